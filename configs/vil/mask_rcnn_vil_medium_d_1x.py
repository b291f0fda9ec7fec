"""Mask R-CNN, ViL-Medium-D (ImageNet-21K), FPN: COCO, 1x.

Source      ViL (arXiv 2103.15358), Tables 6 and 7; microsoft/VisionLongformerForObjectDetection,
            README and configs/msvit_maskrcnn_fpn_1x_medium_sparse.yaml
Published   box AP 47.6, mask AP 43.0 on val2017 at 800 pixels
Parameters  59.29 M. The published model has 60.06 M: its backbone keeps a classifier that nothing
            uses. The README's 60.1 M have absolute positions for relative ones: 60,102,616
FLOPs       293.8 G (README): multiply-adds at 800 x 1344 without the products of the sliding chunks
            and the mask head
Schedule    90000 iterations x 16 images = 1.44 M images = 12 x 118000; lr / 10 at 60000 (66.7%) and
            80000 (88.9%); warm-up 1000 iterations from 0.01; 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/mask_rcnn_vil_medium_d_1x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/mask_rcnn_vil_medium_d_1x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0. lr 2.5e-4 is that of the YAML file; the 3x files have 1e-4.
"""

from ..common.models.mask_rcnn_vil import model
from ..common.models.vil import medium_deep as _size
from ..common.vil import dataloader, optimizer, schedule, train

model.backbone.bottom_up.update(_size)
model.backbone.bottom_up.drop_path_rate = 0.2

optimizer.lr = 2.5e-4
train.init_checkpoint = "weights/coco_mask_rcnn_vil_medium_d_1x_init.pth"
