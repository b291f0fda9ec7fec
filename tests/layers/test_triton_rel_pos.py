"""The Triton kernel: its arithmetic in Triton's interpreter, its code through Triton's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import kernel_cases
import pytest
import torch

from vitdet.layers.attention import attention
from vitdet.layers.kernels import triton_rel_pos
from vitdet.layers.positions import RelPos
from vitdet.utils.checks import InputError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# The interpreter has no products of bfloat16; float16 runs the same code.
INTERPRETED = [str(case) for case in kernel_cases.CASES if case.dtype != "bfloat16"]


# Triton's interpreter is chosen when Triton is imported, so this runs in a process of its own.
SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import kernel_cases
from kernel_cases import CASES, Case, differences, run

found = {str(case): differences(case, "triton_rel_pos") for case in CASES if str(case) in sys.argv}
case = Case((3, 4), 16)
expected = run(case, "triton_rel_pos", torch.float32, "cpu")
kernel_cases.attention = torch.compile(
    kernel_cases.attention, backend="aot_eager", fullgraph=True
)
whole = run(case, "triton_rel_pos", torch.float32, "cpu")
same = {name: torch.equal(whole[name], expected[name]) for name in expected}
q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 6, 16))
h, w = torch.randn(1, 1, 6, 2, requires_grad=True), torch.randn(1, 1, 6, 3, requires_grad=True)
checked = torch.library.opcheck(
    torch.ops.vitdet.rel_pos_attention.default,
    (q, k, v, h, w, 0.25),
    test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
)
print(json.dumps([found, same, list(checked.values())]))
"""


@pytest.mark.slow
def test_interpreted_programs_equal_eager_compiled_too():
    folder = str(Path(kernel_cases.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, *INTERPRETED],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    found, same, checked = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == INTERPRETED
    for name, differences in found.items():
        kernel_cases.check(differences, name.rpartition("-")[2])
    assert same == {"out": True, "qkv": True, "h": True, "w": True}
    assert set(checked) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (14, 14)])
@pytest.mark.parametrize("program", ["forward", "backward_queries", "backward_keys"])
def test_compiles_for_hopper_without_one(program, size, tmp_path, monkeypatch):
    """To machine code with Hopper's matrix instruction, in the shared memory of smaller cards."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vitdet.layers.kernels import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = triton_rel_pos.TILES[program, "hopper", 64]
    rows, columns = triton_rel_pos.split_grid(*size, tile.keys)
    even = size[0] % rows == 0 and size[1] % columns == 0
    constants = {"D": 64, "D_TILE": 64, "QUERIES": tile.queries, "ROWS": rows, "COLUMNS": columns}
    constants |= {"EVEN": even, "PRECISION": "ieee"}
    function = getattr(triton_programs, program)
    kinds = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {
        name: kinds.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    # As at a call: addresses and strides are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name.endswith("_ptr") or name.startswith("stride")
    }
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    built = compile(
        ASTSource(function, signature, places, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        },
    )
    products = {"forward": 2, "backward_queries": 3, "backward_keys": 4}[program]
    assert built.asm["ttgir"].count("ttng.warp_group_dot ") == products
    assert built.metadata.shared <= 99 * 1024
    assert len(built.asm["cubin"]) > 0


@pytest.mark.parametrize(
    ("grid", "keys", "expected"),
    [
        ((64, 64), 64, (1, 64)),
        ((14, 14), 64, (4, 16)),
        ((14, 14), 32, (2, 16)),
        ((64, 96), 64, (2, 32)),
        ((50, 84), 64, (2, 32)),
        ((128, 128), 64, (1, 64)),
        ((1, 5), 32, (1, 32)),
    ],
)
def test_tiles_hold_whole_rows_with_the_fewest_tiles(grid, keys, expected):
    assert triton_rel_pos.split_grid(*grid, keys) == expected


def test_it_needs_cuda_a_bias_and_one_type():
    q = torch.zeros(1, 1, 4, 16)
    rel_pos = RelPos(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(
        InputError, match=r"'triton_rel_pos': expected inputs that it supports, got"
    ):
        attention(q, q, q, rel_pos=rel_pos, backend="triton_rel_pos")
    on_meta = [x.to("meta") for x in (q, *rel_pos)]
    assert not triton_rel_pos.can_run(on_meta[0], RelPos(*on_meta[1:]))
