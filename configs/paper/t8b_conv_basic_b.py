"""ViT-B with four basic convolution blocks: Mask R-CNN, COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 8b, row "basic"
Published   box AP 50.7, mask AP 45.2 on val2017; without relative positions, as all ablations
Parameters  153.28 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t8b_conv_basic_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        Of this block the paper says how many 3x3 convolutions it has; norms and activations are
            those of the bottleneck, detectron2's.
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import as_ablated as _as_ablated
from ..common.ablations import convolutions as _convolutions

_as_ablated(model)
_convolutions(model, "basic")

train.init_checkpoint = "weights/paper_t8b_conv_basic_b_init.pth"
