"""Convert a published checkpoint for a recipe: read, rename, resize, account for every key, write.

    python converter.py --source-model mae_pretrain_vit_base.pth --output-model vit_b.pth \
        --config-file configs/COCO/mask_rcnn_vitdet_b_100ep.py

Exit status: 0 written, 1 some keys are unaccounted for (nothing is written but the report),
2 an input is wrong. docs/conversion.md lists the formats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vitdet import checkpoint
from vitdet.convert import FORMATS, Report, UnaccountedError, convert
from vitdet.utils.checks import InputError, fail
from vitdet.utils.files import replacing


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line; underscores in option names are read as dashes."""
    formats = "; ".join(f"{fmt.name}: {fmt.what}" for fmt in FORMATS.values())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source-model", type=Path, required=True, help="file to read")
    parser.add_argument("--output-model", type=Path, required=True, help=".pth or .safetensors")
    parser.add_argument("--config-file", type=Path, required=True, help="recipe to convert for")
    parser.add_argument("--source-format", help=f"recognised when left out ({formats})")
    parser.add_argument("--report", type=Path, help="JSON file: what became of every key")
    parser.add_argument(
        "--backbone-only", action="store_true", help="leave out the file's pyramid and heads"
    )
    parser.add_argument(
        "--resize-patch-embed",
        action="store_true",
        help="allow the patch kernel to be resampled (bicubic) to the recipe's patch size",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="open a torch file that holds more than tensors: it may run code of its author",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    # underscores are accepted: --source_model
    dashed = [_dashed(word) if word.startswith("--") else word for word in argv]
    return parser.parse_intermixed_args(dashed)


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _check_paths(args: argparse.Namespace) -> None:
    checkpoint.check_writable(args.output_model)
    if args.report and not args.report.parent.is_dir():
        remedy = f"Create it first: mkdir -p {args.report.parent}"
        fail(f"folder of {args.report}", expected="an existing folder", got="none", remedy=remedy)
    inputs = {args.source_model.resolve(), args.config_file.resolve()}
    outputs = [path.resolve() for path in (args.output_model, args.report) if path]
    for path in outputs:
        if path in inputs or outputs.count(path) > 1:
            remedy = "Choose another name."
            fail(f"output {path}", expected="a file of its own", got="an input", remedy=remedy)


def _write_report(args: argparse.Namespace, report: Report) -> None:
    if args.report:
        names = ("source_model", "output_model", "config_file", "overrides")
        record = {name: str(getattr(args, name)) for name in names} | report.as_dict()
        with replacing(args.report) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")


def _run(args: argparse.Namespace) -> None:
    from vitdet.config import build_model, load_config  # detectron2 takes seconds to import

    _check_paths(args)
    model = build_model(load_config(args.config_file, args.overrides).model, device="meta")
    target = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights, report = convert(
        checkpoint.read(args.source_model, trust=args.trust),
        target,
        source_format=args.source_format,
        backbone_only=args.backbone_only,
        resize_patch_embed=args.resize_patch_embed,
        source=str(args.source_model),
    )
    about = {
        "format": 1,
        "source_format": report.source_format,
        "initialised": report.initialised,
    }
    checkpoint.write(args.output_model, {"model": weights, "vitdet": about})
    _write_report(args, report)
    print(report.summary())
    print(f"wrote        {args.output_model}: {len(weights)} tensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        _run(args)
    except UnaccountedError as error:
        _write_report(args, error.report)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
