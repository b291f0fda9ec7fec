"""Cascade Mask R-CNN, Swin-B (ImageNet-21K, supervised), FPN: COCO, 50 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 342979038
Published   box AP 53.9, mask AP 46.2 on val2017 at 1024 pixels, plain NMS; the paper has 54.0/46.5
Parameters  139.31 M
Cost        64 A100, 1 image each: 0.389 s an image (92187 x 0.389 s = 10 h), 8.7 GB; inference
            0.077 s an image
Schedule    92187 iterations x 64 images = 5.90 M images = 50 x 118000; lr / 10 at 81944 (88.9%)
            and 88773 (96.3%); warm-up 125 iterations (detectron2 keeps the fraction 250 / 184375
            of the 100-epoch recipe)
Start       swin_base_patch4_window7_224_22k.pth, which converter.py does not read yet
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_swin_b_in21k_50ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_swin_b_in21k_50ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Table 11 of the paper has drop path 0.3 and lr 1e-4 / 8e-5; detectron2 has 0.4 and
            4e-5.
"""

from ..common.data.coco import dataloader
from ..common.models.cascade import cascade
from ..common.models.mask_rcnn_swin import model
from ..common.optim import optimizer
from ..common.schedule import schedule
from ..common.train import train

model.roi_heads = cascade(model.roi_heads)

optimizer.lr = 4e-5
optimizer.weight_decay = 0.05
optimizer.no_decay = ["relative_position_bias_table"]
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_swin_b_in21k_init.pth"
train.num_images = 92187 * 64
schedule.num_images = 92187 * 64
schedule.milestones = [81944 * 64, 88773 * 64]
schedule.warmup = 125 * 64
