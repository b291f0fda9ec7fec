"""Cascade Mask R-CNN, EVA-02-L at 1536 pixels: LVIS v1, system-level row.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, row eva02_L_lvis_sys,
            eva2_lvis_cascade_mask_rcnn_vitdet_l_8attn_win32_1536_lrd0p8.py
Published   box AP 60.1, mask AP 53.5 on LVIS v1 val at 1536 pixels; its log: 60.0506 / 53.5098
Inference   soft-NMS (linear, 0.6, class by class, candidates with scores above 0.02), scores times
            maskness above 0.5, for boxes and masks; 300 detections an image count
Parameters  364.65 M
Schedule    40000 iterations x 128 images = 5.12 M images = 51.2 x 100000; lr / 10 at 32000 (80%)
            and 36000 (90%); warm-up 1000 iterations
Start       eva02_L_pt_in21k_p14to16.pt, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_eva02_l_sys.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_eva02_l_sys.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        At most 1000 detections an image are rescored; the published code rescores all.
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/cascade_mask_rcnn_eva02_l_sys.py.
"""

from ..COCO.cascade_mask_rcnn_eva02_l_sys import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.eva02 import set_image_size, soft_nms
from ..common.models.lvis import lvis_heads

set_image_size(dataloader, model, 1536)
model.roi_heads = soft_nms(lvis_heads(model.roi_heads), maskness_thresh=0.5)

dataloader.train.total_batch_size = train.reference_batch = 128
optimizer.lr = 1e-4
train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_eva02_l_sys_init.pth"
train.num_images = 40000 * 128
schedule.num_images = 40000 * 128
train.checkpoint_every = train.eval_every = 2500 * 128
schedule.milestones = [32000 * 128, 36000 * 128]
