"""Mask R-CNN, ViL-Medium-D (ImageNet-21K), FPN: COCO, 3x.

Source      ViL (arXiv 2103.15358), Tables 6 and 7; microsoft/VisionLongformerForObjectDetection,
            README and configs/msvit_maskrcnn_fpn_3xms_medium_sparse.yaml
Published   box AP 48.9, mask AP 44.2 on val2017 at 800 pixels
Parameters  59.29 M. The published model has 60.06 M: its backbone keeps a classifier that nothing
            uses. The README's 60.1 M have absolute positions for relative ones: 60,102,616
FLOPs       293.8 G (README): multiply-adds at 800 x 1344 without the products of the sliding chunks
            and the mask head
Schedule    270000 iterations x 16 images = 4.32 M images = 37 x 118000; lr / 10 at 180000 (66.7%)
            and 240000 (88.9%); warm-up 1000 iterations from 0.01; 640 to 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/mask_rcnn_vil_medium_d_3x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/mask_rcnn_vil_medium_d_3x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0. The YAML file has full attention with relative positions in stage 4 (s0, a0), which
            stops at every input but 1344 x 1344; the row has sliding chunks.
"""

from ..common.models.mask_rcnn_vil import model
from ..common.models.vil import medium_deep as _size
from ..common.vil import dataloader, optimizer, schedule, train

model.backbone.bottom_up.update(_size)
model.backbone.bottom_up.drop_path_rate = 0.3

dataloader.train.mapper.augmentations.size = [640, 672, 704, 736, 768, 800]
train.init_checkpoint = "weights/coco_mask_rcnn_vil_medium_d_3x_init.pth"
train.num_images = 270_000 * 16
schedule.num_images = 270_000 * 16
schedule.milestones = [180_000 * 16, 240_000 * 16]
