"""Convert a checkpoint for a recipe, to other classes, or to another project's names.

    python converter.py --source-model mae_pretrain_vit_base.pth --output-model vit_b.pth \
        --config-file configs/COCO/mask_rcnn_vitdet_b_100ep.py

Exit status: 0 written, 1 some keys are unaccounted for (nothing is written but the report),
2 an input is wrong. docs/conversion.md lists the formats. `vitdet convert` does the same.
"""

from __future__ import annotations

import sys

from vitdet.app.convert import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
