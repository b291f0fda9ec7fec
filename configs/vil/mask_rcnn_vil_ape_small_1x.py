"""Mask R-CNN, ViL-Small with absolute positions and another attention, FPN: COCO, 1x.

Attention   sliding chunks
Source      microsoft/VisionLongformerForObjectDetection, README (comparison of attention
            mechanisms) and configs/msvit_maskrcnn_fpn_1x_small_sparse.yaml; ViL (arXiv 2103.15358),
            Sec. 4.4
Published   box AP 42.9, mask AP 39.6 on val2017 at 800 pixels
Parameters  44.25 M; the published model has 45.02 M (45.0 M in the README): its backbone keeps the
            classifier, which nothing uses
Cost        7.4 GB (README), 218.3 GFLOPs
Schedule    90000 iterations x 16 images = 1.44 M images = 12 x 118000; lr / 10 at 60000 (66.7%) and
            80000 (88.9%); warm-up 1000 iterations from 0.01; 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/mask_rcnn_vil_ape_small_1x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/mask_rcnn_vil_ape_small_1x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0. lr 2.5e-4 is that of the YAML file. No YAML file has absolute positions and sliding
            chunks in all stages; the README links the one of the row below.
"""

from .mask_rcnn_vil_small_1x import dataloader, model, optimizer, schedule, train

model.backbone.bottom_up.update(
    use_abs_pos=[True, True, True, True],
    drop_path_rate=0.1,
)
train.init_checkpoint = "weights/coco_mask_rcnn_vil_ape_small_1x_init.pth"
