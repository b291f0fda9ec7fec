"""Mask R-CNN, ViL-Small with absolute positions and another attention, FPN: COCO, 1x.

Attention   spatial reduction 32, full attention in stages 3 and 4
Source      microsoft/VisionLongformerForObjectDetection, README (comparison of attention
            mechanisms) and configs/msvit_maskrcnn_fpn_1x_srformer32_small.yaml; ViL (arXiv
            2103.15358), Sec. 4.4
Published   box AP 42.4, mask AP 39.0 on val2017 at 800 pixels
Parameters  46.02 M; the published model has 46.79 M (46.8 M in the README): its backbone keeps the
            classifier, which nothing uses
Cost        22.6 GB (README), 352.1 GFLOPs
Schedule    90000 iterations x 16 images = 1.44 M images = 12 x 118000; lr / 10 at 60000 (66.7%) and
            80000 (88.9%); warm-up 1000 iterations from 0.01; 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/mask_rcnn_srformer32_partial_small_1x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/mask_rcnn_srformer32_partial_small_1x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0. lr 2.5e-4 is that of the YAML file.
"""

from .mask_rcnn_vil_small_1x import dataloader, model, optimizer, schedule, train

model.backbone.bottom_up.update(
    attention=["srformer", "srformer", "full", "full"],
    attention_size=[8, 4, 2, 1],
    use_abs_pos=[True, True, True, True],
    drop_path_rate=0.1,
)
train.init_checkpoint = "weights/coco_mask_rcnn_srformer32_partial_small_1x_init.pth"
