"""Cascade Mask R-CNN, EVA-02-L, simple feature pyramid: COCO, head-to-head row.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, row eva02_L_coco_bsl,
            eva2_coco_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8.py
Published   box AP 59.2, mask AP 50.8 on val2017 at 1024 pixels, plain NMS; its log:
            59.1550 / 50.7923
Parameters  360.91 M
Schedule    60000 iterations x 144 images = 8.64 M images = 73.2 x 118000; lr / 10 at 48000
            (80%) and 54000 (90%); warm-up 1000 iterations
Start       eva02_L_pt_m38m_p14to16.pt, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_l_bsl.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_eva02_l_bsl.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Layer-wise lr decay 0.8; weight decay 0.1 for every parameter, norms and positions too.
"""

from ..common.data.coco import dataloader
from ..common.eva02 import optimizer, plain_nms, schedule, train
from ..common.models.cascade_mask_rcnn_eva02 import _large, model

model.backbone.net.update(_large)
model.roi_heads = plain_nms(model.roi_heads)

dataloader.train.total_batch_size = train.reference_batch = 144
optimizer.lr = 6e-5
optimizer.layer_decay_rate = 0.8
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_eva02_l_bsl_init.pth"
train.num_images = 60000 * 144
schedule.num_images = 60000 * 144
train.checkpoint_every = train.eval_every = 5000 * 144
schedule.milestones = [48000 * 144, 54000 * 144]
schedule.warmup = 1000 * 144
