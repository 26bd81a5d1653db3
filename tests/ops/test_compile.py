"""The ops as torch.library ops: opcheck, and torch.compile(fullgraph=True) with its corners."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import inputs_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rosa_kernels as rk
from rosa_kernels import CsrPattern, registry
from rosa_kernels.ops.csr_transpose import transpose_tensors
from rosa_kernels.testing import LAYOUTS, assert_accurate, uniform_pattern

pytestmark = pytest.mark.compiled
DIFFERENTIABLE = ("sddmm", "spmm", "csr_add", "csr_gather")
FLAT = torch.ops.rosa


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(inputs: dict[str, Tensor], grad: bool = True) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_(grad) for name, x in inputs.items()}


def compiled(op: str, **options: object) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    """The public op, compiled whole, and the count of its compilations."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(pattern: CsrPattern, **inputs: Tensor) -> Tensor:
        return getattr(rk, op)(pattern=pattern, **inputs)

    return torch.compile(call, fullgraph=True, backend=counter, **options), counter


def test_constants_are_marked_as_torch_marks_them() -> None:
    """By hand, since torch's own decorator imports the compiler."""

    def function() -> None: ...

    marked = vars(torch.compiler.assume_constant_result(function))
    assert marked
    for constant in (registry._ambient, registry.reads_plan):
        assert vars(constant) == marked


# -- opcheck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["row-major", "token-major", "sliced"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("derived", ["nothing", "transpose", "plans"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_products(
    dtype: torch.dtype, derived: str, grad: bool, layout: str, pattern: CsrPattern
) -> None:
    transpose = [] if derived == "nothing" else transpose_tensors(pattern)
    plan = []
    if derived == "plans":
        plan = pattern.tile_plan.tensors
        transpose += pattern.T.tile_plan.tensors
    index = (pattern.crow_indices, pattern.col_indices, transpose, plan)

    def operands(op: str) -> tuple[Tensor, ...]:
        inputs = inputs_of(op, pattern, 5, dtype).values()
        return tuple(LAYOUTS[layout](x).detach().requires_grad_(grad) for x in inputs)

    torch.library.opcheck(FLAT.sddmm, (*index, *operands("sddmm"), dtype, "auto"))
    torch.library.opcheck(FLAT.sddmm, (*index, *operands("sddmm"), torch.float32, "reference"))
    torch.library.opcheck(FLAT.spmm, (*index, *operands("spmm"), "auto"))


@pytest.mark.parametrize("layout", ["row-major", "token-major", "sliced"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_the_copies(grad: bool, layout: str, pattern: CsrPattern) -> None:
    index = (pattern.crow_indices, pattern.col_indices)
    inputs = inputs_of("csr_add", pattern)
    w = LAYOUTS[layout](inputs["w"]).detach()
    values = inputs["values"]
    torch.library.opcheck(FLAT.csr_add_, (w.clone(), *index, values, 0.5, "auto"))
    torch.library.opcheck(FLAT.csr_scatter_, (w.clone(), *index, values, "auto"))
    w.requires_grad_(grad)
    values.requires_grad_(grad)
    torch.library.opcheck(FLAT.csr_add, (w, *index, values, 0.5, "auto"))
    torch.library.opcheck(FLAT.csr_gather, (w, *index, "auto"))
    torch.library.opcheck(FLAT.csr_transpose, (*index, pattern.shape[1]))


def test_opcheck_of_nothing() -> None:
    for m, n in ((0, 0), (0, 3), (3, 0), (3, 3)):
        pattern = uniform_pattern(m, n, 0.0)
        index = (pattern.crow_indices, pattern.col_indices)
        a, b = torch.ones(m, 2, requires_grad=True), torch.ones(n, 2, requires_grad=True)
        torch.library.opcheck(FLAT.sddmm, (*index, [], [], a, b, torch.float32, "auto"))
        torch.library.opcheck(FLAT.spmm, (*index, [], [], torch.zeros(0), b, "auto"))


# -- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_forward_and_backward(
    op: str, warm: bool, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """Equal bits, whether or not the pattern has its transpose before it is traced.

    A cold pattern gets its transpose in the first call; code that relies on it is compiled again.
    """
    if warm:
        assert pattern.T.nnz == pattern.nnz
    call, counter = compiled(op)
    twin = CsrPattern(pattern.crow_indices, pattern.col_indices, pattern.shape)
    inputs = leaves(inputs_of(op, pattern, dtype=dtype))
    eager = leaves(inputs)
    for _ in range(2):
        out = call(pattern, **inputs)
        expected = getattr(rk, op)(pattern=twin, **eager)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        grad = torch.randn_like(out.float()).to(dtype)
        out.backward(grad)
        expected.backward(grad)
        for name, x in inputs.items():
            assert torch.equal(x.grad, eager[name].grad)
    assert counter.frame_count <= (1 if warm else 2)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamic_shapes(op: str, dynamic: bool | None) -> None:
    """Ever other numbers of tokens, and ever other patterns: two compilations at most."""
    call, counter = compiled(op, dynamic=dynamic)
    for step, k in enumerate((5, 9, 12, 31, 64)):
        pattern = uniform_pattern(20 + step, 30 + step, 0.1, seed=step)
        inputs = leaves(inputs_of(op, pattern, k))
        out = call(pattern, **inputs)
        assert_accurate(op, pattern, inputs, out)
        out.sum().backward()
        assert all(x.grad is not None for x in inputs.values())
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_tokens_marked_dynamic(op: str, pattern: CsrPattern) -> None:
    """Raises where tracing fixes the number of tokens to one value."""
    call, counter = compiled(op)
    pattern.T  # noqa: B018 - built before it is traced
    for k in (5, 9, 12):
        inputs = inputs_of(op, pattern, k)
        for name in set(inputs) & {"a", "b"}:
            torch._dynamo.mark_dynamic(inputs[name], 1)
        assert_accurate(op, pattern, inputs, call(pattern, **inputs))
    assert counter.frame_count == 1


def test_many_layers_share_one_compilation() -> None:
    """Same shapes, other patterns: a model of many layers must not meet the recompilation limit."""
    call, counter = compiled("sddmm")
    for seed in range(4):
        pattern = uniform_pattern(20, 30, 0.1, seed=seed)
        assert pattern.T.nnz == pattern.nnz
        inputs = leaves(inputs_of("sddmm", pattern))
        out = call(pattern, **inputs)
        assert_accurate("sddmm", pattern, inputs, out)
        out.sum().backward()
        grad = {"values": torch.ones(pattern.nnz), "b": inputs["a"].detach()}
        assert_accurate("spmm", pattern.T, grad, inputs["b"].grad)
    assert counter.frame_count == 1


def test_csr_transpose(pattern: CsrPattern) -> None:
    """The pattern it builds inside a graph is a real one outside."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(values: Tensor) -> Tensor:
        return rk.csr_transpose(pattern, values)[1] * 2

    values = torch.randn(pattern.nnz, requires_grad=True)
    expected = CsrPattern(pattern.crow_indices, pattern.col_indices, pattern.shape)
    for _ in range(2):
        out = call(values)
        assert torch.equal(out, rk.csr_transpose(expected, values)[1] * 2)
        values.grad = None
        out.sum().backward()
        assert torch.equal(values.grad, torch.full_like(values, 2))
    assert torch.equal(pattern.T.col_indices, expected.T.col_indices)
    pattern.T.check_unchanged()
    assert pattern.T.T is pattern


def test_in_place(pattern: CsrPattern) -> None:
    """The caller's tensor changes, a slice of a bigger one included."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(w: Tensor, values: Tensor) -> Tensor:
        rk.csr_add_(w[:, 1:-1], pattern, values, alpha=2.0)
        return w.sum()

    m, n = pattern.shape
    w = torch.randn(m, n + 2)
    expected = w.clone()
    rk.csr_add_(expected[:, 1:-1], pattern, torch.ones(pattern.nnz), alpha=2.0)
    total = call(w, torch.ones(pattern.nnz))
    assert torch.equal(w, expected)
    assert torch.equal(total, expected.sum())


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_autocast_inside(op: str, pattern: CsrPattern) -> None:
    inputs = leaves(inputs_of(op, pattern))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(**operands: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(rk, op)(pattern=pattern, **operands)

    out = call(**inputs)
    assert out.dtype == torch.bfloat16
    rounded = {n: x.detach() if n == "values" else x.detach().bfloat16() for n, x in inputs.items()}
    assert_accurate(op, pattern, rounded, out)
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs.values())


@pytest.mark.parametrize("build", ["constructor", "from_mask", "from_coo"])
def test_patterns_are_built_outside(build: str) -> None:
    """Validation reads the indices. Without fullgraph, the graph breaks there."""

    def call(mask: Tensor) -> Tensor:
        if build == "from_mask":
            pattern = CsrPattern.from_mask(mask)
        elif build == "from_coo":
            pattern = CsrPattern.from_coo(*mask.nonzero(as_tuple=True), mask.shape)
        else:
            zeros = mask.new_zeros(3, dtype=torch.int64)
            pattern = CsrPattern(zeros.cumsum(0), zeros[:0], (2, 3))
        return rk.csr_gather(mask, pattern)

    mask = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    with pytest.raises(Exception, match=r"expected to be built outside torch\.compile"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(mask)


def test_export_leaves_sizes_unbounded(pattern: CsrPattern) -> None:
    """A dimension that is exported as dynamic may have any size, as in a dense product."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.ones(pattern.nnz))

        def forward(self, x: Tensor) -> Tensor:
            return rk.rosa_linear(x, torch.zeros(pattern.shape), pattern, self.values)

    layer = Layer()
    for strict in (False, True):
        tokens = torch.export.Dim("tokens")
        exported = torch.export.export(
            layer, (torch.ones(3, 53),), dynamic_shapes={"x": {0: tokens}}, strict=strict
        )
        x = torch.randn(9, 53)
        torch.testing.assert_close(exported.module()(x), layer(x))
    assert not pattern.has_transpose


def test_errors_are_raised_while_tracing(pattern: CsrPattern) -> None:
    call, _ = compiled("spmm")
    b = torch.ones(pattern.shape[1], 3)
    with pytest.raises(Exception, match=r"spmm: expected values of shape \(nnz,\) = \(196,\), got"):
        call(pattern, values=torch.ones(3), b=b)


def test_compiled_code_freezes_the_choice_of_backend(
    pattern: CsrPattern, sandbox: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    @rk.register("csr_gather", "probe", devices={"cpu"}, dtypes={torch.float32}, priority=-1)
    def run(w: Tensor, crow: Tensor, col: Tensor) -> Tensor:
        log.append("probe")
        return w.new_zeros(col.numel())

    call, counter = compiled("csr_gather")
    w = torch.ones(pattern.shape)
    with rk.use_backend("probe"):
        call(pattern, w=w)
    call(pattern, w=w)
    assert len(log) == 2
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_inductor(pattern: CsrPattern) -> None:
    """The default compiler, on a whole adapter: sparse and low-rank parts in one graph."""
    torch.manual_seed(0)
    m, n = pattern.shape
    shapes = {"x": (9, n), "values": (pattern.nnz,), "down": (4, n), "up": (m, 4)}
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}

    def layer(x: Tensor, values: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return (rk.spmm(pattern, values, x.T).T + x @ down.T @ up.T).relu()

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        x = leaves(inputs)
        out = call(**x)
        out.sum().backward()
        results.append({"out": out, **{name: t.grad for name, t in x.items()}})
    for name, got in results[1].items():
        torch.testing.assert_close(got, results[0][name])
