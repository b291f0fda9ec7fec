"""Images that cannot be read: replaced by a rule, counted once, and too many of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from itertools import islice

import pytest
import torch

from vitdet.data.bad_images import BadImages
from vitdet.data.loaders import TrainLoader, build_train_loader
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.env import seed_from

SIZE = 7


class Names:
    """A data set of 7 names."""

    name = "names"

    def __init__(self) -> None:
        self.records = [
            {"file_name": f"{index}.jpg", "annotations": [{"iscrowd": 0}]} for index in range(SIZE)
        ]


def mapper_without(bad: Collection[str]) -> Callable[[dict], dict]:
    def mapper(record: dict) -> dict:
        if record["file_name"] in bad:
            raise InputError(f"image {record['file_name']}: expected a JPEG, got text. Remove it.")
        return {"file_name": record["file_name"], "number": float(torch.rand(()))}

    return mapper


def loader(bad: Collection[str], limit: int, **options) -> TrainLoader:
    settings = {"total_batch_size": 4, "num_workers": 0, "seed": 3, **options}
    return build_train_loader(Names(), mapper_without(bad), max_bad_images=limit, **settings)


def shown(loader: TrainLoader, batches: int) -> list[tuple[int, str, float]]:
    return [
        (item["position"], item["file_name"], item["number"])
        for batch in islice(loader, batches)
        for item in batch
    ]


def test_the_place_of_a_bad_image_goes_to_one_that_follows_from_seed_and_position():
    whole, replaced = shown(loader((), 0), 7), shown(loader(("2.jpg",), 1), 7)
    assert [position for position, *_ in replaced] == list(range(28))
    for (position, name, number), other in zip(whole, replaced, strict=True):
        if name != "2.jpg":
            assert other == (position, name, number)
            continue
        generator = torch.Generator().manual_seed(seed_from(3, 2, position))
        order = [index for index in torch.randperm(7, generator=generator).tolist() if index != 2]
        assert other == (position, f"{order[0]}.jpg", number)
    assert len({name for _, name, _ in replaced}) == SIZE - 1
    several = {b[1] for a, b in zip(whole, replaced, strict=True) if a[1] == "2.jpg"}
    assert len(several) > 1  # not always the same one


def test_workers_processes_and_resumes_give_the_same_stream(monkeypatch):
    bad = ("2.jpg", "5.jpg")
    whole = shown(loader(bad, 2), 7)
    assert shown(loader(bad, 2, num_workers=2), 7) == whole
    assert shown(loader(bad, 2, start=12), 4) == whole[12:]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = [item for k in range(7) for item in whole[4 * k + 2 * rank :][:2]]
        assert shown(loader(bad, 2), 7) == mine


def test_each_is_counted_and_told_once(caplog):
    it = loader(("2.jpg", "5.jpg"), 2)
    with caplog.at_level(logging.WARNING, logger="vitdet"):
        shown(it, 14)  # eight epochs
    assert set(it.bad_images.messages) == {"2.jpg", "5.jpg"}
    told = [each.getMessage() for each in caplog.records if each.name.startswith("vitdet.")]
    lines = sorted(line.split(": ", 1)[1] for line in told)
    assert lines == [
        f"image {name}: expected a JPEG, got text. Remove it." for name in ("2.jpg", "5.jpg")
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_more_than_the_limit_stops_with_the_list(num_workers):
    it = loader(("2.jpg", "5.jpg"), 1, num_workers=num_workers)
    with pytest.raises(
        InputError,
        match=r"^training images: expected at most 1 that cannot be read \(dataloader\.train\."
        r"max_bad_images\), got 2: \[image .\.jpg: expected a JPEG, got text\. Remove it\.\] "
        r"\[image .\.jpg: .*\]\. Repair these",
    ):
        shown(it, 14)


def test_without_a_limit_the_first_one_stops():
    with pytest.raises(
        InputError, match=r"^image 2\.jpg: expected a JPEG, got text\. Remove it\.$"
    ):
        shown(loader(("2.jpg",), 0), 7)


def test_no_image_can_be_read():
    names = [f"{index}.jpg" for index in range(SIZE)]
    with pytest.raises(InputError, match=r"expected at most 3 .*, got 4: \["):
        shown(loader(names, 3), 1)
    with pytest.raises(InputError, match=r"^image .\.jpg: expected a JPEG, got text"):
        shown(loader(names, 100), 1)


def test_the_list_in_the_error_is_cut_and_names_are_one_line():
    images = BadImages(limit=1)
    with pytest.raises(InputError, match=r"got 30: (\[bad\] ){20}\.\.\.\. Repair"):
        images.add({f"{index}\n.jpg": "bad" for index in range(30)})
    assert "29 .jpg" in images.messages


def test_a_negative_limit():
    with pytest.raises(InputError, match=r"max_bad_images: expected 0 or more, got -1"):
        loader((), -1)
