#!/usr/bin/env python3
"""Check and measure the kernels on a GPU machine, in one of two short sessions.

    python3 cpp/tools/gpu.py first --budget 5     # minutes, all together; `make gpu BUDGET=5`
    python3 cpp/tools/gpu.py more --budget 4      # `make gpu-more BUDGET=4`

The machine needs torch, nvcc and cmake, but no package index. `first` answers three questions. Are
the kernels right in cases that small tests never reach? How fast are they on real masks, compared
with dense + gather and cuSPARSE? Where does the time go, compared with the cost model? `more` runs
the GPU tests and memcheck. It also measures the other masks, decoding, the copies and the layer.
`--device cpu` rehearses either session without a GPU.

Each session builds into build/gpu and runs a copy of the Python sources there, beside the new
module. The checkout's own module stays as it is. A session ends within its budget, even if a step
hangs. The exit status is 0; 1 if something is incorrect; 2 if something failed; 3 if something was
not reached. The files under --out are log.txt, results.jsonl, stages.jsonl, machine.json and
ncu.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cuda_toolchain
from session import Session, Task

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
TREE = BUILD / "tree"
STAGED = ("rosa_kernels", "rosa_train", "bench", "tests", "cpp/tools", "pyproject.toml")
NOT_STAGED = ("__pycache__", "*.so", "rows")

# A family's kernels share code, so one process checks them. A fault breaks the CUDA context of the
# whole process.
FAMILIES: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "cuda": {
        "sddmm cuda/gather": (("sddmm",), "cuda/gather"),
        "sddmm cuda/tile": (("sddmm",), "cuda/tile"),
        "sddmm cuda/wgmma": (("sddmm",), "cuda/wgmma"),
        "spmm cuda/gather": (("spmm",), "cuda/gather"),
        "spmm cuda/tile": (("spmm",), "cuda/tile"),
        "copies cuda": (("csr_add_", "csr_gather", "csr_scatter_"), "cuda"),
    },
    "cpu": {
        "sddmm cpu": (("sddmm",), "cpu"),
        "spmm cpu": (("spmm",), "cpu"),
        "copies cpu": (("csr_add_", "csr_gather", "csr_scatter_"), "cpu"),
    },
}
# The families whose memory accesses are least like plain loops.
MEMCHECKED = ("sddmm cuda/tile", "sddmm cuda/wgmma", "spmm cuda/gather", "spmm cuda/tile")

# Contenders of the layer suite. Without this choice a case has 34, more than there is time for.
LAYERS = ("rosa", "lora", "peft-lora", "peft-supra", "full")

# Time limits as shares of the budget. Time that a step does not use goes to the measurements.
BUILD_SHARE, CHECK_SHARE, NCU_SHARE, TEST_SHARE, LAYER_SHARE = 0.65, 0.25, 0.13, 0.3, 0.25
# Checks and ncu stop themselves this long before their limit, so that they can report what they
# found.
CHECK_MARGIN_S, NCU_MARGIN_S = 12.0, 20.0
SHORTEST_MEASUREMENT_S = 15.0
LINES_SHOWN = 45

# Time, bytes from and to memory, hits in the L2 cache, utilisation, registers, blocks per
# multiprocessor.
NCU_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "lts__t_bytes.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "launch__occupancy_limit_shared_mem",
)
# gpu_check prints the first if there was no time for any case. It prints the second if the kernel
# is for another GPU.
NO_TIME, NO_SERVICE = "^nothing was reached", "^no kernel served a case"
FOR_SOME_GPUS = ("cuda/wgmma",)
# What the sanitizer and the profiler print if the machine does not let them work.
NO_SANITIZER = "Device not supported|terminated before first instrumented API call|Unable to"
NO_PROFILER = "ERR_NVGPUCTRPERM|No kernels were profiled|not supported"
WARM_UP = """
import torch
print("torch", torch.__version__, "for CUDA", torch.version.cuda)
for i in range(torch.cuda.device_count()):
    print(f"device {i}:", torch.cuda.get_device_properties(i))
    print(float(torch.ones(1, device=i).sum()))
"""
NO_GPU = "no CUDA device: nothing was built. `--device cpu` rehearses the session without one"


@dataclass
class Run:
    """A session, and the settings that its steps share."""

    session: Session
    device: str
    budget_s: float
    out: Path
    without: list[str] = field(default_factory=list)

    def share(self, of_budget: float) -> float:
        """The time limit, in seconds, of a step with this share of the budget."""
        return min(of_budget * self.budget_s, self.session.left())

    def bench(self, *arguments: str | Path, limit_s: float, name: str) -> bool:
        """Run one benchmark process. It ends itself before its limit unless something hangs."""
        if limit_s < SHORTEST_MEASUREMENT_S:
            self.session.skip(name, f"{max(limit_s, 0):.0f} s are left", "not reached")
            return False
        command = [sys.executable, "-m", "bench", *arguments, "--device", self.device]
        command += ["--time-budget", f"{limit_s * 0.8:.0f}"]
        if self.without and "layer" not in arguments:  # its contenders have other names
            command += ["--without", *self.without]
        task = Task(name, command, limit_s=limit_s, show=LINES_SHOWN)
        return self.session.run(task).ok


def has(module: str) -> bool:
    """Whether this Python finds a module."""
    return importlib.util.find_spec(module) is not None


def program(name: str) -> str | None:
    """The path of a CUDA toolkit's program, from PATH or the toolkit's folder, or None."""
    folders = [cuda_toolchain.TOOLKIT / "bin", cuda_toolchain.TOOLKIT / "compute-sanitizer"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def gpu_is_here() -> bool:
    """Whether there is a GPU, found without importing torch, which takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or cuda_toolchain.has_gpu()


def environment() -> dict[str, str]:
    """The environment of the steps: the staged sources, without the caller's settings."""
    ignored = ("VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "PYTHONPATH")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ignored and not key.startswith("ROSA_")
    }
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(TREE)}


def stage() -> None:
    """Copy the Python sources to where the new module will lie."""
    shutil.rmtree(TREE, ignore_errors=True)
    for name in STAGED:
        source, target = ROOT / name, TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_STAGED))
        else:
            shutil.copy(source, target)


def build(run: Run) -> bool:
    """Build the Python module for this machine's GPU with plain CMake. True if that worked."""
    stage()
    nvcc = cuda_toolchain.find()
    if nvcc is None and run.device == "cuda":
        run.session.skip("build", "expected nvcc, got none", "failed")
        return False
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    configure = Task(
        "configure",
        [
            *("cmake", "-S", ROOT, "-B", BUILD / "cmake", *generator),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DROSA_MODULE_DIR={TREE / 'rosa_kernels'}",
            f"-DROSA_CUDA={'ON' if run.device == 'cuda' else 'OFF'}",
            "-DROSA_TESTS=OFF",
            "-DROSA_INSTALL=OFF",
        ],
        limit_s=run.share(BUILD_SHARE),
        environment={} if nvcc is None else {"CUDACXX": str(nvcc)},
    )
    if not run.session.run(configure).ok:
        return False
    command = ["cmake", "--build", BUILD / "cmake", "--parallel", str(os.cpu_count() or 1)]
    built, _ = run.session.together(
        [
            Task("build", command, limit_s=run.share(BUILD_SHARE)),
            # On a fresh machine the first import reads gigabytes. Here it runs beside the build.
            Task("import torch", [sys.executable, "-c", WARM_UP], limit_s=run.share(BUILD_SHARE)),
        ]
    )
    return built.ok


def checks(
    run: Run, names: Iterable[str], limit_s: float, *, under: Sequence[str] = ()
) -> list[Task]:
    """Tasks that run gpu_check for families of kernels, each in a process of its own."""
    names = list(names)
    tasks = []
    for name in names:
        ops, kernel = FAMILIES[run.device][name]
        excuses = {NO_TIME: "not reached"}
        if kernel in FOR_SOME_GPUS:
            excuses[NO_SERVICE] = "skipped"
        command = [
            *(*under, sys.executable, "-W", "ignore", TREE / "cpp" / "tools" / "gpu_check.py"),
            *("--device", run.device, "--ops", *ops, "--kernels", kernel),
            *("--until", f"{time.monotonic() + limit_s - min(CHECK_MARGIN_S, limit_s / 2):.1f}"),
            *("--sizes", *(("small",) if under else ("large", "small"))),
        ]
        tasks.append(
            Task(
                f"{'memcheck' if under else 'check'} {name}",
                command,
                limit_s=limit_s,
                ends_itself=True,
                wrong="^INCORRECT |ERROR SUMMARY: [1-9]",
                excuses=excuses | ({NO_SANITIZER: "skipped"} if under else {}),
                environment=threads_for(len(names)),
            )
        )
    return tasks


def threads_for(processes: int) -> dict[str, str]:
    """Give each process an equal share of the cores. By default, each takes all of them."""
    return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}


def check(run: Run) -> None:
    """Check every family of kernels. A kernel that fails is not measured afterwards."""
    families = FAMILIES[run.device]
    steps = run.session.together(checks(run, families, run.share(CHECK_SHARE)))
    for step, (ops, kernel) in zip(steps, families.values(), strict=True):
        # The next suite is of sddmm. It would refuse the name of a kernel that sddmm does not have.
        if step.outcome in ("failed", "incorrect") and "sddmm" in ops:
            run.without.append(kernel)
    if run.without:
        run.session.say(f"not measured: {', '.join(run.without)}")


def profile(run: Run) -> None:
    """Write what Nsight Compute counts in each kernel, if it works here."""
    ncu = program("ncu")
    if ncu is None or run.device != "cuda":
        run.session.skip("ncu", "ncu was not found" if run.device == "cuda" else run.device)
        return
    command = [
        *(ncu, "--clock-control", "none", "--csv", "--metrics", ",".join(NCU_METRICS)),
        *("--kernel-name-base", "demangled", "--kernel-name", "regex:rosa::cuda"),
        *(sys.executable, "-m", "bench", "stages", "--suite", "first", "--device", "cuda"),
        # ncu prints at the end, so a killed ncu leaves nothing.
        *("--bare", "--time-budget", f"{max(run.session.left() - NCU_MARGIN_S, 1):.0f}"),
        *(("--without", *run.without) if run.without else ()),
    ]
    step = run.session.run(Task("ncu", command, excuses={NO_PROFILER: "skipped"}))
    rows = [line for line in step.lines if line.startswith('"')]
    if rows:
        (run.out / "ncu.csv").write_text("\n".join(rows) + "\n")
    elif step.ok:
        run.session.skip("ncu.csv", "ncu counted nothing", "failed")


def first(run: Run) -> None:
    """Check the kernels, measure them on real masks, and profile them."""
    check(run)
    run.bench(
        *("run", "--suite", "first", "--experiments", "--stages", "--no-plots"),
        *("--calibrate", run.out / "machine.json", "--out", run.out),
        limit_s=run.session.left() - run.share(NCU_SHARE),
        name="measure",
    )
    profile(run)


def more(run: Run) -> None:
    """Run GPU tests beside memcheck. Then measure other masks, decoding, copies and the layer."""
    limit = run.share(TEST_SHARE)
    sanitizer = program("compute-sanitizer")
    tasks = []
    if run.device != "cuda" or not has("pytest") or not has("hypothesis"):
        run.session.skip("GPU tests", "they need a GPU, pytest and hypothesis")
    else:
        tasks.append(gpu_tests(limit))
    if run.device != "cuda" or sanitizer is None:
        run.session.skip("memcheck", "it needs a GPU and compute-sanitizer")
    else:
        memcheck = (
            *(sanitizer, "--tool=memcheck", "--error-exitcode=86"),
            "--report-api-errors=no",  # some of torch's own calls fail
            "--kernel-name=kernel_substring=rosa",  # torch's own kernels take most of the time
            *("--padding", "1024"),  # makes small overruns visible
        )
        tasks += checks(run, MEMCHECKED, limit, under=memcheck)
    if tasks:
        run.session.together(tasks)
    left = run.session.left
    suite = ("run", "--no-plots", "--out", run.out, "--suite")
    run.bench(*suite, "second", limit_s=left() - run.share(LAYER_SHARE), name="measure second")
    run.bench(*suite, "layer", "--kernels", *LAYERS, limit_s=left(), name="measure layer")


def gpu_tests(limit_s: float) -> Task:
    """The task of the tests marked gpu, in parallel if pytest-xdist is installed."""
    # This machine's versions of pytest and others are not ours, so warnings and old versions are
    # allowed.
    lenient = ("-W", "default", "-o", "minversion=7.0", "-p", "no:cacheprovider")
    # Leaves out folders that have no GPU tests but take long to collect.
    chosen = ("-m", "gpu", "--ignore=tests/train", "--ignore=tests/bench")
    workers = min(8, os.cpu_count() or 1) if has("xdist") else 1
    parallel = ("-n", str(workers)) if workers > 1 else ()
    options = ("-v", "--continue-on-collection-errors", *lenient, *chosen, *parallel)
    return Task(
        "GPU tests",
        [sys.executable, "-m", "pytest", *options],
        limit_s=limit_s,
        wrong=r"\bFAILED\b",
        environment=threads_for(2 * workers),
    )


SESSIONS: dict[str, tuple[float, Callable[[Run], None]]] = {"first": (5, first), "more": (4, more)}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, look for a GPU and run a session."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("session", choices=list(SESSIONS))
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="default: 5, or 4 for more")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: below build/gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="kernels or peers")
    parser.add_argument(
        "--no-build", action="store_true", help="use the module in build/gpu, or the checkout's"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not gpu_is_here():
        print(f"gpu: {NO_GPU}")
        return 2
    if not has("torch"):
        print(f"gpu: expected a Python with torch, got {sys.executable} without it")
        return 2
    if shutil.which("cmake") is None and not arguments.no_build:
        print("gpu: expected cmake on PATH, got none")
        return 2
    default_s, steps = SESSIONS[arguments.session]
    budget_s = 60 * (arguments.budget or default_s)
    out = (arguments.out or BUILD / arguments.session).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("w") as log:
        session = Session(budget_s, log, TREE, environment())
        run = Run(session, arguments.device, budget_s, out, list(arguments.without))
        # SIGTERM acts like Ctrl-C: it stops what was started and reports how far that came.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if _prepare(run, arguments.no_build):
                steps(run)
        except KeyboardInterrupt:
            session.stop()
            session.skip("the rest", "it was interrupted", "not reached")
        finally:
            signal.signal(signal.SIGTERM, before)
        session.say(f"Rows and log: {out}")
        return session.finish()


def _prepare(run: Run, no_build: bool) -> bool:
    if not no_build:
        return build(run)
    name = f"rosa_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = [root / name for root in (TREE, ROOT) if (root / name).is_file()]
    if not built:
        run.session.skip("build", f"--no-build: expected {name}, got none", "failed")
        return False
    content = built[0].read_bytes()
    stage()
    (TREE / name).write_bytes(content)
    return True


if __name__ == "__main__":
    sys.exit(main())
