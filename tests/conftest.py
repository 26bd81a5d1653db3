"""What the tests share: kernels to parametrise over, nasty patterns, memory layouts.

A test that asks for the fixture ``kernel`` and is marked ``ops("sddmm", ...)`` runs once for
every registered kernel of these ops and every device it serves: a new kernel is tested with no
other edit.

The CUDA kernels run here twice: on a GPU where there is one, and in the emulator that
``tests/_simt`` is built around, as backend "simt" on CPU tensors, through the same Python adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.backends.native_cuda import register_cuda_kernels
from rosa_kernels.testing import (
    LAYOUTS,
    NASTY,
    Case,
    assert_accurate,
    make_inputs,
    uniform_pattern,
)

# One profile everywhere: a red test stays red on the next run and on the next machine.
hypothesis.settings.register_profile("derandomized", deadline=None, derandomize=True)
hypothesis.settings.load_profile("derandomized")

try:
    import _simt
except ImportError as error:
    _NO_SIMT: str | None = f"tests/_simt is not built ({error})"
else:
    _NO_SIMT = None
    register_cuda_kernels(_simt, "simt", "cpu", on_request=True)
# Tests about this library's threads, or of so much work that emulated kernels, 1,000 times slower,
# would need minutes.
_NOT_SIMT = (
    "test_every_number_of_threads",
    "test_the_same_number_of_threads",
    "test_more_threads_than",
    "test_the_gil_is_released",
    "test_two_callers_at_once[sddmm-simt/gather",
)

# Sizes at which a kernel could be wrong: around vectors and blocks of 16, 32 and 64.
SIZES = (0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): run `kernel` over these ops' kernels")
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")


class Served(NamedTuple):
    """A kernel on one of the devices it serves; calls go through the public op."""

    op: str
    backend: str
    device: str
    run: Callable[..., object]
    dtypes: frozenset[torch.dtype]
    finite_only: bool

    @property
    def dtype(self) -> torch.dtype:
        """The one to take where a test is about something else."""
        return torch.float32 if torch.float32 in self.dtypes else torch.bfloat16

    @property
    def takes_float32_values(self) -> bool:
        """Beside a narrower b: not where they are written into a tile of b's dtype."""
        native = self.device == "cuda" or self.backend.startswith("simt")
        return not (self.finite_only and native)

    def __call__(self, pattern: CsrPattern, **arguments: object) -> Tensor:
        for dense in (arguments[name] for name in ("b", "w") if name in arguments):
            if dense.dtype not in self.dtypes:
                pytest.skip(f"{self.backend} takes no {dense.dtype}")
        if self.backend == "simt/wgmma" and pattern.tile_plan.tile != (128, 256):
            pattern.build_tile_plan(128, 256)  # what a device of compute capability 9.0 gets
        return getattr(rk, self.op)(pattern=pattern, backend=self.backend, **arguments)


def check(
    kernel: Served, pattern: CsrPattern, inputs: dict[str, Tensor], **options: object
) -> Tensor:
    """Run `kernel`; its result is accurate, of the right dtype, and no read operand has changed."""
    before = {name: x.clone() for name, x in inputs.items()}
    pattern = pattern.to(kernel.device)
    got = kernel(pattern, **inputs, **options)
    dense = inputs["w"] if "w" in inputs else inputs["b"]
    assert got.dtype == options.get("out_dtype", dense.dtype)
    assert got.device == dense.device
    alpha = {"alpha": options["alpha"]} if "alpha" in options else {}
    assert_accurate(kernel.op, pattern, before, got, **alpha)
    for name, x in inputs.items():
        if (kernel.op, name) not in (("csr_add_", "w"), ("csr_scatter_", "w")):
            torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)
    return got


# csr_add is csr_add_ on a clone: it has no kernels of its own, and runs on those.
KERNELS_OF = {"csr_add": "csr_add_"}


def served(op: str) -> list[object]:
    params = []
    absent = {} if _NO_SIMT is None else {"simt": _NO_SIMT}
    kernels = rk.kernels(KERNELS_OF.get(op, op))
    # The instruction set that users of this machine get; kernels come best first.
    users = next((k.name for k in kernels if k.backend == "cpu" and k.unavailable is None), None)
    for kernel in kernels:
        for device in sorted(kernel.devices):
            if device == "cuda" and not torch.cuda.is_available():
                absent["cuda"] = "needs a CUDA device"  # once, and not for each of a dozen kernels
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if kernel.backend == "simt":
                marks.append(pytest.mark.emulated)
            if kernel.backend == "cpu" and kernel.variant and kernel.name != users:
                marks.append(pytest.mark.other_isa)
            if kernel.unavailable is not None:
                marks.append(pytest.mark.skip(reason=kernel.unavailable))
            value = Served(op, kernel.name, device, kernel.run, kernel.dtypes, kernel.finite_only)
            params.append(pytest.param(value, marks=marks, id=f"{op}-{kernel.name}-{device}"))
    for name, reason in absent.items():
        marks = [pytest.mark.skip(reason=reason), *([pytest.mark.gpu] if name == "cuda" else [])]
        params.append(pytest.param(None, marks=marks, id=f"{op}-{name}"))
    return params


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ops")
    if "kernel" in metafunc.fixturenames and marker is not None:
        metafunc.parametrize("kernel", [p for op in marker.args for p in served(op)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def runs(item: pytest.Item) -> bool:
        kernel = getattr(item, "callspec", None) and item.callspec.params.get("kernel")
        if not isinstance(kernel, Served) or not kernel.backend.startswith("simt"):
            return True
        return not any(name in item.nodeid for name in _NOT_SIMT)

    dropped = [item for item in items if not runs(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if runs(item)]


@pytest.fixture(params=NASTY)
def nasty(request: pytest.FixtureRequest) -> CsrPattern:
    """Each pattern that has broken a sparse kernel before."""
    return NASTY[request.param]()


@pytest.fixture
def pattern() -> CsrPattern:
    """An ordinary pattern, for what does not depend on it: empty rows and columns included."""
    return uniform_pattern(37, 53, 0.1, seed=1)


def inputs_of(
    op: str,
    pattern: CsrPattern,
    k: int = 33,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """:func:`rosa_kernels.testing.make_inputs` for a pattern at hand."""
    return make_inputs(
        Case(op, *pattern.shape, k, pattern.density, dtype, seed=seed), pattern, device
    )


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Each way a read operand may lie in memory."""
    return LAYOUTS[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype of dense operands."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On small problems and busy cores, threads wait for each other 20 times longer than they work.

    What depends on the number of threads is in test_threads.py.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels registered by the test are forgotten afterwards; ROSA_BACKEND is not set."""
    from rosa_kernels import registry

    monkeypatch.delenv("ROSA_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_kernels", {op: [*ks] for op, ks in registry._kernels.items()})
    monkeypatch.setattr(registry, "chosen", {})
    monkeypatch.setattr(registry, "_plan_readers", {})
    monkeypatch.setattr(registry, "_known_backends", set())
