"""Cascade Mask R-CNN, EVA-02-B, simple feature pyramid: COCO, head-to-head row.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, row eva02_B_coco_bsl,
            eva2_coco_cascade_mask_rcnn_vitdet_b_4attn_1024_lrd0p7.py
Published   box AP 55.5, mask AP 47.1 on val2017 at 1024 pixels, plain NMS; its log:
            55.5017 / 47.0794
Parameters  141.12 M
Schedule    60000 iterations x 128 images = 7.68 M images = 65.1 x 118000; lr / 10 at 48000
            (80%) and 54000 (90%); warm-up 1000 iterations
Start       eva02_B_pt_in21k_p14to16.pt, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_b_bsl.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_b_bsl.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Layer-wise lr decay 0.7; weight decay 0.1 for every parameter, norms and positions too.
Note        The published code runs the heads in float32; here they run in train.precision too.
"""

from ..common.data.coco import dataloader
from ..common.eva02 import optimizer, plain_nms, schedule, train
from ..common.models.cascade_mask_rcnn_eva02 import model

model.roi_heads = plain_nms(model.roi_heads)

dataloader.train.total_batch_size = train.reference_batch = 128
optimizer.lr = 5e-5
optimizer.layer_decay_rate = 0.7
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_eva02_b_bsl_init.pth"
train.num_images = 60000 * 128
schedule.num_images = 60000 * 128
train.checkpoint_every = train.eval_every = 5000 * 128
schedule.milestones = [48000 * 128, 54000 * 128]
schedule.warmup = 1000 * 128
