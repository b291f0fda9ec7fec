"""What an evaluation says while it runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from vitdet.engine import inference


def test_a_long_evaluation_says_how_far_it_is(monkeypatch, caplog):
    times = iter([0.0, 5.0, 25.0, 30.0, 50.0, *range(60, 95, 7)])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(inference, "time", clock)
    batches = [[{"image_id": number}] for number in range(4)]
    with caplog.at_level(logging.INFO, "vitdet"):
        assert list(inference._told(batches)) == batches
        assert list(inference._told(iter(batches))) == batches  # of unknown length
    assert [record.getMessage() for record in caplog.records] == [
        "evaluated 2/4 batches  eta 0:00:25",
        "evaluated 4/4 batches  eta 0:00:00",
        "evaluated 3 batches",
    ]


def test_a_short_one_says_nothing(caplog):
    with caplog.at_level(logging.INFO, "vitdet"):
        assert list(inference._told([[], []])) == [[], []]
    assert not caplog.records
