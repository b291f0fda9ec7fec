"""Training of alibaba/EasyCV from v0.7 on: 100 epochs of train2017, fp16, layer-wise lr decay 0.7.

No weight decay on norms and positions of the backbone; all else decays, norms of pyramid and heads
too (core/optimizer/layer_decay_optimizer_constructor.py). `before_v07` has the rules of v0.6.
"""

from omegaconf import DictConfig

from .mmdet import optimizer, schedule, train

train.precision = "fp16"
optimizer.no_decay = [r"^backbone\.net\..*norm", "pos_embed"]
optimizer.layer_decay_rate = 0.7


def before_v07(adamw: DictConfig, steps: DictConfig) -> None:
    """Change to v0.6: one lr everywhere, no weight decay on biases, positions, and blocks' norms.

    The published rule is a search for "norm" or "bias" in names. The norms of pyramid, heads and
    propagation blocks are called gn, ln and bn there, so their weights decay.
    """
    adamw.layer_decay_rate = None
    adamw.no_decay = [
        r"^backbone\.net\.(blocks\.\d+\.)?norm\d?\.",
        r"bias",
        "pos_embed",
    ]
    steps.warmup_factor = 0.067
