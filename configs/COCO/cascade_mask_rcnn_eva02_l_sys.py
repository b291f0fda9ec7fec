"""Cascade Mask R-CNN, EVA-02-L at 1536 pixels: COCO, system-level row.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, row eva02_L_coco_sys,
            eva2_coco_cascade_mask_rcnn_vitdet_l_8attn_win32_1536_lrd0p8.py
Published   box AP 62.3, mask AP 53.8 on val2017 at 1536 pixels; its log: 62.2848 / 53.8006
Inference   soft-NMS (linear, 0.6, class by class, candidates with scores above 0); for the mask AP
            also model.roi_heads.maskness_thresh=0.5
Parameters  360.91 M
Schedule    60000 iterations x 128 images = 7.68 M images = 65.1 x 118000; lr / 10 at 48000
            (80%) and 54000 (90%); warm-up 1000 iterations
Start       eva02_L_pt_m38m_p14to16.pt, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_l_sys.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_l_sys.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        At most 1000 detections an image; the published code's soft-NMS returns all it has.
Note        Activation checkpointing in every block, as published.
"""

from ..common.data.coco import dataloader
from ..common.eva02 import optimizer, schedule, set_image_size, soft_nms, train
from ..common.models.cascade_mask_rcnn_eva02 import _large, model

model.backbone.net.update(_large)
model.backbone.net.checkpoint_blocks = list(range(24))
set_image_size(dataloader, model, 1536)
model.backbone.net.window_size = 32
model.backbone.net.global_block_indexes = [2, 5, 8, 11, 14, 17, 20, 23]
model.roi_heads = soft_nms(model.roi_heads, override_score_thresh=0.0)

dataloader.train.total_batch_size = train.reference_batch = 128
optimizer.lr = 5e-5
optimizer.layer_decay_rate = 0.8
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_eva02_l_sys_init.pth"
train.num_images = 60000 * 128
schedule.num_images = 60000 * 128
train.checkpoint_every = train.eval_every = 5000 * 128
schedule.milestones = [48000 * 128, 54000 * 128]
schedule.warmup = 1000 * 128
