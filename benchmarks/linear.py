"""Time linear layers: `vitdet.layers.parts.linear` and torch's own on the same inputs, in turn.

    python benchmarks/linear.py [--repeat 9] [--threads 2] [--write]

Sizes are those of the layers of ViT-B and ViT-L at 1024 pixels, and small ones, where the layer
falls back to torch's own. Results are compared before timing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Table, in_turn, parser, write

from vitdet.layers.parts import linear

# tokens, channels in, channels out
SIZES = (
    (4096, 768, 2304),
    (4096, 768, 768),
    (4096, 768, 3072),
    (4096, 3072, 768),
    (4096, 1024, 4096),
    (1024, 96, 288),
    (256, 96, 288),
    (64, 96, 288),
)
TOLERANCE = 1e-4


def compare(size: tuple[int, int, int], repeat: int, backward: bool) -> list[str]:
    """Return the cells of a size: GFLOP/s of torch and of ours, and the ratio of their times."""
    tokens, inner, outer = size
    torch.manual_seed(0)
    tensors = [torch.randn(tokens, inner), torch.randn(outer, inner) / inner**0.5]
    tensors.append(torch.randn(outer))
    outside = torch.randn(tokens, outer)
    for tensor in tensors:
        tensor.requires_grad_(backward)

    def run(function: object) -> list[torch.Tensor]:
        y = F.linear(*tensors) if function is F.linear else linear(*tensors)
        return [y, *torch.autograd.grad(y, tensors, outside)] if backward else [y]

    for ours, theirs in zip(run(linear), run(F.linear), strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if error > TOLERANCE:
            raise SystemExit(f"{size}: results differ by {error}")
    times = in_turn({"torch": lambda: run(F.linear), "ours": lambda: run(linear)}, repeat)
    flops = 2.0 * tokens * inner * outer * (3 if backward else 1)
    rates = [f"{flops / times[name].median / 1e9:.0f}" for name in ("torch", "ours")]
    return [*rates, f"{times['torch'].ratio(times['ours']):.2f}"]


def main() -> None:
    """Run the benchmark."""
    args = parser(__doc__, repeat=9).parse_args()
    torch.set_num_threads(args.threads)
    both = ("torch", "ours", "ratio")
    table = Table("tokens", "in", "out", *both, *(f"{name}, backward too" for name in both))
    for size in SIZES:
        cells = [
            cell for backward in (False, True) for cell in compare(size, args.repeat, backward)
        ]
        table.add(*size, *cells)
    if args.write:
        about = "Linear layers in float32: GFLOP/s, and torch's time over ours."
        write("linear", about, table.lines)


if __name__ == "__main__":
    main()
