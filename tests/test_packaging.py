"""Packaging: versions and pins agree, the stub is right, the wheel works, errors are clear."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import rosa_kernels

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_changelog_leads_with_this_version() -> None:
    # pyproject reads the version from rosa_kernels/__init__.py, so there is no third copy.
    assert PROJECT["dynamic"] == ["version"]
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == rosa_kernels.__version__


def test_classifiers_start_at_the_required_python() -> None:
    minors = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert [int(minor) for minor in minors] == [11, 12, 13, 14]
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    utils = pytest.importorskip("packaging.utils")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"]]
    wanted += [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(requirements.Requirement, wanted):
        name = utils.canonicalize_name(requirement.name)
        if name == "triton":  # a CUDA build of torch pins its own
            assert name not in pins
        else:
            assert requirement.specifier.contains(pins[name]), requirement


@pytest.mark.parametrize("module", ["rosa_kernels._C", "_simt"])
def test_stub_lists_exactly_what_the_module_has(module: str) -> None:
    native = pytest.importorskip(module)
    stub = ast.parse((ROOT / "rosa_kernels/_C.pyi").read_text())
    declared = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    declared |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
    if not hasattr(native, "cuda_unavailable"):  # built without nvcc
        declared = {name for name in declared if not name.startswith("cuda_")}
    assert declared == {name for name in vars(native) if not name.startswith("__")}


@pytest.mark.slow
def test_wheel_is_complete_and_runs_without_checkout(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # The wheel is built from a copy, so that untracked files of the checkout are neither used nor
    # overwritten.
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".venv", "build", ".git", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    (tree / "rosa_kernels" / "_C.cpython-300-stale.so").touch()
    stale = tree / "bench" / "suites" / "__pycache__" / "stale.cpython-300.pyc"
    stale.parent.mkdir()
    stale.touch()
    # With nvcc, the wheel has a CUDA part, too. One architecture is enough for this test.
    settings = "--config-settings=cmake.define.ROSA_CUDA_ARCHITECTURES=80"
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", settings, "-w", tmp_path, tree],
        check=True,
    )

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"rosa_kernels-{rosa_kernels.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert len([n for n in names if re.fullmatch(r"rosa_kernels/_C\..*\.so", n)]) == 1
    assert {"rosa_kernels/_C.pyi", "rosa_kernels/py.typed"} <= set(names)
    assert any(n.endswith("/LICENSE") for n in names)
    packages = {"rosa_kernels", "rosa_train", "rosa_bench"}  # none is called bench or tests
    assert {n.split("/")[0].split("-")[0] for n in names} == packages
    masks = [n for n in names if n.startswith("rosa_bench/masks/")]
    assert {Path(n).suffix for n in masks} == {".py", ".npz", ".md"}
    not_shipped = ("rosa_bench/rows/", "rosa_bench/test_")
    assert not [n for n in names if n.startswith(not_shipped) or "__pycache__" in n]

    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()

    def installed(*command: str | Path) -> str:
        """The output of a command that sees the wheel, in a folder without a checkout."""
        environment = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run(
            command, env=environment, cwd=empty, capture_output=True, text=True, check=True
        )
        return done.stdout

    code = "import rosa_kernels as rk, rosa_bench; from rosa_kernels import _C; "
    paths = installed(sys.executable, "-c", code + "print(rk.__file__, rosa_bench, _C.__file__)")
    assert paths.count(str(target)) == 3
    assert "usage: python -m rosa_train" in installed(target / "bin" / "rosa-train", "--help")

    if not find_spec("numpy"):
        return
    bench = target / "bin" / "rosa-bench"
    assert installed(bench, "--help").startswith("usage: rosa-bench ")
    assert "real:14.q_proj" in installed(bench, "list", "--suite", "first", "--device", "cpu")
    short = ("--device", "cpu", "--no-plots", "--time-budget", "10", "--out", "here")
    # Runs the suite of call overheads, and a layer, whose memory a child process measures.
    printed = installed(bench, "run", "--suite", "overhead", *short)
    assert "Call overhead in us" in printed
    layers = ("--suite", "layer", "--kernels", "lora", "--ops", "rosa_layer")
    installed(sys.executable, "-m", "rosa_bench", "run", *layers, *short)
    rows = [json.loads(line) for line in (empty / "here/results.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows if row["status"] == "ok"} >= {"sddmm", "rosa_layer"}
    assert {(row["git_sha"], row["git_dirty"]) for row in rows} == {(None, None)}


def test_git_is_not_asked_about_an_installed_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    from bench.measuring import environment

    # The environment with the wheel may lie in the checkout of another project.
    monkeypatch.setattr(environment, "_PACKAGE", ROOT / "rosa_bench")
    monkeypatch.setattr(environment, "_output", lambda *command: "of another project")
    record = environment.run_record([])
    assert (record["git_sha"], record["git_dirty"]) == (None, None)


def test_the_benchmark_names_the_missing_extra() -> None:
    code = """
import sys, warnings
sys.modules["numpy"] = None  # importing it now raises
warnings.simplefilter("ignore")  # torch says that it has no numpy
from bench.__main__ import main
sys.exit(main(["list"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench: expected numpy, got none: pip install 'rosa-kernels[bench]'\n"


@pytest.mark.parametrize(
    ("given", "configures", "tests"),
    [
        ((), False, "--parallel 4 --label-exclude slow"),
        (("CMAKE_ARGS=-DROSA_CUDA=OFF",), True, "--parallel 4 --label-exclude slow"),
        (("CTEST_ARGS=",), False, "--parallel 4"),
    ],
)
def test_make_takes_options_after_the_first_build(
    tmp_path: Path, given: tuple[str, ...], configures: bool, tests: str
) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    for file in ("Makefile", "CMakePresets.json", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    for made in (".venv/ready", "build/release/build.ninja"):  # the later one is newer
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).touch()
    # A make that runs these tests hands its own variables on.
    environment = {"PATH": os.environ["PATH"]}
    command = [make, "--dry-run", "test", *given]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ("cmake --preset release -DROSA_CUDA=OFF" in done.stdout) == configures
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ctest"))
    assert line.strip().endswith(tests)


@pytest.mark.parametrize(
    ("lacks", "package"),
    [("ensurepip", "python3-venv"), ("sysconfig", "python3-dev"), ("compiler", "g++")],
)
def test_make_names_the_missing_system_package(tmp_path: Path, lacks: str, package: str) -> None:
    """Runs `make` in an almost empty folder, with a python or a PATH that lacks one thing."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    for file in ("Makefile", "CMakePresets.json", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    if lacks != "compiler":
        (tools / "c++").symlink_to("/bin/sh")
    # This python3 answers as Debian's does without python3-venv or python3-dev.
    refuse = {"ensurepip": "exit 1", "sysconfig": "echo /nonexistent; exit", "compiler": ":"}[lacks]
    python = tools / "python3"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *{lacks}*) {refuse} ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(
        [make, "build"],
        cwd=tmp_path,
        env={**environment, "PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    message = done.stderr.splitlines()[0]
    assert done.returncode != 0
    assert f"apt install {package} " in message + " "
    assert not (tmp_path / ".venv").exists()
