"""Image features of StreamPETR's ViT-Large (EVA-02-L): five levels, for images of 800 x 320 pixels.

Source      exiawsh/StreamPETR, docs/ViT_Large.md (img_backbone, sim_fpn); EVA-02 (arXiv 2303.11331)
Published   nuScenes val, the whole 3-D detector: NDS 60.1, mAP 51.5 with a tenth of the rate for
            the backbone; NDS 60.9, mAP 53.0 with layer-wise decay 0.9 and 4 times the rate for the
            head. This file is the image backbone only.
Parameters  333.02 M
Output      p2 to p6, strides 4 to 64, 256 channels, of normalised RGB images (B, 3, 320, 800)
Positions   windows of 16 x 16 tokens; the global blocks' windows are the short side, 320 / 16 = 20
            tokens; global_window_size=0 lets them see the whole 20 x 50 map
Start       eva02_L_coco_det_sys_o365.pth through converter.py --weights model; simfp_6 and the
            convolution of simfp_5, which EVA-02 has not, stay at their initialisation
Optimizer   layer-wise ("vit_wise"): 1e-4, decay 0.9 over 24 layers, 4 times the rate for the head
            and for the pyramid, which the published constructor puts into the head's groups; no
            weight decay of vectors. For a detector with this backbone as `img_backbone`:
            instantiate({**config.optimizer, "model": detector, "backbone": "img_backbone"})
            "x0.1 backbone": optimizer.lr=4e-4 optimizer.layer_decay_rate=null
            optimizer.backbone_lr_multiplier=0.1 optimizer.pyramid_lr_multiplier=0.1
            optimizer.head_lr_multiplier=1 optimizer.weight_decay=0.01
            optimizer.weight_decay_vectors=null (with batches of 16)
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.optim import adamw
from vitdet.pyramid import SimpleFeaturePyramid

model = L(SimpleFeaturePyramid)(
    net=L(EVA02ViT)(
        img_size=320,  # the short side, whose positions span those of the pretraining
        patch_size=16,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_ratio=4 * 2 / 3,
        qkv_bias=True,
        drop_path_rate=0.3,
        norm_eps=1e-6,
        rope_pretrain_grid=16,
        rope_interpolate=True,
        window_size=16,
        global_window_size=20,
        global_block_indexes=[2, 5, 8, 11, 14, 17, 20, 23],
        checkpoint_blocks=list(range(24)),
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        frozen=False,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=[4.0, 2.0, 1.0, 0.5, 0.25],
    downsample="conv",
    norm="LN",
)
optimizer = L(adamw)(
    lr=1e-4,
    betas=[0.9, 0.999],
    weight_decay=1e-7,
    weight_decay_norm=None,
    weight_decay_vectors=0.0,
    no_decay=[],
    layer_decay_rate=0.9,
    backbone="",  # the model is one
    pyramid_lr_multiplier=4.0,
    head_lr_multiplier=4.0,
)
