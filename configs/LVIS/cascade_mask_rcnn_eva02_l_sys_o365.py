"""Cascade Mask R-CNN, EVA-02-L at 1536 pixels, from Objects365: LVIS v1, the best row.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, row eva02_L_lvis_sys_o365,
            eva2_o365_to_lvis_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8.py
Published   box AP 65.2, mask AP 57.3 on LVIS v1 val at 1536 pixels; its log: 65.2244 / 57.3209
Inference   the averaged weights, soft-NMS (linear, 0.6, class by class, candidates with scores
            above 0.02), scores times maskness above 0.5, for boxes and masks; 1000 detections an
            image count, where LVIS has 300: without that another number
Parameters  364.65 M
Schedule    70000 iterations x 64 images = 4.48 M images = 44.8 x 100000; constant lr after a
            warm-up of 1% = 700 iterations; moving average of the weights, decay 0.9999
Start       eva02_L_in21k_to_o365.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_eva02_l_sys_o365.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_eva02_l_sys_o365.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        At most 1000 detections an image are rescored; the published code rescores all.
Note        Published files: converter.py --weights ema_state takes the average; evaluate what it
            writes with train.eval_weights=model.
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/cascade_mask_rcnn_eva02_l_sys_o365.py.
"""

from ..COCO.cascade_mask_rcnn_eva02_l_sys_o365 import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.eva02 import set_image_size, soft_nms
from ..common.models.lvis import lvis_heads

set_image_size(dataloader, model, 1536)
model.roi_heads = soft_nms(lvis_heads(model.roi_heads), maskness_thresh=0.5)

dataloader.evaluator.max_dets = 1000
train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_eva02_l_sys_o365_init.pth"
train.num_images = 70000 * 64
schedule.num_images = 70000 * 64
train.checkpoint_every = train.eval_every = 5000 * 64
schedule.warmup = 700 * 64
