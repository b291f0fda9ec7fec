from __future__ import annotations

import errno
import math
import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler

from vitdet.data import loaders
from vitdet.data.augment import large_scale_jitter
from vitdet.data.datasets import coco_dataset, subset
from vitdet.data.loaders import ImageStream, build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import shapes_dataset
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_from

Item = tuple[int, int, int, tuple[float, ...]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return shapes_dataset(tmp_path_factory.mktemp("shapes"), "train", num_images=11, size=48)


def _items(loader, num_batches) -> list[Item]:
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


def _as_process(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_each_epoch_shows_every_image_once_in_another_order(shapes):
    items = _items(_loader(shapes, total_batch_size=11), 3)
    assert [position for position, *_ in items] == list(range(33))
    images = [image for _, image, *_ in items]
    epochs = [images[i : i + 11] for i in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({boxes for *_, boxes in items}) > 25  # augmented anew


def test_seed_decides(shapes):
    first = _items(_loader(shapes), 3)
    assert _items(_loader(shapes), 3) == first
    assert _items(_loader(shapes, seed=4), 3) != first


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_stream(shapes, num_workers):
    assert _items(_loader(shapes, num_workers=num_workers), 6) == _items(_loader(shapes), 6)


@pytest.mark.parametrize("start", [4, 12, 24, 13])
def test_a_resumed_stream_goes_on_where_it_stopped(shapes, start):
    # 11 images an epoch, so that every start lies within one
    whole = _items(_loader(shapes), 12)
    assert _items(_loader(shapes, start=start), 4) == whole[start : start + 16]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one_process(shapes, monkeypatch, world):
    whole = _items(_loader(shapes), 6)
    for rank in range(world):
        _as_process(monkeypatch, rank, world)
        mine = _items(_loader(shapes, start=4), 4)
        share = 4 // world
        expected = [item for k in range(1, 5) for item in whole[4 * k + rank * share :][:share]]
        assert mine == expected


def test_positions_are_numbered_by_the_documented_rule(shapes):
    stream = ImageStream(11, seed=3)
    generator = torch.Generator().manual_seed(seed_from(3, 1, 1))
    second = torch.randperm(11, generator=generator).tolist()
    assert list(islice(stream.positions(11), 11)) == list(enumerate(second, 11))


def test_the_loader_leaves_the_random_state_alone(shapes):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    _items(_loader(shapes), 2)
    _items(_loader(shapes, num_workers=1), 2)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_mapping_is_seeded_by_the_position(shapes):
    def mapper(record):
        return {"numbers": (random.random(), np.random.rand(), float(torch.rand(())))}

    def numbers(**options):
        loader = build_train_loader(shapes, mapper, total_batch_size=2, seed=3, **options)
        return [item["numbers"] for batch in islice(loader, 3) for item in batch]

    first = numbers(num_workers=0)
    assert len(set(first)) == 6
    assert numbers(num_workers=2) == first
    random.seed(seed_from(3, 0))
    assert first[0][0] == random.random()


def _classes(*images: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"annotations": [{"category_id": c, "iscrowd": 0} for c in classes]} for classes in images
    ]


def test_repeat_factors_follow_the_formula():
    # class 0 in 10 of 10 images, class 1 in 4, class 2 in 1; threshold 0.9
    records = _classes((0, 2), *[(0, 1)] * 4, *[(0,)] * 5)
    dataset = type("Data", (), {"name": "data", "records": records})()
    loader = build_train_loader(
        dataset, dict, total_batch_size=1, num_workers=0, repeat_threshold=0.9
    )
    factors = loader.stream.repeat_factors
    expected = [math.sqrt(0.9 / 0.1), *[math.sqrt(0.9 / 0.4)] * 4, *[1.0] * 5]
    assert factors.tolist() == pytest.approx(expected)
    theirs = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.9)
    assert torch.equal(factors, theirs)


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


def test_repeated_streams_resume_too():
    stream = ImageStream(4, seed=5, repeat_factors=torch.tensor([1.0, 1.5, 2.25, 3.0]))
    whole = list(islice(stream.positions(), 60))
    lengths = {len(stream.epoch(e)) for e in range(6)}
    assert len(lengths) > 1  # epochs of several lengths, or the test says nothing
    for start in (1, 7, 8, 9, 30):
        assert list(islice(stream.positions(start), 20)) == whole[start : start + 20]


def test_images_without_objects_are_left_out(tiny):
    dataset = coco_dataset(tiny.json_file, tiny.images)
    mapper = Mapper([], is_train=True)
    loader = build_train_loader(dataset, mapper, total_batch_size=1, num_workers=0)
    assert loader.num_images == 2
    assert {batch[0]["image_id"] for batch in islice(loader, 6)} == {1, 2}
    every = build_train_loader(
        dataset, mapper, total_batch_size=1, num_workers=0, filter_empty=False
    )
    assert {batch[0]["image_id"] for batch in islice(every, 6)} == {1, 2, 3}


def test_nothing_to_train_on(tiny):
    tiny.content["annotations"] = tiny.content["annotations"][3:]
    dataset = coco_dataset(tiny.write().json_file, tiny.images)
    with pytest.raises(InputError, match="images with objects to train on, got none among 3"):
        build_train_loader(dataset, dict, total_batch_size=1, num_workers=0)


def test_batches_must_be_shared_equally(shapes, monkeypatch):
    _as_process(monkeypatch, 0, 3)
    text = r"total_batch_size: expected a multiple of the number of processes \(3\), got 4"
    with pytest.raises(InputError, match=text):
        _loader(shapes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_one_line_also_from_a_worker(tiny, num_workers):
    dataset = coco_dataset(tiny.json_file, tiny.images)
    damaged = tiny.images / "2.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    loader = build_train_loader(
        dataset, Mapper([], is_train=True), total_batch_size=2, num_workers=num_workers
    )
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    text = str(caught.value)
    assert text.startswith(f"image {damaged}: damaged or not complete (")
    assert "\n" not in text
    assert "Traceback" not in text


def test_a_batch_that_shared_memory_has_no_room_for_is_one_line(shapes, monkeypatch):
    """A full /dev/shm: the worker inherits this, as it is forked."""

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loaders, "ForkingPickler", SimpleNamespace(dumps=full))
    loader = _loader(shapes, num_workers=1)
    text = r"^reading of images: .* through shared memory \(.*No space.*\/dev\/shm .*num_workers=0"
    with pytest.raises(InputError, match=text):
        next(iter(loader))


@pytest.mark.parametrize(
    ("sent", "text"), [("STOP", "timed out after 1.0"), ("KILL", "(is killed|exited)")]
)
def test_a_worker_that_brings_nothing_is_an_error(shapes, monkeypatch, sent, text):
    """torch's own; a training makes one line of it.

    What the worker has sent before is whole in the queue here: taking a tensor out of shared memory
    would wait for the worker, which the watch of a training ends.
    """
    monkeypatch.setattr(loaders, "TIMEOUT", 1.0)
    monkeypatch.setattr(loaders, "ForkingPickler", SimpleNamespace(dumps=pickle.dumps))
    others = set(multiprocessing.active_children())
    batches = iter(_loader(shapes, num_workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    try:
        os.kill(worker.pid, getattr(signal, f"SIG{sent}"))
        with pytest.raises(RuntimeError, match=rf"^DataLoader .*{text}"):
            _ = [next(batches) for _ in range(9)]
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize("number", [-1, 1.5, True, "2"])
def test_numbers_of_workers_that_are_none(shapes, number):
    text = rf"dataloader\.train\.num_workers: expected 0 or more .* got {number!r}\."
    with pytest.raises(InputError, match=text):
        _loader(shapes, num_workers=number)
    with pytest.raises(InputError, match=r"dataloader\.test\.num_workers: expected 0 or more"):
        build_test_loader(shapes, Mapper([], is_train=False), num_workers=number)


def test_data_sets_without_records_are_named():
    for build in (build_train_loader, build_test_loader):
        size = {"total_batch_size": 1} if build is build_train_loader else {}
        with pytest.raises(InputError, match=r"expected a data set with records, got a list with"):
            build([], Mapper([], is_train=False), num_workers=0, **size)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_shows_each_image_once(shapes, monkeypatch, world, batch_size):
    mapper = Mapper([], is_train=False)
    seen = []
    for rank in range(world):
        _as_process(monkeypatch, rank, world)
        loader = build_test_loader(shapes, mapper, batch_size=batch_size, num_workers=0)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch) <= batch_size for batch in batches)
        seen += [item["image_id"] for batch in batches for item in batch]
    assert seen == list(range(1, 12))


def test_more_processes_than_images(shapes, monkeypatch):
    _as_process(monkeypatch, 1, 5)
    loader = build_test_loader(subset(shapes, 3), Mapper([], is_train=False), num_workers=0)
    assert [item["image_id"] for batch in loader for item in batch] in ([], [1], [2])
    seen = []
    for rank in range(5):
        _as_process(monkeypatch, rank, 5)
        loader = build_test_loader(subset(shapes, 3), Mapper([], is_train=False), num_workers=1)
        seen += [item["image_id"] for batch in loader for item in batch]
    assert len(seen) == 3
    assert len(set(seen)) == 3


def test_an_empty_data_set_cannot_be_evaluated():
    dataset = type("Data", (), {"name": "nothing", "records": []})()
    with pytest.raises(InputError, match="data set nothing: expected at least one image, got none"):
        build_test_loader(dataset, dict)
