"""ViTAE-B: a tiny Mask R-CNN on drawn shapes.

Source      ViTAE-Transformer/ViTDet; the sizes are those of global_attention.py
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/vitae_b.py --num-gpus 2
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.vitae import ViTAE as _ViTAE

from .global_attention import dataloader, model, optimizer, schedule, train

model.backbone.net = L(_ViTAE)(
    img_size=128,
    patch_size=8,
    embed_dim=96,
    depth=6,
    num_heads=3,
    window_size=8,
    global_block_indexes=[2, 5],
    attention_backend="eager",
    out_feature="last_feat",
)
train.output_dir = "output/variants/vitae_b"
