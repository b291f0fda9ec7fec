"""RetinaNet on the plain ViT-B with the simple feature pyramid, at 1024 x 1024 pixels.

Levels p3 to p5 from the pyramid, p6 and p7 by strided convolutions from p5. Heads as detectron2's
defaults: the paper shows RetinaNet in Fig. 5 and says no more than that all else stays.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from .mask_rcnn_vitdet import model as _mask_rcnn
from .retinanet_vil import model

model.backbone = _mask_rcnn.backbone
model.backbone.scale_factors = [2.0, 1.0, 0.5]  # strides 8, 16, 32: p3 to p5
model.backbone.top_block = L(LastLevelP6P7)(in_channels=256, out_channels=256, in_feature="p5")
