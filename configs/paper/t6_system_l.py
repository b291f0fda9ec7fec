"""ViT-L at 1280 pixels with soft-NMS: Cascade Mask R-CNN, COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 6
Published   box AP 59.6, mask AP 51.1 on val2017 at one scale; 60.4/52.2 at several, which this
            recipe does not do
Parameters  360.97 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_large.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t6_system_l.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        With relative positions. Of soft-NMS the paper says no kind and no threshold; linear
            from an overlap of 0.5 is chosen here.
"""

from ..COCO.cascade_mask_rcnn_vitdet_l_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import system_level as _system_level

_system_level(model, dataloader)

train.init_checkpoint = "weights/paper_t6_system_l_init.pth"
