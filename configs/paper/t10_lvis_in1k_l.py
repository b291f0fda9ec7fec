"""ViT-L from supervised weights (IN-1K): Mask R-CNN, LVIS v1, 50 epochs.

Source      ViTDet (arXiv 2203.16527), Table 10, row "IN-1K, supervised"
Published   box AP 38.3, mask AP 36.0 on LVIS v1 val (rare classes: mask AP 26.7)
Parameters  336.73 M
Schedule    78125 iterations x 64 images = 5.00 M images = 50 x 100000; lr 1.6e-4, / 10 at 69444
            (88.9%) and 75231 (96.3%), the shares of 100 epochs; warm-up 250 iterations; no
            layer-wise lr decay
Start       timm's vit_large_patch16_224.augreg_in21k_ft_in1k, through converter.py
            (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t10_lvis_in1k_l.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        1024 pixels and plain NMS, as the table says. It says no hyper-parameters; taken is what
            Table 11 changes on COCO for supervised weights (0.8 times the lr, half the epochs, no
            layer-wise lr decay), applied to LVIS/mask_rcnn_vitdet_l_100ep.py, which is the row of
            MAE. timm has no ViT-L from ImageNet-1K alone; these weights have seen ImageNet-21K
            before.
"""

from ..common.ablations import from_supervised as _from_supervised
from ..LVIS.mask_rcnn_vitdet_l_100ep import dataloader, model, optimizer, schedule, train

_from_supervised(train, schedule, optimizer)

train.init_checkpoint = "weights/paper_t10_lvis_in1k_l_init.pth"
