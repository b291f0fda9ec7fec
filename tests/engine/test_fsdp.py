from __future__ import annotations

import json

import parallel_workers
import pytest
import torch
from tiny_recipe import detector_node
from torch import nn

from vitdet import checkpoint
from vitdet.config import build_model
from vitdet.engine.launch import launch
from vitdet.engine.parallel import (
    check_parallel,
    gathered,
    is_shared_out,
    shard,
    shared_like,
    whole,
    without_sync,
)
from vitdet.utils.checks import InputError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    launch(parallel_workers.ddp_and_fsdp, 2, args=(str(folder),))
    return folder


def final(folder) -> dict:
    return checkpoint.read(folder / "model_final.pth")


def assert_close(ours: dict, theirs: dict, atol: float) -> None:
    assert ours["images_seen"] == theirs["images_seen"] == 32
    for part in ("model", "ema_state"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            assert type(value) is torch.Tensor
            torch.testing.assert_close(value, theirs[part][name], rtol=0, atol=atol, msg=name)


@pytest.mark.slow
def test_shared_weights_train_to_those_of_copies(runs):
    ours, theirs = final(runs / "fsdp"), final(runs / "ddp")
    assert_close(ours, theirs, 1e-6)
    first = checkpoint.read(runs / "ddp" / "model_000000016.pth")["model"]
    moved = [(value - first[name]).abs().max().item() for name, value in theirs["model"].items()]
    assert max(moved) > 1e-4  # the steps are large against the difference
    for index, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            mine = ours["optimizer"]["state"][index][name]
            torch.testing.assert_close(mine, value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_clipping_accumulation_and_recomputed_blocks_with_shared_weights(runs):
    assert_close(final(runs / "clipped_fsdp"), final(runs / "clipped_ddp"), 1e-6)
    apart = final(runs / "clipped_ddp")["model"], final(runs / "ddp")["model"]
    assert any(not torch.equal(value, apart[1][name]) for name, value in apart[0].items())


@pytest.mark.slow
def test_fp16_and_its_scaler_with_shared_weights(runs):
    ours, theirs = final(runs / "fp16_fsdp"), final(runs / "fp16_ddp")
    assert_close(ours, theirs, 1e-5)
    assert ours["scaler"] == theirs["scaler"] != {}


@pytest.mark.slow
def test_evaluation_with_shared_weights(runs):
    """Five test images: the processes have three and two, and none waits for the other."""
    results = {
        name: json.loads((runs / name / "results.json").read_text())["results"]
        for name in ("ddp", "fsdp")
    }
    assert results["fsdp"].keys() == {"bbox", "ema/bbox"}
    for task, values in results["fsdp"].items():
        assert values["AP"] == results["ddp"][task]["AP"] == 3  # images of the main process
        assert values["AP50"] == pytest.approx(results["ddp"][task]["AP50"], rel=1e-4)


@pytest.mark.slow
def test_resumes_with_shared_weights_are_exact(runs):
    assert_close(final(runs / "fsdp_to_fsdp"), final(runs / "fsdp"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp_to_fsdp", "fsdp_to_ddp"])
def test_resumes_from_one_kind_to_the_other(runs, name):
    assert_close(final(runs / name), final(runs / "ddp"), 1e-6)


def test_a_single_process_has_nothing_to_share():
    detector = build_model(detector_node())
    shard(detector)
    assert not is_shared_out(detector)
    kinds = {type(parameter) for parameter in detector.parameters()}
    assert kinds == {nn.Parameter}
    with gathered(detector), without_sync(detector):
        pass
    value = torch.ones(2)
    assert shared_like(value, value) is value
    state = {"a": [value, {"b": (value,)}], "n": 1}
    assert whole(state)["a"][1]["b"][0] is value
    assert whole(state)["n"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zero", False), r"train\.parallel: expected ddp or fsdp, got zero\."),
        (
            ("fsdp", True),
            r"train\.compile: expected none with train\.parallel=fsdp, got True\. "
            r"Set train\.compile=False, or train\.parallel=ddp\.",
        ),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    check_parallel("ddp", True)
    check_parallel("fsdp", False)
    with pytest.raises(InputError, match=message):
        check_parallel(*arguments)
