"""What the tests share: kernels to parametrise over, nasty patterns, memory layouts.

A test that asks for the fixture ``kernel`` and is marked ``ops("sddmm", ...)`` runs once for
every registered kernel of these ops and every device it serves: a new kernel is tested with no
other edit.
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
from rosa_kernels.testing import Case, assert_accurate, make_inputs, uniform_pattern

# One profile everywhere: a red test stays red on the next run and on the next machine.
hypothesis.settings.register_profile("derandomized", deadline=None, derandomize=True)
hypothesis.settings.load_profile("derandomized")

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

    def __call__(self, pattern: CsrPattern, **arguments: object) -> Tensor:
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
        if (kernel.op, name) != ("csr_add_", "w"):
            torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)
    return got


# csr_add is csr_add_ on a clone: it has no kernels of its own, and runs on those.
KERNELS_OF = {"csr_add": "csr_add_"}


def served(op: str) -> list[object]:
    params = []
    for kernel in rk.kernels(KERNELS_OF.get(op, op)):
        for device in sorted(kernel.devices):
            marks = []
            if device == "cuda":
                marks.append(pytest.mark.gpu)
                if not torch.cuda.is_available():
                    marks.append(pytest.mark.skip(reason="needs a CUDA device"))
            if kernel.unavailable is not None:
                marks.append(pytest.mark.skip(reason=kernel.unavailable))
            value = Served(op, kernel.name, device, kernel.run)
            params.append(pytest.param(value, marks=marks, id=f"{op}-{kernel.name}-{device}"))
    return params


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ops")
    if "kernel" in metafunc.fixturenames and marker is not None:
        metafunc.parametrize("kernel", [p for op in marker.args for p in served(op)])


def _powerlaw() -> CsrPattern:
    """Rows from empty to nearly full, in no order: what real masks look like."""
    generator = torch.Generator().manual_seed(3)
    share = torch.rand(90, 1, generator=generator) ** 4
    return CsrPattern.from_mask(torch.rand(90, 70, generator=generator) < share)


def _only(m: int, n: int, rows: object, cols: object) -> CsrPattern:
    mask = torch.zeros(m, n, dtype=torch.bool)
    mask[rows, cols] = True
    return CsrPattern.from_mask(mask)


NASTY: dict[str, Callable[[], CsrPattern]] = {
    "0x0": lambda: uniform_pattern(0, 0, 0.0),
    "0x7": lambda: uniform_pattern(0, 7, 0.0),
    "7x0": lambda: uniform_pattern(7, 0, 0.0),
    "1x1-empty": lambda: uniform_pattern(1, 1, 0.0),
    "1x1-full": lambda: uniform_pattern(1, 1, 1.0),
    "1x9": lambda: uniform_pattern(1, 9, 0.5),
    "9x1": lambda: uniform_pattern(9, 1, 0.5),
    "nnz=0": lambda: uniform_pattern(5, 7, 0.0),
    "empty-rows-and-columns": lambda: uniform_pattern(37, 29, 0.02),
    "one-full-row": lambda: _only(19, 45, 7, slice(None)),
    "last-row-only": lambda: _only(21, 33, -1, slice(None, None, 2)),
    "last-column-only": lambda: _only(33, 21, slice(None), -1),
    "corners": lambda: _only(130, 67, [0, 0, -1, -1], [0, -1, 0, -1]),
    "full": lambda: uniform_pattern(33, 31, 1.0),
    "powerlaw": _powerlaw,
    "odd-tiles": lambda: uniform_pattern(129, 65, 0.1),
    "even-tiles": lambda: uniform_pattern(128, 64, 0.1),
    "wide": lambda: uniform_pattern(3, 40_000, 0.004),
    "tall": lambda: uniform_pattern(40_000, 3, 0.004),
}


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


# Layouts: each takes a contiguous tensor and gives its values back in other memory. Those that
# share memory between elements change the values: the oracle must read the tensor they return.


def _misaligned(x: Tensor) -> Tensor:
    storage = x.new_full((x.numel() + 2,), torch.nan)
    view = storage[1:-1].view(x.shape)
    return view.copy_(x)


def _sliced(x: Tensor) -> Tensor:
    storage = x.new_full([2 * size + 3 for size in x.shape], torch.nan)
    view = storage[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


def _overlapping(x: Tensor) -> Tensor:
    flat = x.reshape(-1)[: max(sum(x.shape) - x.dim() + 1, 0)] if x.numel() else x.reshape(-1)
    return flat.as_strided(x.shape, (1,) * x.dim())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda x: x.contiguous(),
    "token-major": lambda x: x.T.contiguous().T if x.dim() == 2 else x,
    "misaligned": _misaligned,
    "misaligned-token-major": lambda x: _misaligned(x.T).T if x.dim() == 2 else _misaligned(x),
    "sliced": _sliced,
    "sliced-token-major": lambda x: _sliced(x.T).T if x.dim() == 2 else _sliced(x),
    "stride-0-rows": lambda x: x[:1].expand(x.shape),
    "stride-0-columns": lambda x: x[..., :1].expand(x.shape),
    "stride-0": lambda x: x.flatten()[0].expand(x.shape),
    "stride-1-1": _overlapping,
}


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
    monkeypatch.setattr(registry, "_selected", {})
