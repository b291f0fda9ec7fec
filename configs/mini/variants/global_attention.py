"""ViT, global blocks, simple feature pyramid: a tiny Mask R-CNN on drawn shapes.

Source      this project: mini/mask_rcnn_vitdet_shapes.py without convolutions and relative
            positions, the one that the other files here change in one place;
            benchmarks/variants.py trains them all
Schedule    6000 images = 1500 iterations x 4, cosine, warm-up 200 iterations
Train       python train_net.py --config-file configs/mini/variants/global_attention.py --num-gpus 2
"""

from ..mask_rcnn_vitdet_shapes import dataloader, model, optimizer, schedule, train

# Relative positions are in no ablation of the paper, so in no variant.
model.backbone.net.update(use_rel_pos=False, residual_block_indexes=[])
train.num_images = 6000
schedule.num_images = 6000
train.checkpoint_every = 6000
train.output_dir = "output/variants/global_attention"
