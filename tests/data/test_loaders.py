import errno
import math
import multiprocessing
import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import _utils

from vitdet.data import loaders
from vitdet.data.augment import large_scale_jitter
from vitdet.data.datasets import coco_dataset, subset
from vitdet.data.loaders import ImageStream, build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import shapes_dataset
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_from

TEST = Mapper([], is_train=False)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return shapes_dataset(tmp_path_factory.mktemp("shapes"), "train", num_images=11, size=48)


def _items(loader, num_batches):
    """What a training step would see: position, image, pixels, boxes; in the order it comes."""
    found = []
    for batch in islice(iter(loader), num_batches):
        for item in batch:
            boxes = tuple(item["instances"].gt_boxes.tensor.flatten().tolist())
            pixels = int(item["image"].long().sum())
            found.append((item["position"], item["image_id"], pixels, boxes))
    return found


def _loader(dataset, **options):
    mapper = Mapper(large_scale_jitter(48, 0.5, 1.5), is_train=True)
    return build_train_loader(
        dataset, mapper, **({"total_batch_size": 4, "num_workers": 0, "seed": 3} | options)
    )


def _as_process(monkeypatch, rank, world):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_the_stream_is_that_of_seed_and_position(shapes, monkeypatch):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = _items(_loader(shapes), 12)
    assert [position for position, *_ in whole] == list(range(48))
    images = [image for _, image, *_ in whole]
    epochs = [images[i : i + 11] for i in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({boxes for *_, boxes in whole}) > 35  # augmented anew
    # by the documented rule
    generator = torch.Generator().manual_seed(seed_from(3, 1, 1))
    second = torch.randperm(11, generator=generator).tolist()
    assert list(islice(ImageStream(11, seed=3).positions(11), 11)) == list(enumerate(second, 11))
    assert epochs[1] == [index + 1 for index in second]
    assert _items(_loader(shapes, seed=4), 3) != whole[:12]
    for num_workers in (1, 2):
        assert _items(_loader(shapes, num_workers=num_workers), 6) == whole[:24]
    assert random.getstate() == states[0]  # the training's own, left alone
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    for start in (4, 12, 13):  # 11 images an epoch, so that every start lies within one
        assert _items(_loader(shapes, start=start), 4) == whole[start : start + 16]
    for world in (2, 4):
        for rank in range(world):
            _as_process(monkeypatch, rank, world)
            share = 4 // world
            expected = [item for k in range(1, 5) for item in whole[4 * k + rank * share :][:share]]
            assert _items(_loader(shapes, start=4), 4) == expected


def test_repeat_factors_follow_the_formula():
    # class 0 in 10 of 10 images, class 1 in 4, class 2 in 1; threshold 0.9
    images = [(0, 2), *[(0, 1)] * 4, *[(0,)] * 5]
    records = [{"annotations": [{"category_id": each} for each in classes]} for classes in images]
    loader = _loader(SimpleNamespace(name="data", records=records), repeat_threshold=0.9)
    expected = [math.sqrt(0.9 / 0.1), *[math.sqrt(0.9 / 0.4)] * 4, *[1.0] * 5]
    assert loader.batches.stream.repeat_factors.tolist() == pytest.approx(expected)


def test_repeats_are_rounded_at_random_as_in_detectron2():
    factors = torch.tensor([1.0, 1.5, 2.25, 3.0])
    stream = ImageStream(4, seed=5, repeat_factors=factors)
    sampler = RepeatFactorTrainingSampler(factors, seed=0)
    counts = Counter()
    for epoch in range(200):
        indexes = stream.epoch(epoch).tolist()
        # detectron2's own rounding, given the same random numbers
        generator = torch.Generator().manual_seed(seed_from(5, 1, epoch))
        assert sorted(indexes) == sampler._get_epoch_indices(generator).tolist()
        counts.update(indexes)
    assert [counts[i] / 200 for i in range(4)] == pytest.approx(factors.tolist(), abs=0.12)
    whole = list(islice(stream.positions(), 60))
    assert len({len(stream.epoch(e)) for e in range(6)}) > 1  # or what follows says nothing
    for start in (1, 7, 8, 9, 30):
        assert list(islice(stream.positions(start), 20)) == whole[start : start + 20]


def test_images_without_objects_are_left_out(tiny):
    dataset, mapper = coco_dataset(tiny.json_file, tiny.images), Mapper([], is_train=True)
    for keep, wanted in ((True, {1, 2}), (False, {1, 2, 3})):
        options = {"total_batch_size": 1, "num_workers": 0, "filter_empty": keep}
        loader = build_train_loader(dataset, mapper, **options)
        assert {batch[0]["image_id"] for batch in islice(loader, 6)} == wanted


def test_wrong_arguments_are_named(shapes):
    for number in (-1, 1.5, True, "2"):
        text = rf"\.num_workers: expected 0 or more .* got {number!r}\."
        with pytest.raises(InputError, match=rf"dataloader\.train{text}"):
            _loader(shapes, num_workers=number)
        with pytest.raises(InputError, match=rf"dataloader\.test{text}"):
            build_test_loader(shapes, TEST, num_workers=number)
    empty = SimpleNamespace(name="none", records=[{"annotations": [{"iscrowd": 1}]}])
    with pytest.raises(InputError, match="images with objects to train on, got none among 1"):
        _loader(empty)
    with pytest.raises(InputError, match=r"expected a data set with records, got a list with"):
        _loader([])
    with pytest.raises(InputError, match="data set none: expected at least one image, got none"):
        build_test_loader(SimpleNamespace(name="none", records=[]), dict)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_one_line_also_from_a_worker(tiny, num_workers):
    dataset = coco_dataset(tiny.json_file, tiny.images)
    damaged = tiny.images / "2.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    mapper = Mapper([], is_train=True)
    loader = build_train_loader(dataset, mapper, total_batch_size=2, num_workers=num_workers)
    others = set(multiprocessing.active_children())
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert set(multiprocessing.active_children()) <= others  # though the error is still there
    text = str(caught.value)
    assert text.startswith(f"image {damaged}: damaged or not complete (")
    assert "\n" not in text


def test_a_batch_that_shared_memory_has_no_room_for_is_one_line(shapes, monkeypatch):
    """A full /dev/shm: the worker inherits this, as it is forked."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loaders, "ForkingPickler", SimpleNamespace(dumps=full))
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds for a worker's end
    text = r"^reading of images: .* through shared memory \(.*No space.*\/dev\/shm .*num_workers=0"
    with pytest.raises(InputError, match=text):
        next(iter(_loader(shapes, num_workers=1)))


class Stuck:
    """A mapper that waits for ever at the sixth image that its process reads."""

    def __init__(self):
        self.read = 0
        self.waits = multiprocessing.Event()

    def __call__(self, record):
        self.read += 1
        if self.read == 6:
            self.waits.set()
            multiprocessing.Event().wait()
        return {"image_id": record["image_id"]}


@pytest.mark.parametrize("killed", [False, True])
def test_a_worker_that_brings_nothing_is_an_error(shapes, monkeypatch, killed):
    """torch's own; a training makes one line of it.

    The worker ends between two batches: half a batch in the queue is for the watch of a training.
    """
    monkeypatch.setattr(loaders, "TIMEOUT", 5.0)  # the first batches come in time, too
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    others = set(multiprocessing.active_children())
    mapper = Stuck()
    loader = build_train_loader(shapes, mapper, total_batch_size=2, num_workers=1, seed=3)
    batches = iter(loader)
    assert [len(next(batches)) for _ in range(2)] == [2, 2]
    (worker,) = set(multiprocessing.active_children()) - others
    try:
        assert mapper.waits.wait(60)
        if killed:
            worker.kill()
        text = "(is killed|exited)" if killed else "timed out after 5.0"
        with pytest.raises(RuntimeError, match=rf"^DataLoader .*{text}"):
            next(batches)
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize(
    ("images", "world", "batch_size"), [(11, 1, 3), (11, 2, 1), (11, 4, 3), (3, 5, 1)]
)
def test_evaluation_shows_each_image_once(shapes, monkeypatch, images, world, batch_size):
    seen = []
    for rank in range(world):
        _as_process(monkeypatch, rank, world)
        part = subset(shapes, images)
        loader = build_test_loader(part, TEST, batch_size=batch_size, num_workers=0)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch) <= batch_size for batch in batches)
        seen += [item["image_id"] for batch in batches for item in batch]
    assert seen == list(range(1, images + 1))


def test_no_more_processes_read_than_there_are_cores(shapes, monkeypatch):
    """Torch would warn, and warnings are errors here; the batches are the same."""
    whole = _items(_loader(shapes), 6)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert _items(_loader(shapes, num_workers=50), 6) == whole
