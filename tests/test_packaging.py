"""What is shipped: versions that agree, a truthful stub, a wheel that works, clear refusals."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
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
def test_wheel_holds_the_package_and_runs_on_its_own(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # A copy, so that what lies about in the checkout can neither help nor be overwritten.
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".venv", "build", ".git", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    (tree / "rosa_kernels" / "_C.cpython-300-stale.so").touch()
    # Where there is nvcc, a wheel has a CUDA part, too: one architecture of it will do.
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
    assert {n.split("/")[0].split("-")[0] for n in names} == {"rosa_kernels", "rosa_train"}

    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    code = "import rosa_kernels as rk; from rosa_kernels import _C; print(rk.__file__, _C.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(path).is_relative_to(target) for path in done.stdout.split())


@pytest.mark.parametrize(
    ("lacks", "package"),
    [("ensurepip", "python3-venv"), ("sysconfig", "python3-dev"), ("compiler", "g++")],
)
def test_make_names_the_missing_system_package(tmp_path: Path, lacks: str, package: str) -> None:
    """`make` in an empty copy whose python, or whose PATH, lacks one thing."""
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
    # Answers as a Debian python3 does without python3-venv or python3-dev.
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
