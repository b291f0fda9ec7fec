"""Mask R-CNN, ViL-Tiny (ImageNet-1K), FPN: COCO, 1x.

Source      ViL (arXiv 2103.15358), Tables 6 and 7; microsoft/VisionLongformerForObjectDetection,
            README and configs/msvit_maskrcnn_fpn_1x_tiny_sparse.yaml
Published   box AP 41.4, mask AP 38.1 on val2017 at 800 pixels
Parameters  26.43 M. The published model has 26.81 M: its backbone keeps a classifier that nothing
            uses. The README's 26.9 M have absolute positions for relative ones: 26,850,424
FLOPs       145.6 G (README): multiply-adds at 800 x 1344 without the products of the sliding chunks
            and the mask head
Schedule    90000 iterations x 16 images = 1.44 M images = 12 x 118000; lr / 10 at 60000 (66.7%) and
            80000 (88.9%); warm-up 1000 iterations from 0.01; 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/mask_rcnn_vil_tiny_1x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/mask_rcnn_vil_tiny_1x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0. lr 2.5e-4 is that of the YAML file; the 3x files have 1e-4.
"""

from ..common.models.mask_rcnn_vil import model
from ..common.vil import dataloader, optimizer, schedule, train

model.backbone.bottom_up.drop_path_rate = 0.05

optimizer.lr = 2.5e-4
train.init_checkpoint = "weights/coco_mask_rcnn_vil_tiny_1x_init.pth"
