"""What two processes must have in common, and how gradients travel between them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import parallel_workers
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from vitdet.engine import parallel
from vitdet.engine.launch import launch

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

    def fake(module: nn.Module, *, device_ids: list[int], forward_sync_buffers=True) -> object:
        assert (device_ids, forward_sync_buffers) == ([0], False)
        return wrapped

    monkeypatch.setattr(parallel, "DistributedDataParallel", fake)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    options = {"fp16_compression": compress}
    arguments = (nn.Linear(2, 2), torch.device("cuda"), options, dtype)
    assert parallel.distributed(*arguments) is wrapped
    assert registered == ([HOOKS[dtype]] if compress and dtype is not None else [])


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "scale", "error"),
    [(None, 1, 0), (torch.bfloat16, 1, 2**-8), (torch.float16, 65536, 2**-10)],
)
def test_small_gradients_arrive(alone, dtype, scale, error):
    """1e-5 to 1e-9, of which fp16, without a loss scale, has nothing below 6e-8."""
    weights = nn.Linear(50, 1, bias=False)
    module = DistributedDataParallel(weights)
    if (hook := parallel.compression(dtype)) is not None:
        module.register_comm_hook(None, hook)
    true = torch.logspace(-5, -9, 50)
    (module(true[None]).sum() * scale).backward()
    got = weights.weight.grad[0] / scale
    torch.testing.assert_close(got, true, rtol=error, atol=0)
    if dtype == torch.float16:
        assert int((true.half() == 0).sum()) > 10  # so it would be without the scale


@pytest.fixture(scope="module")
def with_batch_norm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch_norm")
    launch(parallel_workers.batch_norm, 2, args=(str(folder),))
    return folder


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_score_at_the_end_is_that_of_the_file(with_batch_norm, kind):
    folder = with_batch_norm / kind
    for which, task in (("model", "bbox"), ("ema", "ema/bbox")):
        trained, again = json.loads((folder / f"{which}.json").read_text())
        assert trained.keys() == {"bbox", "ema/bbox"}
        assert trained[task]["AP"] == 6  # images of both processes
        assert again[task]["AP50"] == trained[task]["AP50"]
    assert trained["bbox"]["AP50"] != trained["ema/bbox"]["AP50"]


@pytest.mark.slow
def test_results_go_to_the_main_process_alone(with_batch_norm):
    held = [json.loads((with_batch_norm / f"held{rank}.json").read_text()) for rank in (0, 1)]
    assert held == [[[0, 1, 2, 3], 12], [[1, 3], 6]]
