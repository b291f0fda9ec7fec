"""`vitdet serve`: a page on this machine to which one gives an image, and sees what is found."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
from typing import Any

from vitdet.app.options import add_weights_arguments, file_options
from vitdet.utils.checks import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights_arguments(parser)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    add("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 for any free one (default 8000)")
    add("--max-bytes", type=int, default=32 * 2**20, help="of an upload (default 32 MiB)")
    add("--max-pixels", type=int, default=50_000_000, help="of a picture (default 50 million)")
    text = "let other machines in: needed for a --host that is not this machine's own"
    add("--allow-network", action="store_true", help=text)
    text = "a name by which other machines call this one; may be given several times"
    add("--host-name", action="append", default=[], metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    """Serve until ^C; return 0.

    Raises:
        InputError: a wrong option, weights that cannot be used, an address that is taken.
    """
    try:
        from vitdet.app.serve import server
    except ModuleNotFoundError as error:
        text = f"vitdet serve: needs starlette and uvicorn ({error}). pip install starlette uvicorn"
        raise InputError(text) from error
    if args.max_bytes < 1 or args.max_pixels < 1:
        got = f"--max-bytes {args.max_bytes} --max-pixels {args.max_pixels}"
        raise InputError(f"{got}: both are 1 or more.")
    if not server.is_own(args.host):
        if not args.allow_network:
            text = "other machines reach this address, without password and encryption. Add "
            raise InputError(f"--host {args.host}: {text}--allow-network if they shall.")
        text = "can use this server; there is no password and no encryption"
        print(f"warning: every machine that reaches {args.host} {text}", file=sys.stderr)
    if not args.weights.exists():  # said before the process has loaded its libraries
        raise InputError(f"--weights {args.weights}: there is no such file. Check the path.")
    limits = server.Limits(max_bytes=args.max_bytes, max_pixels=args.max_pixels)
    multiprocessing.set_forkserver_preload(["vitdet.app.serve.detect"])
    with server.listen(args.host, args.port) as listening:
        worker = server.Worker(functools.partial(_start, args), limits)
        uploads, is_open = server.Uploads(limits), args.allow_network
        app = server.build_app(worker, uploads, args.host_name, loopback_only=not is_open)
        where = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving http://{where}:{listening.getsockname()[1]}/ (^C ends it)", flush=True)
        try:
            server.Server(app, worker).run(sockets=[listening])
        except KeyboardInterrupt:  # the server has closed its connections before it says so
            print("ended", flush=True)
        finally:
            worker.end()
    return 0


def _start(args: argparse.Namespace) -> Any:
    """Load the model, in the worker's process: the server needs no detector."""
    from vitdet.app.serve.detect import Predictor, answering

    options = {**file_options(args), "device": args.device, "threshold": 0.0}
    predictor = Predictor.from_checkpoint(args.weights, **options)
    return answering(predictor, args.weights.name, args.max_pixels)
