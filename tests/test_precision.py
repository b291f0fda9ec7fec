"""The number format that a run computes in."""

from __future__ import annotations

import pytest
import torch

from vitdet.utils.checks import InputError
from vitdet.utils.precision import autocast_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_takes_bf16_only_where_the_processor_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert autocast_dtype("auto", CPU) is expected
    assert autocast_dtype("bf16", CPU) is torch.bfloat16  # what is asked for by name is done


def test_named_precisions():
    assert autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("fp16", CPU) is torch.float16
    with pytest.raises(InputError, match=r"one of auto, bf16, fp16, fp32, got fp8\. auto"):
        autocast_dtype("fp8", CPU)
