"""ViT-L with four bottleneck convolution blocks: Mask R-CNN, COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 2b, row "bottleneck"
Published   box AP 54.6, mask AP 48.6 on val2017; without relative positions, as all ablations
Parameters  344.20 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_large.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t2b_conv_bottleneck_l.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..COCO.mask_rcnn_vitdet_l_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import as_ablated as _as_ablated
from ..common.ablations import convolutions as _convolutions

_as_ablated(model)
_convolutions(model, "bottleneck")

train.init_checkpoint = "weights/paper_t2b_conv_bottleneck_l_init.pth"
