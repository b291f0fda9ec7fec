"""Mask R-CNN, plain ViT-L, on your own images: large GPUs.

Source      as mask_rcnn_vitdet_b.py, with the backbone, its decay of the learning rate and its
            stochastic depth of configs/COCO/mask_rcnn_vitdet_l_100ep.py
Data        class names and their number come from the json
              dataloader.train.dataset.json=TRAIN.json dataloader.train.dataset.images=FOLDER
              dataloader.test.dataset.json=VAL.json    dataloader.test.dataset.images=FOLDER
Schedule    as mask_rcnn_vitdet_b.py
Start       mae_pretrain_vit_large.pth or another ViT-L, by converter.py
Train       vitdet train --data FOLDER --size large, or
            python train_net.py --config-file configs/own/mask_rcnn_vitdet_l.py DATA...
"""

from .mask_rcnn_vitdet_b import dataloader, model, optimizer, schedule, train

model.backbone.net.update(embed_dim=1024, depth=24, num_heads=16, drop_path_rate=0.4)
model.backbone.net.global_block_indexes = [5, 11, 17, 23]
optimizer.layer_decay_rate = 0.8
