"""ViT-B with no pyramid: Mask R-CNN, COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 1, row "no feature pyramid"
Published   box AP 47.8, mask AP 42.5 on val2017; without relative positions, as all ablations
Parameters  106.05 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t1_pyramid_none_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        As Sec. 4.2 has it, RPN and heads all stand on the last map, of stride 16, and its RPN
            has anchors of several sizes: here all five of the other rows.
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import as_ablated as _as_ablated
from ..common.ablations import no_pyramid as _no_pyramid

_as_ablated(model)
_no_pyramid(model)

train.init_checkpoint = "weights/paper_t1_pyramid_none_b_init.pth"
