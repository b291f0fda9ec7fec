"""Training of ViTAE-Transformer/ViTDet: 25 rounds of train2017 four times over, in fp32.

No weight decay on vectors (norms, biases) and on positions; the published `custom_keys` say less,
but their constructor never reads them (mmcv_custom/layer_decay_optimizer_constructor.py).
"""

from .mmdet import optimizer, schedule, train

optimizer.weight_decay_vectors = 0.0
optimizer.no_decay = ["pos_embed", "cls_token", "rel_pos_"]
optimizer.layer_decay_rate = 0.7
schedule.warmup_factor = 0.067
