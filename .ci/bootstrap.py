"""Make an environment in which vitdet runs. Standard library only.

    python .ci/bootstrap.py          .venv beside this project, with the tools of tests and lint
    python .ci/bootstrap.py --extras ""   the same with what running needs
    python .ci/bootstrap.py --here   the environment of this Python: its torch and its detectron2
                                     stay what they are, and only what running needs is added

A second run does nothing until pyproject.toml or this folder's requirement file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / ".ci" / "requirements-detectron2.txt"
# Never replaced by --here: whoever built these for their machine wants to keep them.
KEPT = ("torch", "torchvision", "xformers", "numpy", "detectron2")
# What detectron2 imports, by import name, where it differs from the package's name.
DETECTRON2_NEEDS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "hydra": "hydra-core>=1.1",
    "yacs": "yacs",
    "tabulate": "tabulate",
    "cloudpickle": "cloudpickle",
    "tqdm": "tqdm",
    "termcolor": "termcolor",
    "tensorboard": "tensorboard",
    "black": "black",
    "packaging": "packaging",
    "portalocker": "portalocker",
}
NO_OPERATORS = """\
torchvision cannot load its compiled operators ({error}).
  expected: a torch and a torchvision of the same release and the same build (both CUDA or both CPU)
  got:      torch {torch}, torchvision {torchvision}
  to do:    pip uninstall -y torch torchvision && pip install torch torchvision
            (one index for both: a CPU-only torch needs the torchvision of PyTorch's CPU index)"""


def run(*command: str) -> None:
    """Run `command`; stop with its exit status if it fails."""
    print("+", " ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"bootstrap: status {status} from this command: {' '.join(command)}")


def pip(*arguments: str) -> None:
    """Run this interpreter's pip."""
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def missing(import_name: str) -> bool:
    """Whether this interpreter finds no module of that name (nothing is imported)."""
    return importlib.util.find_spec(import_name) is None


def constraints() -> str:
    """Requirement lines that pin what is installed of KEPT to its present version."""
    lines = []
    for name in KEPT:
        try:
            lines.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join(lines)


def install(extras: str) -> None:
    """Install vitdet with `extras`, and detectron2 if it is absent, for this interpreter."""
    needs = [package for module, package in DETECTRON2_NEEDS.items() if missing(module)]
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(constraints())
        target = f"{ROOT}[{extras}]" if extras else str(ROOT)
        if not missing("lvis"):
            print("(pip may name conflicts of sal-detectron2 and lvis: their pins are too narrow)")
        pip(
            "install",
            "--quiet",
            "--no-compile",
            "--constraint",
            str(pins),
            "--editable",
            target,
            *needs,
        )
    importlib.invalidate_caches()
    if missing("detectron2"):
        # The wheel is tagged for CPython 3.10. Its Python files run on any; its compiled part is
        # not used.
        pip(
            "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:",
            "--python-version", "3.10", "--implementation", "cp", "--abi", "none",
            "--platform", "any", "--target", sysconfig.get_path("purelib"), "-r", str(SNAPSHOT),
        )  # fmt: skip
    if missing("lvis"):
        pip(
            "install", "--quiet", "--no-deps", "lvis==0.5.3"
        )  # its own pins ask for a second OpenCV


def check_operators() -> None:
    """Stop with a remedy if torchvision.ops.nms does not run."""
    code = (
        "import torch, torchvision; "
        "torchvision.ops.nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if result.returncode:
        error = (result.stderr.strip().splitlines() or ["no message"])[-1]
        versions = {name: metadata.version(name) for name in ("torch", "torchvision")}
        sys.exit(NO_OPERATORS.format(error=error, **versions))


def fingerprint() -> str:
    """What an environment was made from: changes when it has to be made again."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", SNAPSHOT, Path(__file__)):
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
            f"bootstrap: expected Python 3.10 to 3.13, got {found}: use make PY=python3.11 ..."
        )
    if arguments.here:
        install(arguments.extras)
        check_operators()
        return
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
