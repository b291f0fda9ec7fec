"""ViT-B with the simple feature pyramid: Mask R-CNN, COCO, 100 epochs.

Source      ViTDet (arXiv 2203.16527), Table 1, row (c) "simple feature pyramid"; also Table 8a "4
            global blocks", 8c "evenly", 8d "4" and Table 4 "MAE"
Published   box AP 51.2, mask AP 45.5 on val2017; without relative positions, as all ablations
Parameters  110.80 M
Schedule    184375 iterations x 64 images = 11.80 M images = 100 x 118000; lr / 10 at 163889 (88.9%)
            and 177546 (96.3%); warm-up 250 iterations
Start       mae_pretrain_vit_base.pth, through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/paper/t1_pyramid_simple_b.py
              --num-gpus 8 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:PORT
"""

from ..COCO.mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train
from ..common.ablations import as_ablated as _as_ablated

_as_ablated(model)

train.init_checkpoint = "weights/paper_t1_pyramid_simple_b_init.pth"
