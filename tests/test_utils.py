"""Room 0: errors, seeds, warnings."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from vitdet.utils import env, quiet
from vitdet.utils.checks import InputError, fail, nearest


def test_an_error_is_one_line_with_expected_got_and_remedy():
    with pytest.raises(InputError) as caught:
        fail("file\nx", expected="a JPEG", got="text", remedy="Remove it.")
    assert str(caught.value) == "file x: expected a JPEG, got text. Remove it."


def test_nearest_name():
    assert nearest("sed", ["seed", "device"]) == "seed"
    assert nearest("zzz", ["seed", "device"]) is None


def test_seeds_are_the_same_everywhere_and_differ_with_each_number():
    assert env.seed_from(0, 1) == 1506311409109703068
    seeds = {env.seed_from(*numbers) for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_random_state_repeats_inside_and_restores_outside():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    env.seed_all(3)
    undisturbed = draw()
    env.seed_all(3)
    with env.random_state(7):
        first = draw()
    assert draw() == undisturbed
    with env.random_state(7):
        assert draw() == first


def test_only_the_listed_warnings_of_dependencies_are_quiet():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.quiet_dependencies()
        warnings.warn("torch.meshgrid: in an upcoming release, it will", stacklevel=1)
        warnings.warn("something new", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["something new"]


def test_importing_the_package_prints_nothing():
    code = "import vitdet, vitdet.engine.run, vitdet.predict.predictor"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_description_names_versions_and_the_state_of_the_checkout():
    found = env.describe()
    assert torch.__version__.startswith(found["torch"])
    assert found["device"]
    assert found["git"]
