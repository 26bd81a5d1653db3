"""The choice of a kernel: precedence, reasons, and explicit requests, which never fall back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

import rosa_kernels as rk
from rosa_kernels import choice, registry
from rosa_kernels.kernel import Call
from rosa_kernels.testing import uniform_pattern

pytestmark = pytest.mark.usefixtures("sandbox")

CALL = Call("cpu", torch.float32, (3, 4, 5))
Probe = Callable[..., None]


@pytest.fixture
def probe() -> Callable[..., list[str]]:
    """A function that registers a csr_gather kernel and returns the log of its calls."""

    def add(backend: str, log: list[str], **options: object) -> list[str]:
        defaults: dict[str, object] = {
            "devices": {"cpu"},
            "dtypes": {torch.float32},
            "priority": 1,
        }

        @rk.register("csr_gather", backend, **{**defaults, **options})
        def run(w: torch.Tensor, crow: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
            log.append(backend)
            return w.new_zeros(col.numel())

        return log

    return add


def gather(**options: object) -> torch.Tensor:
    return rk.csr_gather(torch.ones(4, 5), uniform_pattern(4, 5, 0.5), **options)


def test_every_op_has_a_reference_kernel() -> None:
    for op in ("sddmm", "spmm", "csr_add_", "csr_gather", "csr_scatter_", "csr_transpose"):
        *_, last = rk.kernels(op)
        assert last.name == "reference"
        assert last.unavailable is None
        assert last.devices == {"cpu", "cuda"}


def test_kernels_are_listed_by_priority(probe: Probe) -> None:
    probe("slow", [], priority=-5)
    probe("fast", [], priority=1000)
    names = [k.name for k in rk.kernels("csr_gather")]
    assert names[0] == "fast"
    assert names[-1] == "slow"
    assert set(rk.kernels("csr_gather")) < set(rk.kernels())


def test_unknown_ops_are_refused_with_a_list() -> None:
    with pytest.raises(ValueError, match=r"an op among \['csr_add_', .*'spmm'.*\], got 'conv'"):
        rk.kernels("conv")


def test_kernel_names_have_backend_and_variant() -> None:
    names = {k.name for k in rk.kernels("sddmm")}
    assert names == {
        k.backend if k.variant is None else f"{k.backend}/{k.variant}" for k in rk.kernels("sddmm")
    }
    with pytest.raises(ValueError, match="a new kernel name for csr_gather, got 'reference'"):
        rk.register("csr_gather", "reference", devices=set(), dtypes=set(), priority=0)(print)


def test_auto_takes_the_best_kernel_that_can_serve(probe: Probe) -> None:
    log: list[str] = []
    probe("good", log, priority=1000)
    probe("elsewhere", log, priority=2000, devices={"cuda"})
    probe("narrow", log, priority=2000, dtypes={torch.float16})
    probe("broken", log, priority=2000, unavailable="is not built")
    probe("picky", log, priority=2000, reject=lambda call: "wants more rows")
    gather()
    assert log == ["good"]


def test_withheld_kernels_serve_only_by_name(probe: Probe) -> None:
    log: list[str] = []
    probe("quick", log, priority=1000)
    probe("sound", log, priority=999)
    gather()
    with registry.withheld(["quick"]):
        gather()
        gather(backend="quick")
    gather()
    assert log == ["quick", "sound", "quick", "quick"]


def test_precedence_of_backend_requests(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order: the argument, the innermost use_backend, ROSA_BACKEND, the best kernel."""
    log: list[str] = []
    for name in ("argument", "inner", "outer", "environment"):
        probe(name, log)
    gather()
    monkeypatch.setenv("ROSA_BACKEND", "environment")
    gather()
    with rk.use_backend("outer"):
        gather()
        with rk.use_backend("inner"):
            gather()
            gather(backend="argument")
        gather()
    gather()
    assert log == ["environment", "outer", "inner", "argument", "outer", "environment"]


def test_use_backend_ends_with_its_block(probe: Probe) -> None:
    log = probe("inside", [])
    with pytest.raises(KeyError), rk.use_backend("inside"):
        raise KeyError
    gather()
    assert log == []


def test_auto_as_argument_overrides_use_backend(probe: Probe) -> None:
    log: list[str] = []
    probe("best", log, priority=1000)
    probe("other", log)
    with rk.use_backend("other"):
        gather(backend="auto")
    assert log == ["best"]


def test_use_backend_is_local_to_its_thread(probe: Probe) -> None:
    log = probe("mine", [], priority=-1)
    with rk.use_backend("mine"):
        thread = threading.Thread(target=gather)
        thread.start()
        thread.join()
        assert log == []
        gather()
    assert log == ["mine"]


@pytest.mark.parametrize("ask", ["argument", "context", "environment"])
def test_unknown_backends_are_refused_with_a_list(
    ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ", ".join(
        sorted({"auto", "auto-finite"} | {n for k in rk.kernels() for n in (k.backend, k.name)})
    )
    message = f"expected a backend among {every}, got 'cpus'"
    if ask == "environment":
        monkeypatch.setenv("ROSA_BACKEND", "cpus")
    block = rk.use_backend("cpus") if ask == "context" else nullcontext()
    argument = {"backend": "cpus"} if ask == "argument" else {}
    with pytest.raises(ValueError, match=message), block:
        gather(**argument)


def test_a_backend_takes_its_best_variant(probe: Probe) -> None:
    log: list[str] = []
    probe("family", log, variant="old", priority=5, unavailable="is not built")
    probe("family", log, variant="new", priority=3)
    assert choice.select("csr_gather", CALL, "family").name == "family/new"
    assert choice.select("csr_gather", CALL, "family/new").variant == "new"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"devices": {"cuda"}}, "runs on cuda tensors, got cpu"),
        (
            {"dtypes": {torch.float16, torch.bfloat16}},
            "takes dtypes bfloat16, float16, got float32",
        ),
        ({"unavailable": "is not built (no compiler)"}, "is not built (no compiler)"),
        (
            {"reject": lambda call: f"wants a square, got {call.shape}"},
            "wants a square, got (4, 5)",
        ),
    ],
)
def test_explicit_backends_that_cannot_serve_say_why(
    options: dict[str, object], reason: str, probe: Probe
) -> None:
    """There is no fallback, although other kernels could serve the call."""
    log = probe("special", [], **options)
    for ask in ({"backend": "special"}, {}):
        with pytest.raises(RuntimeError) as raised, rk.use_backend("special"):
            gather(**ask)
        assert str(raised.value) == (
            "csr_gather: expected backend 'special', asked for explicitly, to serve this call, "
            f"got none that can: special {reason}"
        )
    assert log == []


def test_an_explicit_backend_without_the_op_says_so(probe: Probe) -> None:
    probe("special", [])
    with pytest.raises(RuntimeError, match=r"'special', asked for explicitly,.* it has no such op"):
        rk.spmm(uniform_pattern(2, 3, 0.0), torch.zeros(0), torch.ones(3, 4), backend="special")


def test_if_no_kernel_serves_all_reasons_are_given() -> None:
    with pytest.raises(RuntimeError, match="expected a kernel to serve this call") as raised:
        choice.select("sddmm", Call("xpu", torch.float32, (1, 1, 1)))
    for kernel in rk.kernels("sddmm"):
        assert f"{kernel.name} runs on" in str(raised.value)


def test_choices_that_depend_on_shape_are_not_cached(probe: Probe) -> None:
    """The cache has no shapes in its keys, so it must not hold what a `reject` decided."""
    probe("small", [], priority=9999, reject=lambda c: "too big" if max(c.shape) > 4 else None)
    small = Call("cpu", torch.float32, (4, 4))
    for _ in range(2):
        assert choice.select("csr_gather", CALL).name != "small"
        assert choice.select("csr_gather", small).name == "small"


def test_new_kernels_replace_cached_choices(probe: Probe) -> None:
    gather()
    log = probe("better", [], priority=9999)
    gather()
    assert log == ["better"]


def test_choices_for_every_shape_are_cached(probe: Probe) -> None:
    """An op then does not have to describe the call.

    A `reject` of a kernel for another device or dtype does not prevent caching.
    """

    def cached() -> str | None:
        kernel = choice.cached_kernel("csr_gather", "cpu", torch.float32, "auto")
        return None if kernel is None else kernel.name

    assert cached() is None
    probe("elsewhere", [], priority=9999, devices={"cuda"}, reject=lambda call: "no")
    gather()
    assert cached() == "cpu"
    probe("picky", [], priority=9999, reject=lambda call: "no")
    gather()
    assert cached() is None
    probe("plain", [], priority=99999)
    gather()
    assert cached() == "plain"


def test_unavailable_is_called_once_and_when_needed(probe: Probe) -> None:
    asked = []
    probe("driven", [], priority=9999, unavailable=lambda: asked.append(1) or "needs a driver")
    assert not asked
    for _ in range(2):
        with pytest.raises(RuntimeError, match="driven needs a driver"):
            gather(backend="driven")
    assert len(asked) == 1
    (kernel,) = [k for k in rk.kernels("csr_gather") if k.name == "driven"]
    assert "unavailable='needs a driver'" in repr(kernel)


def test_reads_plan_depends_on_the_requested_backend(probe: Probe) -> None:
    assert not registry.reads_plan("csr_gather", "cpu", "auto")
    probe("shy", [], reads_plan={"cpu"}, on_request=True)
    assert not registry.reads_plan("csr_gather", "cpu", "auto")
    assert registry.reads_plan("csr_gather", "cpu", "shy")
    assert not registry.reads_plan("csr_gather", "cuda", "shy")
    probe("open", [], reads_plan={"cpu"}, priority=-9)
    assert registry.reads_plan("csr_gather", "cpu", "auto")
    assert not registry.reads_plan("csr_gather", "cpu", "cpu")
