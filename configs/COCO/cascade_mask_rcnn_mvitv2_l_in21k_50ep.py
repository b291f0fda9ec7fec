"""Cascade Mask R-CNN, MViTv2-L (ImageNet-21K, supervised), FPN: COCO, 50 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 325607715
Published   box AP 55.7, mask AP 48.3 on val2017 at 1024 pixels, plain NMS; the paper has 55.7/48.3
Parameters  265.11 M
Cost        64 A100, 1 image each: 0.844 s an image (92187 x 0.844 s = 22 h), 19.7 GB; inference
            0.157 s an image
Schedule    92187 iterations x 64 images = 5.90 M images = 50 x 118000; lr / 10 at 81944 (88.9%)
            and 88773 (96.3%); warm-up 125 iterations (detectron2 keeps the fraction 250 / 184375
            of the 100-epoch recipe)
Start       MViTv2_L_in21k.pyth, which converter.py does not read yet
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_mvitv2_l_in21k_50ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_mvitv2_l_in21k_50ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        The paper counts 270 M parameters.
"""

from ..common.data.coco import dataloader
from ..common.models.cascade import cascade
from ..common.models.mask_rcnn_mvit import model
from ..common.optim import optimizer
from ..common.schedule import schedule
from ..common.train import train

model.roi_heads = cascade(model.roi_heads)
model.backbone.bottom_up.update(embed_dim=144, depth=48, num_heads=2)
model.backbone.bottom_up.last_block_indexes = [1, 7, 43, 47]
model.backbone.bottom_up.drop_path_rate = 0.5

optimizer.lr = 8e-5
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_mvitv2_l_in21k_init.pth"
train.num_images = 92187 * 64
schedule.num_images = 92187 * 64
schedule.milestones = [81944 * 64, 88773 * 64]
schedule.warmup = 125 * 64
