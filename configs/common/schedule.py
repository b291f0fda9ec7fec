"""Warm-up from 0.001 of the learning rate, then two steps of 0.1. All durations are in images."""

from detectron2.config import LazyCall as L

from vitdet.optim import MultiStep

schedule = L(MultiStep)(
    num_images="???",
    milestones="???",  # images seen
    warmup=250 * 64,
    warmup_factor=0.001,
    gamma=0.1,
)
