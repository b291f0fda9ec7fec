"""What a user does not read: warnings of dependencies about their own code. Imports nothing."""

from __future__ import annotations

import logging
import warnings

# Each can go when its source no longer says it.
_NOISE = (
    r".*torch\.jit\.(script|trace|script_method).* is deprecated",  # fvcore, at import
    r"Importing from timm\.models\.layers is deprecated",  # detectron2, at import
    r"pkg_resources is deprecated",  # detectron2, at import
    r"torch\.meshgrid: in an upcoming release",  # detectron2's anchors
    r"The given NumPy array is not writable",  # detectron2's masks
    r"Grad strides do not match bucket view strides",  # DistributedDataParallel, of 1x1 kernels
)


def quiet_dependencies() -> None:
    """Leave the known warnings of dependencies out of what a user reads; all others stay."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # detectron2's image lists make recent torch log a line about tracing
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
