"""What all tests share: the kernels to run them on, and `sweep`, which loops over cases.

A test that takes ``kernel`` and is marked ``ops("sddmm", ...)`` runs for every registered kernel of
these ops on every device that the kernel serves. A new kernel is tested without another edit. If
the test also takes ``dtype``, it runs for every dtype of the kernel.

The CUDA kernels run on a GPU, if there is one, and always in the emulator. ``tests/_simt`` contains
the emulator. Its kernels are the backend "simt", take CPU tensors and go through the same Python
adapter as the CUDA kernels.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.backends.native_cuda import register_cuda_kernels
from rosa_kernels.testing import (
    Case,
    assert_accurate,
    make_inputs,
    uniform_pattern,
)

# The same examples everywhere: a red test stays red on the next run and on the next machine.
hypothesis.settings.register_profile("derandomized", deadline=None, derandomize=True)
hypothesis.settings.load_profile("derandomized")

try:
    import _simt
except ImportError as error:
    _NO_SIMT: str | None = f"tests/_simt is not built ({error})"
else:
    _NO_SIMT = None
    register_cuda_kernels(_simt, "simt", "cpu", on_request=True)
# Sizes at which a kernel could be wrong: around vectors and blocks of 16, 32 and 64.
SIZES = (0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = (torch.bfloat16, torch.float16)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ops(*names, dtypes, where): run the test on each kernel of these ops; only with these "
        "dtypes, only on kernels for which `where` is true",
    )
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
        """The dtype for a test that is about something else."""
        return torch.float32 if torch.float32 in self.dtypes else torch.bfloat16

    @property
    def takes_float32_values(self) -> bool:
        """Whether it takes float32 values beside a 16-bit b.

        Tensor-core kernels do not: they write the values into a tile of b's dtype.
        """
        native = self.device == "cuda" or self.emulated
        return not (self.finite_only and native)

    @property
    def emulated(self) -> bool:
        return self.backend.startswith("simt")

    def __call__(self, pattern: CsrPattern, **arguments: object) -> Tensor:
        if self.backend == "simt/wgmma" and pattern.tile_plan.tile != (128, 256):
            pattern.build_tile_plan(128, 256)  # the default on compute capability 9.0
        return getattr(rk, self.op)(pattern=pattern, backend=self.backend, **arguments)


def check(
    kernel: Served, pattern: CsrPattern, inputs: dict[str, Tensor], **options: object
) -> Tensor:
    """Run `kernel`. The result must be accurate and of the right dtype, its operands unchanged."""
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


# csr_add runs csr_add_'s kernels on a clone: it has none of its own.
KERNELS_OF = {"csr_add": "csr_add_"}


def served(
    op: str, dtypes: Iterable[torch.dtype] = (), where: Callable[[Served], bool] = lambda _: True
) -> list[object]:
    """A parameter for each kernel of `op` on each device, and one for each reason that some lack.

    Args:
        dtypes: only kernels that take all of these.
        where: only kernels for which this is true.
    """
    params = []
    absent = {} if _NO_SIMT is None else {"simt": _NO_SIMT}
    kernels = rk.kernels(KERNELS_OF.get(op, op))
    # The instruction set that users of this machine get: the best kernel comes first.
    users = next((k.name for k in kernels if k.backend == "cpu" and k.unavailable is None), None)
    for kernel in kernels:
        for device in sorted(kernel.devices):
            if device == "cuda" and not torch.cuda.is_available():
                absent["cuda"] = "needs a CUDA device"  # one skip, not one for each kernel
                continue
            value = Served(op, kernel.name, device, kernel.run, kernel.dtypes, kernel.finite_only)
            if not kernel.dtypes.issuperset(dtypes) or not where(value):
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if value.emulated:
                marks.append(pytest.mark.emulated)
            if kernel.backend == "cpu" and kernel.variant and kernel.name != users:
                marks.append(pytest.mark.other_isa)
            if kernel.unavailable is not None:
                marks.append(pytest.mark.skip(reason=kernel.unavailable))
            params.append(pytest.param(value, marks=marks, id=f"{op}-{kernel.name}-{device}"))
    for name, reason in absent.items():
        marks = [pytest.mark.skip(reason=reason), *([pytest.mark.gpu] if name == "cuda" else [])]
        params.append(pytest.param(None, marks=marks, id=f"{op}-{name}"))
    return params


def with_dtypes(kernel: object, dtypes: Iterable[torch.dtype]) -> Iterator[object]:
    """A parameter of :func:`served` with each dtype that its kernel takes."""
    (value,) = kernel.values
    for dtype in dtypes if value is not None else ["-"]:
        if value is None or dtype in value.dtypes:
            name = str(dtype).removeprefix("torch.")
            yield pytest.param(value, dtype, marks=kernel.marks, id=f"{kernel.id}-{name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ops")
    parametrized = {
        name
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0] if isinstance(mark.args[0], tuple) else mark.args[0].split(","))
    }
    takes_dtype = "dtype" in metafunc.fixturenames and "dtype" not in parametrized
    if "kernel" in metafunc.fixturenames and marker is not None:
        options = dict(marker.kwargs)
        dtypes = options.pop("dtypes", DTYPES) if takes_dtype else DTYPES
        kernels = [p for op in marker.args for p in served(op, **options)]
        if takes_dtype:
            pairs = [pair for kernel in kernels for pair in with_dtypes(kernel, dtypes)]
            metafunc.parametrize(("kernel", "dtype"), pairs)
        else:
            metafunc.parametrize("kernel", kernels)
    elif takes_dtype:
        metafunc.parametrize("dtype", DTYPES, ids=str)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, with the number of tests."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = collections.Counter(report.longrepr[2] for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


def sweep(**axes: Iterable[object] | Mapping[str, Callable[[], object]]) -> Callable:
    """Runs a test for every combination of these arguments, each as a subtest of one item.

    A failure names its case, and the other cases still run. A mapping has the names of values and
    functions that make them: every case gets a new one.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def swept(subtests: pytest.Subtests, **fixtures: object) -> None:
            for case in itertools.product(*axes.values()):
                named = dict(zip(axes, case, strict=True))
                with subtests.test(**{axis: str(name) for axis, name in named.items()}):
                    made = {
                        axis: axes[axis][name]() if isinstance(axes[axis], Mapping) else name
                        for axis, name in named.items()
                    }
                    test(**fixtures, **made)

        signature = inspect.signature(test)
        fixtures = [p for p in signature.parameters.values() if p.name not in axes]
        subtests = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        swept.__signature__ = signature.replace(parameters=[subtests, *fixtures])
        return swept

    return decorate


@pytest.fixture
def pattern() -> CsrPattern:
    """An ordinary pattern with empty rows and columns, for tests that are not about patterns."""
    return uniform_pattern(37, 53, 0.1, seed=1)


def inputs_of(
    op: str,
    pattern: CsrPattern,
    k: int = 33,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """:func:`rosa_kernels.testing.make_inputs` for a given pattern."""
    return make_inputs(
        Case(op, *pattern.shape, k, pattern.density, dtype, seed=seed), pattern, device
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: on small problems and busy cores, threads wait 20 times longer than they work.

    test_threads.py tests other numbers of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the kernels that the test registers. ROSA_BACKEND is not set."""
    from rosa_kernels import registry

    monkeypatch.delenv("ROSA_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_kernels", {op: [*ks] for op, ks in registry._kernels.items()})
    monkeypatch.setattr(registry, "chosen", {})
    monkeypatch.setattr(registry, "_plan_readers", {})
    monkeypatch.setattr(registry, "_known_backends", set())
