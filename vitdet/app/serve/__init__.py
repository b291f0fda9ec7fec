"""`vitdet serve`: a page on this machine to which one gives an image, and sees what is found."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
from typing import Any

from vitdet.app.options import add_weights_arguments
from vitdet.utils.checks import InputError, fail


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
    try:
        from vitdet.app.serve.server import Server, build_app, listen
        from vitdet.app.serve.uploads import Limits
        from vitdet.app.serve.worker import Worker
    except ModuleNotFoundError as error:
        text = f"vitdet serve: needs starlette and uvicorn ({error}). pip install starlette uvicorn"
        raise InputError(text) from error
    _check(args)
    if not args.weights.exists():  # said before the process has loaded its libraries
        raise InputError(f"--weights {args.weights}: expected a file, got none. Check the path.")
    limits = Limits(max_bytes=args.max_bytes, max_pixels=args.max_pixels)
    multiprocessing.set_forkserver_preload(["vitdet.app.serve.answers"])
    start = functools.partial(_start, args)
    worker = Worker(start, waiting=limits.waiting, seconds=limits.answer_seconds)
    try:
        with listen(args.host, args.port) as listening:
            about = worker.begin()
            app = build_app(
                worker, about, limits, names=args.host_name, loopback_only=not args.allow_network
            )
            where = f"[{args.host}]" if ":" in args.host else args.host
            port = listening.getsockname()[1]
            print(f"serving http://{where}:{port}/ (^C ends it)", flush=True)
            try:
                Server(app, worker).run(sockets=[listening])
            except KeyboardInterrupt:  # the server has closed its connections before it says so
                print("ended", flush=True)
    finally:
        worker.end()
    return 0


def _start(args: argparse.Namespace) -> Any:
    from vitdet.app.serve.answers import start  # in the worker: the server needs no detector

    return start(args)


def _check(args: argparse.Namespace) -> None:
    for name in ("max_bytes", "max_pixels"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            fail(option, expected="1 or more", got=getattr(args, name), remedy="Correct it.")
    from vitdet.app.serve.guard import is_loopback

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
