"""ViTAE-S: a tiny Mask R-CNN on drawn shapes.

Source      ViTAE-Transformer/ViTDet; widths a quarter of the published ones, stride 8 instead of 16
Schedule    as global_attention.py
Train       python train_net.py --config-file configs/mini/variants/vitae_s.py --num-gpus 2
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.vitae_s import ViTAES as _ViTAES

from .global_attention import dataloader, model, optimizer, schedule, train

model.backbone.net = L(_ViTAES)(
    img_size=128,
    embed_dims=[16, 16, 48],
    token_dims=[24, 48, 96],
    downsample_ratios=[2, 2, 2],
    depths=[0, 0, 6],
    num_heads=[1, 1, 3],
    groups=[1, 1, 24],
    window_size=8,
    global_block_indexes=[2, 5],
    attention_backend="eager",
    out_feature="last_feat",
)
train.output_dir = "output/variants/vitae_s"
