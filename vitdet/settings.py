"""`train` of a recipe: its keys, their types, what holds without them, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitdet.utils.checks import InputError, nearest


@dataclass
class EarlyStopping:
    """`train.early_stopping`: stop after evaluations in a row without improvement."""

    metric: str = MISSING  # such as "bbox/AP"
    patience: int = MISSING  # evaluations
    min_delta: float = 0.0  # less than so much above the best (percent for AP) is no improvement


@dataclass
class Train:
    """`train` of a recipe: every key, its type, and what holds where a recipe leaves it out."""

    output_dir: str = "./output"
    init_checkpoint: str | None = ""  # weights written by converter.py; none: random
    seed: int = 0
    device: str = "auto"
    precision: str = "fp16"
    eval_precision: str = "fp32"  # as detectron2 and EVA evaluate, so as published AP
    num_images: int = MISSING  # the length: images seen by all processes together
    epochs: float | None = None  # sets num_images to so many rounds of the data
    reference_batch: int | None = None  # the batch that optimizer.lr is for; the run says so
    checkpoint_every: Any = 5000 * 64  # images, "10%" of the training, "500 iterations"
    eval_every: Any = 5000 * 64  # the same
    log_every: int = 20  # iterations
    keep_checkpoints: int = 5
    async_checkpoints: bool = True  # written during the next steps from a copy on the CPU
    best_metric: str | None = None  # such as "bbox/AP": keep the best weights, model_best.pth
    early_stopping: EarlyStopping | None = None
    clip_grad_norm: float | None = None
    ema_decay: float | None = None  # of a moving average of the weights, evaluated too
    eval_weights: str = "model"  # what --eval-only takes of a file: "model" or "ema"
    compile: bool = False  # torch.compile of the backbone's blocks
    accumulate: int = 1  # parts in which a process takes its images of a step, to save memory
    freeze_blocks: int = 0  # so many blocks, and the embeddings before them, do not learn
    on_bad_step: str = "stop"  # a loss or gradient that is not finite: "stop" or "skip"
    max_bad_steps: int = 10  # then the run stops all the same
    loggers: list[str] | None = field(default_factory=list)  # "wandb" (an extra of the package)
    allow_changed_data: bool = False  # let --resume go on with other data than the run's
    parallel: str = "ddp"  # or "fsdp": weights and optimizer sharded over the processes
    step_timeout: float | None = 1800.0  # seconds a step may take before the run ends; None: never
    # Of DistributedDataParallel. fp16_compression: gradients travel between GPUs as fp16 with
    # precision="fp16", which has a loss scale, as bf16 with "bf16", and as they are with "fp32".
    ddp: dict[str, Any] | None = field(default_factory=lambda: {"fp16_compression": True})


# Of recipes that earlier versions saved; they changed no weights, and are passed over.
_FORMER_KEYS = ("looks_every", "sharded_checkpoints", "hash_images", "tags", "first_step_timeout")


def complete(train: DictConfig) -> DictConfig:
    """Return `train` of a recipe with the types of `Train` and with what it leaves out.

    Raises:
        InputError: an unknown key or a value of another type.
    """
    known = [each.name for each in fields(Train)]
    made: Any = OmegaConf.structured(Train)
    if train.get("ddp") is not None:
        made.ddp = {}  # what is given takes its place and does not join it
    for key in map(str, train):
        if key in _FORMER_KEYS:
            continue
        if key not in known:
            close = nearest(key, known)
            hint = f"Did you mean {close}?" if close else f"It has {', '.join(known)}."
            raise InputError(f"train.{key}: there is no such key. {hint}")
        try:
            if OmegaConf.is_missing(train, key):  # merging would take the default
                made[key] = MISSING
            else:
                made = OmegaConf.merge(made, OmegaConf.masked_copy(train, key))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"train.{key}: {reason}. vitdet/settings.py has its type.") from error
    assert isinstance(made, DictConfig)
    return made
