"""ViT-B at 1280 pixels with soft-NMS: Cascade Mask R-CNN, COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 6
Published   box AP 56.0, mask AP 48.0 on val2017 at one scale; 57.3/49.4 at several, which this
            recipe does not do
Parameters  141.18 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t6_system_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        With relative positions. Of soft-NMS the paper says no kind and no threshold; linear
            from an overlap of 0.5 is chosen here.
"""

from ..COCO.cascade_mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import system_level as _system_level

_system_level(model, dataloader)

train.init_checkpoint = "weights/paper_t6_system_b_init.pth"
