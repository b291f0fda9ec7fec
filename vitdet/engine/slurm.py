"""Submit a run to SLURM: every task is a rank, and a job that must leave queues itself again."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from vitdet.config import load_config
from vitdet.engine import startup
from vitdet.engine.launch import INPUT_ERROR_STATUS, PREEMPTED_STATUS, run_as
from vitdet.engine.startup import Place
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import broadcast_object, is_main

CLUSTERS = ("slurm", "local")
_FIRST_PORT, _PORTS = 20000, 20000  # a job's port follows from its number


def parameters(text: str) -> dict[str, Any]:
    """Return the settings in "partition=big,nodes=2": whole numbers where they look like it.

    Raises:
        InputError: a part without "=".
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            fail(
                "--slurm",
                expected="key=value,key=value",
                got=part,
                remedy="As in partition=gpu,nodes=2,gpus_per_node=8,timeout_min=1440.",
            )
        found[name] = int(value) if value.isdigit() else value
    return found


def submit_run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Submit the run that a command line describes, with `--slurm` among its options.

    Raises:
        InputError: a recipe that does not load, and what `submit` raises.
    """
    folder = Path(load_config(args.config_file, args.overrides).train.output_dir)
    job = submit(main, args, parameters(args.slurm), folder)
    print(f"submitted job {job.job_id}; its logs are in {folder}/slurm")


def submit(
    main: Callable[[argparse.Namespace], object],
    args: argparse.Namespace,
    settings: dict[str, Any],
    output_dir: Path,
) -> Any:
    """Submit `main(args)` as a job and return submitit's Job; logs go to `output_dir`/slurm.

    Args:
        main: what each rank calls.
        args: for it; `args.resume` is set when the job was queued again.
        settings: of sbatch, in submitit's names: partition, nodes, gpus_per_node, timeout_min,
            mem_gb, cpus_per_task, account, ...; tasks_per_node follows from gpus_per_node.
            cluster="local" runs the tasks on this machine instead.
        output_dir: folder of the run.

    Raises:
        InputError: no submitit, no sbatch, or settings that they do not know.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ModuleNotFoundError as error:
        raise InputError(
            "--slurm: expected the package submitit, got none. Install it: "
            "pip install 'vitdet[slurm]'."
        ) from error
    settings = dict(settings)
    cluster = settings.pop("cluster", "slurm")
    if cluster not in CLUSTERS:
        fail("--slurm cluster", expected=" or ".join(CLUSTERS), got=cluster, remedy="Leave it out.")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        fail(
            "--slurm",
            expected="the command sbatch",
            got="none on this machine",
            remedy="Run it where jobs are submitted, or try the job here with cluster=local.",
        )
    settings.setdefault("tasks_per_node", settings.get("gpus_per_node", 1))
    settings.setdefault("name", output_dir.name)
    if cluster == "slurm":  # a rank that fails takes the others along
        settings.setdefault("srun_args", ["--kill-on-bad-exit=1"])
    try:
        executor = submitit.AutoExecutor(folder=output_dir / "slurm", cluster=cluster)
        general = {*executor._typed_parameters(), "timeout_min"}
        executor.update_parameters(
            **{
                name if name in general else f"{cluster}_{name}": value
                for name, value in settings.items()
            }
        )
        return executor.submit(Task(main, args, startup.timeout(args.start_timeout)))
    except (NameError, AssertionError, ValueError, FailedSubmissionError, FailedJobError) as error:
        raise InputError(
            f"--slurm: expected settings that submitit and sbatch take, got: {error} See the "
            "section SLURM of docs/training.md."
        ) from error


class Task:
    """What one rank of a job does. submitit pickles it and calls it in each task.

    SLURM sends the tasks SIGUSR2 some time before the time limit (submitit asks for it), and
    SIGTERM when the job is preempted. Both are taken as SIGTERM: a training saves and leaves,
    anything else leaves at once. Then rank 0 puts the job into the queue again, where it goes on.

    Args:
        main: what to call.
        args: for it.
        seconds: within which all ranks must be there.
    """

    def __init__(
        self,
        main: Callable[[argparse.Namespace], object],
        args: argparse.Namespace,
        seconds: float,
    ) -> None:
        self.main = main
        self.args = args
        self.seconds = seconds

    def __call__(self) -> None:
        """Run as the rank that the job's environment says."""
        import submitit

        job = submitit.JobEnvironment()
        signal.signal(signal.SIGTERM, _leave)
        signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        place = place_in(job)
        try:
            store = startup.connect(place, self.seconds)
            run_as(
                place, store, self._run, (job.paths.folder / f"{job.job_id}_begun",), self.seconds
            )
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(INPUT_ERROR_STATUS)
        except SystemExit as ended:
            if ended.code != PREEMPTED_STATUS:
                raise
            if place.rank == 0:
                job._requeue(0)
                raise
            sys.exit(0)  # another status would make srun end rank 0 before it has done so

    def _run(self, begun: Path) -> None:
        again = broadcast_object(begun.exists())
        if is_main():
            begun.touch()
        self.main(argparse.Namespace(**{**vars(self.args), "resume": self.args.resume or again}))


def place_in(job: Any) -> Place:
    """Return the place of this task of a job (a submitit.JobEnvironment)."""
    number = int("".join(filter(str.isdigit, job.job_id)))
    return Place(
        rank=job.global_rank,
        world_size=job.num_tasks,
        local_rank=job.local_rank,
        local_size=job.num_tasks // job.num_nodes,
        host=job.hostnames[0],
        port=_FIRST_PORT + number % _PORTS,
        serves=job.global_rank == 0,
    )


def _leave(*_: object) -> NoReturn:
    sys.exit(PREEMPTED_STATUS)
