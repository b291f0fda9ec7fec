"""What every published recipe of ViTDet trains with (arXiv 2203.16527, A.2).

AdamW has one weight decay, none on norms and on positions. "Norms" are the LayerNorms over tokens;
the LayerNorms over channels in pyramid and heads decay, as in detectron2. `layer_decay_rate` lowers
the learning rate block by block towards the input. Warm-up from 0.001 of the learning rate, then
two steps of 0.1. `Train` in vitdet/settings.py has all keys of `train`.
"""

from detectron2.config import LazyCall as L

from vitdet.optim import MultiStep, adamw

optimizer = L(adamw)(
    lr=1e-4,
    betas=[0.9, 0.999],
    weight_decay=0.1,
    weight_decay_norm=0.0,
    no_decay=["pos_embed"],
    layer_decay_rate=None,
)
schedule = L(MultiStep)(
    num_images="???", milestones="???", warmup=250 * 64, warmup_factor=0.001, gamma=0.1
)
train = dict(
    precision="fp16",
    num_images="???",  # seen in the training; a step has 64
    reference_batch=64,  # the batch that optimizer.lr is for; another one makes the run say so
    checkpoint_every=5000 * 64,
    eval_every=5000 * 64,
    ddp=dict(fp16_compression=True),
)
