"""What recipes of MMDetection's descendants share: epochs of COCO, and AdamW with their rules.

Their epochs go through the 117266 images of train2017 that have an object. All durations are in
images.
"""

from .training import optimizer, schedule, train

EPOCH = 117_266

train.precision = "fp32"
train.ddp.fp16_compression = False
train.num_images = 100 * EPOCH
schedule.num_images = 100 * EPOCH
train.checkpoint_every = EPOCH
train.eval_every = 4 * EPOCH

optimizer.weight_decay_norm = None
optimizer.weight_decay_vectors = None
optimizer.no_decay = []
optimizer.num_layers = None

schedule.milestones = [88 * EPOCH, 96 * EPOCH]
