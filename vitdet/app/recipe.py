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
