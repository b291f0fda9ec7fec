"""ViT-H at 1280 pixels with soft-NMS: Cascade Mask R-CNN, COCO, 75 epochs.

Source      ViTDet (arXiv 2203.16527), Table 6
Published   box AP 60.4, mask AP 52.0 on val2017 at one scale; 61.3/53.1 at several, which this
            recipe does not do
Parameters  691.49 M
Schedule    138281 iterations x 64 images = 8.85 M images = 75 x 118000; lr / 10 at 122916 (88.9%)
            and 133159 (96.3%); warm-up 187.5 iterations, as detectron2's recipe of 75 epochs
Start       mae_pretrain_vit_huge_p14to16.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t6_system_h.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        With relative positions. Of soft-NMS the paper says no kind and no threshold; linear
            from an overlap of 0.5 is chosen here.
"""

from ..COCO.cascade_mask_rcnn_vitdet_h_75ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import system_level as _system_level

_system_level(model, dataloader)

train.init_checkpoint = "weights/paper_t6_system_h_init.pth"
