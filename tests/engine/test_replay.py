"""`vitdet replay`: the batch of a bad step once more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_recipe import recipe

from vitdet import checkpoint
from vitdet.app import cli
from vitdet.engine.run import train
from vitdet.utils.checks import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run that stopped at its third step, of images 8 to 11: image 9 is not a number."""
    folder = tmp_path_factory.mktemp("run")
    cfg = recipe(folder, checkpoint_every=4)
    cfg.dataloader.train.poison_at = 9
    with pytest.raises(InputError):
        train(cfg)
    return folder


def replay(capsys, *arguments: object) -> tuple[int, list[str]]:
    status = cli.main(["replay", *map(str, arguments)])
    return status, capsys.readouterr().out.splitlines()


def test_the_image_at_fault_is_found(folder, capsys):
    file = folder / "bad_steps" / "000000008.pth"
    status, lines = replay(capsys, file)
    assert status == 0
    assert "rectangle_9.jpg (id 9)" in lines[0]
    assert lines[1] == f"weights of {file}, computed in float32"
    fault = "first not finite: the output of backbone.net.patch_embed.proj"
    assert lines[2].startswith("the batch: ")
    assert lines[2].endswith(fault)
    assert len(lines) == 3 + 4
    for position, line in enumerate(lines[3:], start=8):
        assert line.startswith(f"rectangle_{position}.jpg (id {position}): ")
        assert line.endswith(fault) == (position == 9)
        if position != 9:
            assert re.search(r"loss_rpn_cls=0\.\d+, .*, norm of the gradient \d", line)


def test_with_other_weights_and_images_all_may_be_finite(folder, capsys, tmp_path):
    content = checkpoint.read(folder / "bad_steps" / "000000008.pth")
    del content["model"]
    content["images"] = [content["images"][0], content["images"][2]]
    bad_steps = tmp_path / "bad_steps"
    bad_steps.mkdir()
    checkpoint.write(bad_steps / "x.pth", content)
    weights = folder / "model_000000008.pth"
    config = folder / "config.yaml"
    status, lines = replay(
        capsys, bad_steps / "x.pth", "--config-file", config, "--weights", weights
    )
    assert status == 1
    assert lines[1] == f"weights of {weights}, computed in float32"
    assert len(lines) == 3 + 2
    assert all("norm of the gradient" in line for line in lines[2:])
    assert cli.main(["replay", str(bad_steps / "x.pth"), "--config-file", str(config)]) == 2
    assert "expected --weights, weights in the file, or a checkpoint" in capsys.readouterr().err


def test_the_last_checkpoint_of_the_run_is_taken(folder, capsys):
    content = checkpoint.read(folder / "bad_steps" / "000000008.pth")
    del content["model"]
    file = folder / "bad_steps" / "without.pth"
    checkpoint.write(file, content)
    status, lines = replay(capsys, file)
    assert status == 0
    assert lines[1] == f"weights of {folder / 'model_000000008.pth'}, computed in float32"
