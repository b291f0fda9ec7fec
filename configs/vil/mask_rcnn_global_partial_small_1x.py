"""Mask R-CNN, ViL-Small with absolute positions and another attention, FPN: COCO, 1x.

Attention   global tokens only, full attention in stages 3 and 4
Source      microsoft/VisionLongformerForObjectDetection, README (comparison of attention
            mechanisms) and configs/msvit_maskrcnn_fpn_1x_gformer_small.yaml; ViL (arXiv
            2103.15358), Sec. 4.4
Published   box AP 42.5, mask AP 39.2 on val2017 at 800 pixels
Parameters  44.39 M; the published model has 45.16 M (45.1 M in the README): its backbone keeps the
            classifier, which nothing uses
Cost        20.1 GB (README), 326.5 GFLOPs
Schedule    90000 iterations x 16 images = 1.44 M images = 12 x 118000; lr / 10 at 60000 (66.7%) and
            80000 (88.9%); warm-up 1000 iterations from 0.01; 800 pixels
Start       the ImageNet classifier of vision-longformer, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/vil/mask_rcnn_global_partial_small_1x.py
              --num-gpus 8
Evaluate    python train_net.py --config-file configs/vil/mask_rcnn_global_partial_small_1x.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Weight decay 0.05 and drop path are those of the README; its YAML files have 0.0001 and
            0.0. lr 2.5e-4 is that of the YAML file. The YAML file has 384 channels in stage 4,
            hence 38.8 M parameters; the row has 45.1 M, hence 768 channels. Its 256 global tokens
            in stages 1 and 2 give 45.16 M and 333.8 GFLOPs; 64 would give 45.05 M and 328.6 G,
            closer to the row.
"""

from .mask_rcnn_vil_small_1x import dataloader, model, optimizer, schedule, train

model.backbone.bottom_up.update(
    attention=["only_global", "only_global", "full", "full"],
    num_global_tokens=[256, 256, 1, 0],
    use_abs_pos=[True, True, True, True],
    drop_path_rate=0.1,
)
train.init_checkpoint = "weights/coco_mask_rcnn_global_partial_small_1x_init.pth"
