"""Entry point: ``python -m bench`` in the checkout, ``rosa-bench`` where the wheel is installed."""

from __future__ import annotations

import os
import signal
import sys

from .cli import parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 1 after a finding that the command is for, 2 with a message for bad input, 130
    after Ctrl-C, and 141 if the reader of the output has gone, as `| head` does.
    """
    try:
        try:
            return parser.main(argv)
        finally:
            sys.stdout.flush()  # here, and not at exit, where Python would report a closed pipe
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
