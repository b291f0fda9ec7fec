"""Flash attention with the decomposed position bias inside, written in Triton.

Forward and backward hold no L x L matrix (Dao et al., "FlashAttention"), and sums have one order,
so gradients are the same in every run. A tile of keys is made of whole grid rows, or of whole
parts of long rows, each padded to a power of two (14 to 16): `rel_pos.h` is then one number a query
and row, `rel_pos.w` one tile for all rows, and their gradients are sums of a tile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from vitdet.layers.positions import RelPos

Tensor = torch.Tensor

PACKAGE = "triton"
# Read when this file is imported, so that torch.compile sees constants.
_INSTALLED = find_spec(PACKAGE) is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Queries and keys of a tile (powers of two), and how many warps and stages compute it."""

    queries: int
    keys: int
    warps: int
    stages: int


# By program, kind of card and width of a head. Chosen from what the compiler reports for bfloat16,
# not from timings, which `benchmarks/attention.py --tiles` takes: on Hopper (sm_90) no register is
# spilled, on others (compiled for sm_80) at most 120 bytes are; all need at most 97 KiB of shared
# memory, which every card since Ampere has. Hopper's matrix instruction wants at least 64 columns.
TILES: dict[tuple[str, str, int], Tile] = {
    ("forward", "hopper", 64): Tile(128, 64, 8, 3),
    ("forward", "hopper", 128): Tile(128, 64, 8, 2),
    ("forward", "other", 64): Tile(128, 64, 8, 3),
    ("forward", "other", 128): Tile(128, 64, 8, 2),
    ("backward_queries", "hopper", 64): Tile(128, 64, 8, 2),
    ("backward_queries", "hopper", 128): Tile(64, 32, 4, 2),
    ("backward_queries", "other", 64): Tile(64, 32, 4, 2),
    ("backward_queries", "other", 128): Tile(64, 32, 4, 2),
    ("backward_keys", "hopper", 64): Tile(64, 128, 8, 2),
    ("backward_keys", "hopper", 128): Tile(32, 64, 4, 2),
    ("backward_keys", "other", 64): Tile(64, 32, 4, 2),
    ("backward_keys", "other", 128): Tile(32, 64, 4, 2),
}
# float32 is exact by default, so without matrix instructions; some 600 bytes are spilled.
FLOAT32 = Tile(32, 32, 4, 1)


@torch.compiler.assume_constant_result
def _capable(index: int | None) -> bool:
    """Whether a CUDA device has what the programs need: Ampere or later."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def can_run(q: Tensor, rel_pos: RelPos | None) -> bool:
    """With a bias in one type with q, heads of 16 to 128, and Triton for the device.

    On a CPU that is Triton's interpreter, asked for by TRITON_INTERPRET=1: slow, for tests.
    """
    if rel_pos is None or not _INSTALLED or q.dtype not in _TYPES or q.ndim != 4:
        return False
    if torch.jit.is_tracing():
        return False  # a traced graph should run without this file
    if not (16 <= q.shape[-1] <= 128 and rel_pos.h.dtype == rel_pos.w.dtype == q.dtype):
        return False
    if q.device.type == "cpu":
        # The interpreter multiplies matrices of bfloat16 as if they were integers.
        return _INTERPRETED and q.dtype != torch.bfloat16
    return q.device.type == "cuda" and _capable(q.device.index)


def attention(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, scale: float) -> Tensor:
    """Compute what `vitdet.layers.attention.eager` computes; see there for arguments and shapes."""
    assert rel_pos is not None, "can_run() wants a bias"
    return _forward(q, k, v, rel_pos.h, rel_pos.w, scale)[0]


def split_grid(height: int, width: int, keys: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of `keys` keys that covers a grid with the fewest tiles."""
    found = [(keys // columns, columns) for columns in (16, 32, 64, 128) if columns <= keys]
    return min(found, key=lambda tile: (-(-height // tile[0]) * -(-width // tile[1]), tile[0]))


def _like_output(x: Tensor) -> Tensor:
    """Return an empty (B, N, L, D) that lies as (B, L, N, D), as what comes next reads it."""
    B, N, L, D = x.shape
    return x.new_empty(B, L, N, D).transpose(1, 2)


class _Launch:
    """What the programs have in common for one call."""

    def __init__(self, q: Tensor, h: Tensor, w: Tensor) -> None:
        self.B, self.N, self.L, self.D = q.shape
        self.H, self.W = h.shape[-1], w.shape[-1]
        self.dtype, self.strides, self.card = q.dtype, q.stride()[:3], card(q.device)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if tf32 else "ieee"

    def tile(self, program: str) -> tuple[Tile, int, int]:
        """Return the tile of a program, with its rows and columns of keys."""
        tile = TILES[program, self.card, 64 if self.D <= 64 else 128]
        if self.dtype == torch.float32:
            tile = FLOAT32
        return tile, *split_grid(self.H, self.W, tile.keys)

    def run(self, program: str, programs: int, tensors: list[Tensor], *numbers: Any) -> None:
        """Run a program on B * N * `programs` tiles."""
        from vitdet.layers.kernels import triton_programs

        tile, rows, columns = self.tile(program)
        function: Any = getattr(triton_programs, program)
        with torch.cuda.device_of(tensors[0]):
            function[(programs * self.B * self.N,)](
                *tensors,
                *self.strides,
                *numbers,
                D=self.D,
                D_TILE=max(16, 1 << (self.D - 1).bit_length()),
                QUERIES=tile.queries,
                ROWS=rows,
                COLUMNS=columns,
                EVEN=self.H % rows == 0 and self.W % columns == 0,
                PRECISION=self.precision,
                num_warps=tile.warps,
                num_stages=tile.stages,
                enable_fp_fusion=True,
            )


def _one_layout(tensors: list[Tensor]) -> list[Tensor]:
    """Return q, k and v with the same strides and neighbouring channels, copied if need be."""
    strides = {x.stride() for x in tensors}
    if len(strides) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return [x.contiguous() for x in tensors]


def card(device: torch.device) -> str:
    """Return the kind of card in TILES."""
    on_cuda = device.type == "cuda"
    return "hopper" if on_cuda and torch.cuda.get_device_capability(device)[0] == 9 else "other"


@torch.library.custom_op("vitdet::rel_pos_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, w: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, L, D) and the logarithm of the sum of each query (B, N, L)."""
    q, k, v = _one_layout([q, k, v])
    launch = _Launch(q, h, w)
    out = _like_output(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles = -(-launch.L // launch.tile("forward")[0].queries)
    tensors = [q, k, v, h.contiguous(), w.contiguous(), out, lse]
    launch.run("forward", tiles, tensors, launch.N, launch.H, launch.W, scale)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, h: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    del k, v, h, w, scale  # the signature is the operator's
    return _like_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("vitdet::rel_pos_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, h and w."""
    q, k, v = _one_layout([q, k, v])
    dout, out = (x.transpose(1, 2).contiguous() for x in (dout, out))  # (B, L, N, D)
    h, w = h.contiguous(), w.contiguous()
    launch = _Launch(q, h, w)
    B, N, H, W = launch.B, launch.N, launch.H, launch.W
    dq, dk, dv = (_like_output(q) for _ in range(3))
    dw, delta = torch.empty_like(w), torch.empty_like(lse)
    tile, _, columns = launch.tile("backward_queries")
    parts = -(-W // columns)
    part_type = q.dtype if parts == 1 else torch.float32
    dh = q.new_empty(parts, B, N, H, launch.L, dtype=part_type)
    tensors = [q, k, v, h, w, out, dout, lse, delta, dq, dh, dw]
    launch.run("backward_queries", -(-launch.L // tile.queries), tensors, B, N, H, W, scale)
    _, rows, columns = launch.tile("backward_keys")
    tensors = [q, k, v, h, w, dout, lse, delta, dk, dv]
    launch.run("backward_keys", -(-H // rows) * -(-W // columns), tensors, N, H, W, scale)
    whole = dh[0] if parts == 1 else dh.sum(0).to(q.dtype)
    return dq, dk, dv, whole.transpose(-1, -2), dw


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del dout, k, v, out, lse, scale
    dh = h.new_empty(*h.shape[:2], h.shape[3], h.shape[2]).transpose(-1, -2)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    return _like_output(q), _like_output(q), _like_output(q), dh, dw


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, ctx.scale), None


_register: Callable[..., None] = _forward.register_autograd
_register(_differentiate, setup_context=_keep)
