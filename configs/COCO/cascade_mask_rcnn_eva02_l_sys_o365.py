"""Cascade Mask R-CNN, EVA-02-L at 1536 pixels, from Objects365: COCO, the best rows.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, rows eva02_L_coco_det_sys_o365
            and eva02_L_coco_seg_sys_o365 (two checkpoints of one run: masks, which Objects365 does
            not teach, need longer), eva2_o365_to_coco_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8
Published   det: box AP 64.1, mask AP 54.3; seg: box AP 63.9, mask AP 55.4, on val2017 at 1536
            pixels; its log: 64.1442 (box of det), 55.3584 (mask of seg)
Inference   the averaged weights, soft-NMS (linear, 0.6, class by class, candidates with scores
            above 0); for the mask AP also model.roi_heads.maskness_thresh=0.5
Parameters  360.91 M
Schedule    40000 iterations x 64 images = 2.56 M images = 21.7 x 118000; constant lr after a
            warm-up of 1% = 400 iterations; moving average of the weights, decay 0.9999
Start       eva02_L_m38m_to_o365.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_l_sys_o365.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_l_sys_o365.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        At most 1000 detections an image; the published code's soft-NMS returns all it has.
Note        Activation checkpointing in every block; windows of 16 tokens, not 32 as without O365.
Note        Published files: converter.py --weights ema_state takes the average; evaluate what it
            writes with train.eval_weights=model.
"""

from detectron2.config import LazyCall as L

from vitdet.optim import Constant

from ..common.data.coco import dataloader
from ..common.eva02 import optimizer, set_image_size, soft_nms, train
from ..common.models.cascade_mask_rcnn_eva02 import _large, model

model.backbone.net.update(_large)
set_image_size(dataloader, model, 1536)
model.backbone.net.update(drop_path_rate=0.3, checkpoint_blocks=list(range(24)))
model.backbone.net.global_block_indexes = [2, 5, 8, 11, 14, 17, 20, 23]
model.roi_heads = soft_nms(model.roi_heads, override_score_thresh=0.0)

optimizer.lr = 4e-5
optimizer.layer_decay_rate = 0.8
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_eva02_l_sys_o365_init.pth"
train.update(num_images=40000 * 64, ema_decay=0.9999, eval_weights="ema")
schedule = L(Constant)(num_images=40000 * 64, warmup=400 * 64, warmup_factor=0.001)
