"""What tests of several folders share: the file of a small detector that is quick on a CPU.

With several workers (`-n 2 --dist loadgroup`) the tests of a file stay together, for their
fixtures, so do those of the recipes, which are built once, and those that start processes of their
own, which would be too many at once.
"""

from __future__ import annotations

import resource
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig

from vitdet import checkpoint
from vitdet.config import build_model, load_config, save_config
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.utils.env import random_state

RECIPE = Path(__file__).resolve().parents[1] / "configs/mini/mask_rcnn_eva02_shapes.py"


@dataclass(frozen=True)
class DrawnRun:
    """A file as a run leaves it, with random weights, and the images that its recipe tests on."""

    weights: Path
    images: list[Path]
    annotations: Path
    cfg: DictConfig


@pytest.fixture(scope="session")
def drawn_run(tmp_path_factory):
    """The detector of the drawn shapes: it finds 20 things of low score in each of six images."""
    folder = tmp_path_factory.mktemp("drawn_run")
    dataset = shapes_dataset(folder / "data", "val", num_images=6)
    settings = [
        f"dataloader.test.dataset.root={folder / 'data'}",
        "dataloader.test.dataset.num_images=6",
        "dataloader.test.num_workers=0",
        "dataloader.test.batch_size=2",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
        "model.roi_heads.box_predictor.test_topk_per_image=20",
        "train.device=cpu",
        "train.precision=fp32",
    ]
    cfg = load_config(RECIPE, settings)
    save_config(cfg, folder / "config.yaml")
    states = []
    for seed in (0, 1):
        with random_state(seed):
            states.append(build_model(cfg.model).state_dict())
    note = {
        "class_names": list(CLASSES),
        "config": (folder / "config.yaml").read_text(encoding="utf-8"),
        "environment": {"python": "3"},
    }
    content = {"model": states[0], "ema_state": states[1], "images_seen": 0, "vitdet": note}
    checkpoint.write(folder / "model_final.pth", content)
    images = [Path(record["file_name"]) for record in dataset.records]
    return DrawnRun(folder / "model_final.pth", images, dataset.json_file, cfg)


@contextmanager
def largest_file(size):
    """Let no file grow beyond so many bytes: as good as a full disk, and it needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def signals_as_before():
    """A test that sets handlers of signals leaves none to the next."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PROCESSES = {
    *("test_bad_steps", "test_checkpoints", "test_ema", "test_fsdp", "test_kill"),
    *("test_launch", "test_resume", "test_signals", "test_train_net"),
}
RECIPES = {"test_configs", "test_config_models", "test_published_lr", "test_recipes_page"}


def pytest_collection_modifyitems(items):
    """Keep together what should run in one worker."""
    for item in items:
        name = item.path.stem
        group = "recipes" if name in RECIPES else name
        if name in PROCESSES and item.get_closest_marker("slow"):
            group = "processes"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Let what a test printed travel between processes, whatever characters are in it."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report
