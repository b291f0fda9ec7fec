"""RetinaNet, a small Vision Longformer: the embedded data set of drawn shapes, on a CPU.

Source      this project. The backbone is that of mask_rcnn_vil_shapes.py, the head RetinaNet's
            (arXiv 1708.02002) with two narrow layers, on the strides 4, 8 and 16.
Schedule    15000 images = 3750 iterations x 4, cosine, warm-up 200 iterations
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from ..common.models.retinanet_vil import model
from .mask_rcnn_vil_shapes import dataloader, optimizer, schedule, train
from .mask_rcnn_vil_shapes import model as _mask_rcnn

model.backbone = _mask_rcnn.backbone
model.head.update(
    input_shape=[L(ShapeSpec)(channels=64) for _ in range(3)],
    conv_dims=[64, 64],
    num_anchors=2,
)
model.anchor_generator.update(
    sizes=[[12, 18], [28, 40], [60, 88]], aspect_ratios=[1.0], strides=[4, 8, 16], offset=0.5
)
model.head_in_features = ["p2", "p3", "p4"]
model.num_classes = 6
dataloader.train.mapper.use_masks = False
train.update(output_dir="output/shapes_vil_retinanet", num_images=15000)
schedule.num_images = 15000
