"""`vitdet strip FILE OUT`: a slim file of weights, class names and recipe, to predict with."""

from __future__ import annotations

import argparse

from vitdet.app.options import file_options
from vitdet.predict.loading import save_for_inference
from vitdet.weights import locate


def run(args: argparse.Namespace) -> int:
    """Write the file; return 0."""
    options = file_options(args)
    save_for_inference(args.source, args.output, overrides=args.overrides, **options)
    before, after = (path.stat().st_size / 2**20 for path in (locate(args.source), args.output))
    print(f"wrote {args.output}: {after:.1f} MiB ({args.source}: {before:.1f} MiB)")
    return 0
