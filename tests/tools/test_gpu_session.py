"""cpp/tools: timed sessions of commands, the sessions on a GPU machine, and gpu_check.

The commands of these tests are small Python programs. The longest waits are two or three seconds,
for deadlines.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import gpu
import gpu_check
import pytest
import torch
from session import Session, Step, Task

import rosa_kernels as rk
from rosa_kernels.backends import reference
from rosa_kernels.registry import register

ROOT = Path(__file__).resolve().parents[2]
FOREVER = "import time; print('begun', flush=True); time.sleep(60)"


def python(text: str, **options: object) -> Task:
    """A task that runs a Python program."""
    return Task(str(options.pop("name", "task")), [sys.executable, "-c", text], **options)


def session(budget_s: float = 60.0) -> Session:
    return Session(budget_s, io.StringIO(), ROOT, os.environ)


def run(task: Task, budget_s: float = 60.0) -> tuple[Step, int]:
    """Runs a session of one task. Returns the task's step and the exit status."""
    it = session(budget_s)
    return it.run(task), it.finish()


# -- outcomes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "outcome", "status"),
    [
        ("print('seen')", {}, "ok", 0),
        ("raise SystemExit(3)", {}, "failed", 2),
        ("raise ValueError", {"wrong": "^INCORRECT"}, "failed", 2),
        ("import os; os.kill(os.getpid(), 11)", {}, "failed", 2),
        ("print('2 wrong')", {"wrong": "wrong$"}, "incorrect", 1),
        ("print('unable'); raise SystemExit(1)", {"excuses": {"^unable": "skipped"}}, "skipped", 0),
        ("print('unable')", {"excuses": {"^unable": "skipped"}}, "ok", 0),
        (FOREVER, {"limit_s": 1.0}, "not reached", 3),
        (FOREVER, {"limit_s": 1.0, "ends_itself": True}, "failed", 2),
    ],
)
def test_a_commands_outcome_and_exit_status(
    text: str, options: dict[str, object], outcome: str, status: int
) -> None:
    step, got = run(python(text, **options))
    assert (step.outcome, got) == (outcome, status)


def test_a_missing_program_has_failed() -> None:
    step, status = run(Task("absent", ["/no/such/program"]))
    assert (step.outcome, status) == ("failed", 2)
    assert "No such file" in step.reason


def test_the_reason_quotes_the_last_output() -> None:
    step, _ = run(python(FOREVER, limit_s=4.0))
    assert step.reason == "not finished within 4 s; its last words: begun"


def test_the_terminal_shows_fewer_lines_than_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = io.StringIO()
    it = Session(60, log, ROOT, os.environ)
    it.run(python("for i in range(50): print('line', i)", show=2))
    it.run(python("raise SystemExit('why')"))
    assert all(f"[task] line {i}\n" in log.getvalue() for i in range(50))
    it.finish()
    out = capsys.readouterr().out
    assert out.index("why") < out.index("== Outcomes") < out.index("line 48") < out.index("line 49")
    assert "line 47" not in out


# -- time --------------------------------------------------------------------------------------


def test_tasks_stopped_by_the_deadline_are_not_reached() -> None:
    """Even a check has not failed if the deadline stops it. Later tasks are not begun."""
    it = session(7.0)
    check = {"ends_itself": True, "limit_s": 60.0}
    steps = [it.run(python(FOREVER, name=name, **check)) for name in ("first", "second")]
    assert [step.outcome for step in steps] == ["not reached"] * 2
    assert steps[0].reason == "stopped, the time is up; its last words: begun"
    assert steps[1].reason == "the time is up"
    assert it.finish() == 3


def test_a_wrong_result_before_the_deadline_is_incorrect() -> None:
    task = python("print('FAILED x', flush=True); import time; time.sleep(60)", wrong="^FAILED")
    step, status = run(task, 7.0)
    assert (step.outcome, step.reason, status) == ("incorrect", "FAILED x", 1)


def test_grouped_commands_run_concurrently_and_fail_separately() -> None:
    it = session()
    meet = "import pathlib, sys, time\nme, other = map(pathlib.Path, sys.argv[1:])\nme.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)"
    folder = Path(it._cwd) / "build" / f"meeting-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        places = [folder / "a", folder / "b"]
        tasks = [
            Task(f"{i}", [sys.executable, "-c", meet, places[i], places[1 - i]], limit_s=30)
            for i in (0, 1)
        ]
        steps = it.together([*tasks, python("raise SystemExit(9)", name="breaks")])
    finally:
        shutil.rmtree(folder)
    assert [step.outcome for step in steps] == ["ok", "ok", "failed"]
    it.finish()


def test_children_are_killed_and_strangers_not_awaited() -> None:
    """A grandchild in a session of its own survives the kill, and keeps the pipe open."""
    text = """
        import subprocess, sys, time
        child = subprocess.Popen(["sleep", "60"])
        stranger = subprocess.Popen(["sleep", "20"], start_new_session=True)
        print(child.pid, stranger.pid, flush=True)
        time.sleep(60)
    """
    begin = time.monotonic()
    step, _ = run(python(textwrap.dedent(text), limit_s=4.0))
    assert time.monotonic() - begin < 18
    child, stranger = map(int, step.lines[0].split())
    try:
        assert step.outcome == "not reached"
        state = Path(f"/proc/{child}/stat")
        # The child was killed. Init may not have reaped it yet.
        assert not state.exists() or ") Z " in state.read_text()
    finally:
        os.kill(stranger, 9)


def test_a_session_ends_if_its_process_hangs() -> None:
    program = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT / "cpp/tools")!r})
        from pathlib import Path
        from session import Session, Task
        it = Session(6.0, open("/dev/null", "w"), Path("."), {{}})
        it.run(Task("quick", ["/bin/true"]))
        time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0
    assert re.search(r"== Outcomes after \d+ s\nok ", done.stdout)


# -- what is run -------------------------------------------------------------------------------


def test_make_gpu_needs_no_virtual_environment(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS")}

    def commands(*arguments: str) -> list[str]:
        done = subprocess.run(
            # Otherwise a make inside another make prints the folder that it enters.
            [make, "-n", "--no-print-directory", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert commands("gpu") == ["python3", "cpp/tools/gpu.py", "first"]
    assert commands("gpu", "BUDGET=7")[2:] == ["first", "--budget", "7"]
    assert commands("gpu-more", "GPU_ARGS=--out here")[2:] == ["more", "--out", "here"]


def test_without_a_gpu_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "gpu_is_here", lambda: False)
    monkeypatch.setattr(gpu, "stage", lambda: pytest.fail("began to build"))
    assert gpu.main(["first", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device: nothing was built" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_detected_without_importing_torch(tmp_path: Path) -> None:
    """Importing torch takes about a second. Without a GPU, the command must end faster."""
    text = "import sys, gpu; gpu.gpu_is_here(); raise SystemExit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT / "cpp" / "tools")
    assert done.returncode == 0


def test_every_cuda_kernel_belongs_to_a_family() -> None:
    families = {(op, kernel) for ops, kernel in gpu.FAMILIES["cuda"].values() for op in ops}
    registered = {
        (k.op, k.name) for k in rk.kernels() if k.backend == "cuda" and k.op in gpu_check.OPS
    }
    assert families == registered
    assert set(gpu.MEMCHECKED) <= set(gpu.FAMILIES["cuda"])


def test_sources_are_staged_without_the_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "TREE", tmp_path / "tree")
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "rosa_kernels").rglob("*")}
    gpu.stage()
    gpu.stage()  # over an older copy
    tree = tmp_path / "tree"
    assert (tree / "rosa_kernels" / "ops" / "rosa_linear.py").is_file()
    assert (tree / "bench" / "masks").is_dir()
    assert (tree / "cpp" / "tools" / "gpu_check.py").is_file()
    assert not [*tree.rglob("*.so"), *(tree / "bench" / "rows").rglob("*")]
    after = {path: path.stat().st_mtime_ns for path in (ROOT / "rosa_kernels").rglob("*")}
    assert {p: t for p, t in after.items() if "__pycache__" not in str(p)} == {
        p: t for p, t in before.items() if "__pycache__" not in str(p)
    }


def test_kernels_that_fail_their_check_are_not_measured(tmp_path: Path) -> None:
    class Outcomes:
        """A session whose checks have the outcomes below. Two are incorrect and two have failed."""

        def left(self) -> float:
            return 100.0

        def say(self, text: str) -> None:
            pass

        def together(self, tasks: list[Task]) -> list[Step]:
            self.tasks = tasks
            found = ["incorrect", "not reached", "failed", "failed", "ok", "incorrect"]
            return [Step(t.name, o, 1.0) for t, o in zip(tasks, found, strict=True)]

        def run(self, task: Task) -> Step:
            self.task = task
            return Step(task.name, "ok", 1.0)

    outcomes = Outcomes()
    it = gpu.Run(outcomes, "cuda", 300.0, tmp_path)
    gpu.check(it)
    assert it.without == ["cuda/gather", "cuda/wgmma"]
    assert it.bench("run", limit_s=50.0, name="measure")
    command = list(outcomes.task.command)
    assert command[command.index("--without") :] == ["--without", "cuda/gather", "cuda/wgmma"]
    assert outcomes.tasks[2].excuses[gpu.NO_SERVICE] == "skipped"  # wgmma cannot run on other GPUs
    assert gpu.NO_SERVICE not in outcomes.tasks[1].excuses
    assert command[command.index("--time-budget") + 1] == "40"


@pytest.mark.slow
def test_the_first_session_survives_a_hanging_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the session on a CPU with the installed module. One family of kernels hangs."""
    monkeypatch.setattr(gpu, "TREE", tmp_path / "tree")
    stage = gpu.stage

    def stage_with_a_hang() -> None:
        stage()
        tool = tmp_path / "tree" / "cpp" / "tools" / "gpu_check.py"
        text = tool.read_text().replace(
            "def main() -> int:",
            "def main() -> int:\n    'csr_add_' in sys.argv and time.sleep(999)",
        )
        tool.write_text(text)

    monkeypatch.setattr(gpu, "stage", stage_with_a_hang)
    out = tmp_path / "out"
    budget = 1.5
    begin = time.monotonic()
    status = gpu.main(
        ["first", "--device", "cpu", "--no-build", "--budget", str(budget), "--out", str(out)]
    )
    assert time.monotonic() - begin < 60 * budget + 1
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("== Outcomes"))) :]
    table = table[: table.index("")] if "" in table else table  # the shown lines follow the table
    outcomes = {line[20:].strip().split(":")[0]: line.split("  ")[0] for line in table[1:]}
    assert outcomes["check copies cpu"] == "failed"
    # A slow machine may not reach the measurements. That makes nothing incorrect.
    assert set(outcomes.values()) <= {"ok", "failed", "skipped", "not reached"}
    assert status == 2
    assert "not finished within 22 s" in " ".join(table)
    files = {path.name for path in out.iterdir()}
    assert files <= {"log.txt", "results.jsonl", "stages.jsonl", "machine.json", "ncu.csv"}


# -- gpu_check ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the environment variables that gpu_check sets in its process."""
    for name, value in gpu_check.DEFAULTS.items():
        monkeypatch.setenv(name, value)


def checked(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    sys.argv = ["gpu_check", "--device", "cpu", *arguments]
    return gpu_check.main(), capsys.readouterr().out


@pytest.fixture
def faulty(sandbox: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers an sddmm kernel "faulty". It applies `change` to the right result."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(gpu_check, "REHEARSAL", 32)

    def add(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        @register("sddmm", "faulty", devices={"cpu"}, dtypes=reference.FLOATS, priority=0)
        def run(crow, col, a, b, out_dtype):
            return change(reference.sddmm(crow, col, a, b, out_dtype))

    return add


@pytest.mark.parametrize(
    ("ops", "kernel", "passed"),
    [
        (["sddmm"], "simt/gather", 15),
        (["sddmm"], "simt/tile", 14),  # not float32
        (["sddmm"], "simt/wgmma", 2),  # only with plans of its tile size
        (["spmm"], "simt/gather", 44),
        (["spmm"], "simt/tile", 34),
        (["csr_add_", "csr_gather", "csr_scatter_"], "simt", 9),
    ],
)
def test_the_emulated_kernels_pass_the_large_cases(
    ops: list[str],
    kernel: str,
    passed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("_simt", reason="tests/_simt is not built")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(gpu_check, "REHEARSAL", 32)
    options = ("--sizes", "large", "--ops", *ops, "--kernels", kernel)
    status, out = checked(*options, capsys=capsys)
    assert (status, out.splitlines()[-1]) == (0, f"{passed} passed, 0 incorrect, 0 failed")


@pytest.mark.parametrize("size", ["small", "large"])
def test_gpu_check_finds_wrong_results(
    size: str, faulty: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One entry in a hundred is wrong by 5 %, as with a wrong tile."""

    def off(x: torch.Tensor) -> torch.Tensor:
        x[50::100] *= 1.05
        return x

    faulty(off)
    options = ("--sizes", size, "--ops", "sddmm", "--kernels", "faulty")
    status, out = checked(*options, capsys=capsys)
    assert status == 2
    assert "INCORRECT sddmm faulty, " in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x + torch.randn_like(x), "calls with the same operands differ"),
        (lambda x: torch.where(torch.arange(len(x)) % 97 == 5, torch.inf, x), "a result of finite"),
    ],
)
def test_gpu_check_covers_all_of_large_results(
    change: Callable[[torch.Tensor], torch.Tensor],
    said: str,
    faulty: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty(change)
    options = ("--sizes", "large", "--ops", "sddmm", "--kernels", "faulty")
    status, out = checked(*options, capsys=capsys)
    assert status == 2
    assert f"INCORRECT sddmm faulty, 4096 x 4096, 256 tokens, bfloat16, token-major: {said}" in out


def test_gpu_check_tells_errors_from_wrong_results(
    faulty: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("invalid argument")

    faulty(fail)
    options = ("--sizes", "small", "--ops", "sddmm", "--kernels", "faulty")
    status, out = checked(*options, capsys=capsys)
    assert status == 2
    assert "FAILED sddmm faulty, corners, 8 tokens, bfloat16, token-major: invalid" in out
    assert "0 passed, 0 incorrect" in out


def test_gpu_check_reports_cases_not_reached(
    faulty: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    faulty(lambda x: x)
    options = ("--sizes", "small", "--ops", "sddmm", "--kernels", "faulty", "--until", "0")
    status, out = checked(*options, capsys=capsys)
    assert status == 2
    assert "not reached: sddmm, small cases from nnz=0, 8 tokens, bfloat16, token-major on" in out
    assert "0 incorrect, 0 failed\nnothing was reached\n" in out


def test_gpu_check_fails_if_a_kernel_cannot_run(
    sandbox: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that is not built fails. A kernel that refuses every case gives another message."""
    monkeypatch.setattr(sys, "argv", [])
    options = {"devices": {"cpu"}, "dtypes": reference.FLOATS, "priority": 0}
    register("sddmm", "broken", unavailable="is not built", **options)(lambda *arguments: None)
    register("sddmm", "choosy", reject=lambda call: "not today", **options)(lambda *arguments: None)
    chosen = ("--sizes", "small", "--ops", "sddmm", "--kernels")
    status, out = checked(*chosen, "broken", capsys=capsys)
    assert (status, "FAILED sddmm broken is not built" in out) == (2, True)
    status, out = checked(*chosen, "choosy", capsys=capsys)
    assert (status, "54 refused" in out, "no kernel served a case" in out) == (2, True, True)
