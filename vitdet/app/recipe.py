"""`vitdet recipe`, and train_net.py: train or evaluate a recipe, on one machine or several."""

from __future__ import annotations

import argparse
import os

WHAT = "Train or evaluate a recipe. Runs on the GPU, or on the CPU without one."
ENDS = (
    "Under torchrun the flags about processes and machines come from its environment. "
    "Exit status: 0 done; 2 something to repair, in one line; 75 told to leave (SIGTERM, "
    "SIGUSR1) and saved, --resume goes on; 130 interrupted (^C; the first one saves too)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, as detectron2's tools name them."""
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="recipe, .py or .yaml")
    start = "start from it: converted first where it is another project's, the recipe follows it"
    add("--weights", metavar="FILE", help=start)
    what = "what of the backbone learns: all of it, adapters (lora), nothing (head)"
    add("--tune", choices=("all", "lora", "head"), help=what)
    add("--resume", action="store_true", help="continue train.output_dir's run")
    trial = "build all, take two real steps, print memory, time and length, keep nothing"
    add("--dry-run", action="store_true", help=trial)
    add("--eval-only", action="store_true", help="evaluate, do not train")
    add("--print-groups", action="store_true", help="print each parameter's lr")
    processes = "processes on this machine (default 1)"
    add("--num-gpus", type=int, default=1, metavar="N", help=processes)
    add("--num-machines", type=int, default=1, metavar="N")
    add("--machine-rank", type=int, default=0, metavar="I", help="0 to N-1")
    address = "tcp://HOST:PORT of machine 0; auto finds a free port on one machine"
    add("--dist-url", default="auto", help=address)
    words = "changes, as train.seed=1"
    add("overrides", nargs="*", default=[], metavar="key=value", help=words)


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


def run(args: argparse.Namespace) -> int:
    """Start the processes; return 0. A preemption is a SystemExit.

    Raises:
        InputError: the recipe, the weights, or what a run finds wrong.
    """
    # not above: --help should not wait for torch
    from vitdet.app.start import from_weights
    from vitdet.engine.launch import launch

    # torchrun starts its workers again when one has died
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with from_weights(args) as args.overrides:
        if args.print_groups:
            main(args)
        else:
            where = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
            launch(main, *where, args=(args,))
    return 0
