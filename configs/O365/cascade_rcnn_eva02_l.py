"""Cascade R-CNN (boxes alone), EVA-02-L at 1536 pixels: Objects365 v2, before COCO and LVIS.

Source      EVA-02 (arXiv 2303.11331); baaivision/EVA, EVA-02/det, rows eva02_L_m38m_to_o365 and
            eva02_L_in21k_to_o365, eva2_o365_cascade_mask_rcnn_vitdet_l_8attn_1536_lrd0p8.py
Published   no AP: both train on train and val together, and val is what is evaluated
Parameters  359.14 M
Schedule    400000 iterations x 160 images = 64.00 M images; lr / 10 at 320000 (80%) and 360000
            (90%); warm-up 5000 iterations
Start       eva02_L_pt_m38m_p14to16.pt (to go on to COCO) or eva02_L_pt_in21k_p14to16.pt (to LVIS,
            whose images are COCO's), through converter.py (docs/recipes.md)
Data        docs/data.md; the folder is Objects365, as in EVA's code (its README says o365). 365
            classes, by the annotation file.
Train       python train_net.py --config-file configs/O365/cascade_rcnn_eva02_l.py
              --num-gpus 8 --num-machines N --machine-rank RANK --dist-url tcp://HOST:PORT
Evaluate    python train_net.py --config-file configs/O365/cascade_rcnn_eva02_l.py
              --eval-only train.init_checkpoint=WEIGHTS
Note        Without masks boxes cannot be taken again from cut masks: they are cut themselves.
"""

from detectron2.config import LazyCall as L

from vitdet.data.datasets import joined_dataset

from ..common.data.coco import dataloader
from ..common.eva02 import optimizer, plain_nms, schedule, set_image_size, train
from ..common.models.cascade_mask_rcnn_eva02 import _large, model

model.backbone.net.update(_large)
set_image_size(dataloader, model, 1536)
model.backbone.net.global_block_indexes = [2, 5, 8, 11, 14, 17, 20, 23]
model.roi_heads = plain_nms(model.roi_heads)
model.roi_heads.update(num_classes=365, mask_in_features=None, mask_pooler=None, mask_head=None)

_names = ["objects365_v2_train", "objects365_v2_val"]
dataloader.train.dataset = L(joined_dataset)(names=_names)
dataloader.train.mapper.update(use_masks=False, recompute_boxes=False)
dataloader.train.total_batch_size = train.reference_batch = 160
dataloader.test.dataset.name = "objects365_v2_val"
optimizer.lr = 6e-5
optimizer.layer_decay_rate = 0.8
train.init_checkpoint = "weights/o365_cascade_rcnn_eva02_l_init.pth"
train.num_images = schedule.num_images = 400000 * 160
train.checkpoint_every, train.eval_every = 2500 * 160, 10000 * 160
schedule.milestones = [320000 * 160, 360000 * 160]
schedule.warmup = 5000 * 160
