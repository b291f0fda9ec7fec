"""The table of source formats: one entry a project, read from above, the first that fits counts.

An entry says how its files are told (`marks`), what its names are here (`rules` inside the
backbone, `outside` for pyramid and heads), what is computed (`makes`) and what no shape tells
(`settings`). Names below are without the backbone's root, see `vitdet.convert.names`.
"""

from __future__ import annotations

from vitdet.convert import tensors, transformers
from vitdet.convert.rules import (
    EVERY_KIND,
    Drop,
    Format,
    Inexact,
    Make,
    OtherThan,
    Refuse,
    Rename,
    renames,
)
from vitdet.convert.tensors import copy, join, part
from vitdet.convert.transformers import NO_PATCH_BIAS, PRE_NORM, QKV_WEIGHT, REGISTERS, W3, packed

# --- names that `vitdet.convert.out` writes, too: (ours, theirs) ---------------------------------

HF_VITDET = (
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.projection."),
    ("blocks.{}.attn.", "encoder.layer.{}.attention."),
    ("blocks.{}.", "encoder.layer.{}."),
)
SAM = tuple((f"blocks.{{}}.mlp.fc{i}.", f"blocks.{{}}.mlp.lin{i}.") for i in (1, 2))
STREAMPETR = (("/backbone.simfp_{}.", "adapter.simfp_{}."),)
SWIGLU = tuple(
    (f"blocks.{{}}.mlp.w{i}.", f"blocks.{{}}.mlp.fc1_{x}.") for i, x in ((1, "g"), (2, "x"))
)
TIMM_EVA = (
    *((f"blocks.{{}}.attn.{x}_bias", f"blocks.{{}}.attn.{x}_proj.bias") for x in "qv"),
    ("blocks.{}.attn.inner_attn_ln.", "blocks.{}.attn.norm."),
    *SWIGLU,
    ("blocks.{}.mlp.ffn_ln.", "blocks.{}.mlp.norm."),
    ("blocks.{}.mlp.w3.", "blocks.{}.mlp.fc2."),
)

# --- what several entries share ------------------------------------------------------------------

CLASS = Drop(r"cls_token$", transformers.NO_CLASS)
NORM = Drop(r"norm\.", transformers.NO_NORM)
MASK = Drop(r"mask_token$", transformers.MASK)
HEAD = Drop(r"(fc_norm|head)\.", "classifier")
LM_HEAD = Drop(r"lm_head\.", "head of the pretraining")
DECODER = Drop(r"mask_token$|decoder_", "decoder of the pretraining")
DINO_HEADS = Drop(r"(dino|ibot)_head\.|gram_", "heads of the pretraining")
CONSTANT = "constant of the recipe, not a weight"
CONSTANTS = (
    Drop(r"(pixel_mean|pixel_std)$", CONSTANT),
    Drop(r"(proposal_generator\.)?anchor_generator\.cell_anchors\.", CONSTANT),
)
_TABLES = r"(rope_win\.|rope_glb\.|((.*\.)?attn\.)?rope\.)freqs_(cos|sin)$|.*\.attn\.freqs_cis$"
ROPE = Drop(_TABLES, "rotary table, computed from the recipe's sizes")
NO_REL_POS = Refuse(r".*\.rel_pos_[hw]$", "relative positions, which this format does not have")
QK_NORM = Refuse(r".*\.attn\.[qk]_norm\.", "q and k are normalised")
GAMMA = Rename(r"(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma")
UNGROUP = Rename(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.")  # trainings group their blocks
# StreamPETR's pyramid has a fifth level, and a convolution where EVA-02 pools
MORE_LEVELS = (r"/backbone\.simfp_6\.", r"/backbone\.simfp_5\.0\.")

QKV_BIAS = Make(r"(.*\.attn\.)qkv\.bias$", (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join)
# A bias of k adds the same to all logits of a query, so it changes nothing.
NO_K_BIAS = (
    Make(r"(.*attn\.)q_bias$", (r"\1qkv.bias",), part(0)),
    Make(r"(.*attn\.)v_bias$", (r"\1qkv.bias",), part(2)),
)
SCALED_REL_POS = Make(r".*\.rel_pos_[hw]$", (r"\g<0>",), tensors.scaled_by_head)


def norms(pyramid: object, heads: object) -> tuple[tuple[str, object], ...]:
    """Return the settings that tell GroupNorm with one group from LayerNorm of the same shapes."""
    return (("pyramid.norm", pyramid), ("box_head.norm", heads), ("mask_head.norm", heads))


# --- MMDetection's heads, as detectron2 spells them -------------------------------------------

# How mmcv calls the norm in a ConvModule: after its kind, or "norm_layer" for an unknown one.
_NORM = r"(?:ln|gn|norm_layer|norm)"
_RPN = "proposal_generator.rpn_head."


def _numbered(pattern: str, to: str) -> list[Rename]:
    """Return rules for a list of ConvModules, which detectron2 counts from 1."""
    parts = ((r"conv\.", "."), (rf"{_NORM}\.", ".norm."))
    return [Rename(rf"{pattern}{i}\.{p}", f"{to}{i + 1}{t}") for i in range(8) for p, t in parts]


def _box_head(source: str, stage: str) -> list[Rename]:
    head, predictor = f"roi_heads.box_head.{stage}", f"roi_heads.box_predictor.{stage}"
    return [
        *_numbered(rf"{source}shared_convs\.", f"{head}conv"),
        *(Rename(rf"{source}shared_fcs\.{i}\.", f"{head}fc{i + 1}.") for i in range(8)),
        Rename(rf"{source}fc_cls\.", f"{predictor}cls_score."),
        Rename(rf"{source}fc_reg\.", f"{predictor}bbox_pred."),
    ]


def _laterals() -> list[Rename]:
    """Return rules for the 1x1 and 3x3 convolutions of each level, from the finest."""
    rules = []
    for i, (level, first) in enumerate({2: 4, 3: 1, 4: 0, 5: 1}.items()):
        for name, place in (("lateral_convs", first), ("fpn_convs", first + 1)):
            source, to = rf"neck\.{name}\.{i}\.", f"backbone.simfp_{level}.{place}."
            rules += [Rename(rf"{source}conv\.", to), Rename(rf"{source}{_NORM}\.", f"{to}norm.")]
    return rules


MMDET = (
    *_laterals(),
    Rename(r"rpn_head\.rpn_conv\.(\d+)\.conv\.", rf"{_RPN}conv.conv\1."),
    Rename(rf"rpn_head\.rpn_conv\.(\d+)\.{_NORM}\.", rf"{_RPN}conv.conv\1.norm."),
    Rename(r"rpn_head\.rpn_conv\.(weight|bias)$", rf"{_RPN}conv.\1"),  # one convolution only
    Rename(r"rpn_head\.rpn_cls\.", f"{_RPN}objectness_logits."),
    Rename(r"rpn_head\.rpn_reg\.", f"{_RPN}anchor_deltas."),
    *_box_head(r"roi_head\.bbox_head\.", ""),
    *(rule for k in range(3) for rule in _box_head(rf"roi_head\.bbox_head\.{k}\.", f"{k}.")),
    *_numbered(r"roi_head\.mask_head\.convs\.", "roi_heads.mask_head.mask_fcn"),
    Rename(r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_head.deconv."),
    Rename(r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_head.predictor."),
)
# Both generations of EasyCV's SFP.
_SFP = ((r"(\d+)\.conv\.", r"\1."), (r"(\d+)\.gn\.", r"\1.norm."), ("", ""))
EASYCV = (
    *(
        Rename(rf"neck\.sfp_{k}\.{pattern}", f"backbone.simfp_{k + 2}.{to}")
        for k in range(4)
        for pattern, to in _SFP
    ),
    Rename(r"neck\.top_downs\.0\.1\.ln\.", "backbone.simfp_2.1."),
    Rename(r"neck\.top_downs\.0\.([03])\.", r"backbone.simfp_2.\1."),
    Rename(r"neck\.top_downs\.1\.", "backbone.simfp_3.0."),
    *MMDET,
)

TIMM = (
    *(CLASS, NORM, GAMMA, NO_REL_POS, QK_NORM),
    Drop(r"reg_token$", REGISTERS),
    Drop(r"(fc_norm|head|head_dist|pre_logits|attn_pool)\.", "classifier"),
    Inexact(r"norm_pre\.", PRE_NORM),
    Refuse(r"dist_token$", "a distillation token, with a row of its own in pos_embed"),
    Refuse(r".*\.(attn|mlp)\.norm\.", "a norm inside the attention or the MLP"),
)

# --- openai/CLIP, mlfoundations/open_clip, facebookresearch/perception_models ---------------------

CLIP = (
    Drop(r"class_embedding$", CLASS.why, "cls_token"),
    Inexact(r"ln_pre\.", PRE_NORM, "norm_pre."),
    Drop(r"ln_post\.", NORM.why, "norm."),
    Drop(r"proj$", "projection to the space shared with texts"),
    *renames(
        ("pos_embed", "positional_embedding"),
        ("patch_embed.proj.", "conv1."),
        ("blocks.{}.attn.qkv.weight", "transformer.resblocks.{}.attn.in_proj_weight"),
        ("blocks.{}.attn.qkv.bias", "transformer.resblocks.{}.attn.in_proj_bias"),
        ("blocks.{}.attn.proj.", "transformer.resblocks.{}.attn.out_proj."),
        ("blocks.{}.norm1.", "transformer.resblocks.{}.ln_1."),
        ("blocks.{}.norm2.", "transformer.resblocks.{}.ln_2."),
        ("blocks.{}.mlp.fc1.", "transformer.resblocks.{}.mlp.c_fc."),
        ("blocks.{}.mlp.fc2.", "transformer.resblocks.{}.mlp.c_proj."),
        ("blocks.{}.ls1.", "transformer.resblocks.{}.ls_1."),
        ("blocks.{}.ls2.", "transformer.resblocks.{}.ls_2."),
    ),
)
CLIP_TEXT = Drop(
    r"transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text|"
    r"logit_(scale|bias)$|(input_resolution|context_length|vocab_size)$",
    "text tower",
)
CLIP_MAKES = (Make(r"(pos_embed|cls_token)$", (r"\1",), tensors.positions), NO_PATCH_BIAS)
PE = (("rope", "pe"), ("norm_eps", 1e-5))

# --- Vision Longformer ------------------------------------------------------------------------

_SHARED = "weights of global tokens: the model's share those of the others"
_VALUES = "projection of the values: the model's share that of the keys"
VIL_RULES = (
    Drop(r".*\.relative_position_index$", "index of the position table: computed"),
    Drop(r"(norm|head)\.(weight|bias)$", "classifier, which a detector does not use"),
    Drop(r"(.*\.attn\.(query|kv|proj))_global\.", _SHARED, same_as=r"\1."),
    Drop(r"(.*\.attn\.proj)_v$", _VALUES, same_as=r"\1_k"),
    Drop(r".*\.cls_pos_embed$", "positions of global tokens: the stage has none"),
    Inexact(r".*\.cls_token$", "global tokens"),
    Inexact(r".*\.[xy]_pos_embed$", "absolute positions"),
    Inexact(r".*_relative_position_bias(_table)?$", "relative positions"),
)
VIL_MAKES = (
    Make(r"(.*\.attn\.)query(_global)?\.(weight|bias)$", (r"\1qkv.\3",), part(0)),
    Make(r"(.*\.attn\.)kv(_global)?\.(weight|bias)$", (r"\1qkv.\3",), part(1, 3, to=3)),
    Make(r"(.*\.attn\.)(query|kv|proj)_global\.(weight|bias)$", (r"\1\2.\3",), copy),
    Make(r"(.*\.attn\.)qkv\.(weight|bias)$", (r"\1query.\2", r"\1kv.\2"), join),
    Make(r"(.*\.attn\.)proj_v$", (r"\1proj_k",), tensors.tokens),
    Make(r".*\.attn\.proj_[kv]$", (r"\g<0>",), tensors.tokens),
    Make(r".*\.(cls_token|cls_pos_embed)$", (r"\g<0>",), tensors.every_token),
    Make(r".*\.g2[lg]_relative_position_bias$", (r"\g<0>",), tensors.every_token),
    Make(r".*\.[xy]_pos_embed$", (r"\g<0>",), tensors.axis),
    Make(r".*\.local_relative_position_bias_table$", (r"\g<0>",), tensors.offsets),
)
DRAWN = (r"num_redraws$", r"calls_since_last_redraw$")  # random features of a performer

# --- the table --------------------------------------------------------------------------------

_TABLE = (
    Format("vitdet", "this project's converted weights and training checkpoints",
        marks=("/vitdet",), kinds=EVERY_KIND, detector=True,
        outside=(Drop(r"roi_heads\.mask_head\.", "mask head: the model has boxes alone"),)),
    # microsoft/VisionLongformerForObjectDetection, and what its converter.py writes
    Format("vil_det", "Vision Longformer detectors, in detectron2's names",
        marks=(r"backbone\.bottom_up\.layer1\.1\.",),
        rules=VIL_RULES, outside=CONSTANTS, makes=VIL_MAKES,
        kinds=("vil",), optional=DRAWN, detector=True),
    Format("vil", "Vision Longformer classifiers",
        marks=(r"layer1\.1\.(attn|norm)\.",),
        rules=VIL_RULES, makes=VIL_MAKES, kinds=("vil",), optional=DRAWN),
    # exiawsh/StreamPETR, docs/ViT_Large.md: of a pyramid at most, five levels or a detector's four
    Format("streampetr", "StreamPETR (img_backbone of its ViT-L, with or without adapter)",
        marks=(r"img_backbone\.patch_embed\.proj\.weight$",),
        rules=(*renames(*STREAMPETR), ROPE),
        outside=(Drop(r"(pts_bbox_head|img_roi_head|img_neck)\.",
            "StreamPETR's own neck and heads"),),
        kinds=("eva02", "vit"), detector=True,
        optional=(r"/(proposal_generator|roi_heads)\.", *MORE_LEVELS)),
    # alibaba/EasyCV: norms are GroupNorm with one group, whose weights have LayerNorm's shapes
    Format("easycv", "EasyCV ViTDet, v0.7 and later",
        marks=(r"neck\.sfp_0\.",), outside=EASYCV, detector=True,
        settings=(("norm_eps", 1e-6), *norms("GN1", "GN1"))),
    Format("easycv_old", "EasyCV ViTDet, before v0.7",
        marks=(r"neck\.top_downs\.",),
        rules=(
            Rename(r"(blocks\.\d+)\.conv_aggregation\.conv(\d)\.", r"\1.residual.conv\2."),
            Rename(r"(blocks\.\d+)\.conv_aggregation\.bn(\d)\.", r"\1.residual.norm\2."),
        ),
        outside=EASYCV, makes=(SCALED_REL_POS,), detector=True,
        settings=(("norm_eps", 1e-6), *norms("GN1+LN", "GN1"))),
    # open-mmlab/mmdetection 3.x, projects/ViTDet: every LayerNorm has mmcv's epsilon
    Format("mmdet3", "mmdetection 3.x projects/ViTDet",
        marks=(r"neck\.fpn1\.1\.weight$",),
        outside=(
            Drop(r"data_preprocessor\.", CONSTANT),
            Rename(r"neck\.fpn1\.", "backbone.simfp_2."),
            Rename(r"neck\.fpn2\.", "backbone.simfp_3."),
            *MMDET,
        ),
        detector=True, settings=(("norm_eps", 1e-5), *norms("LN", "LN"))),
    # ViTAE-Transformer/ViTDet: deconvolutions inside the backbone, tables for scaled queries
    Format("vitae", "ViTAE-Transformer/ViTDet (ViT-B, ViTAE-B, ViTAE-S detectors)",
        marks=(r"(backbone\.)?fpn1\.1\.ln\.weight$",),
        rules=(
            Rename(r"fpn1\.1\.ln\.", "/backbone.simfp_2.1."),
            Rename(r"fpn1\.([03])\.", r"/backbone.simfp_2.\1."),
            Rename(r"fpn2\.0\.", "/backbone.simfp_3.0."),
            GAMMA,
        ),
        outside=MMDET, makes=(SCALED_REL_POS,), kinds=("vit", "vitae", "vitae_s"),
        detector=True, settings=(("norm_eps", 1e-6), *norms("LN", "LN"))),
    # the same cells under the names of a network in stages (vitae/ViTAE.py)
    Format("vitae_classifier", "ViTAE-B of the classification repository",
        marks=(r"layers\.0\.RC\.PRM\.proj\.weight$",), anchor="layers.0.RC.PRM.proj.weight",
        rules=(
            Drop(r"layers\.0\.RC\.cls_token$", CLASS.why),
            HEAD,
            *renames(("patch_embed.", "layers.0.RC.PRM."), ("pos_embed", "layers.0.RC.pos_embed"),
                ("blocks.", "layers.2.NC.")),
        ),
        makes=NO_K_BIAS, kinds=("vitae",), optional=(r"norm\.",)),
    # MAE has 1x1 kernels in the convolution branch (convertK1toK3.py)
    Format("vitae_pretrain", "ViTAE-B (MAE) and ViTAE-S (ImageNet) without pyramid and heads",
        marks=(r"blocks\.0\.PCM\.0\.weight$|layers\.0\.RC\.PCM\.0\.weight$",),
        rules=(CLASS, DECODER, Drop(r"head\.", "classifier")),
        makes=(QKV_BIAS, *NO_K_BIAS,
            Make(r"blocks\.\d+\.PCM\.[03]\.weight$", (r"\g<0>",), tensors.centred)),
        kinds=("vitae", "vitae_s"),
        optional=(r"norm\.", r"layers\.\d+\.NC\.\d+\.attn\.rel_pos_[hw]$")),
    Format("sam", "Segment Anything (ViT-B, L, H image encoder)",
        marks=(r"(.*\.)?blocks\.0\.mlp\.lin1\.weight$",),
        rules=(*renames(*SAM), Drop(r"neck\.", "SAM's neck: the pyramid takes its place")),
        outside=(
            Drop(r"(prompt_encoder|mask_decoder)\.", "prompt encoder and mask decoder"),
            *CONSTANTS,
        ),
        makes=(Make(r"pos_embed$", ("pos_embed",), tensors.positions),)),
    # facebookresearch/sam3, sam3/model/vitdet.py
    Format("sam3", "Segment Anything 3 (image trunk)",
        marks=(r"(.*\.)?blocks\.0\.attn\.freqs_cis$", r"(.*\.)?ln_pre\.weight$"),
        rules=(ROPE, CLASS, Inexact(r"ln_pre\.", PRE_NORM, "norm_pre.")),
        outside=(Drop(r"(detector|tracker)\.", "SAM 3's neck, text encoder, heads and tracker"),),
        makes=(NO_PATCH_BIAS,), settings=PE),
    Format("hf_vitdet", "transformers VitDet (backbone)",
        marks=(r"(.*\.)?encoder\.layer\.0\.attention\.qkv\.weight$",),
        anchor="embeddings.projection.weight", rules=renames(*HF_VITDET)),
    *transformers.ROWS,
    # openai/CLIP and mlfoundations/open_clip
    Format("clip", "OpenAI CLIP and open_clip (image tower, ViT)",
        marks=(r"(.*\.)?class_embedding$",
            r"(.*\.)?transformer\.resblocks\.0\.attn\.in_proj_weight$", r"(.*\.)?ln_post\."),
        absent=(r"(.*\.)?attn_pool\.probe$",),
        anchor="conv1.weight", rules=CLIP, outside=(CLIP_TEXT,), makes=CLIP_MAKES,
        settings=(("norm_eps", 1e-5),),
        notes=("OpenAI's weights want act_layer='quick_gelu', open_clip's own mostly 'gelu'",)),
    # facebookresearch/perception_models: no last norm (Spatial, detectors) or a probe (Core)
    Format("pe", "Perception Encoder (Core, Spatial, ViTDet detectors)",
        marks=(r"(.*\.)?ln_pre\.weight$",
            r"(.*\.)?transformer\.resblocks\.0\.attn\.in_proj_weight$"),
        anchor="ln_pre.weight",
        rules=(ROPE, Drop(r"attn_pool\.", "attention pooling of the pretraining"), *CLIP),
        outside=(CLIP_TEXT, *CONSTANTS), makes=CLIP_MAKES, detector=True,
        settings=(*PE, *norms("LN", "LN"))),
    # baaivision/EVA, EVA-02: under huggingface/pytorch-image-models' names, then its own
    Format("timm_eva", "timm EVA-02",
        marks=(r"blocks\.0\.attn\.q_proj\.weight$", r"blocks\.0\.mlp\.fc1_g\."),
        rules=(
            *renames(*TIMM_EVA),
            *(CLASS, NORM, HEAD, QK_NORM, Drop(r"reg_token$", REGISTERS)),
            Refuse(r".*\.gamma_[12]$", "LayerScale, which an EVA-02 backbone does not have"),
        ),
        makes=(QKV_WEIGHT, QKV_BIAS), kinds=("eva02", "vit")),
    Format("eva02", "EVA-02 (detectors, pretraining, classification)",
        marks=(r"((backbone\.)?net\.)?blocks\.0\.attn\.q_proj\.weight$",
            r"((backbone\.)?net\.)?blocks\.0\.mlp\.w1\.weight$"),
        rules=(ROPE, CLASS, MASK, NORM, LM_HEAD, HEAD), outside=CONSTANTS,
        kinds=("eva02",), optional=MORE_LEVELS, detector=True, settings=norms("LN", "LN")),
    # microsoft/unilm: a bias table over all pairs of places, which no decomposed table equals
    Format("beit", "BEiT and BEiTv2, of their own repository and under timm's names",
        marks=(r"(.*\.)?blocks\.0\.attn\.q_bias$",
            r"(.*\.)?(blocks\.0\.attn|rel_pos_bias)\.relative_position_bias_table$"),
        rules=(
            *(CLASS, MASK, NORM, GAMMA),
            Drop(r"(fc_norm|head|lm_head)\.", "classifier"),
            Drop(r".*relative_position_index$", "index into the bias table"),
            Inexact(r".*relative_position_bias_table$", transformers.BIAS_TABLE),
        ),
        makes=(QKV_BIAS,), settings=(("norm_eps", 1e-6),)),
    # facebookresearch/dinov3: the original keeps a bias with a mask over k's; timm those of q and v
    Format("dinov3", "DINOv3 ViT of its own repository, and under timm's names",
        marks=(r"(.*\.)?blocks\.(0\.)?0\.attn\.qkv\.weight$",
            r"(.*\.)?(storage_tokens|reg_token)$"),
        absent=(r"(.*\.)?pos_embed$",),
        rules=(
            *(CLASS, MASK, HEAD, UNGROUP, GAMMA),
            Drop(r"storage_tokens$", REGISTERS, "reg_token"),
            Drop(r"reg_token$", REGISTERS),
            Drop(r"rope_embed\.periods$", "periods of the rotary positions: computed "
                "(the file has them rounded to bfloat16)"),
            Drop(r"norm\.|cls_norm\.|local_cls_norm\.", NORM.why),
            *renames(*SWIGLU),
        ),
        outside=(DINO_HEADS,),
        makes=(
            Make(r"(.*\.attn\.)qkv\.bias$", (r"\1qkv.bias", r"\1qkv.bias_mask"), tensors.masked),
            QKV_BIAS,
            Make(r"(.*\.attn\.)qkv\.bias$", (r"\1qkv.weight",), tensors.zeros,
                "biases of q, k and v are zero: the file has none"),
            W3,
        ),
        settings=(("rope", "dinov3"), ("norm_eps", 1e-5))),
    # baaivision/EVA, EVA-01: eva/modeling_pretrain.py, then det/
    Format("eva01_pretrain", "EVA-01 pretraining and classification",
        marks=(r"blocks\.0\.attn\.q_bias$", r"cls_token$", r"pos_embed$"),
        absent=(r".*(rel_pos_[hw]$|gamma_[12]$)",),
        rules=(CLASS, MASK, NORM, LM_HEAD, HEAD), makes=(QKV_BIAS,),
        settings=(("norm_eps", 1e-6),)),
    Format("eva01", "EVA-01 detectors",
        marks=(r"((backbone\.)?net\.)?blocks\.0\.attn\.q_bias$",),
        absent=(r"cls_token$|norm\.weight$|fc_norm\.",),
        rules=(GAMMA,), outside=CONSTANTS,
        makes=(QKV_BIAS, Make(r"(blocks\.\d+\.)gamma_([12])$", (r"\1ls\2.gamma",), copy)),
        detector=True, settings=norms("LN", "LN")),
    # facebookresearch/dinov2: with and without registers, and of trainings
    Format("dinov2", "DINOv2 of its own repository",
        marks=(r"(.*\.)?mask_token$", r"(.*\.)?pos_embed$",
            r"(.*\.)?blocks\.(0\.)?0\.ls1\.gamma$"),
        rules=(CLASS, MASK, NORM, UNGROUP, Drop(r"register_tokens$", REGISTERS, "reg_token")),
        outside=(DINO_HEADS,), makes=packed("w12"), settings=(("norm_eps", 1e-6),)),
    # huggingface/pytorch-image-models: as its CLIP, but pooled by attention, or without last norm
    *(Format(name, f"timm Perception Encoder ({what})",
        marks=(r"norm_pre\.weight$", r"blocks\.0\.attn\.qkv\.weight$", *marks),
        absent=(r"patch_embed\.proj\.bias$", *absent),
        rules=TIMM, makes=(NO_PATCH_BIAS,), settings=PE)
      for name, what, marks, absent in (
          ("timm_pe_core", "Core", (r"attn_pool\.latent$",), ()),
          ("timm_pe", "Spatial, Lang", (), (r"(norm|fc_norm)\.",)))),
    # facebookresearch/detectron2: our names are theirs
    Format("detectron2", "detectron2 model zoo (.pkl) and files trained with detectron2 (.pth)",
        marks=(r"(backbone\.)?((net|bottom_up)\.)?patch_embed\.",),
        absent=(r"(cls_token|decoder_embed.*|norm\.weight)$|head\.|fc_norm\.",),
        rules=(
            Refuse(r"rope", "rotary positions of an EVA-02 detector"),
            Refuse(r".*\.attn\.(q_proj|k_proj|v_proj|inner_attn_ln)", "split q, k, v of EVA-02"),
            Refuse(r".*\.attn\.(q_bias|v_bias)", "separate q and v biases of an EVA-01 detector"),
            Refuse(r".*\.mlp\.(w1|w2|w3|ffn_ln)", "SwiGLU of EVA-02"),
        ),
        outside=CONSTANTS, detector=True,
        settings=norms(OtherThan("GN1"), OtherThan("GN1"))),
    # facebookresearch/mae: names are timm's, its place is "model"
    Format("mae", "MAE pretrained encoders",
        marks=(r"blocks\.0\.attn\.qkv\.weight$", r"cls_token$", r"/model|decoder_embed\.weight$"),
        absent=(r"(head\.|fc_norm\.|reg_token$|norm_pre\.|dist_token$|.*\.(gamma_[12]$|ls[12]\.))",),
        rules=(CLASS, NORM, DECODER, NO_REL_POS), settings=(("norm_eps", 1e-6),)),
    # huggingface/pytorch-image-models, and DeiT-III's own files
    Format("timm", "timm plain ViT (AugReg, DeiT-III, CLIP, DINOv2, ...)",
        marks=(r"blocks\.0\.attn\.qkv\.weight$", r"norm\.weight$|fc_norm\."),
        absent=(r"mask_token$",),
        rules=TIMM, makes=(*packed("fc1"), W3, NO_PATCH_BIAS)),
)  # fmt: skip
FORMATS = {fmt.name: fmt for fmt in _TABLE}
