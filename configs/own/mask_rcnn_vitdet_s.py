"""Mask R-CNN, plain ViT-S at 512 pixels, on your own images: one small GPU.

Source      this project: ViTDet (arXiv 2203.16527) with the ViT-S of DINOv2 and others
Data        class names and their number come from the json
              dataloader.train.dataset.json=TRAIN.json dataloader.train.dataset.images=FOLDER
              dataloader.test.dataset.json=VAL.json    dataloader.test.dataset.images=FOLDER
Schedule    40000 images = 2500 iterations x 16, cosine, warm-up 250 iterations; train.epochs=N
            makes it N rounds of the data and keeps its shape
Start       a ViT-S, by converter.py; train.init_checkpoint= with nothing behind it starts from
            random weights
Train       vitdet train --data FOLDER --size small, or
            python train_net.py --config-file configs/own/mask_rcnn_vitdet_s.py DATA...
"""

from detectron2.config import LazyCall as L

from vitdet.optim import Cosine

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitdet import model
from ..common.optim import optimizer
from ..common.own import own_data, set_batch
from ..common.train import train

SIZE = 512  # pixels

model.backbone.square_pad = SIZE
model.backbone.net.update(
    img_size=SIZE,
    embed_dim=384,
    num_heads=6,
    window_size=16,  # 32 x 32 tokens are four windows, and nothing is padded
)
own_data(dataloader, SIZE)
set_batch(dataloader, optimizer, train, batch=16, lr=1e-4)
optimizer.layer_decay_rate = 0.7
schedule = L(Cosine)(num_images=40000, warmup=250 * 16, warmup_factor=0.001)
train.update(
    output_dir="output/own",
    precision="auto",
    num_images=40000,
    checkpoint_every=10000,
    eval_every=10000,
    clip_grad_norm=1.0,
)
