"""Convert a checkpoint for a recipe, to other classes, or to another project's names.

`vitdet convert` does the same; docs/conversion.md has the commands and the formats.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitdet.app.options import parse_convert
from vitdet.utils.checks import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""

    def run() -> int:
        args = parse_convert(sys.argv[1:] if argv is None else argv)
        from vitdet.app import convert  # not above: ^C while it is imported is one line too

        return convert.run(args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
