"""RetinaNet, ViL-Tiny (ImageNet-1K), FPN: COCO, 3x.

Source      ViL (arXiv 2103.15358), Tables 6 and 7; microsoft/VisionLongformerForObjectDetection,
            README and configs/msvit_retina_fpn_3x_ms.yaml
Published   box AP 43.6 on val2017 at 800 pixels
Parameters  16.22 M. The published model has 16.60 M: its backbone keeps a classifier that nothing
            uses. The README's 16.64 M have absolute positions for relative ones: 16,642,172
FLOPs       182.7 G (README): multiply-adds at 800 x 1344 without the products of the sliding chunks
Schedule    270000 iterations x 16 images = 4.32 M images = 37 x 118000; lr / 10 at 180000 (66.7%)
            and 240000 (88.9%); warm-up 1000 iterations from 0.01; 640 to 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/retinanet_vil_tiny_3x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/retinanet_vil_tiny_3x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0.
"""

from ..common.models.retinanet_vil import model
from ..common.vil import dataloader, optimizer, schedule, train

model.backbone.bottom_up.drop_path_rate = 0.1

dataloader.train.mapper.use_masks = False
dataloader.train.mapper.augmentations.size = [640, 672, 704, 736, 768, 800]
train.init_checkpoint = "weights/coco_retinanet_vil_tiny_3x_init.pth"
train.clip_grad_norm = 1.0
train.num_images = 270_000 * 16
schedule.num_images = 270_000 * 16
schedule.milestones = [180_000 * 16, 240_000 * 16]
