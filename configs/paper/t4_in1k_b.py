"""ViT-B from supervised weights (IN-1K): Mask R-CNN, COCO, 50 epochs.

Source      ViTDet (arXiv 2203.16527), Table 4, row "IN-1K, supervised"; hyper-parameters of Table
            11
Published   box AP 47.6, mask AP 42.4 on val2017; without relative positions, as all ablations
Parameters  110.80 M
Schedule    92187 iterations x 64 images = 5.90 M images = 50 x 118000; lr 8e-5, / 10 at 81944
            (88.9%) and 88773 (96.3%), the shares of 100 epochs; warm-up 250 iterations; drop path
            0.1, no layer-wise lr decay
Start       timm's vit_base_patch16_224.augreg_in1k, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t4_in1k_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        The paper does not name its weights; timm has supervised ones.
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import as_ablated as _as_ablated
from ..common.ablations import from_supervised as _from_supervised

_as_ablated(model)
_from_supervised(train, schedule, optimizer)

train.init_checkpoint = "weights/paper_t4_in1k_b_init.pth"
