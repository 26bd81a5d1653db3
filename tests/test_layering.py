"""The allowed imports between modules, and the side effects that an import may not have."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The longest matching prefix is a module's layer. A module may import modules of its own layer, the
# listed ones, and anything from outside this repository.
ALLOWED: dict[str, set[str]] = {
    "rosa_kernels.bounds": set(),
    "rosa_kernels.strides": set(),
    "rosa_kernels.tile_plan": set(),
    "rosa_kernels.kernel": {"rosa_kernels.tile_plan"},
    "rosa_kernels.registry": {"rosa_kernels.kernel"},
    "rosa_kernels.choice": {"rosa_kernels.kernel", "rosa_kernels.registry"},
    "rosa_kernels.pattern": {
        "rosa_kernels.choice",
        "rosa_kernels.files",
        "rosa_kernels.kernel",
        "rosa_kernels.tile_plan",
    },
    "rosa_kernels.backends": {
        "rosa_kernels.choice",
        "rosa_kernels.kernel",
        "rosa_kernels.pattern",
        "rosa_kernels.registry",
        "rosa_kernels.strides",
        "rosa_kernels.tile_plan",
    },
    # Only the adapter of the CPU kernels imports the unsafe module _C. The adapter of the CUDA
    # kernels takes it from there.
    "rosa_kernels.backends.native": {
        "rosa_kernels._C",
        "rosa_kernels.pattern",
        "rosa_kernels.registry",
        "rosa_kernels.strides",
    },
    "rosa_kernels.backends.native_cuda": {
        "rosa_kernels.backends.cost",
        "rosa_kernels.backends.machine",
        "rosa_kernels.backends.native",
        "rosa_kernels.kernel",
        "rosa_kernels.registry",
        "rosa_kernels.strides",
        "rosa_kernels.tile_plan",
    },
    # The machine's rates, and the cost of a call on it. Neither imports a kernel.
    "rosa_kernels.backends.machine": set(),
    "rosa_kernels.backends.cost": {
        "rosa_kernels.backends.machine",
        "rosa_kernels.backends.slabs",
        "rosa_kernels.kernel",
        "rosa_kernels.tile_plan",
    },
    "rosa_kernels.ops": {
        "rosa_kernels.bounds",
        "rosa_kernels.choice",
        "rosa_kernels.kernel",
        "rosa_kernels.pattern",
        "rosa_kernels.registry",
        "rosa_kernels.strides",
        "rosa_kernels.tile_plan",
    },
    "rosa_kernels.explain": {
        "rosa_kernels.backends.machine",
        "rosa_kernels.choice",
        "rosa_kernels.kernel",
        "rosa_kernels.pattern",
        "rosa_kernels.registry",
        "rosa_kernels.tile_plan",
    },
    "rosa_kernels.nn": {
        "rosa_kernels.bounds",
        "rosa_kernels.ops",
        "rosa_kernels.pattern",
        "rosa_kernels.strides",
    },
    "rosa_kernels.files": set(),
    # Any training loop can make masks with it. `import rosa_kernels` does not load it.
    "rosa_kernels.masks": {
        "rosa_kernels.bounds",
        "rosa_kernels.files",
        "rosa_kernels.nn",
        "rosa_kernels.pattern",
    },
    "rosa_kernels.testing": {
        "rosa_kernels.backends.reference",
        "rosa_kernels.pattern",
        "rosa_kernels.registry",
    },
    "rosa_kernels": {
        "rosa_kernels.backends",
        "rosa_kernels.explain",
        "rosa_kernels.kernel",
        "rosa_kernels.nn",
        "rosa_kernels.ops",
        "rosa_kernels.pattern",
        "rosa_kernels.registry",
        "rosa_kernels.tile_plan",
    },
    # The subpackages of rosa_train, from the lowest layer up.
    "rosa_train.config": {"rosa_kernels.bounds", "rosa_train.files"},
    "rosa_train.files": {"rosa_kernels.files"},
    "rosa_train.methods": {"rosa_kernels.bounds", "rosa_kernels.masks"},
    "rosa_train.cli": {"rosa_train.config"},
    "rosa_train.data": {"rosa_train.config"},
    "rosa_train.adapters": {"rosa_kernels", "rosa_train.files", "rosa_train.methods"},
    "rosa_train.run": {
        "rosa_kernels",
        "rosa_train.adapters",
        "rosa_train.config",
        "rosa_train.data",
        "rosa_train.files",
        "rosa_train.methods",
    },
    # Users import this. No subpackage may, because it would then import all subpackages.
    "rosa_train": {
        "rosa_kernels.masks",
        "rosa_train.adapters",
        "rosa_train.methods",
        "rosa_train.run",
    },
    "rosa_train.report": {
        "rosa_kernels.masks",
        "rosa_train.cli",
        "rosa_train.config",
        "rosa_train.data",
        "rosa_train.files",
        "rosa_train.methods",
        "rosa_train.run",
    },
    "rosa_train.demo": {
        "rosa_train.cli",
        "rosa_train.data",
        "rosa_train.files",
        "rosa_train.report",
        "rosa_train.run",
    },
    "rosa_train.__main__": {
        "rosa_train.adapters",
        "rosa_train.cli",
        "rosa_train.config",
        "rosa_train.data",
        "rosa_train.demo",
        "rosa_train.files",
        "rosa_train.methods",
        "rosa_train.report",
        "rosa_train.run",
    },
    # The subpackages of bench, from the lowest layer up.
    "bench.measuring": {"rosa_kernels", "rosa_train.cli"},
    "bench.masks": {"rosa_kernels"},
    "bench.contenders": {"rosa_kernels", "bench.masks", "bench.measuring"},
    "bench.layer": {"rosa_kernels", "bench.masks", "bench.measuring"},
    "bench.suites": {
        "rosa_kernels",
        "bench.contenders",
        "bench.layer",
        "bench.masks",
        "bench.measuring",
    },
    "bench.report": {
        "rosa_kernels",
        "rosa_train.cli",
        "bench.contenders",
        "bench.layer",
        "bench.measuring",
    },
    "bench.plot": {"bench.contenders", "bench.layer", "bench.measuring", "bench.report"},
    "bench.run": {
        "rosa_kernels",
        "bench.contenders",
        "bench.layer",
        "bench.measuring",
        "bench.report",
        "bench.suites",
    },
    "bench.cli": {
        "rosa_kernels",
        "rosa_train.cli",
        "bench.contenders",
        "bench.layer",
        "bench.measuring",
        "bench.plot",
        "bench.report",
        "bench.run",
        "bench.suites",
    },
    "bench.test_benchmarks": {
        "rosa_kernels",
        "bench.contenders",
        "bench.run",
        "bench.suites",
    },
    "bench": {"bench.cli"},
}
PACKAGES = ("rosa_kernels", "rosa_train", "bench")
# The wheel installs `bench` as `rosa_bench`, so bench may import itself only relatively.
RELATIVE = "bench"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Every import in a file, including lazy imports: (line, absolute module)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = resolved(node, name, path)
            for alias in node.names:
                # `from package import module` names the module, not the package.
                inner = f"{module}.{alias.name}"
                is_module = inner in SOURCES or inner == "rosa_kernels._C"
                yield node.lineno, inner if is_module else module


def resolved(node: ast.ImportFrom, name: str, path: Path) -> str:
    """The absolute module that a `from` import names. Only bench may use relative imports."""
    if node.level == 0:
        return str(node.module)
    assert within(name, RELATIVE), f"{path}:{node.lineno}: expected an absolute import"
    parents = name.split(".")
    up = node.level - (path.name == "__init__.py")
    assert up < len(parents), f"{path}:{node.lineno}: expected an import within {RELATIVE}"
    package = parents[: len(parents) - up]
    return ".".join([*package, *([node.module] if node.module else [])])


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer_of(name: str) -> str:
    return max((prefix for prefix in ALLOWED if within(name, prefix)), key=len)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_respect_the_layers(name: str) -> None:
    layer = layer_of(name)
    for line, imported in imports(name, SOURCES[name]):
        if imported.split(".")[0] not in PACKAGES:
            continue
        # A root package may import its parts, but its parts may not import it.
        own = imported == layer if layer in PACKAGES else within(imported, layer)
        assert own or any(within(imported, prefix) for prefix in ALLOWED[layer]), (
            f"{SOURCES[name].relative_to(ROOT)}:{line}: {layer} may not import {imported}"
        )


def levels(graph: dict[str, set[str]]) -> list[set[str]]:
    """The graph's levels: nodes without dependencies come first. A cycle raises CycleError."""
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = sorter.get_ready()
        found.append(set(ready))
        sorter.done(*ready)
    return found


def test_the_layers_have_no_cycle() -> None:
    levels(ALLOWED)


@pytest.mark.parametrize("part", PACKAGES)
def test_modules_have_no_import_cycle(part: str) -> None:
    names = [name for name in SOURCES if within(name, part)]
    levels({n: {m for _, m in imports(n, SOURCES[n]) if m in names and m != n} for n in names})


@pytest.mark.parametrize("name", [n for n in SOURCES if within(n, RELATIVE)])
def test_bench_imports_itself_only_relatively(name: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        named = [str(node.module)] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        assert not any(within(module, RELATIVE) for module in named), (
            f"{SOURCES[name].relative_to(ROOT)}:{node.lineno}: expected a relative import"
        )


def test_subpackages_of_bench_lie_on_six_levels() -> None:
    parts = {layer: found for layer, found in ALLOWED.items() if within(layer, RELATIVE)}
    del parts["bench.test_benchmarks"]  # only pytest imports it
    graph = {part: {other for other in found if other in parts} for part, found in parts.items()}
    assert levels(graph) == [
        {"bench.masks", "bench.measuring"},
        {"bench.contenders", "bench.layer"},
        {"bench.report", "bench.suites"},
        {"bench.plot", "bench.run"},
        {"bench.cli"},
        {"bench"},
    ]


def test_the_layers_name_existing_modules() -> None:
    # Otherwise a renamed module would belong to a less strict layer, unnoticed.
    assert set(ALLOWED) <= {*SOURCES}


def test_every_module_has_a_layer() -> None:
    # Otherwise a new module would belong to the root package, which may import nearly everything.
    roots = {name for name in SOURCES if layer_of(name) in PACKAGES}
    assert roots == {*PACKAGES, "bench.__main__"}


@pytest.mark.parametrize("name", [n for n in SOURCES if within(n, "rosa_kernels.ops")])
def test_ops_name_no_backend(name: str) -> None:
    backends = {module.name for module in pkgutil.iter_modules([ROOT / "rosa_kernels/backends"])}
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        assert not (isinstance(node, ast.Constant) and node.value in backends), (
            f"{SOURCES[name].relative_to(ROOT)}:{node.lineno}: ops name no backend"
        )


@pytest.mark.parametrize("name", [n for n in SOURCES if within(n, "rosa_kernels.backends")])
def test_backends_do_not_touch_autograd(name: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        used = getattr(node, "attr", getattr(node, "id", None))
        assert used != "autograd", (
            f"{SOURCES[name].relative_to(ROOT)}:{node.lineno}: gradients belong to ops"
        )
    assert not any(within(m, "torch.autograd") for _, m in imports(name, SOURCES[name]))


def test_the_native_core_includes_neither_torch_nor_python() -> None:
    foreign = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)", re.M)
    sources = [p for p in (ROOT / "cpp").rglob("*.*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    users = {p.relative_to(ROOT).as_posix() for p in sources if foreign.search(p.read_text())}
    assert users == {"cpp/bindings/module.cpp"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_import_has_no_side_effects() -> None:
    done = run_python(
        """
import sys, threading, pathlib
import torch

def state():
    tasks = pathlib.Path("/proc/self/task")  # native threads too, where they can be counted
    native = len(list(tasks.iterdir())) if tasks.exists() else 0
    return native, threading.active_count(), torch.get_num_threads(), torch.initial_seed()

before, loaded = state(), set(sys.modules)
import rosa_kernels
after = state()
optional = {"triton", "transformers", "matplotlib"} & (set(sys.modules) - loaded)
assert before == after, (before, after)
assert not optional, optional
assert not torch.cuda.is_initialized()
assert "bench" not in sys.modules
# Importing it takes a second. Users who do not compile need not wait for it.
assert "torch._dynamo" not in set(sys.modules) - loaded
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_modules_import_without_the_optional_packages() -> None:
    # bench.plot needs matplotlib. Users who only run benchmarks do not import it.
    drawing = {name for name in SOURCES if within(name, "bench.plot")}
    names = [name for name in SOURCES if name not in drawing and "test_" not in name]
    done = run_python(
        f"""
import importlib, sys
for absent in ("triton", "transformers", "matplotlib"):
    sys.modules[absent] = None  # importing it now raises
for name in {names}:
    importlib.import_module(name)
assert not {drawing} & set(sys.modules)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
