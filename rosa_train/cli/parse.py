"""Reads a run's arguments from options, or from a JSON or YAML file followed by options."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rosa_train.config import Arguments

_FILES = (".json", ".yaml", ".yml")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `ValueError` on an error, instead of exiting."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=f"python -m rosa_train {command}",
            description=description,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


def parse_run(
    command: str,
    description: str,
    argv: Sequence[str],
    extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Arguments, argparse.Namespace]:
    """Parses the four dataclasses of a run, and the options that `extend` adds to the parser.

    `argv` may begin with a .json, .yaml or .yml file of options, such as the args.json of another
    run. The options after the file override those in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an option is unknown, a value is out of range, or the file holds no object.
    """
    from transformers import HfArgumentParser

    from rosa_train.config import ARGUMENTS  # this imports torch, which takes seconds

    parser: Any = HfArgumentParser(
        ARGUMENTS,  # type: ignore[arg-type]
        prog=f"python -m rosa_train {command}",
        usage=f"python -m rosa_train {command} [FILE.json | FILE.yaml] [--option value ...]",
        description=description,
        allow_abbrev=False,
    )
    for action in parser._actions:
        # argparse takes a percent sign as the start of a format.
        action.help = (action.help or "").replace("%", "%%")
    extend(parser)
    parser.error = partial(Parser.error, parser)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        _take_defaults(parser, Path(argv.pop(0)))
    *found, rest = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(_unknown(rest[0], [o for a in parser._actions for o in a.option_strings]))
    arguments = (found[0], found[1], found[2], found[3])
    return arguments, found[4] if len(found) > 4 else argparse.Namespace()


def process(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that run `python -m rosa_train` in a new process.

    The process finds this package from any folder, even if the package is not installed.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, "-m", "rosa_train", *argv], os.environ | {"PYTHONPATH": path}


def no_bars_in_files() -> None:
    """Switches off the progress bars of transformers, unless stderr is a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _take_defaults(parser: argparse.ArgumentParser, path: Path) -> None:
    """Makes the fields of a file the parser's defaults."""
    values = _read(path)
    known = {action.dest: action for action in parser._actions}
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: {_unknown(name, known)}")
        known[name].required = False
    parser.set_defaults(**values)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in _FILES:
        raise ValueError(f"expected options, or a file of {', '.join(_FILES)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of options, got no file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() == ".json":
            values = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            values = yaml.safe_load(text)
    except Exception as error:  # yaml's errors share no base with json's
        raise ValueError(f"{path}: expected {path.suffix[1:].upper()}, got: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of options, got {type(values).__name__}")
    return values


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name.split("=")[0], list(known), n=1)
    return f"expected a known option, got {name}" + (f"; is it {near[0]}?" if near else "")
