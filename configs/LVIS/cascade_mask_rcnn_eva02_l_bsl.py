"""Cascade Mask R-CNN, EVA-02-L, simple feature pyramid: LVIS v1, head-to-head row.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, row eva02_L_lvis_bsl,
            eva2_lvis_cascade_mask_rcnn_vitdet_l_4attn_1024_lrd0p8.py
Published   box AP 55.3, mask AP 48.6 on LVIS v1 val at 1024 pixels, plain NMS; its log:
            55.2866 / 48.5964
Parameters  364.65 M
Schedule    40000 iterations x 128 images = 5.12 M images = 51.2 x 100000; lr / 10 at 32000
            (80%) and 36000 (90%); warm-up 1000 iterations
Start       eva02_L_pt_in21k_p14to16.pt, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_eva02_l_bsl.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/LVIS/cascade_mask_rcnn_eva02_l_bsl.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        1203 classes, federated loss, repeat factor sampling; else the model of
            COCO/cascade_mask_rcnn_eva02_l_bsl.py.
Note        The README's link to the weights of this row leads to those of the COCO row.
"""

from ..COCO.cascade_mask_rcnn_eva02_l_bsl import model, optimizer, schedule, train
from ..common.data.lvis import dataloader
from ..common.models.lvis import lvis_heads

model.roi_heads = lvis_heads(model.roi_heads)

dataloader.train.total_batch_size = train.reference_batch = 128
optimizer.lr = 1e-4
train.init_checkpoint = "weights/lvis_cascade_mask_rcnn_eva02_l_bsl_init.pth"
train.num_images = 40000 * 128
schedule.num_images = 40000 * 128
train.checkpoint_every = train.eval_every = 2500 * 128
schedule.milestones = [32000 * 128, 36000 * 128]
schedule.warmup = 1000 * 128
