"""Cascade Mask R-CNN, MViTv2-H (ImageNet-21K, supervised), FPN: COCO, 36 epochs.

Source      ViTDet (arXiv 2203.16527), Tables 5 and 9; detectron2 projects/ViTDet, model 326187358
Published   box AP 55.9, mask AP 48.3 on val2017 at 1024 pixels, plain NMS; the paper has 55.8/48.3
Parameters  718.16 M
Cost        64 A100, 1 image each: 1.655 s an image (67500 x 1.655 s = 31 h), 18.4 GB with
            activation checkpointing; inference 0.285 s an image
Schedule    67500 iterations x 64 images = 4.32 M images = 36.6 x 118000; lr / 10 at 52500 (77.8%)
            and 62500 (92.6%); warm-up 250 iterations
Start       MViTv2_H_in21k.pyth, which converter.py does not read yet
Train       python train_net.py --config-file configs/COCO/cascade_mask_rcnn_mvitv2_h_in21k_36ep.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/COCO/cascade_mask_rcnn_mvitv2_h_in21k_36ep.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Table 11 of the paper has lr 8e-5; detectron2 has 1.6e-4.
Note        Activation checkpointing is off: detectron2's MViT needs the package fairscale for it.
            With fairscale installed, add model.backbone.bottom_up.use_act_checkpoint=true.
"""

from ..common.data.coco import dataloader
from ..common.models.cascade import cascade
from ..common.models.mask_rcnn_mvit import model
from ..common.optim import optimizer
from ..common.schedule import schedule
from ..common.train import train

model.roi_heads = cascade(model.roi_heads)
model.backbone.bottom_up.update(embed_dim=192, depth=80, num_heads=3)
model.backbone.bottom_up.last_block_indexes = [3, 11, 71, 79]
model.backbone.bottom_up.drop_path_rate = 0.6

optimizer.lr = 1.6e-4
train.init_checkpoint = "weights/coco_cascade_mask_rcnn_mvitv2_h_in21k_init.pth"
train.num_images = 67500 * 64
schedule.num_images = 67500 * 64
schedule.milestones = [52500 * 64, 62500 * 64]
