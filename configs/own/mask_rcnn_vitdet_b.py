"""Mask R-CNN, plain ViT-B, on your own images: any json in COCO's format.

Source      the COCO recipe of ViTDet (arXiv 2203.16527, Table 5) at a length for small data sets
Data        class names and their number come from the json
              dataloader.train.dataset.json=TRAIN.json dataloader.train.dataset.images=FOLDER
              dataloader.test.dataset.json=VAL.json    dataloader.test.dataset.images=FOLDER
Schedule    50000 images = 3125 iterations x 16; lr / 10 at 80% and 95%; warm-up 250 iterations.
            lr 2.5e-5 = 1e-4 x 16 / 64, the linear rule. train.epochs=N makes it N rounds of the
            data and keeps its shape.
Start       a COCO model (its heads need other classes: convert a backbone) or MAE, by converter.py;
            train.init_checkpoint= with nothing behind it starts from random weights
Train       vitdet train --data FOLDER --size base, or
            python train_net.py --config-file configs/own/mask_rcnn_vitdet_b.py DATA...
"""

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_vitdet import model
from ..common.optim import optimizer
from ..common.own import own_data, set_batch
from ..common.schedule import schedule
from ..common.train import train

own_data(dataloader, size=1024)
set_batch(dataloader, optimizer, train, batch=16, lr=1e-4 * 16 / 64)
optimizer.layer_decay_rate = 0.7
train.update(output_dir="output/own", precision="auto", num_images=50000)
train.checkpoint_every = train.eval_every = 10000
schedule.num_images = 50000
schedule.milestones = [40000, 47500]
schedule.warmup = 250 * 16
