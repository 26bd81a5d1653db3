"""Command line: python -m bench run | list | plot | report | compare | env."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import compare, console, environment, measure, report, results, runner
from bench.cases import SUITES, case_id, contenders, suite
from bench.contender import Contender, Problem
from bench.report import Table
from rosa_kernels.testing import Case

OPS = ("sddmm", "spmm", "csr_add_", "csr_gather")
# quick has to stay under four minutes with its plots on two slow cores: three samples tell a factor
# of two, and what its budget does not reach is recorded as not run.
_RULES = {"quick": measure.Rule(cap_s=0.25, noise=0.03, min_samples=3, max_samples=100)}
_BUDGETS = {"quick": 200.0}


def main(argv: list[str] | None = None) -> int:
    """Parse, dispatch, and turn bad input into a message without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    args.argv = argv
    try:
        return args.command(args)
    except (results.ResultsError, _UsageError) as error:
        parser.error(str(error))


class _UsageError(ValueError):
    """Arguments that parse but make no sense together."""


def _run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise _UsageError("--device: expected a machine with CUDA, got none")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    plan = _plan(args)
    rule = _rule(args)
    out = args.out / "results.jsonl"
    base = environment.run_record(args.argv) | environment.device_record(args.device)
    print(
        f"{base['device_name']}, {base['threads']} threads, torch {base['torch']}: "
        f"{args.suite} suite, {len(plan)} cases"
    )
    rows: list[results.Row] = []

    def keep(new: list[results.Row]) -> None:
        new = [row | base for row in new]
        rows.extend(new)
        results.append(out, new)  # at once: an interrupted run loses nothing

    start = time.monotonic()
    budget = args.time_budget or _BUDGETS.get(args.suite)
    runner.warm_up({(c.op, c.name): c for _, cs in plan for c in cs}.values(), args.device)
    keep(runner.roof_rows(sorted({c.dtype for c, _ in plan}, key=str), rule, args.device))
    with console.progress(len(plan)) as advance:
        for case, competing in plan:
            if budget is not None and time.monotonic() - start > budget:
                reason = f"not run: the time budget of {budget:g} s was spent"
                keep(runner.skipped(case, competing, reason))
            else:
                keep(runner.run_case(case, competing, rule, args.device))
            advance(_line(case, rows))
    print(f"Measured in {time.monotonic() - start:.0f} s")
    _summary(rows, limit=10)
    written = [out]
    if not args.no_plots:
        written += _draw(rows, args.out)
    print("\nWrote", *(f"  {path}" for path in written), sep="\n")
    return 0


def _plan(args: argparse.Namespace) -> list[tuple[Case, list[Contender]]]:
    plan = []
    known: dict[str, None] = {}
    for case in suite(args.suite, args.seed):
        competing = contenders(case)
        known |= dict.fromkeys(c.name for c in competing)
        if args.kernels:
            competing = [c for c in competing if c.name in args.kernels]
        if competing and (not args.ops or case.op in args.ops):
            plan.append((case, competing))
    unknown = sorted(set(args.kernels or ()) - set(known))
    if unknown:
        raise _UsageError(
            f"--kernels: expected some of {', '.join(known)}, got {', '.join(unknown)}"
        )
    if not plan:
        raise _UsageError(f"run: expected filters that leave a pair of {args.suite}, got none left")
    return plan


def _rule(args: argparse.Namespace) -> measure.Rule:
    rule = _RULES.get(args.suite, measure.Rule())
    if args.cap is None:
        return rule
    return measure.Rule(args.cap, rule.noise, rule.min_samples, rule.max_samples)


def _line(case: Case, rows: list[results.Row]) -> str:
    """A case's name, and its times, fastest first, from token-major where there is that row."""
    times: dict[str, tuple[float, str]] = {}
    for row in reversed(rows):
        if row["case"] != case_id(case):
            break
        name = row["kernel"] if row["mode"] == "no_grad" else f"{row['kernel']} {row['mode']}"
        text = row["status"] if row["median_s"] is None else f"{row['median_s'] * 1e3:.3g}"
        times.setdefault(name, (row["median_s"] or float("inf"), text))
    shown = [f"{name} {text}" for name, (_, text) in sorted(times.items(), key=lambda t: t[1][0])]
    return f"{case_id(case)} ms: {', '.join(shown)}"


def _list(args: argparse.Namespace) -> int:
    if args.suite is None:
        table = Table("Suites", ["suite", "cases", "pairs", "what"])
        for name, build in SUITES.items():
            cases = suite(name)
            pairs = sum(len(contenders(case)) for case in cases)
            what = (build.__doc__ or "").splitlines()[0]
            table.rows.append([name, str(len(cases)), str(pairs), what])
        console.show(table)
        return 0
    table = Table(f"Suite {args.suite}", ["case", "contenders"])
    for case in suite(args.suite):
        table.rows.append([case_id(case), ", ".join(c.label for c in contenders(case))])
    console.show(table)
    return 0


def _plot(args: argparse.Namespace) -> int:
    written = _draw(_select_run(args.results, args.run_id), args.out or args.results.parent)
    if not written:
        raise _UsageError(f"{args.results}: expected timed rows to draw, got none")
    print("Wrote", *(f"  {path}" for path in written), sep="\n")
    return 0


def _summary(rows: list[results.Row], limit: int | None = None) -> None:
    for table in report.summary(rows, limit):
        console.show(table)
    note = report.noise_note(rows)
    if note is not None:
        print(f"\n{note}")


def _draw(rows: list[results.Row], out: Path) -> list[Path]:
    try:
        from bench import plot
    except ImportError as error:
        raise _UsageError(f"plots: expected matplotlib to be installed, got {error}") from error
    return plot.draw_all(rows, out)


def _report(args: argparse.Namespace) -> int:
    rows = _select_run(args.results, args.run_id)
    for charge in ("from_token_major", "op"):
        table = report.case_table(rows, charge)
        if table.rows:
            console.show(table)
    _summary(rows)
    return 0


def _compare(args: argparse.Namespace) -> int:
    base, new = (results.latest_run(results.read(path)) for path in (args.base, args.new))
    found = compare.compare(base, new, args.threshold)
    if not found:
        raise _UsageError("compare: expected runs with rows, got none")
    for table in compare.tables(found, show_same=args.all):
        console.show(table)
    return int(args.fail_on_slower and any(item.verdict == "slower" for item in found))


def _env(args: argparse.Namespace) -> int:
    table = Table("Environment", ["what", "value"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = environment.run_record([]) | environment.device_record(device)
    for name in ("run_id", "argv", "schema_version"):
        del record[name]
    for name, value in {**record, **environment.extra_record()}.items():
        table.rows.append([name, "-" if value is None else str(value)])
    console.show(table)
    for op in OPS:
        table = Table(f"Contenders of {op}", ["kernel", "state"])
        case = Case(op, 64, 64, 16, 0.1)
        problem = Problem.of(case)
        for contender in contenders(case):
            table.rows.append([contender.name, contender.reject(problem) or "ready"])
        console.show(table)
    return 0


def _select_run(path: Path, run_id: str | None) -> list[results.Row]:
    rows = results.read(path)
    if run_id is None:
        return results.latest_run(rows)
    known = list(dict.fromkeys(row["run_id"] for row in rows))
    if run_id not in known:
        raise _UsageError(f"--run-id: expected one of {', '.join(known)}, got {run_id}")
    return [row for row in rows if row["run_id"] == run_id]


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value: float = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, "measure a suite, print its tables, draw its plots")
    run.add_argument("--suite", choices=list(SUITES), default="quick")
    run.add_argument(
        "--out", type=Path, default=Path("build/bench"), metavar="DIR", help="default: %(default)s"
    )
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    run.add_argument("--threads", type=_positive(int), metavar="N", help="default: torch's")
    run.add_argument("--ops", nargs="+", choices=OPS, metavar="OP", help=", ".join(OPS))
    run.add_argument("--kernels", nargs="+", metavar="NAME", help="contenders, see `list`")
    run.add_argument("--seed", type=int, default=0, metavar="N")
    run.add_argument(
        "--cap", type=_positive(float), metavar="S", help="seconds of samples per contender"
    )
    run.add_argument(
        "--time-budget",
        type=_positive(float),
        metavar="S",
        help="seconds after which no case is begun (quick: 200)",
    )
    run.add_argument("--no-plots", action="store_true")

    sub = add("list", _list, "the suites, or the cases and contenders of one")
    sub.add_argument("--suite", choices=list(SUITES))

    for name, command, text in (
        ("plot", _plot, "draw the plots of a run again"),
        ("report", _report, "every case of a run, and its summary"),
    ):
        sub = add(name, command, text)
        sub.add_argument("results", type=Path, help="a results.jsonl")
        sub.add_argument("--run-id", help="default: the last run in the file")
        if command is _plot:
            sub.add_argument("--out", type=Path, metavar="DIR", help="default: beside the results")

    sub = add("compare", _compare, "the last run of one file against the last of another")
    sub.add_argument("base", type=Path)
    sub.add_argument("new", type=Path)
    sub.add_argument("--threshold", type=_positive(float), default=0.05, help="default: 0.05")
    sub.add_argument("--all", action="store_true", help="also show what is the same")
    sub.add_argument("--fail-on-slower", action="store_true", help="exit 1 if anything is slower")

    add("env", _env, "the machine, the versions, and which contenders can run here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
