"""Checkpoints as folders to which every process writes its own part (torch.distributed.checkpoint).

For weights that are shared out (`train.parallel=fsdp`) and too large to be gathered in one process.
Any number of processes can read the folder again. `python -m vitdet.engine.sharded FOLDER OUT.pth`
makes it a single file.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vitdet import checkpoint
from vitdet.checkpoint import AVERAGE
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import barrier, broadcast_object, is_main, world_size

SUFFIX = ".parts"
_REST = "rest.pth"  # what is no tensor of the three below, and where they belong
_SEPARATOR = "/"
_DAMAGE = (dcp.CheckpointException, OSError, RuntimeError, ValueError, EOFError, KeyError)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a trainer's state to a new folder; every process must call it.

    It is complete when this returns: who must not leave half of it behind gives a temporary name.

    Args:
        path: of the folder. What is there goes first.
        state: what `Trainer.state_dict` gives, with tensors that are shared out, and whatever
            plain values a checkpoint holds beside it.

    Raises:
        InputError: the disk of a process refuses.
    """
    if is_main():
        shutil.rmtree(path, ignore_errors=True)
    barrier()
    failure = None
    try:
        writer = dcp.FileSystemWriter(path, sync_files=True)
        with _quiet():
            dcp.save(dict(_tensors(state)), storage_writer=writer, no_dist=world_size() == 1)
        if is_main():
            checkpoint.write(path / _REST, _rest(state))
    except (InputError, *_DAMAGE) as error:
        failure = f"output {path}: it cannot be written ({_cause(error)}). Check space and rights."
    # dcp tells every process of the error of one; the last part is the main process's alone.
    failure = broadcast_object(failure)
    if failure is not None:
        raise InputError(failure)


def read(
    path: Path, detector: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Return the state in a folder, as `checkpoint.read` returns that in a file.

    Args:
        path: of the folder.
        detector: when its weights are shared out, every process reads only its own part, and all
            must call this. Without one the tensors are whole, and a single process may read.
        optimizer: of the detector.

    Raises:
        InputError: no such folder, or a damaged one.
    """
    try:
        alone = detector is None or world_size() == 1
        reader = dcp.FileSystemReader(path)
        content = checkpoint.read(path / _REST)
        stored = reader.read_metadata().state_dict_metadata
        weights = _weights(detector, optimizer)
        tensors = {
            name: _room(name, each, weights)
            for name, each in stored.items()
            if isinstance(each, TensorStorageMetadata)
        }
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
    except _DAMAGE as error:
        raise InputError(
            f"checkpoint {path}: it cannot be read ({_cause(error)}). Take the one before it."
        ) from error
    for name, tensor in tensors.items():
        _put(content, name.split(_SEPARATOR), tensor)
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process saves or loads alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights, average and moments under names that say where they belong."""
    for part in ("model", AVERAGE):
        for name, value in state.get(part, {}).items():
            yield f"{part}{_SEPARATOR}{name}", value
    for index, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            yield _SEPARATOR.join(("optimizer", "state", str(index), name)), value


def _rest(state: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in state.items() if name not in ("model", AVERAGE)}
    return {**rest, "optimizer": {**state["optimizer"], "state": {}}}


def _put(content: dict[str, Any], place: list[str], tensor: torch.Tensor) -> None:
    *above, last = place
    if above[0] == "optimizer":
        moments = content["optimizer"]["state"].setdefault(int(above[2]), {})
        moments[last] = tensor
    else:
        content.setdefault(above[0], {})[last] = tensor


def _weights(
    detector: nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, torch.Tensor]:
    """Return {a tensor's name, or the beginning of its moments': the weight that it belongs to}."""
    found: dict[str, torch.Tensor] = {}
    for name, value in detector.state_dict().items() if detector is not None else ():
        found |= {f"{part}{_SEPARATOR}{name}": value for part in ("model", AVERAGE)}
    groups = [] if optimizer is None else optimizer.param_groups
    for index, weight in enumerate(each for group in groups for each in group["params"]):
        found[_SEPARATOR.join(("optimizer", "state", str(index)))] = weight
    return found


def _room(
    name: str, stored: TensorStorageMetadata, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the tensor to read into: shared out as the weight that it belongs to."""
    owner = name.rpartition(_SEPARATOR)[0] if name.startswith("optimizer") else name
    weight = weights.get(owner)
    if weight is not None and weight.shape == stored.size:
        return torch.zeros_like(weight.detach(), dtype=stored.properties.dtype)
    return torch.zeros(stored.size, dtype=stored.properties.dtype)


def _cause(error: BaseException) -> str:
    """The innermost error of torch's collection of all processes' ones."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__


def main(arguments: list[str] | None = None) -> int:
    """Turn a folder into one file."""
    parser = argparse.ArgumentParser(
        prog="python -m vitdet.engine.sharded",
        description="Make one .pth file of a checkpoint that is a folder.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, help="ends in .pth")
    args = parser.parse_args(arguments)
    try:
        if not args.folder.is_dir():
            got = "a file" if args.folder.exists() else "nothing there"
            fail(
                f"checkpoint {args.folder}", expected="a folder", got=got, remedy="Check the path."
            )
        checkpoint.write(args.output, read(args.folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
