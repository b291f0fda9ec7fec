"""Make an environment in which vitdet runs. Standard library only.

    python .ci/bootstrap.py          .venv beside this project, with the tools of tests and lint
    python .ci/bootstrap.py --extras ""   the same with what running needs
    python .ci/bootstrap.py --here   the environment of this Python: its torch and its detectron2
                                     stay what they are, and only what running needs is added

A second run does nothing until pyproject.toml or vitdet/app/setup.py changes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "vitdet" / "app" / "setup.py"  # what brings detectron2, as `vitdet setup` does


def run(*command: str) -> None:
    """Run `command`; stop with its exit status if it fails."""
    print("+", " ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"bootstrap: status {status} from this command: {' '.join(command)}")


def install(extras: str) -> int:
    """Install vitdet with `extras`, and detectron2 if it is absent, for this interpreter."""
    sys.path.insert(0, str(ROOT))
    from vitdet.app import setup
    from vitdet.utils.checks import exit_status

    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    return exit_status(lambda: setup.install("--editable", target) or 0)


def fingerprint() -> str:
    """What an environment was made from: changes when it has to be made again."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", SETUP, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="use the environment of this Python")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder (default: .venv)")
    parser.add_argument("--extras", help="of pyproject.toml (default: test,lint; none with --here)")
    arguments = parser.parse_args()
    if arguments.extras is None:
        arguments.extras = "" if arguments.here else "test,lint"

    if sys.version_info < (3, 10):  # noqa: UP036 (this file runs on whatever Python is there)
        found = sys.version.split()[0]
        sys.exit(
            f"bootstrap: expected Python 3.10 or later, got {found}: use make PY=python3.11 ..."
        )
    if arguments.here:
        sys.exit(install(arguments.extras))
    stamp = arguments.venv / "made-from.txt"  # the fingerprint, then the extras that are in
    extras = set(filter(None, arguments.extras.split(",")))
    made_from, *present = stamp.read_text().split() if stamp.exists() else [""]
    if made_from == fingerprint() and extras <= set(present):
        return
    extras |= set(present)
    python = arguments.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"+ making {arguments.venv}", flush=True)
        venv.create(arguments.venv, with_pip=True)
    run(str(python), str(Path(__file__).resolve()), "--here", "--extras", ",".join(sorted(extras)))
    stamp.write_text(" ".join([fingerprint(), *sorted(extras)]))


if __name__ == "__main__":
    main()
