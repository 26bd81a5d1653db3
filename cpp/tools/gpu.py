#!/usr/bin/env python3
"""Build, test and measure on a GPU machine that has torch, nvcc and cmake, and no package index.

    python3 cpp/tools/gpu.py --budget 25          # minutes, all together; `make gpu BUDGET=25`

Builds into build/gpu for the GPU of the machine, runs the native tests, the GPU tests (by pytest,
or without it by gpu_check.py) and compute-sanitizer, measures the benchmark suites in the time that
is left and ends with the ratios to every peer. A step that fails is reported at the end and stops
only what needs it. The exit status is 0, 1 if something was found to be incorrect, or 2 if anything
else failed. Rows, figures and the log are in build/gpu/results, or where --out says.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cuda_toolchain

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SUITES = ("rosa", "density", "tokens", "llm")
# What tests may take of the budget: what remains belongs to the suites.
NATIVE_SHARE, TEST_SHARE, SANITIZER_SHARE = 0.1, 0.25, 0.08
SHORTEST_TEST_S = 90.0  # a shorter limit would tell a slow machine from a fast one, no more
FINISH_SHARE = 0.04  # for the figures and the table
EXPERIMENT_SHARE = 0.025  # for each of the experiments
# Beside the defaults: panels of the size of L2, and kernels of a call that overlap.
EXPERIMENTS = {
    "panels-128": {},
    "panels-128-early": {"ROSA_EARLY_LAUNCH": "1"},
    "panels-32": {"ROSA_PANEL_MIB": "32"},
    "panels-32-early": {"ROSA_PANEL_MIB": "32", "ROSA_EARLY_LAUNCH": "1"},
}
SANITIZERS = {
    # Room after every allocation makes small overruns visible; torch must not pool them.
    "memcheck": ("--padding", "1024"),
    "racecheck": (),
    "synccheck": (),
}
# Exit status of gpu_check.py is 0 or 1, of compute-sanitizer on an error this.
SANITIZER_ERROR = 86
NO_DEVICE = "no CUDA device"


@dataclass(frozen=True)
class Step:
    """How one step went: "ok", "failed" or "skipped"."""

    name: str
    outcome: str
    seconds: float
    reason: str = ""
    correctness: bool = False


class Session:
    """Runs commands, keeps a log of them, the time, and what became of every step."""

    def __init__(self, budget_s: float, log: IO[str]) -> None:
        self.steps: list[Step] = []
        self._log = log
        self._budget_s = budget_s
        self._start = time.monotonic()

    def left(self) -> float:
        """Seconds of the budget that are not spent."""
        return self._budget_s - (time.monotonic() - self._start)

    def share(self, of_budget: float, at_least_s: float = SHORTEST_TEST_S) -> float:
        """A step's time limit in seconds."""
        return max(at_least_s, of_budget * self._budget_s)

    def say(self, text: str) -> None:
        """To the terminal and the log."""
        print(text, flush=True)
        print(text, file=self._log, flush=True)

    def skip(self, name: str, reason: str) -> None:
        """Record a step that cannot run here."""
        self.say(f"\n== {name}: skipped, {reason}")
        self.steps.append(Step(name, "skipped", 0.0, reason))

    def run(
        self,
        name: str,
        *command: str | Path,
        limit_s: float | None = None,
        correctness: bool = False,
        extra: dict[str, str] | None = None,
        unsupported: str = "",
    ) -> bool:
        """Run one step; its output is shown and kept. True if it succeeded.

        A step that fails with the words `unsupported` in its output counts as skipped.
        """
        limit = "" if limit_s is None else f"   (at most {limit_s:.0f} s)"
        words = ("..." if "\n" in word else word for word in map(str, command))
        self.say(f"\n== {name}: {' '.join(words)}{limit}")
        begin = time.monotonic()
        expired = threading.Event()
        seen_unsupported = False
        with subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment() | (extra or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that a time limit ends the children, too
        ) as process:

            def expire() -> None:
                expired.set()
                os.killpg(process.pid, signal.SIGKILL)

            timer = threading.Timer(limit_s or threading.TIMEOUT_MAX, expire)
            timer.daemon = True
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                seen_unsupported |= bool(unsupported) and unsupported in line
            status = process.wait()
            timer.cancel()
        seconds = time.monotonic() - begin
        if status == 0:
            self.steps.append(Step(name, "ok", seconds))
        elif seen_unsupported:
            self.steps.append(Step(name, "skipped", seconds, unsupported))
        else:
            reason = f"exit status {status}"
            if expired.is_set():
                reason = f"not finished within {limit_s:.0f} s"
            self.steps.append(Step(name, "failed", seconds, reason, correctness))
        return status == 0

    def finish(self) -> int:
        """Print every step's outcome; the exit status."""
        self.say("\n== Steps")
        for step in self.steps:
            reason = f": {step.reason}" if step.reason else ""
            self.say(f"{step.outcome:8}{step.seconds:7.0f} s  {step.name}{reason}")
        failed = [step for step in self.steps if step.outcome == "failed"]
        if any(step.correctness for step in failed):
            return 1
        return 2 if failed else 0


def environment() -> dict[str, str]:
    """What the steps run in: this Python, whatever virtual environment the caller names."""
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS")}
    return kept | {"PYTHONUNBUFFERED": "1"}


def has(*modules: str) -> bool:
    """Whether this Python finds all these modules."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def build(session: Session) -> bool:
    """Configure and build with plain CMake; True if the module is there."""
    nvcc = cuda_toolchain.find()
    if nvcc is None:
        session.steps.append(Step("nvcc", "failed", 0.0, "none was found: CPU kernels only"))
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    configured = session.run(
        "configure",
        "cmake",
        "-S",
        ROOT,
        "-B",
        BUILD,
        *generator,
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DROSA_CUDA={'AUTO' if nvcc is None else 'ON'}",
        "-DROSA_EMULATED_TESTS=OFF",  # any machine can run those
        extra={} if nvcc is None else {"CUDACXX": str(nvcc)},
    )
    return configured and session.run(
        "build", "cmake", "--build", BUILD, "--parallel", str(os.cpu_count() or 1)
    )


def devices(session: Session) -> bool:
    """Whether torch and the kernels of this build see a CUDA device; says which."""
    code = (
        "import torch, rosa_kernels as rk\n"
        "n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
        "print('torch', torch.__version__, 'for CUDA', torch.version.cuda)\n"
        "for i in range(n): print(f'device {i}:', torch.cuda.get_device_properties(i))\n"
        "for k in rk.kernels():\n"
        "    if 'cuda' in k.devices: print(f'{k.op} {k.name}:', k.unavailable or 'ready')\n"
        f"if n == 0: print('{NO_DEVICE}'); raise SystemExit(1)\n"
    )
    return session.run("devices", sys.executable, "-c", code, unsupported=NO_DEVICE)


def test(session: Session, device: str) -> None:
    """GPU tests, then compute-sanitizer over small cases."""
    if device == "cuda" and has("pytest", "hypothesis"):
        # The versions on this machine are not ours: neither their warnings nor their age count.
        lenient = ("-W", "default", "-o", "minversion=7.0", "-p", "no:cacheprovider")
        command = ("-m", "pytest", "-q", "-m", "gpu", *lenient)
    else:
        command = (str(ROOT / "cpp/tools/gpu_check.py"), "--device", device)
    limit = session.share(TEST_SHARE)
    session.run("gpu tests", sys.executable, *command, limit_s=limit, correctness=True)

    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )
    for tool, options in SANITIZERS.items():
        if sanitizer is None or device != "cuda":
            session.skip(tool, "compute-sanitizer was not found" if device == "cuda" else device)
            continue
        session.run(
            tool,
            sanitizer,
            f"--tool={tool}",
            f"--error-exitcode={SANITIZER_ERROR}",
            "--report-api-errors=no",  # torch asks for things that may fail
            "--kernel-name=kernel_substring=rosa",  # torch's own kernels take most of the time
            *options,
            sys.executable,
            ROOT / "cpp/tools/gpu_check.py",
            "--small",
            limit_s=session.share(SANITIZER_SHARE),
            correctness=True,
            extra={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            unsupported="Device not supported",
        )


def calibrate(session: Session, out: Path) -> dict[str, str]:
    """Measure the roofs alone and let `auto` decide by them; the environment that tells it."""
    rows, machine = out / "roofs" / "results.jsonl", out / "machine.json"
    bench = (sys.executable, "-m", "bench")
    session.run(
        "roofs",
        # A budget that is spent before the first case.
        *(*bench, "run", "--suite", "rosa", "--device", "cuda", "--time-budget", "0.001"),
        *("--no-plots", "--out", rows.parent),
        limit_s=session.share(EXPERIMENT_SHARE),
    )
    if not rows.is_file():
        return {}
    session.run("calibrate", *bench, "calibrate", rows, "--out", machine)
    return {"ROSA_MACHINE": str(machine)} if machine.is_file() else {}


def experiments(session: Session, out: Path) -> None:
    """What docs/cuda-kernels.md wants known first: panels within L2, launches that overlap."""
    bench = (sys.executable, "-m", "bench")
    for name, variables in EXPERIMENTS.items():
        seconds = session.share(EXPERIMENT_SHARE, at_least_s=0)
        session.run(
            f"experiment {name}",
            *(*bench, "run", "--suite", "rosa", "--device", "cuda", "--ops", "sddmm"),
            *("--kernels", "cuda/tile", "cuda/wgmma", "dense", "--no-plots"),
            *("--time-budget", f"{seconds:.0f}", "--out", out / name),
            limit_s=seconds + SHORTEST_TEST_S,
            extra=variables,
        )
    base, *others = (out / name / "results.jsonl" for name in EXPERIMENTS)
    for other in others:
        if base.is_file() and other.is_file():
            session.run(f"compare {other.parent.name}", *bench, "compare", base, other, "--all")


def measure(
    session: Session, device: str, out: Path, suites: list[str], bench_args: list[str]
) -> None:
    """The suites, in equal shares of what is left; figures; the ratios to every peer."""
    if not has("numpy"):
        session.skip("suites", "numpy, which reads the masks, is not installed")
        return
    calibration: dict[str, str] = {}
    if device == "cuda":
        calibration = calibrate(session, out)
        experiments(session, out)
    reserve = session.share(FINISH_SHARE, at_least_s=20)
    for i, suite in enumerate(suites):
        seconds = (session.left() - reserve) / (len(suites) - i)
        if seconds < 10:
            session.skip(f"suite {suite}", "the budget is spent")
            continue
        session.run(
            f"suite {suite}",
            *(sys.executable, "-m", "bench", "run", "--suite", suite, "--device", device),
            *("--time-budget", f"{seconds:.0f}", "--no-plots", "--out", out / suite),
            *bench_args,
            # The budget is looked at between cases; one that hangs must not take the others' time.
            limit_s=seconds + SHORTEST_TEST_S,
            extra=calibration,
        )
    rows = [path for suite in suites if (path := out / suite / "results.jsonl").is_file()]
    if not rows:
        session.skip("ratios", "there are no rows")
        return
    (out / "rows.jsonl").write_text("".join(path.read_text() for path in rows))
    for path in rows:
        if has("matplotlib"):
            session.run(f"plot {path.parent.name}", sys.executable, "-m", "bench", "plot", path)
        else:
            session.skip(f"plot {path.parent.name}", "matplotlib is not installed")
    session.run("ratios", sys.executable, "-m", "bench", "ratios", *rows)


def main() -> int:
    """All steps in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=25, metavar="MINUTES")
    parser.add_argument("--out", type=Path, default=BUILD / "results", metavar="DIR")
    parser.add_argument("--suites", nargs="*", default=list(SUITES), metavar="SUITE")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    parser.add_argument("--no-tests", action="store_true", help="build and measure")
    parser.add_argument(
        "--bench-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to bench run"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("w") as log:
        session = Session(arguments.budget * 60, log)
        if not has("torch"):
            session.say(f"gpu: expected a Python with torch, got {sys.executable} without it")
            return 2
        if shutil.which("cmake") is None:
            session.say("gpu: expected cmake on PATH, got none")
            return 2
        if not build(session):
            session.say("\nthe build failed: nothing else can run")
            return session.finish()
        if not arguments.no_tests:
            session.run(
                "native tests",
                *("ctest", "--test-dir", BUILD, "--output-on-failure", "--parallel", "4"),
                limit_s=session.share(NATIVE_SHARE),
                correctness=True,
            )
        if arguments.device == "cuda" and not devices(session):
            if session.steps[-1].reason == NO_DEVICE:
                session.say(f"\n{NO_DEVICE}: built, compiled, stopped")
            return session.finish()
        if not arguments.no_tests:
            test(session, arguments.device)
        measure(session, arguments.device, out, arguments.suites, arguments.bench_args)
        session.say(f"\nRows, figures and this log: {out}")
        return session.finish()


if __name__ == "__main__":
    sys.exit(main())
