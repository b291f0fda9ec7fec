"""Loaders whose stream of images is a pure function of (seed, position).

A position counts images over all processes from the start of training, so a stopped run goes on
with the next image, and the stream depends neither on the number of workers nor of processes.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cv2
import torch
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils import data

from vitdet.data.datasets import has_objects
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import hold_back, serve_parent
from vitdet.utils.env import random_state, seed_from

logger = logging.getLogger(__name__)

Record = dict[str, Any]
MapFunction = Callable[..., Record]  # of a record; of all records too where it has a `preset`
TIMEOUT = 600.0  # seconds within which the processes that read bring the next batch
_EPOCH = 1  # keeps the seeds of epochs apart from those of positions


class ImageStream:
    """Which image stands at which position.

    Epoch e is a permutation that depends on (seed, e) alone. With repeat factors (one of at least 1
    for each of `size` images) an image occurs floor(factor) or floor(factor) + 1 times an epoch,
    the fraction being the chance of the extra time, so epochs differ a little in length.
    """

    def __init__(self, size: int, seed: int, repeat_factors: torch.Tensor | None = None) -> None:
        self.size, self.seed, self.repeat_factors = size, seed, repeat_factors

    def epoch(self, number: int) -> torch.Tensor:
        """Return the image indexes of an epoch in their order, int64."""
        generator = torch.Generator().manual_seed(seed_from(self.seed, _EPOCH, number))
        indexes = torch.arange(self.size)
        if self.repeat_factors is not None:
            whole = torch.floor(self.repeat_factors)
            extra = torch.rand(self.size, generator=generator) < self.repeat_factors - whole
            indexes = torch.repeat_interleave(indexes, whole.long() + extra.long())
        return indexes[torch.randperm(len(indexes), generator=generator)]

    def positions(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (position, image index) without end, from position `start`."""
        number, offset, position = 0, start, start
        if self.repeat_factors is None:
            number, offset = divmod(start, self.size)
        while True:
            indexes = self.epoch(number)
            for index in indexes[offset:].tolist():
                yield position, index
                position += 1
            number, offset = number + 1, max(0, offset - len(indexes))


class Mapped(data.Dataset):
    """Maps (position, image index); a user's error becomes the value, so that it can travel."""

    def __init__(self, records: Sequence[Record], mapper: MapFunction, seed: int) -> None:
        # pickled into one tensor: worker processes share it instead of copying it page by page
        self._records = DatasetFromList(list(records), copy=False, serialize=True)
        self._mapper, self._seed = mapper, seed

    def __getitem__(self, key: tuple[int, int]) -> Record | InputError:
        """Return the model input of (position, image index), or why there is none."""
        position, index = key
        record = self._records[index]
        try:
            with random_state(seed_from(self._seed, position)):
                more = (self._records,) if getattr(self._mapper, "preset", None) else ()
                result = self._mapper(record, *more)
        except InputError as error:
            return error
        result["position"] = position
        return result


class TrainBatches:
    """This process's (position, image index) pairs, a list a batch, without end."""

    def __init__(self, stream: ImageStream, total_batch_size: int, start: int) -> None:
        self.stream, self.total_batch_size, self.start = stream, total_batch_size, start
        self._share = total_batch_size // distributed.world_size()
        self._first = distributed.rank() * self._share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        positions = self.stream.positions(self.start)
        while True:
            batch = list(islice(positions, self.total_batch_size))
            yield batch[self._first : self._first + self._share]


class Loader:
    """Iterable of lists of model inputs, one a batch; has a length where `batches` have one."""

    def __init__(self, mapped: Mapped, batches: Any, num_workers: int) -> None:
        self.mapped, self.batches, self.num_workers = mapped, batches, num_workers

    def __iter__(self) -> Iterator[list[Record]]:
        """Begin anew; raise what the mapper has raised, here or in a worker."""
        workers = min(self.num_workers, _cores())  # more only wait, and torch warns of them
        loader = data.DataLoader(
            self.mapped,
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_packed if workers else list,
            worker_init_fn=_start_worker,
            timeout=TIMEOUT if workers else 0,
            # of its own, because it draws a number and must not move the training's random state
            generator=torch.Generator(),
        )
        with hold_back():  # its workers start here
            iterator = iter(loader)
        error = None
        for packed in iterator:
            batch = _unpacked(packed)
            error = next((each for each in batch if isinstance(each, InputError)), None)
            if error is not None:
                break
            yield batch
        del iterator  # or the error's traceback would keep it, and torch wait for every worker
        if error is not None:
            raise error

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self.batches)


def build_train_loader(
    dataset: Any,
    mapper: MapFunction,
    *,
    total_batch_size: int,
    num_workers: int,
    seed: int = 0,
    repeat_threshold: float | None = None,
    filter_empty: bool = True,
    start: int = 0,
) -> Loader:
    """Return an endless iterable of lists of model inputs, one list an iteration.

    Batch k holds positions [k * T, (k + 1) * T) for a total batch of T, counted from `start`; rank
    r of R takes the r-th of R equal parts. Before an image is mapped, random, NumPy and torch are
    seeded by (seed, position), and their states restored after. Each input also gets `position`.

    Args:
        dataset: has `name` and `records`, which `mapper` turns into model inputs.
        total_batch_size: images an iteration over all processes, a multiple of their number.
        num_workers: reading processes for each training process, at most one a core; 0 reads in
            the process itself.
        seed: of order and augmentation.
        repeat_threshold: repeat-factor sampling ("LVIS", Gupta et al. 2019, Appendix B.2): an image
            whose rarest class is in a fraction f of the images is repeated sqrt(threshold / f)
            times. LVIS recipes use 0.001.
        filter_empty: leave out images without annotation other than crowd regions.
        start: images already seen, to resume.

    Raises:
        InputError: nothing to train on. While iterating: what the mapper raises, also in workers.
    """
    assert total_batch_size % distributed.world_size() == 0  # vitdet.engine.recipe has seen to it
    _check(dataset, num_workers, "train")
    records = dataset.records
    if filter_empty:
        records = [record for record in records if has_objects(record)]
        total = len(dataset.records)
        logger.info("%s: %d of %d images have objects", dataset.name, len(records), total)
    if not records:
        raise InputError(
            f"data set {dataset.name}: expected images with objects to train on, got none among "
            f"{len(dataset.records)} images. Check the annotation file."
        )
    if steps := getattr(mapper, "steps", ""):
        logger.info("augment %s", steps)
    of_records = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    factors = None if repeat_threshold is None else of_records(records, repeat_threshold)
    batches = TrainBatches(ImageStream(len(records), seed, factors), total_batch_size, start)
    return Loader(Mapped(records, mapper, seed), batches, num_workers)


def build_test_loader(
    dataset: Any, mapper: MapFunction, *, batch_size: int = 1, num_workers: int = 4
) -> Loader:
    """Return an iterable of lists of model inputs: each image once, over all processes.

    Each process has a contiguous part of the data set, in lists of `batch_size` images.
    """
    _check(dataset, num_workers, "test")
    if not dataset.records:
        raise InputError(f"data set {dataset.name}: expected at least one image, got none.")
    rank, world, size = distributed.rank(), distributed.world_size(), len(dataset.records)
    mine = range(rank * size // world, (rank + 1) * size // world)
    batches = [
        [(index, index) for index in mine[first : first + batch_size]]
        for first in range(0, len(mine), batch_size)
    ]
    return Loader(Mapped(dataset.records, mapper, 0), batches, num_workers)


def _cores() -> int:
    """How many this process may use; macOS does not tell more than how many there are."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def _check(dataset: Any, num_workers: Any, part: str) -> None:
    if not hasattr(dataset, "records"):
        got = type(dataset).__name__
        text = f"dataloader.{part}.dataset: expected a data set with records, got a {got} without."
        raise InputError(f"{text} Use coco_dataset, or a loader of your own.")
    if type(num_workers) is not int or num_workers < 0:
        text = f"dataloader.{part}.num_workers: expected 0 or more processes that read images, got "
        raise InputError(f"{text}{num_workers!r}. 0 reads in the training process itself.")


def _packed(items: list[Any]) -> bytes | InputError:
    """Put the tensors into shared memory here, where an error can still be told.

    torch's queue does it in a thread: without room there the batch would be lost without a word.
    """
    try:
        return bytes(ForkingPickler.dumps(items))
    except (OSError, RuntimeError) as error:
        return _no_room(error)


def _unpacked(packed: Any) -> list[Any]:
    try:
        batch = pickle.loads(packed) if isinstance(packed, bytes) else packed
    except (OSError, RuntimeError) as error:
        batch = _no_room(error)
    return [batch] if isinstance(batch, InputError) else batch


def _no_room(error: Exception) -> InputError:
    return InputError(
        f"reading of images: a batch cannot be handed over through shared memory ({error}). Look "
        "at the size of /dev/shm and the limit of open files (ulimit -n), or set "
        "dataloader.train.num_workers=0."
    )


def _start_worker(_: int) -> None:
    serve_parent()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
