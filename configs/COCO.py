"""COCO 2017: ViTDet and its rivals (detectron2), EVA-02, PE. One row is one recipe.

    python train_net.py --config-file configs/COCO/mask_rcnn_vitdet_l_100ep.py
        --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
    python train_net.py --config-file configs/COCO/mask_rcnn_vitdet_l_100ep.py
        --eval-only train.init_checkpoint=WEIGHTS

configs/COCO/mask_rcnn_vitdet_b_100ep.py is the same of ViT-B as a file of its own, and the base of
all these. Rows of detectron2 are ViTDet (arXiv 2203.16527), Tables 5 and 9, and projects/ViTDet,
whose number of the model stands in the row: 1024 pixels, plain NMS; docs/recipes.md has their cost.
Rows of EVA-02 (arXiv 2303.11331; baaivision/EVA, EVA-02/det) have the name of the published config.
"""

from .COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from .common.changes import (
    COCO_50,
    COCO_75,
    MVIT_H_SIZE,
    MVIT_L_SIZE,
    SWIN_L_SIZE,
    THIRDS,
    averaged,
    cascaded,
    eva02_b,
    eva02_l,
    eva02_steps,
    mvit,
    pe_g,
    swin,
    system,
    vit_h,
    vit_l,
)
from .common.rows import MAE_H, MAE_L, PE_CORE_G, PE_SPATIAL_G, Recipes, Row, net, steps

EVA_B, EVA_L = "eva02_B_pt_in21k_p14to16.pt", "eva02_L_pt_m38m_p14to16.pt"
SWIN_B, SWIN_L = (f"swin_{size}_patch4_window7_224_22k.pth" for size in ("base", "large"))
MVIT_B, MVIT_L, MVIT_H = (f"MViTv2_{size}_in21k.pyth" for size in "BLH")

ROWS = {
    "mask_rcnn_vitdet_l_100ep": Row(
        "55.5/49.2", 330.68, "model 325599698; the paper has 55.6/49.2", (vit_l,), MAE_L,
    ),
    "mask_rcnn_vitdet_h_75ep": Row(
        "56.7/50.2", 661.20, "model 329145471; the paper has 56.7/50.1", (vit_h, COCO_75), MAE_H,
        "MAE's patches of 14 pixels were resized to 16; converter.py --resize-patch-embed does the "
        "like (not compared)",
    ),
    "cascade_mask_rcnn_vitdet_b_100ep": Row(
        "54.0/46.7", 141.16, "model 325358525; the paper has 54.0/46.7", (cascaded,),
    ),
    "cascade_mask_rcnn_vitdet_l_100ep": Row(
        "57.6/50.0", 360.95, "model 328021305; the paper has 57.6/49.8", (vit_l, cascaded), MAE_L,
    ),
    "cascade_mask_rcnn_vitdet_h_75ep": Row(
        "58.7/51.0", 691.47, "model 328730692; the paper has 58.7/50.9",
        (vit_h, COCO_75, cascaded), MAE_H,
    ),
    # from ImageNet-21K, supervised; converter.py does not read these files yet
    "cascade_mask_rcnn_swin_b_in21k_50ep": Row(
        "53.9/46.2", 139.31, "model 342979038; the paper has 54.0/46.5",
        (swin(4e-5), COCO_50, cascaded), SWIN_B,
        "Table 11 has drop path 0.3 and lr 1e-4 / 8e-5; detectron2 has 0.4 and 4e-5",
    ),
    "cascade_mask_rcnn_swin_l_in21k_50ep": Row(
        "55.0/47.2", 247.81, "model 342979186; the paper has 54.8/47.3",
        (swin(4e-5, **SWIN_L_SIZE), COCO_50, cascaded), SWIN_L,
    ),
    "cascade_mask_rcnn_mvitv2_b_in21k_100ep": Row(
        "55.6/48.1", 103.15, "model 325820315; the paper has 55.6/48.1", (mvit(8e-5), cascaded),
        MVIT_B,
    ),
    "cascade_mask_rcnn_mvitv2_l_in21k_50ep": Row(
        "55.7/48.3", 265.11, "model 325607715; the paper has 55.7/48.3 and 270 M parameters",
        (mvit(8e-5, **MVIT_L_SIZE), COCO_50, cascaded), MVIT_L,
    ),
    "cascade_mask_rcnn_mvitv2_h_in21k_36ep": Row(
        "55.9/48.3", 718.16, "model 326187358; the paper has 55.8/48.3 and lr 8e-5",
        (
            mvit(1.6e-4, **MVIT_H_SIZE),
            steps(67500, 52500, 62500),  # 36.6 x 118000 images; cuts at 77.8 % and 92.6 %
            cascaded,
        ),
        MVIT_H,
        "published with activation checkpointing, for which detectron2's MViT needs the package "
        "fairscale; with it add model.backbone.bottom_up.use_act_checkpoint=true",
    ),
    # EVA-02 (published heads compute in float32): 60000 x 128 images = 65.1 x 118000
    "cascade_mask_rcnn_eva02_b_bsl": Row(
        "55.5/47.1", 141.12,
        "eva02_B_coco_bsl, eva2_coco_cascade_mask_rcnn_vitdet_b_4attn_1024_lrd0p7.py; its log: "
        "55.5017 / 47.0794",
        (eva02_b, eva02_steps(128, 5e-5, 60000)), EVA_B,
    ),
    "cascade_mask_rcnn_eva02_l_bsl": Row(
        "59.2/50.8", 360.91,
        "eva02_L_coco_bsl, eva2_coco_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8.py; its log: "
        "59.1550 / 50.7923",
        (eva02_l, eva02_steps(144, 6e-5, 60000)), EVA_L,
    ),
    # At 1536 pixels: soft-NMS (linear, 0.6, class by class, candidates with scores above 0), at
    # most 1000 detections an image where the published code returns all it has; for the mask AP
    # also model.roi_heads.maskness_thresh=0.5
    "cascade_mask_rcnn_eva02_b_sys": Row(
        "58.9/50.7", 141.12,
        "eva02_B_coco_sys, eva2_coco_cascade_mask_rcnn_vitdet_b_6attn_win32_1536_lrd0p7.py; its "
        "log: 58.9331 / 50.6875",
        (
            eva02_b, system([1, 3, 5, 7, 9, 11], 32, override_score_thresh=0.0),
            eva02_steps(128, 5e-5, 60000),
        ),
        EVA_B,
    ),
    "cascade_mask_rcnn_eva02_l_sys": Row(
        "62.3/53.8", 360.91,
        "eva02_L_coco_sys, eva2_coco_cascade_mask_rcnn_vitdet_l_8attn_win32_1536_lrd0p8.py; its "
        "log: 62.2848 / 53.8006",
        (eva02_l, system(THIRDS, 32, override_score_thresh=0.0), eva02_steps(128, 5e-5, 60000)),
        EVA_L,
    ),
    "cascade_mask_rcnn_eva02_l_sys_o365": Row(
        "64.1/55.4", 360.91,
        "eva02_L_coco_det_sys_o365 (box AP 64.1, mask AP 54.3) and eva02_L_coco_seg_sys_o365 "
        "(63.9/55.4), two checkpoints of one run: masks, which Objects365 does not teach, need "
        "longer; eva2_o365_to_coco_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8.py; its log: "
        "64.1442 (box of det), 55.3584 (mask of seg)",
        (eva02_l, system(THIRDS, 16, override_score_thresh=0.0), averaged(40000)),
        "eva02_L_m38m_to_o365.pth",
        "40000 iterations x 64 images = 21.7 x 118000, warm-up 1 %. Of published files "
        "converter.py --weights ema_state takes the average; evaluate what it writes with "
        "train.eval_weights=model",
    ),
    # Perception Encoder (arXiv 2504.13181; facebookresearch/perception_models, apps/detection);
    # its patches of 14 pixels are resized to 16: converter.py --resize-patch-embed
    "mask_rcnn_pe_core_g_75ep": Row(
        "57.0/49.8", 1885.52, "mask_rcnn_PEcore_G_coco75ep.py", (pe_g, COCO_75), PE_CORE_G,
    ),
    "mask_rcnn_pe_spatial_g_36ep": Row(
        "57.8/50.3", 1885.68, "mask_rcnn_PEspatial_G_coco36ep.py",
        (pe_g, net(layer_scale=True), steps(66375, 59000, 63916, warmup=90)), PE_SPATIAL_G,
    ),
}  # fmt: skip
recipes = Recipes(ROWS, "coco", globals())
