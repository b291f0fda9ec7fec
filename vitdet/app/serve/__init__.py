"""`vitdet serve`: a page on this machine to which one gives an image, and sees what is found."""

from __future__ import annotations

import argparse
import sys

from vitdet.app.options import add_weights_arguments, file_options
from vitdet.app.serve.hosts import is_loopback
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default 8000)")
    parser.add_argument(
        "--max-bytes", type=int, default=32 * 2**20, help="of an upload (default 32 MiB)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, help="of a picture (default 50 million)"
    )
    parser.add_argument(
        "--allow-network",
        action="store_true",
        help="let other machines in: needed for a --host that is not this machine's own",
    )
    parser.add_argument(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which other machines call this one; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until ^C; return 0.

    Raises:
        InputError: a wrong option, weights that cannot be used, an address that is taken.
    """
    _check(args)
    try:
        from vitdet.app.serve.answers import answering
        from vitdet.app.serve.server import build_app, listen, make_server
        from vitdet.app.serve.uploads import Limits
    except ModuleNotFoundError as error:
        remedy = "pip install 'vitdet[web]'"
        fail("vitdet serve", expected="starlette and uvicorn", got=str(error), remedy=remedy)
    predictor = Predictor.from_checkpoint(
        args.weights,
        **file_options(args),
        device=args.device,
        threshold=0.0,
    )
    names = list(predictor.class_names)
    about = {"name": args.weights.name, "device": str(predictor.device), "classes": names}
    about["class_ids"] = list(predictor.class_ids)
    limits = Limits(max_bytes=args.max_bytes, max_pixels=args.max_pixels)
    app = build_app(
        answering(predictor, limits.max_pixels),
        about,
        limits,
        names=args.host_name,
        loopback_only=not args.allow_network,
    )
    listening = listen(args.host, args.port)
    try:
        where = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving http://{where}:{listening.getsockname()[1]}/ (^C ends it)", flush=True)
        make_server(app).run(sockets=[listening])
    except KeyboardInterrupt:
        print("ended", flush=True)  # the server has closed its connections before it says so
    finally:
        listening.close()
        app.state.line.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("max_bytes", "max_pixels"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            fail(option, expected="1 or more", got=getattr(args, name), remedy="Correct it.")
    if is_loopback(args.host):
        return
    if not args.allow_network:
        fail(
            f"--host {args.host}",
            expected="127.0.0.1, ::1 or localhost",
            got="an address that other machines reach",
            remedy="Add --allow-network if they shall: there is no password and no encryption.",
        )
    print(
        f"warning: every machine that reaches {args.host} can use this server; there is no "
        "password and no encryption",
        file=sys.stderr,
    )
