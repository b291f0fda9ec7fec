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
from vitdet.layers.rel_pos import RelPos
from vitdet.utils.checks import InputError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# The interpreter has no products of bfloat16; float16 runs the same code.
INTERPRETED = [str(case) for case in kernel_cases.CASES if case.dtype != "bfloat16"]


def interpret(*words: str) -> dict:
    """Run Python under Triton's interpreter, which is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return interpret(kernel_cases.__file__, "triton_rel_pos", *INTERPRETED)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_programs_equal_eager(interpreted, name):
    kernel_cases.check(interpreted[name], name.rpartition("-")[2])


COMPILED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from kernel_cases import Case, run
from vitdet.layers import attention as door

whole = torch.compile(door.attention, backend="aot_eager", fullgraph=True)
case = Case((3, 4), 16)
expected = run(case, "triton_rel_pos", torch.float32, "cpu")
import kernel_cases
kernel_cases.attention = whole
found = run(case, "triton_rel_pos", torch.float32, "cpu")
print(json.dumps({name: torch.equal(found[name], expected[name]) for name in expected}))
"""


def test_one_graph_under_a_compiler_with_the_same_numbers():
    folder = str(Path(kernel_cases.__file__).parent)
    same = interpret("-W", "ignore", "-c", COMPILED, folder)
    assert same == {"out": True, "qkv": True, "h": True, "w": True}


CHECKED = """
import json, torch
from vitdet.layers.kernels import triton_rel_pos

q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 6, 16))
h, w = torch.randn(1, 1, 6, 2, requires_grad=True), torch.randn(1, 1, 6, 3, requires_grad=True)
done = torch.library.opcheck(
    torch.ops.vitdet.rel_pos_attention.default,
    (q, k, v, h, w, 0.25),
    test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
)
print(json.dumps(done))
"""


def test_operator_is_what_it_says_it_is():
    assert set(interpret("-W", "ignore", "-c", CHECKED).values()) == {"SUCCESS"}


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
