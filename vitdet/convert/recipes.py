"""Which recipe a published file is for, and what the command line has to say beside it.

docs/conversion.md shows this table (`python docs/conversion_tables.py` writes it there), and
`vitdet inspect` reads it. The names are data: nothing here loads a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

# Formats whose files have no decomposed relative positions: a model's keep their initialisation.
WITHOUT_REL_POS = frozenset(
    ("mae", "timm", "dinov2", "dinov3", "clip", "beit", "vitae_pretrain", "vitae_classifier")
) | {"pe", "sam3"}


@dataclass(frozen=True)
class Command:
    """The command for some files.

    `width` is the channels of the blocks, of the first stage where there are several; `recipe` a
    path under configs/, without suffix, whose plain ViT follows a file of a foundation model: only
    what it cannot follow stands here. train_net.py has to be given the `overrides` too.
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


# What some rows have in common.
_SHORT = {
    "B": "COCO/mask_rcnn_vitdet_b_100ep",
    "L": "COCO/mask_rcnn_vitdet_l_100ep",
    "H": "COCO/mask_rcnn_vitdet_h_75ep",
    "EVA01": "common/models/cascade_mask_rcnn_eva01",
    "EMA": "--weights ema_state",
    "EVA02_B": "COCO/cascade_mask_rcnn_eva02_b_bsl",
    "EVA02_L": "COCO/cascade_mask_rcnn_eva02_l_bsl",
    "STREAMPETR": "backbones/streampetr_eva02_l_800x320",
    "BEIT": "--allow-inexact",
    "LINFORMER": "model.backbone.bottom_up.attention=[linformer,linformer,linformer,linformer] "
    "model.backbone.bottom_up.attention_size=[256,256,256,256] "
    "model.backbone.bottom_up.img_size=1344",
}

# format, width, recipe, files, and what the command line has to be given: options, changes. A row
# with " = " is one for each of the words behind it, which stand for "*".
_ROWS = """
mae 768 B mae_pretrain_vit_base,mae_pretrain_vit_base.with_decoder
mae 1024 L mae_pretrain_vit_large
mae 1280 H mae_pretrain_vit_huge
timm 768 B vit_base_patch16_224.augreg_in21k,vit_base_patch16_224.augreg2_in21k_ft_in1k
timm 1024 L vit_large_patch16_224.augreg_in21k
timm 1024 L vit_large_patch16_384.augreg_in21k_ft_in1k
timm 768 B deit3_base_patch16_224.fb_in22k_ft_in1k,deit_base_patch16_LS
timm 1024 L deit3_large_patch16_224.fb_in22k_ft_in1k,deit_large_patch16_LS
timm 1280 H deit3_huge_patch14_224.fb_in22k_ft_in1k,deit_huge_patch14_LS
timm 768 B timm.vit_base_patch16_clip_224.laion2b
timm 1024 L timm.vit_large_patch14_clip_224.openai
timm 768 B vit_base_patch14_dinov2.lvd142m,vit_base_patch14_reg4_dinov2.lvd142m
timm 1024 L vit_large_patch14_dinov2.lvd142m,vit_large_patch14_reg4_dinov2.lvd142m
timm 1536 L vit_giant_patch14_reg4_dinov2.lvd142m
dinov2 768 B dinov2_vitb14,dinov2_vitb14_reg
dinov2 1024 L dinov2_vitl14,dinov2_vitl14_reg
dinov2 1536 L dinov2_vitg14,dinov2_vitg14_reg
dinov3 384 B vit_small_patch16_dinov3.lvd1689m
dinov3 768 B dinov3_vitb16,vit_base_patch16_dinov3.lvd1689m
dinov3 1024 L dinov3_vitl16,vit_large_patch16_dinov3.lvd1689m
dinov3 1280 H dinov3_vith16plus,vit_huge_plus_patch16_dinov3.lvd1689m
clip 768 B openai.ViT-B-16,open_clip.ViT-B-16
clip 1024 L openai.ViT-L-14,openai.ViT-L-14-336,open_clip.ViT-L-14
pe 1536 COCO/mask_rcnn_pe_core_g_75ep mask_rcnn_PEcore_G_coco75ep
pe 1536 COCO/mask_rcnn_pe_core_g_75ep pe_core_G14_448_16patch,PE-Core-G14-448
pe 1536 COCO/mask_rcnn_pe_spatial_g_36ep mask_rcnn_PEspatial_G_coco36ep
pe 1536 COCO/mask_rcnn_pe_spatial_g_36ep pe_spatial_G14_16patch,PE-Spatial-G14-448
pe 1536 LVIS/mask_rcnn_pe_core_g_75ep mask_rcnn_PEcore_G_lvis75ep
pe 1536 LVIS/mask_rcnn_pe_spatial_g_75ep mask_rcnn_PEspatial_G_lvis75ep
pe 192 B PE-Spatial-T16-512
pe 384 B PE-Spatial-S16-512
pe 768 B PE-Spatial-B16-512,PE-Core-B16-224
pe 1024 L PE-Core-L14-336,PE-Spatial-L14-448
sam3 1024 L sam3.detector_trunk,sam3.trunk
beit 768 B beit_base.unilm,beitv2_base.unilm BEIT
beit 768 B beit_base_patch16_224.in22k_ft_in22k,beitv2_base_patch16_224.in1k_ft_in22k BEIT
beit 1024 L beit_large_patch16_224.in22k_ft_in22k,beitv2_large_patch16_224.in1k_ft_in22k BEIT
sam 768 B sam_vit_b
sam 1024 L sam_vit_l
sam 1280 H sam_vit_h
hf_vitdet 768 B hf_vitdet_base.backbone,hf_vitdet_base.model
hf_vitdet 768 B hf_vitdet_base.residual
hf_vitdet 1024 L hf_vitdet_large.backbone
hf_vitdet 1280 H hf_vitdet_huge.backbone
eva01 1408 EVA01 eva_coco_det
eva01 1408 EVA01 eva_lvis_det model.roi_heads.num_classes=1203
eva02 768 COCO/cascade_mask_rcnn_eva02_b_* eva02_B_coco_* = bsl sys
eva02 1024 COCO/cascade_mask_rcnn_eva02_l_* eva02_L_coco_* = bsl sys
eva02 1024 O365/cascade_rcnn_eva02_l eva02_L_m38m_to_o365
eva02 1024 COCO/cascade_mask_rcnn_eva02_l_sys_o365 eva02_L_coco_det_sys_o365
eva02 1024 COCO/cascade_mask_rcnn_eva02_l_sys_o365 eva02_L_coco_det_sys_o365.ema_state EMA
eva02 768 LVIS/cascade_mask_rcnn_eva02_b_bsl eva02_B_lvis_bsl
eva02 1024 LVIS/cascade_mask_rcnn_eva02_l_* eva02_L_lvis_* = bsl sys sys_o365
eva02 768 EVA02_B eva02_B_pt_in21k_p14to16
eva02 1024 EVA02_L eva02_L_pt_m38m_p14to16
eva02 768 EVA02_B eva02_B_pt_in21k_p14,eva02_B_pt_in21k_medft_in21k_p14
eva02 1024 EVA02_L eva02_L_pt_in21k_p14,eva02_L_pt_m38m_p14
eva02 1024 EVA02_L eva02_L_pt_m38m_medft_in21k_p14
eva02 1024 EVA02_L eva02_L_pt_m38m_medft_in21k_p14.448
timm_eva 768 EVA02_B timm.eva02_base_patch14_224.mim_in22k
timm_eva 1024 EVA02_L timm.eva02_large_patch14_224.mim_m38m
timm_eva 768 EVA02_B timm.eva02_base_patch14_448.mim_in22k_ft_in22k
timm_eva 1024 EVA02_L timm.eva02_large_patch14_448.mim_m38m_ft_in22k
streampetr 1024 STREAMPETR streampetr_img_backbone_vit_l,eva02_L_coco_det_sys_o365_remapped
detectron2 768 COCO/*_vitdet_b_100ep *_vitdet_b.coco = mask_rcnn cascade_mask_rcnn
detectron2 1024 COCO/*_vitdet_l_100ep *_vitdet_l.coco = mask_rcnn cascade_mask_rcnn
detectron2 1280 COCO/*_vitdet_h_75ep *_vitdet_h.coco = mask_rcnn cascade_mask_rcnn
detectron2 768 LVIS/*_vitdet_b_100ep *_vitdet_b.lvis = mask_rcnn cascade_mask_rcnn
detectron2 1024 LVIS/*_vitdet_l_100ep *_vitdet_l.lvis = mask_rcnn cascade_mask_rcnn
detectron2 1280 LVIS/*_vitdet_h_100ep *_vitdet_h.lvis = mask_rcnn cascade_mask_rcnn
mmdet3 768 mmdetection/mask_rcnn_vitdet_b_100ep mmdet3_vitdet_mask_rcnn_vit_b
easycv 768 easycv/mask_rcnn_vitdet_b_100ep easycv_vitdet_mask_rcnn
easycv_old 768 easycv/mask_rcnn_vit_b_v06_*_100ep easycv_vitdet_mask_rcnn_old_* = \
    attn basicblock bottleneck
vitae 768 vitae/mask_rcnn_*_100ep vitae_vitdet_* = vit_b vitae_b
vitae 384 vitae/mask_rcnn_vitae_s_100ep vitae_vitdet_vitae_s
vitae_pretrain 768 vitae/mask_rcnn_vitae_b_100ep vitae_b_mae_kernel1,vitae_b_mae_encoder_kernel3
vitae_pretrain 384 vitae/mask_rcnn_vitae_s_100ep vitae_s_classification
vitae_classifier 768 vitae/mask_rcnn_vitae_b_100ep vitae_b_classification
vil_det 48 vil/*_vil_tiny_1x vil_tiny_* = mask_rcnn retinanet
vil_det 96 vil/*_vil_small_1x vil_small_* = mask_rcnn retinanet
vil_det 96 vil/*_vil_medium_d_1x vil_medium_* = mask_rcnn retinanet
vil_det 96 vil/*_vil_base_d_1x vil_base_* = mask_rcnn retinanet
vil_det 96 vil/mask_rcnn_*_small_1x *_small_mask_rcnn = srformer64 srformer32 performer global \
    srformer32_partial performer_partial
vil_det 96 vil/mask_rcnn_vil_ape_partial_small_1x vil_partial_small_ape_mask_rcnn
vil_det 96 vil/mask_rcnn_global_partial_small_1x global_partial_small_d768_mask_rcnn
vil_det 96 vil/mask_rcnn_global_partial_small_1x global_partial_small_mask_rcnn \
    model.backbone.bottom_up.embed_dim=[96,192,384,384]
vil 48 vil/mask_rcnn_vil_tiny_1x vil_tiny_rpe
vil 96 vil/mask_rcnn_vil_small_1x vil_small_rpe
vil 96 vil/mask_rcnn_vil_*_d_1x vil_*_deep_rpe = medium base
vil 96 vil/mask_rcnn_vil_ape_small_1x vil_small_ape
vil 96 vil/mask_rcnn_*_small_1x *_small = srformer64 srformer32 performer global
vil 96 vil/mask_rcnn_vil_ape_small_1x linformer_small LINFORMER
"""


def _commands(row: str) -> list[Command]:
    """Return what a row of the table stands for."""
    row, _, names = row.partition(" = ")
    commands = []
    for name in names.split() or ["*"]:
        words = [word for each in row.split() for word in _SHORT.get(each, each).split()]
        fmt, width, recipe, files, *rest = (word.replace("*", name) for word in words)
        options = tuple(word for word in rest if "=" not in word)
        changes = (word for word in rest if "=" in word)
        commands.append(
            Command(fmt, tuple(files.split(",")), int(width), recipe, options, tuple(changes))
        )
    return commands


COMMANDS = tuple(each for row in _ROWS.strip().splitlines() for each in _commands(row))
