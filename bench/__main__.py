"""Entry point: ``python -m bench`` in the checkout, ``rosa-bench`` where the wheel is installed."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 2, with a message, if numpy is not installed.
    """
    try:
        from .cli import parser
    except ModuleNotFoundError as error:
        if error.name != "numpy":  # a bug, not a missing extra
            raise
        print("bench: expected numpy, got none: pip install 'rosa-kernels[bench]'", file=sys.stderr)
        return 2
    return parser.main(argv)


if __name__ == "__main__":
    sys.exit(main())
