"""Reads a run's arguments from options, or from a JSON or YAML file followed by options."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rosa_train.config import Arguments

_FILES = (".json", ".yaml", ".yml")
_TEMPLATES = ("--prompt_template", "--completion_template")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

_EXAMPLES = {
    "train": """\
  python -m rosa_train train --model_name_or_path smollm2 --train_file train.jsonl \\
    --eval_file eval.jsonl --method rosa --budget 1% --output_dir run
  python -m rosa_train train run/args.json --resume_from_checkpoint last
  python -m rosa_train train run/args.json --seed 1 --output_dir run-1""",
    "compare": """\
  python -m rosa_train compare --methods lora,rosa --model_name_or_path smollm2 \\
    --train_file train.jsonl --eval_file eval.jsonl --budget 1% --output_dir compared""",
}


class Help(argparse.HelpFormatter):
    """Help with each option once, and with its default or `required` after its text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        name = action.option_strings[0]  # the others have dashes for underscores
        if isinstance(action.const, bool):  # a switch, which may have a value
            return name
        return f"{name} {self._format_args(action, _metavar(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        value = action.default
        if value is None or isinstance(value, bool) or "default" in text:
            return text
        said = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"{text} (default: {said.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):  # as they are, to be pasted
            return text
        return super()._fill_text(text, width, indent)


def _metavar(action: argparse.Action) -> str:
    kinds: dict[Any, str] = {int: "N", float: "X"}
    kind = "NAME" if action.nargs == "+" else action.dest.rpartition("_")[2].upper()
    return kinds.get(action.type, kind)


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
    hidden: Sequence[str] = (),
) -> tuple[Arguments, argparse.Namespace]:
    """Parses the four dataclasses of a run, and the options that `extend` adds to the parser.

    The help has an option group for each dataclass, without the `hidden` options.

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
        epilog=f"examples:\n{_EXAMPLES[command]}\n\nOptions may have dashes for underscores.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    for action in parser._actions:
        # argparse takes a percent sign as the start of a format.
        action.help = (action.help or "").replace("%", "%%")
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    extend(parser)
    parser.error = partial(Parser.error, parser)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        _take_defaults(parser, Path(argv.pop(0)))
    *found, rest = parser.parse_args_into_dataclasses(
        _with_templates(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(_unknown(rest[0], [o for a in parser._actions for o in a.option_strings]))
    arguments = (found[0], found[1], found[2], found[3])
    return arguments, found[4] if len(found) > 4 else argparse.Namespace()


def unescape(template: str) -> str:
    r"""A template of the command line, with \n, \t and \\ as newline, tab and backslash.

    A shell passes them as two characters. Files of options hold any text: nothing is replaced.
    """
    return re.sub(r"\\([nt\\])", lambda found: _ESCAPES[found[1]], template)


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


def _with_templates(argv: Sequence[str]) -> list[str]:
    """The options with their templates unescaped. argparse would also change those of a file."""
    parts = []
    for before, part in zip(["", *argv], argv, strict=False):
        name, equals, value = part.partition("=")
        if before in _TEMPLATES:
            part = unescape(part)
        elif name in _TEMPLATES and equals:
            part = f"{name}={unescape(value)}"
        parts.append(part)
    return parts


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
