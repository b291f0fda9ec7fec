"""Sharded weights train to those of copies; processes save and evaluate the same statistics."""

import json
from types import SimpleNamespace

import pytest
import ranks
import torch
from pair import in_pair
from tiny_recipe import detector_node
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from vitdet import checkpoint
from vitdet.config import build_model
from vitdet.engine import parallel
from vitdet.engine.parallel import gathered, is_sharded, shard, without_sync

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    in_pair(ranks.ddp_and_fsdp, str(folder))
    return folder


def final(folder):
    return checkpoint.read(folder / "model_final.pth")


def assert_close(ours, theirs, atol):
    assert ours["images_seen"] == theirs["images_seen"]
    for part in ("model", "ema_state"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            assert type(value) is torch.Tensor
            torch.testing.assert_close(value, theirs[part][name], rtol=0, atol=atol, msg=name)


def test_sharded_weights_train_to_those_of_copies(runs):
    """Clipped; the sharded ones also with accumulation and recomputed blocks."""
    ours, theirs = final(runs / "fsdp"), final(runs / "ddp")
    assert_close(ours, theirs, 1e-6)
    first = checkpoint.read(runs / "ddp" / "model_000000016.pth")["model"]
    moved = [(value - first[name]).abs().max().item() for name, value in theirs["model"].items()]
    assert max(moved) > 1e-4  # the steps are large against the difference
    free = final(runs / "free_ddp")["model"]
    assert any(not torch.equal(value, free[name]) for name, value in theirs["model"].items())
    for index, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            mine = ours["optimizer"]["state"][index][name]
            torch.testing.assert_close(mine, value, rtol=0, atol=1e-6)


def test_fp16_and_its_scaler_with_sharded_weights(runs):
    ours, theirs = final(runs / "fp16_fsdp"), final(runs / "fp16_ddp")
    assert_close(ours, theirs, 1e-5)
    assert ours["scaler"] == theirs["scaler"] != {}


def test_evaluation_with_sharded_weights(runs):
    """Five test images: the processes have three and two, and none waits for the other."""
    results = {
        name: json.loads((runs / name / "results.json").read_text())["results"]
        for name in ("ddp", "fsdp")
    }
    assert results["fsdp"].keys() == {"bbox", "ema/bbox"}
    for task, values in results["fsdp"].items():
        assert values["AP"] == results["ddp"][task]["AP"] == 3  # images of the main process
        assert values["AP50"] == pytest.approx(results["ddp"][task]["AP50"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "whole", "atol"),
    [("fsdp_to_fsdp", "fsdp", 0), ("ddp_to_fsdp", "ddp", 1e-6), ("fsdp_to_ddp", "ddp", 1e-6)],
)
def test_resumes_from_one_kind_to_the_other(runs, name, whole, atol):
    assert final(runs / name)["images_seen"] == 32
    assert_close(final(runs / name), final(runs / whole), atol)


def test_recomputed_blocks_change_nothing_in_two_processes(runs):
    """Stochastic depth draws the same numbers again when a block is computed once more."""
    assert_close(final(runs / "one"), final(runs / "recomputed"), 0)
    drawn, without = final(runs / "one")["model"], final(runs / "free_ddp")["model"]
    assert any(not torch.equal(value, without[name]) for name, value in drawn.items())


def test_a_single_process_has_nothing_to_shard():
    detector = build_model(detector_node())
    shard(detector)
    assert not is_sharded(detector)
    assert {type(parameter) for parameter in detector.parameters()} == {nn.Parameter}
    with gathered(detector), without_sync(detector):
        pass


# --- how gradients travel ------------------------------------------------------------------------

HOOKS = {
    None: None,
    torch.bfloat16: default_hooks.bf16_compress_hook,
    torch.float16: default_hooks.fp16_compress_hook,
}


@pytest.mark.parametrize("dtype", HOOKS)
@pytest.mark.parametrize("compress", [True, False])
def test_gradients_travel_in_the_precision_of_the_run(monkeypatch, dtype, compress):
    registered = []
    wrapped = SimpleNamespace(register_comm_hook=lambda state, hook: registered.append(hook))

    def fake(module, *, device_ids, forward_sync_buffers=True):
        assert (device_ids, forward_sync_buffers) == ([0], False)
        return wrapped

    monkeypatch.setattr(parallel, "DistributedDataParallel", fake)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    options = {"fp16_compression": compress}
    arguments = (nn.Linear(2, 2), torch.device("cuda"), options, dtype)
    assert parallel.distributed(*arguments) is wrapped
    assert registered == ([HOOKS[dtype]] if compress and dtype is not None else [])


# --- statistics of BatchNorm ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_batch_norm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch_norm")
    in_pair(ranks.batch_norm, str(folder))
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_save_and_evaluate_the_same_statistics(with_batch_norm, kind):
    folder = with_batch_norm / kind
    moments = []
    for images in (12, 24):
        mine, theirs = (torch.load(folder / f"{images}_rank{rank}.pth") for rank in (0, 1))
        for part in ("model", "ema_state"):
            statistics = [name for name in mine[part] if name.endswith("running_mean")]
            assert len(statistics) == 4
            assert mine[part].keys() == theirs[part].keys()
            for name, value in mine[part].items():
                assert torch.equal(value, theirs[part][name]), (images, part, name)
            moments.append(mine[part][statistics[0]])
    assert not any(torch.equal(value, moments[0]) for value in moments[1:])
    # the score at the end is that of the file
    for which, task in (("model", "bbox"), ("ema", "ema/bbox")):
        trained, again = json.loads((folder / f"{which}.json").read_text())
        assert trained.keys() == {"bbox", "ema/bbox"}
        assert trained[task]["AP"] == 6  # images of both processes
        assert again[task]["AP50"] == trained[task]["AP50"]
    assert trained["bbox"]["AP50"] != trained["ema/bbox"]["AP50"]
