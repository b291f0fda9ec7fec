"""Which recipe a published file is for, and what the command line has to say beside it.

docs/conversion.md shows this table (`python docs/conversion_tables.py` writes it there), and
`vitdet inspect` reads it. The names are data: nothing here loads a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

_NET = "model.backbone.net."
_RESIZE = ("--resize-patch-embed",)
_INEXACT = ("--allow-inexact",)


# Formats whose files have no decomposed relative positions: a model's keep their initialisation.
WITHOUT_REL_POS = frozenset(
    ("mae", "timm", "dinov2", "dinov3", "clip", "beit", "vitae_pretrain", "vitae_classifier")
)


@dataclass(frozen=True)
class Command:
    """The command for some files.

    Attributes:
        format: a name in `vitdet.convert.FORMATS`.
        files: the published names, without suffix.
        width: channels of the blocks, of the first stage where there are several.
        recipe: path under configs/, without suffix.
        options: what converter.py has to be given beside the files and the recipe.
        overrides: changes to the recipe, which train_net.py has to be given too.
    """

    format: str
    files: tuple[str, ...]
    width: int
    recipe: str
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def words(self) -> tuple[str, ...]:
        """Return what stands after --source-model FILE --output-model OUT."""
        return ("--config-file", f"configs/{self.recipe}.py", *self.options, *self.overrides)


def _net(*changes: str) -> tuple[str, ...]:
    return tuple(_NET + change for change in changes)


_B, _L, _H = (f"COCO/mask_rcnn_vitdet_{size}" for size in ("b_100ep", "l_100ep", "h_75ep"))
_SCALE = "layer_scale=true"
_GRID_24 = "pretrain_img_size=384"  # 24 x 24 places of 16 pixels
_GRID_37 = "pretrain_img_size=592"
_SAM = _net("pretrain_img_size=1024", "pretrain_use_cls_token=false")
_DINOV2 = _net(_SCALE, _GRID_37)
_DINOV3 = _net("rope=dinov3", "use_abs_pos=false", "norm_eps=1e-5", _SCALE)
_CLIP = _net("pre_norm=true", "norm_eps=1e-5")
_QUICK = _net("act_layer=quick_gelu")
_GIANT = _net(
    "embed_dim=1536",
    "depth=40",
    "num_heads=24",
    "ffn_layer=swiglu",
    "mlp_ratio=2.6667",
    "global_block_indexes=[9,19,29,39]",
)
_BEIT = _net("use_abs_pos=false", _SCALE)
_RESIDUAL = _net("residual_block_indexes=[2,5,8,11]")
_LVIS_CLASSES = ("model.roi_heads.num_classes=1203",)
_EVA01 = "common/models/cascade_mask_rcnn_eva01"
_EVA02_B, _EVA02_L = (f"COCO/cascade_mask_rcnn_eva02_{size}_bsl" for size in "bl")
_STREAMPETR = "backbones/streampetr_eva02_l_800x320"

_IMAGE_ENCODERS = (
    Command("mae", ("mae_pretrain_vit_base", "mae_pretrain_vit_base.with_decoder"), 768, _B),
    Command("mae", ("mae_pretrain_vit_large",), 1024, _L),
    Command("mae", ("mae_pretrain_vit_huge",), 1280, _H, _RESIZE),
    Command(
        "timm",
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        768,
        _B,
    ),
    Command("timm", ("vit_large_patch16_224.augreg_in21k",), 1024, _L),
    Command("timm", ("vit_large_patch16_384.augreg_in21k_ft_in1k",), 1024, _L, (), _net(_GRID_24)),
    Command(
        "timm",
        ("deit3_base_patch16_224.fb_in22k_ft_in1k", "deit_base_patch16_LS"),
        768,
        _B,
        (),
        _net(_SCALE),
    ),
    Command(
        "timm",
        ("deit3_large_patch16_224.fb_in22k_ft_in1k", "deit_large_patch16_LS"),
        1024,
        _L,
        (),
        _net(_SCALE),
    ),
    Command(
        "timm",
        ("deit3_huge_patch14_224.fb_in22k_ft_in1k", "deit_huge_patch14_LS"),
        1280,
        _H,
        _RESIZE,
        _net(_SCALE),
    ),
    Command("timm", ("timm.vit_base_patch16_clip_224.laion2b",), 768, _B, (), _CLIP),
    Command(
        "timm",
        ("timm.vit_large_patch14_clip_224.openai",),
        1024,
        _L,
        _RESIZE,
        (*_CLIP, *_QUICK),
    ),
    Command(
        "timm",
        ("vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m"),
        768,
        _B,
        _RESIZE,
        _DINOV2,
    ),
    Command(
        "timm",
        ("vit_large_patch14_dinov2.lvd142m", "vit_large_patch14_reg4_dinov2.lvd142m"),
        1024,
        _L,
        _RESIZE,
        _DINOV2,
    ),
    Command(
        "timm",
        ("vit_giant_patch14_reg4_dinov2.lvd142m",),
        1536,
        _L,
        _RESIZE,
        (*_GIANT, *_DINOV2),
    ),
    Command("dinov2", ("dinov2_vitb14", "dinov2_vitb14_reg"), 768, _B, _RESIZE, _DINOV2),
    Command("dinov2", ("dinov2_vitl14", "dinov2_vitl14_reg"), 1024, _L, _RESIZE, _DINOV2),
    Command(
        "dinov2",
        ("dinov2_vitg14", "dinov2_vitg14_reg"),
        1536,
        _L,
        _RESIZE,
        (*_GIANT, *_DINOV2),
    ),
    Command(
        "dinov3",
        ("vit_small_patch16_dinov3.lvd1689m",),
        384,
        _B,
        (),
        (*_net("embed_dim=384", "num_heads=6"), *_DINOV3),
    ),
    Command("dinov3", ("dinov3_vitb16", "vit_base_patch16_dinov3.lvd1689m"), 768, _B, (), _DINOV3),
    Command(
        "dinov3", ("dinov3_vitl16", "vit_large_patch16_dinov3.lvd1689m"), 1024, _L, (), _DINOV3
    ),
    Command(
        "dinov3",
        ("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3.lvd1689m"),
        1280,
        _H,
        (),
        (*_net("num_heads=20", "ffn_layer=swiglu"), *_DINOV3),
    ),
    Command("clip", ("openai.ViT-B-16",), 768, _B, (), (*_CLIP, *_QUICK)),
    Command("clip", ("open_clip.ViT-B-16",), 768, _B, (), _CLIP),
    Command("clip", ("openai.ViT-L-14",), 1024, _L, _RESIZE, (*_CLIP, *_QUICK)),
    Command(
        "clip", ("openai.ViT-L-14-336",), 1024, _L, _RESIZE, (*_CLIP, *_QUICK, *_net(_GRID_24))
    ),
    Command("clip", ("open_clip.ViT-L-14",), 1024, _L, _RESIZE, _CLIP),
    Command(
        "beit",
        (
            "beit_base.unilm",
            "beitv2_base.unilm",
            "beit_base_patch16_224.in22k_ft_in22k",
            "beitv2_base_patch16_224.in1k_ft_in22k",
        ),
        768,
        _B,
        _INEXACT,
        _BEIT,
    ),
    Command(
        "beit",
        (
            "beit_large_patch16_224.in22k_ft_in22k",
            "beitv2_large_patch16_224.in1k_ft_in22k",
        ),
        1024,
        _L,
        _INEXACT,
        _BEIT,
    ),
    Command("sam", ("sam_vit_b",), 768, _B, (), _SAM),
    Command("sam", ("sam_vit_l",), 1024, _L, (), _SAM),
    Command("sam", ("sam_vit_h",), 1280, _H, (), _SAM),
    Command("hf_vitdet", ("hf_vitdet_base.backbone", "hf_vitdet_base.model"), 768, _B),
    Command("hf_vitdet", ("hf_vitdet_base.residual",), 768, _B, (), _RESIDUAL),
    Command("hf_vitdet", ("hf_vitdet_large.backbone",), 1024, _L),
    Command("hf_vitdet", ("hf_vitdet_huge.backbone",), 1280, _H),
)

_EVA = (
    Command("eva01", ("eva_coco_det",), 1408, _EVA01),
    Command("eva01", ("eva_lvis_det",), 1408, _EVA01, (), _LVIS_CLASSES),
    Command("eva02", ("eva02_B_coco_bsl",), 768, _EVA02_B),
    Command("eva02", ("eva02_L_coco_bsl",), 1024, _EVA02_L),
    Command("eva02", ("eva02_B_coco_sys",), 768, "COCO/cascade_mask_rcnn_eva02_b_sys"),
    Command("eva02", ("eva02_L_coco_sys",), 1024, "COCO/cascade_mask_rcnn_eva02_l_sys"),
    Command("eva02", ("eva02_L_m38m_to_o365",), 1024, "O365/cascade_rcnn_eva02_l"),
    Command(
        "eva02",
        ("eva02_L_coco_det_sys_o365",),
        1024,
        "COCO/cascade_mask_rcnn_eva02_l_sys_o365",
    ),
    Command(
        "eva02",
        ("eva02_L_coco_det_sys_o365.ema_state",),
        1024,
        "COCO/cascade_mask_rcnn_eva02_l_sys_o365",
        ("--weights", "ema_state"),
    ),
    Command("eva02", ("eva02_B_lvis_bsl",), 768, "LVIS/cascade_mask_rcnn_eva02_b_bsl"),
    Command("eva02", ("eva02_L_lvis_bsl",), 1024, "LVIS/cascade_mask_rcnn_eva02_l_bsl"),
    Command("eva02", ("eva02_L_lvis_sys",), 1024, "LVIS/cascade_mask_rcnn_eva02_l_sys"),
    Command("eva02", ("eva02_L_lvis_sys_o365",), 1024, "LVIS/cascade_mask_rcnn_eva02_l_sys_o365"),
    Command("eva02", ("eva02_B_pt_in21k_p14to16",), 768, _EVA02_B),
    Command("eva02", ("eva02_L_pt_m38m_p14to16",), 1024, _EVA02_L),
    Command(
        "eva02",
        ("eva02_B_pt_in21k_p14", "eva02_B_pt_in21k_medft_in21k_p14"),
        768,
        _EVA02_B,
        _RESIZE,
    ),
    Command(
        "eva02",
        ("eva02_L_pt_in21k_p14", "eva02_L_pt_m38m_p14", "eva02_L_pt_m38m_medft_in21k_p14"),
        1024,
        _EVA02_L,
        _RESIZE,
    ),
    Command(
        "eva02",
        ("eva02_L_pt_m38m_medft_in21k_p14.448",),
        1024,
        _EVA02_L,
        _RESIZE,
        _net("pretrain_img_size=512"),
    ),
    Command("timm_eva", ("timm.eva02_base_patch14_224.mim_in22k",), 768, _EVA02_B, _RESIZE),
    Command("timm_eva", ("timm.eva02_large_patch14_224.mim_m38m",), 1024, _EVA02_L, _RESIZE),
    Command(
        "timm_eva",
        ("timm.eva02_base_patch14_448.mim_in22k_ft_in22k",),
        768,
        _EVA02_B,
        _RESIZE,
        _net("pretrain_img_size=512"),
    ),
    Command(
        "timm_eva",
        ("timm.eva02_large_patch14_448.mim_m38m_ft_in22k",),
        1024,
        _EVA02_L,
        _RESIZE,
        _net("pretrain_img_size=512"),
    ),
    Command(
        "streampetr",
        ("streampetr_img_backbone_vit_l", "eva02_L_coco_det_sys_o365_remapped"),
        1024,
        _STREAMPETR,
    ),
)

_DETECTORS = (
    *(
        Command(
            "detectron2",
            (f"{kind}_vitdet_{size}.{data}",),
            width,
            f"{data.upper()}/{kind}_vitdet_{size}_{epochs}ep",
        )
        for kind in ("mask_rcnn", "cascade_mask_rcnn")
        for data in ("coco", "lvis")
        for size, width, epochs in (
            ("b", 768, 100),
            ("l", 1024, 100),
            ("h", 1280, 75 if data == "coco" else 100),
        )
    ),
    Command(
        "mmdet3", ("mmdet3_vitdet_mask_rcnn_vit_b",), 768, "mmdetection/mask_rcnn_vitdet_b_100ep"
    ),
    Command("easycv", ("easycv_vitdet_mask_rcnn",), 768, "easycv/mask_rcnn_vitdet_b_100ep"),
    *(
        Command(
            "easycv_old",
            (f"easycv_vitdet_mask_rcnn_old_{kind}",),
            768,
            f"easycv/mask_rcnn_vit_b_v06_{kind}_100ep",
        )
        for kind in ("attn", "basicblock", "bottleneck")
    ),
    *(
        Command("vitae", (f"vitae_vitdet_{name}",), width, f"vitae/mask_rcnn_{name}_100ep")
        for name, width in (("vit_b", 768), ("vitae_b", 768), ("vitae_s", 384))
    ),
    Command(
        "vitae_pretrain",
        ("vitae_b_mae_kernel1", "vitae_b_mae_encoder_kernel3"),
        768,
        "vitae/mask_rcnn_vitae_b_100ep",
    ),
    Command("vitae_pretrain", ("vitae_s_classification",), 384, "vitae/mask_rcnn_vitae_s_100ep"),
    Command("vitae_classifier", ("vitae_b_classification",), 768, "vitae/mask_rcnn_vitae_b_100ep"),
)

_VIL_SIZES = (("tiny", "", 48), ("small", "", 96), ("medium", "_d", 96), ("base", "_d", 96))
_VIL_VARIANTS = ("srformer64", "srformer32", "performer", "global")
_LINFORMER = tuple(
    f"model.backbone.bottom_up.{change}"
    for change in (
        "attention=[linformer,linformer,linformer,linformer]",
        "attention_size=[256,256,256,256]",
        "img_size=1344",
    )
)
_LONGFORMERS = (
    *(
        Command("vil_det", (f"vil_{size}_{kind}",), width, f"vil/{kind}_vil_{size}{deep}_1x")
        for kind in ("mask_rcnn", "retinanet")
        for size, deep, width in _VIL_SIZES
    ),
    *(
        Command("vil_det", (f"{name}_small_mask_rcnn",), 96, f"vil/mask_rcnn_{name}_small_1x")
        for name in (
            *_VIL_VARIANTS,
            "srformer32_partial",
            "performer_partial",
        )
    ),
    Command(
        "vil_det",
        ("vil_partial_small_ape_mask_rcnn",),
        96,
        "vil/mask_rcnn_vil_ape_partial_small_1x",
    ),
    Command(
        "vil_det",
        ("global_partial_small_d768_mask_rcnn",),
        96,
        "vil/mask_rcnn_global_partial_small_1x",
    ),
    Command(
        "vil_det",
        ("global_partial_small_mask_rcnn",),
        96,
        "vil/mask_rcnn_global_partial_small_1x",
        (),
        ("model.backbone.bottom_up.embed_dim=[96,192,384,384]",),
    ),
    *(
        Command(
            "vil",
            (f"vil_{size}{'_deep' if deep else ''}_rpe",),
            width,
            f"vil/mask_rcnn_vil_{size}{deep}_1x",
        )
        for size, deep, width in _VIL_SIZES
    ),
    Command("vil", ("vil_small_ape",), 96, "vil/mask_rcnn_vil_ape_small_1x"),
    *(
        Command("vil", (f"{name}_small",), 96, f"vil/mask_rcnn_{name}_small_1x")
        for name in _VIL_VARIANTS
    ),
    Command("vil", ("linformer_small",), 96, "vil/mask_rcnn_vil_ape_small_1x", (), _LINFORMER),
)

COMMANDS: tuple[Command, ...] = (*_IMAGE_ENCODERS, *_EVA, *_DETECTORS, *_LONGFORMERS)
