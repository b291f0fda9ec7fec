"""`vitdet setup`: bring detectron2, which has no package of its own name, and what it imports.

`.ci/bootstrap.py` does the same for a checkout. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from vitdet.utils.checks import InputError

# Never replaced: whoever built these for their machine wants to keep them.
KEPT = ("torch", "torchvision", "xformers", "numpy", "detectron2")
# This package holds detectron2's Python files at commit a59f056 (April 2024).
_DETECTRON2 = """sal-detectron2==0.7.2 \
--hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561
"""
# What detectron2 imports, by import name, where it differs from the package's name.
_NEEDS = {
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
_NO_OPERATORS = (
    "torchvision cannot load its compiled operators ({error}): expected a torch and a torchvision "
    "of the same release and the same build (both CUDA or both CPU), got torch {torch}, "
    "torchvision {torchvision}. Run `pip uninstall -y torch torchvision && pip install torch "
    "torchvision`, with one index for both: a CPU-only torch needs the torchvision of its index."
)


def run(args: argparse.Namespace) -> int:
    """Install what is missing for this Python; return 0.

    Raises:
        InputError: pip fails, or torch and torchvision do not fit each other.
    """
    del args
    install()
    print("detectron2 is here, and torchvision's operators run")
    return 0


def install(*targets: str) -> None:
    """Install `targets`, what detectron2 imports, and detectron2 where it is absent.

    Raises:
        InputError: pip fails, or torch and torchvision do not fit each other.
    """
    needs = [package for module, package in _NEEDS.items() if _missing(module)]
    with TemporaryDirectory() as folder:
        pins, snapshot = Path(folder, "constraints.txt"), Path(folder, "detectron2.txt")
        pins.write_text("\n".join(_installed()))
        snapshot.write_text(_DETECTRON2)
        if not _missing("lvis"):
            print("(pip may name conflicts of sal-detectron2 and lvis: their pins are too narrow)")
        if targets or needs:
            _pip("--no-compile", "--constraint", str(pins), *targets, *needs)
        importlib.invalidate_caches()
        if _missing("detectron2"):
            # The wheel is tagged for CPython 3.10. Its Python files run on any; its compiled part
            # is not used.
            _pip(
                "--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.10",
                "--implementation", "cp", "--abi", "none", "--platform", "any",
                "--target", sysconfig.get_path("purelib"), "-r", str(snapshot),
            )  # fmt: skip
    if _missing("lvis"):
        _pip("--no-deps", "lvis==0.5.3")  # its own pins ask for a second OpenCV
    _check_operators()


def _missing(import_name: str) -> bool:
    """Whether this interpreter finds no module of that name (nothing is imported)."""
    return importlib.util.find_spec(import_name) is None


def _installed() -> list[str]:
    """Return requirement lines that pin what is installed of KEPT to its present version."""
    there = {each.name.lower(): each.version for each in metadata.distributions() if each.name}
    return [f"{name}=={there[name]}" for name in KEPT if name in there]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += arguments
    print("+", " ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        text = "Its last lines say why; without pip, run `python -m ensurepip` first."
        raise InputError(f"pip: status {status} from {' '.join(command)}. {text}")


def _check_operators() -> None:
    """Raise an InputError with a remedy if torchvision.ops.nms does not run."""
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
        raise InputError(_NO_OPERATORS.format(error=error, **versions))
