"""The ops under torch.library.opcheck, torch.compile(fullgraph=True) and torch.export."""

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
    """The public op compiled with fullgraph=True, and a counter of its compilations."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(pattern: CsrPattern, **inputs: Tensor) -> Tensor:
        return getattr(rk, op)(pattern=pattern, **inputs)

    return torch.compile(call, fullgraph=True, backend=counter, **options), counter


def test_constant_functions_are_marked_as_by_torch() -> None:
    """The library sets the mark itself, because torch's decorator imports the compiler."""

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
def test_opcheck_of_sddmm_and_spmm(
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
def test_opcheck_of_the_csr_ops(grad: bool, layout: str, pattern: CsrPattern) -> None:
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


def test_opcheck_of_empty_patterns() -> None:
    for m, n in ((0, 0), (0, 3), (3, 0), (3, 3)):
        pattern = uniform_pattern(m, n, 0.0)
        index = (pattern.crow_indices, pattern.col_indices)
        a, b = torch.ones(m, 2, requires_grad=True), torch.ones(n, 2, requires_grad=True)
        torch.library.opcheck(FLAT.sddmm, (*index, [], [], a, b, torch.float32, "auto"))
        torch.library.opcheck(FLAT.spmm, (*index, [], [], torch.zeros(0), b, "auto"))


# -- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_and_eager_results_are_equal(
    op: str, warm: bool, pattern: CsrPattern, dtype: torch.dtype
) -> None:
    """The bits are equal, whether or not the pattern has its transpose before tracing.

    A cold pattern gets its transpose in the first call. Code that uses it is compiled again.
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
def test_dynamic_shapes_compile_at_most_twice(op: str, dynamic: bool | None) -> None:
    """Five numbers of tokens and five patterns need two compilations at most."""
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
def test_the_number_of_tokens_can_be_dynamic(op: str, pattern: CsrPattern) -> None:
    """mark_dynamic raises if tracing fixes the number of tokens to one value."""
    call, counter = compiled(op)
    pattern.T  # noqa: B018 - built before it is traced
    for k in (5, 9, 12):
        inputs = inputs_of(op, pattern, k)
        for name in set(inputs) & {"a", "b"}:
            torch._dynamo.mark_dynamic(inputs[name], 1)
        assert_accurate(op, pattern, inputs, call(pattern, **inputs))
    assert counter.frame_count == 1


def test_many_layers_share_one_compilation() -> None:
    """The layers have equal shapes and different patterns.

    A model of many layers must not reach the recompilation limit.
    """
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


def test_compiled_csr_transpose_caches_a_valid_pattern(pattern: CsrPattern) -> None:
    """The transposed pattern that a graph builds is a valid pattern outside the graph."""

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


@pytest.mark.parametrize(
    ("op", "options"), [("csr_add_", {"alpha": 2.0}), ("csr_scatter_", {})], ids=["add", "scatter"]
)
def test_compiled_ops_change_their_target_in_place(
    op: str, options: dict[str, float], pattern: CsrPattern
) -> None:
    """The caller's tensor changes. The target may be a slice of a bigger tensor."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(w: Tensor, values: Tensor) -> Tensor:
        getattr(rk, op)(w[:, 1:-1], pattern, values, **options)
        return w.sum()

    m, n = pattern.shape
    w = torch.randn(m, n + 2)
    expected = w.clone()
    getattr(rk, op)(expected[:, 1:-1], pattern, torch.ones(pattern.nnz), **options)
    total = call(w, torch.ones(pattern.nnz))
    assert torch.equal(w, expected)
    assert torch.equal(total, expected.sum())


@pytest.mark.parametrize("op", ["sddmm", "spmm"])
def test_autocast_inside_a_compiled_function(op: str, pattern: CsrPattern) -> None:
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
def test_patterns_cannot_be_built_while_tracing(build: str) -> None:
    """Validation reads the indices, so a graph cannot hold it. Without fullgraph, it breaks."""

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


def test_export_does_not_bound_dynamic_sizes(pattern: CsrPattern) -> None:
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


def test_compiled_code_keeps_its_choice_of_backend(
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
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch itself
def test_inductor_compiles_a_whole_adapter(pattern: CsrPattern) -> None:
    """The default compiler takes the sparse and the low-rank part in one graph."""
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
