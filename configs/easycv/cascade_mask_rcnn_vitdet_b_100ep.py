"""Cascade Mask R-CNN, ViT-B, pyramid and heads with GroupNorm of one group: COCO, 100 epochs.

Source      alibaba/EasyCV v0.7, configs/detection/vitdet/vitdet_cascade_mask_rcnn.py
Published   no AP
Parameters  141.16 M
Schedule    as mask_rcnn_vitdet_b_100ep.py
Start       mae_pretrain_vit_base.pth (1600 epochs), through converter.py (docs/recipes.md)
Train       python train_net.py --config-file configs/easycv/cascade_mask_rcnn_vitdet_b_100ep.py
              --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT
Note        As published: smooth L1 (1/9 in the RPN, 1 in the box heads), 2000 proposals in
            training, no anchors that leave the image, losses of the stages weighted 1, 1/2, 1/4,
            deltas of the third stage scaled by 0.033 and 0.067. Unlike published: one mask head,
            detectron2's, where MMDetection has one for each stage.
"""

from ..common.models.cascade import cascade
from .mask_rcnn_vitdet_b_100ep import dataloader, model, optimizer, schedule, train

_rpn = model.proposal_generator
_rpn.anchor_boundary_thresh = 0
_rpn.post_nms_topk = [2000, 1000]
_rpn.smooth_l1_beta = 1 / 9
model.roi_heads = cascade(model.roi_heads)
for _stage, _weight in zip(model.roi_heads.box_predictors, (1.0, 0.5, 0.25), strict=True):
    _stage.smooth_l1_beta, _stage.loss_weight = 1.0, _weight
_last = model.roi_heads.box_predictors[2].box2box_transform
_last.weights = [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067]

train.init_checkpoint = "weights/easycv_cascade_mask_rcnn_vitdet_b_init.pth"
