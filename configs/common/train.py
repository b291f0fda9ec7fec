"""What every published recipe has in common; `Train` in vitdet/settings.py has all keys."""

train = dict(
    precision="fp16",
    num_images="???",  # seen in the training; a step has 64
    reference_batch=64,  # the batch that optimizer.lr is for; another one makes the run say so
    checkpoint_every=5000 * 64,
    eval_every=5000 * 64,
    ddp=dict(fp16_compression=True),
)
