"""What every published recipe has in common. Durations are in images; a step has 64."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # weights written by converter.py; none: random
    seed=0,
    device="auto",
    precision="fp16",
    num_images="???",
    checkpoint_every=5000 * 64,
    eval_every=5000 * 64,
    log_every=20,  # iterations
    keep_checkpoints=5,
    clip_grad_norm=None,
    ema_decay=None,  # of a moving average of the weights, evaluated beside them
    eval_weights="model",  # what --eval-only takes of a file: "model" or "ema"
    compile=False,  # torch.compile of the backbone's blocks
    ddp=dict(fp16_compression=True),  # gradients travel as fp16
)
