"""What every published recipe has in common. Durations are in images; a step has 64."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # weights written by converter.py; none: random
    seed=0,
    device="auto",
    precision="fp16",
    eval_precision="fp32",  # as detectron2 and EVA evaluate, so as published AP; "auto" is faster
    num_images="???",
    epochs=None,  # stretches this and all other durations to so many rounds of the data
    reference_batch=64,  # the batch that optimizer.lr is for; another one makes the run say so
    checkpoint_every=5000 * 64,
    eval_every=5000 * 64,
    log_every=20,  # iterations
    keep_checkpoints=5,
    async_checkpoints=True,  # written beside the steps from a copy on the CPU
    best_metric=None,  # such as "bbox/AP": keep the weights that evaluate best, model_best.pth
    early_stopping=None,  # dict(metric="bbox/AP", patience=3, min_delta=0.1): evaluations, percent
    clip_grad_norm=None,
    ema_decay=None,  # of a moving average of the weights, evaluated beside them
    eval_weights="model",  # what --eval-only takes of a file: "model" or "ema"
    compile=False,  # torch.compile of the backbone's blocks
    accumulate=1,  # parts in which a process takes its images of a step, to save memory
    freeze_blocks=0,  # so many blocks, and the embeddings before them, do not learn
    on_bad_step="stop",  # a loss or gradient that is not finite: "stop" or "skip"
    max_bad_steps=10,  # then the run stops all the same
    loggers=[],  # beside files and TensorBoard: "wandb" (an extra of the package)
    allow_changed_data=False,  # let --resume go on with other data than the run's
    parallel="ddp",  # or "fsdp": weights and optimizer shared out over the processes
    step_timeout=1800,  # seconds; a step that takes longer ends the run; None: never
    # gradients travel between GPUs as fp16 with precision="fp16", which has a loss scale, as bf16
    # with "bf16", and as they are with "fp32"
    ddp=dict(fp16_compression=True),
)
