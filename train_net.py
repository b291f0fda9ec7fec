"""Train or evaluate a recipe: `python train_net.py --config-file configs/... [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys

from vitdet.utils.checks import exit_status


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as detectron2's tools name it."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Train or evaluate a detector. Runs on the GPU, or on the CPU without one.",
        epilog="Under torchrun the flags about processes and machines come from its environment. "
        "Exit status: 0 done; 2 something to repair, in one line; 75 told to leave (SIGTERM, "
        "SIGUSR1) and saved, --resume goes on; 130 interrupted (^C; the first one saves too).",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="recipe, .py or .yaml")
    start = "start from it: converted first where it is another project's, the recipe follows it"
    parser.add_argument("--weights", metavar="FILE", help=start)
    what = "what of the backbone learns: all of it, adapters (lora), nothing (head)"
    parser.add_argument("--tune", choices=("all", "lora", "head"), help=what)
    parser.add_argument("--resume", action="store_true", help="continue train.output_dir's run")
    trial = "build all, take two real steps, print memory, time and length, keep nothing"
    parser.add_argument("--dry-run", action="store_true", help=trial)
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--print-groups", action="store_true", help="print each parameter's lr")
    processes = "processes on this machine (default 1)"
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help=processes)
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="0 to N-1")
    address = "tcp://HOST:PORT of machine 0; auto finds a free port on one machine"
    parser.add_argument("--dist-url", default="auto", help=address)
    words = "changes, as train.seed=1"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=words)
    return parser.parse_intermixed_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Run in each process."""
    from vitdet.config import load_config
    from vitdet.engine.parameters import group_lines
    from vitdet.engine.run import evaluate, train

    cfg = load_config(args.config_file, args.overrides)
    if args.print_groups:
        print(*group_lines(cfg), sep="\n", flush=True)
    elif args.eval_only:
        evaluate(cfg, resume=args.resume)
    else:
        train(cfg, resume=args.resume, dry_run=args.dry_run)


def run(arguments: list[str] | None = None) -> int:
    """Start the processes; return the exit status, that of a preemption as a SystemExit."""
    args = parse(arguments)
    # torchrun starts its workers again when one has died
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def start() -> int:
        from vitdet.app.start import from_weights  # not above: --help should not wait for torch
        from vitdet.engine.launch import launch

        with from_weights(args) as args.overrides:
            if args.print_groups:
                main(args)
            else:
                where = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
                launch(main, *where, args=(args,))
        return 0

    return exit_status(start)


if __name__ == "__main__":
    sys.exit(run())
