"""rosa_linear: accuracy, tensors saved for backward, scatter, torch features and bad input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import NARROW, Served, sweep
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.ops.csr_transpose import transpose_tensors
from rosa_kernels.ops.rosa_linear import rosa_linear_backward_op, rosa_linear_op
from rosa_kernels.strides import overlaps_itself
from rosa_kernels.testing import LAYOUTS, NASTY, uniform_pattern

SCALING = 0.75
PATHS = ["separate", "scatter", "merged"]
# Branches: no branch, A and B, a selector and B, S, or S with one of the low-rank branches.
BRANCHES = ["none", "lora", "selector", "sparse", "rosa", "selector+sparse"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def problem(
    branches: str = "rosa",
    dtype: torch.dtype = torch.float32,
    pattern: CsrPattern | None = None,
    *,
    lead: tuple[int, ...] = (3, 5),
    rank: int = 4,
    bias: bool = True,
    masters: bool = True,
) -> dict[str, Any]:
    """Arguments of rosa_linear. Trained ones are leaves.

    With `masters`, parameters beside a 16-bit x are float32.
    """
    pattern = uniform_pattern(37, 53, 0.1, seed=1) if pattern is None else pattern
    m, n = pattern.shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of)

    master = torch.float32 if masters and dtype in NARROW else dtype
    args: dict[str, Any] = {
        "x": normal(*lead, n).requires_grad_(),
        "weight": normal(m, n),
        "scaling": SCALING,
        "bias": normal(m, of=master).requires_grad_() if bias else None,
    }
    if "sparse" in branches or branches == "rosa":
        args["pattern"] = pattern
        args["values"] = normal(pattern.nnz, of=master).requires_grad_()
    if "selector" in branches:
        args["lora_a"] = torch.randperm(n, generator=generator)[:rank]
    elif branches in ("lora", "rosa"):
        args["lora_a"] = normal(rank, n, of=master).requires_grad_()
    if "lora_a" in args:
        args["lora_b"] = normal(m, rank, of=master).requires_grad_()
    return args


def run(path: str, args: dict[str, Any], **options: Any) -> Tensor:
    """rosa_linear on this path. For "merged", S is added to the weight before the call."""
    if args.get("pattern") is None:
        return rk.rosa_linear(**args, **options)
    if path == "merged":
        with torch.no_grad():
            merged = rk.csr_add(args["weight"], args["pattern"], args["values"])
        return rk.rosa_linear(**{**args, "weight": merged}, merged=True, **options)
    return rk.rosa_linear(**args, scatter=path == "scatter", **options)


def dense_a(args: dict[str, Any]) -> Tensor:
    """A as a dense matrix. A selector becomes rows of the identity."""
    a = args["lora_a"]
    if a.dim() == 1:
        return torch.eye(args["weight"].shape[1], dtype=torch.float64)[a]
    return a.detach().double()


class Oracle:
    """y and all gradients in float64 from rounded inputs, each with a bound on its error.

    The bound for a product of length k, accumulated in float32, is 4 sqrt(k) 2**-24 times the norm
    of its terms. Rounding a result or an operand to the dtype costs half a unit in the last place.
    The op rounds y after each of its terms. It rounds h and the gradient of h once. On adversarial
    operands (all columns are equal), errors do not average out. The bound is then k u sum |a b|.
    """

    def __init__(
        self, path: str, args: dict[str, Any], dy: Tensor, adversarial: bool = False
    ) -> None:
        self.adversarial = adversarial
        dtype = args["x"].dtype
        self.half = torch.finfo(dtype).eps / 2
        self.unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        weight, pattern = args["weight"], args.get("pattern")
        lead = args["x"].shape[:-1]
        x, dy = (t.detach().double().reshape(lead.numel(), t.shape[-1]) for t in (args["x"], dy))
        w = weight.double()
        sparse = torch.zeros_like(w)
        if pattern is not None:
            values = args["values"].detach()
            if path == "separate":
                sparse = pattern.to_torch(values.double()).to_dense()
            else:
                w = rk.csr_add(weight, pattern, values).double()  # rounded to the weight's dtype
        bias = args["bias"]
        y = x @ (w + sparse).T + (0 if bias is None else bias.detach().to(dtype).double())
        bound = self.product(x, w.T) + self.product(x, sparse.T)
        bound = bound + 4 * self.half * (y.abs() + (x @ w.T).abs() + (x @ sparse.T).abs())
        dx = dy @ (w + sparse)
        dx_bound = self.product(dy, w) + self.product(dy, sparse)
        dx_bound += 2 * self.half * (dx.abs() + (dy @ w).abs() + (dy @ sparse).abs())
        self.results: dict[str, tuple[Tensor, Tensor]] = {}
        if "lora_b" in args:
            a, b = dense_a(args), args["lora_b"].detach().double()
            a_low, b_low = (t.to(dtype).double() for t in (a, b))  # as the op rounds them
            h, g = x @ a_low.T, SCALING * dy @ b_low
            h_off = self.product(x, a_low.T) + self.half * h.abs()
            g_off = SCALING * self.product(dy, b_low) + 2 * self.half * g.abs()
            y = y + SCALING * h @ b_low.T
            bound = bound + SCALING * (h_off @ b_low.abs().T + self.product(h, b_low.T))
            bound = bound + 2 * self.half * y.abs()
            dx = dx + g @ a_low
            dx_bound = dx_bound + g_off @ a_low.abs() + self.product(g, a_low)
            dx_bound = dx_bound + 2 * self.half * (dx.abs() + (g @ a_low).abs())
            db = SCALING * dy.T @ h
            off = SCALING * (dy.abs().T @ h_off + self.product(dy.T, h))
            self.results["lora_b"] = db, off + 3 * self.half * db.abs()
            if args["lora_a"].dim() == 2:
                da = g.T @ x
                off = g_off.T @ x.abs() + self.product(g.T, x)
                self.results["lora_a"] = da, off + 2 * self.half * da.abs()
        if pattern is not None:
            rows, cols = pattern.row_indices.long(), pattern.col_indices.long()
            dw, off = dy.T @ x, self.product(dy.T, x)
            ds, off = dw[rows, cols], off[rows, cols]
            own = torch.finfo(args["values"].dtype).eps / 2
            self.results["values"] = ds, off + own * ds.abs()
        if bias is not None:
            total = dy.sum(0)
            off = 4 * len(dy) ** 0.5 * self.unit * dy.norm(dim=0) + self.half * total.abs()
            self.results["bias"] = total, off
        m, n = weight.shape
        self.results["y"] = y.view(*lead, m), bound.view(*lead, m)
        self.results["x"] = dx.view(*lead, n), dx_bound.view(*lead, n)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.adversarial:
            return a.shape[1] * self.unit * (a.abs() @ b.abs())
        return 4 * a.shape[1] ** 0.5 * self.unit * (a.square() @ b.square()).sqrt()

    def check(self, name: str, got: Tensor, dtype: torch.dtype) -> None:
        ref, bound = self.results[name]
        assert got.shape == ref.shape, name
        assert got.dtype == dtype, name
        # 2 ** -24 is the smallest subnormal of float16. Rounding may cost half of it.
        floor = 2.0**-25 if dtype == torch.float16 else 0.0
        excess = (got.detach().cpu().double() - ref).abs() - bound - floor
        assert bool((excess <= 0).all()), f"{name}: off by {float(excess.max()):.3g} too much"


def check(
    path: str,
    args: dict[str, Any],
    dy: Tensor | None = None,
    *,
    adversarial: bool = False,
    **options: Any,
) -> None:
    """Check the result and every gradient against the oracle. The weight must keep its bits."""
    before = args["weight"].clone()
    y = run(path, args, **options)
    if dy is None:
        generator = torch.Generator().manual_seed(5)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    y.backward(dy)
    oracle = Oracle(path, {k: to_device(v, "cpu") for k, v in args.items()}, dy.cpu(), adversarial)
    oracle.check("y", y, args["x"].dtype)
    for name, tensor in args.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            assert tensor.grad is not None, name
            oracle.check(name, tensor.grad, tensor.dtype)
    assert torch.equal(args["weight"], before)


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branches", "path"),
    [
        (branches, path)
        for branches in BRANCHES
        for path in (PATHS if branches in ("sparse", "rosa", "selector+sparse") else ["no S"])
    ],
)
def test_results_and_gradients_are_accurate(branches: str, path: str, dtype: torch.dtype) -> None:
    check(path, problem(branches, dtype))


@sweep(path=PATHS, nasty=NASTY)
def test_results_on_nasty_patterns_are_accurate(path: str, nasty: CsrPattern) -> None:
    rank = 2 if nasty.shape[1] >= 2 else 1
    check(path, problem("rosa", pattern=nasty, rank=rank))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_x_may_have_any_leading_dimensions(lead: tuple[int, ...], path: str) -> None:
    args = problem(lead=lead)
    if lead:
        check(path, args)
        return
    alone = run(path, args)
    row = run(path, {**args, "x": args["x"][None]})
    torch.testing.assert_close(alone, row[0], rtol=1e-5, atol=1e-5)
    assert alone.shape == (37,)


@sweep(path=PATHS, layout=LAYOUTS.keys())
def test_operands_may_have_any_layout(layout: str, path: str) -> None:
    """Conv1D's weight is transposed, and a slice of a fused projection has a larger row stride."""
    args = problem(lead=(6,))
    lay = LAYOUTS[layout]
    for name in ("x", "lora_a", "lora_b"):
        args[name] = lay(args[name].detach()).requires_grad_()
    weight = lay(args["weight"])
    if path == "scatter" and overlaps_itself(weight):
        with pytest.raises(RuntimeError, match="share memory"):
            run(path, {**args, "weight": weight})
        return
    check(path, {**args, "weight": weight}, adversarial=True)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_with_strides_of_0(path: str) -> None:
    """The backward of `sum` gives the op a gradient with strides 0."""
    args = problem()
    check(path, args, torch.ones(()).expand(3, 5, 37))


def small_problem(branches: str) -> tuple[dict[str, Any], list[str]]:
    """A float64 problem for gradcheck, and the names of its trained arguments."""
    pattern = CsrPattern.from_mask(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]))
    args = problem(branches, torch.float64, pattern, rank=2)
    return args, [k for k, v in args.items() if isinstance(v, Tensor) and v.requires_grad]


@pytest.mark.parametrize("path", ["separate", "scatter"])
@pytest.mark.parametrize("branches", BRANCHES)
def test_gradients_agree_with_finite_differences(branches: str, path: str) -> None:
    args, names = small_problem(branches)

    def call(*leaves: Tensor) -> Tensor:
        return run(path, {**args, **dict(zip(names, leaves, strict=True))})

    leaves = tuple(args[name] for name in names)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)


@pytest.mark.parametrize("branches", ["lora", "selector", "rosa"])
def test_dropout_agrees_with_formula_and_finite_differences(branches: str) -> None:
    args, names = small_problem(branches)
    shape = (3, 5, 2) if branches == "selector" else (3, 5, 4)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6

    def call(*leaves: Tensor) -> Tensor:
        given = {**args, **dict(zip(names, leaves, strict=True))}
        return run("scatter", given, dropout=0.4, dropout_mask=mask)

    assert torch.autograd.gradcheck(call, tuple(args[name] for name in names))
    # Dropout acts on x before A, or on h after a selector. What is kept is divided by 0.6.
    y, plain = call(*(args[name] for name in names)), run("scatter", {**args, "scaling": 0.0})
    kept = args["x"] @ dense_a(args).T * mask if branches == "selector" else None
    if kept is None:
        kept = (args["x"] * mask) @ dense_a(args).T
    torch.testing.assert_close(y, plain + SCALING / 0.6 * kept @ args["lora_b"].T)


def test_a_selector_equals_its_dense_a() -> None:
    args = problem("selector+sparse", torch.float64)
    explicit = {**args, "lora_a": dense_a(args)}
    torch.testing.assert_close(run("scatter", args), run("scatter", explicit))


@pytest.mark.ops("sddmm")
@sweep(path=PATHS)
def test_every_backend_serves_the_layer(kernel: Served, path: str) -> None:
    """The backends of sddmm, including the emulator's.

    The other ops of the layer derive their backend from that of sddmm.
    """
    args = problem("rosa", kernel.dtype, lead=(3, 8))
    if kernel.backend == "simt/wgmma":
        args["pattern"].build_tile_plan(128, 256)
    args = {k: to_device(v, kernel.device) for k, v in args.items()}
    check(path, args, backend=kernel.backend)


def to_device(argument: Any, device: str) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach().to(device).requires_grad_(argument.requires_grad)
    return argument.to(device) if isinstance(argument, CsrPattern) else argument


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        run("separate", problem(), backend="nowhere")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("branches", ["rosa", "selector+sparse"])
@pytest.mark.parametrize("path", PATHS)
def test_results_on_a_gpu_are_accurate(path: str, branches: str, dtype: torch.dtype) -> None:
    args = problem(branches, dtype, uniform_pattern(256, 384, 0.02), lead=(2, 64))
    check(path, {name: to_device(value, "cuda") for name, value in args.items()})


# -- tensors saved for backward --------------------------------------------------------------------


def saved_by(call: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd saves for backward, one for each storage."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return [tensor for tensor in saved.values() if tensor.numel()]


def frozen_but(args: dict[str, Any], *trained: str) -> dict[str, Any]:
    return {
        name: value.detach().requires_grad_(name in trained)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in args.items()
    }


def owners(saved: list[Tensor], args: dict[str, Any]) -> set[str]:
    """The names of the arguments that were saved, and "other" for tensors that the op made."""
    names = {v.data_ptr(): k for k, v in args.items() if isinstance(v, Tensor)}
    pattern = args.get("pattern")
    index = (
        {} if pattern is None else {pattern.crow_indices.data_ptr(), pattern.col_indices.data_ptr()}
    )
    return {names.get(t.data_ptr(), "other") for t in saved if t.data_ptr() not in index}


@pytest.mark.parametrize(
    ("branches", "trained", "expected"),
    [
        ("rosa", {"x", "values", "lora_a", "lora_b"}, "x weight values lora_a lora_b other"),
        ("rosa", {"values"}, "x values"),
        ("lora", {"lora_a", "lora_b"}, "x lora_a lora_b other"),
        ("lora", {"lora_b"}, "lora_b other"),
        # A selector is cheap: instead of x, only h is saved, which is r columns of x.
        ("selector", {"lora_b"}, "lora_b other"),
        ("selector", {"x", "lora_b"}, "weight lora_a lora_b other"),
        ("none", {"x"}, "weight"),
        ("none", {"bias"}, "bias"),
    ],
)
def test_only_tensors_that_gradients_need_are_saved(
    branches: str, trained: set[str], expected: str
) -> None:
    args = frozen_but(problem(branches), *trained)
    saved = saved_by(lambda: run("scatter", args))
    assert owners(saved, args) == set(expected.split())
    assert all(t.shape == (15, 4) for t in saved if owners([t], args) == {"other"})  # only h


def test_x_is_saved_once_for_all_branches() -> None:
    args = frozen_but(problem(), "x", "values", "lora_a", "lora_b")
    size = sum(t.untyped_storage().nbytes() for t in saved_by(lambda: run("scatter", args)))
    given = ("x", "weight", "values", "lora_a", "lora_b")
    bytes_of = sum(args[name].untyped_storage().nbytes() for name in given)
    pattern, h = args["pattern"], 15 * 4 * 4
    assert size == bytes_of + h + 4 * (pattern.nnz + pattern.shape[0] + 1)


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest storage that an operation inside the block returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("path", ["separate", "scatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_has_the_size_of_w(dtype: torch.dtype, path: str) -> None:
    """Neither a clone nor a gradient of W is returned. Five tokens keep activations far smaller."""
    pattern = uniform_pattern(256, 192, 0.01)
    args = problem("rosa", dtype, pattern, lead=(5,))
    y = run(path, args)
    # Allocations sees the results of torch.library ops, not the operations inside them.
    with Allocations() as forward:
        y, _ = torch.ops.rosa.rosa_linear(
            *(args[k] for k in ("x", "weight", "bias", "values", "lora_a", "lora_b")),
            None,
            [pattern.crow_indices, pattern.col_indices],
            transpose_tensors(pattern),
            [],
            SCALING,
            0.0,
            path,
            "auto",
        )
        y.backward(torch.ones_like(y))
    assert 0 < forward.largest < args["weight"].untyped_storage().nbytes() / 4


# -- scatter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_scatter_restores_bits_that_subtracting_would_not(dtype: torch.dtype) -> None:
    args = problem("sparse", dtype)
    before = args["weight"].clone()
    undone = before.clone()
    with torch.no_grad():
        rk.csr_add_(undone, args["pattern"], args["values"])
        rk.csr_add_(undone, args["pattern"], -args["values"])
    assert not torch.equal(undone, before)
    run("scatter", args).sum().backward()
    assert torch.equal(args["weight"], before)


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_scatter_restores_the_weight_after_an_error(
    fails_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = problem("sparse")
    before = args["weight"].clone()

    def fail(*_: Any) -> Tensor:
        assert not torch.equal(args["weight"], before)  # S is in the weight
        raise MemoryError("no room for the product")

    if fails_in == "forward":
        monkeypatch.setattr(torch.nn.functional, "linear", fail)
        with pytest.raises(MemoryError):
            run("scatter", args)
    else:
        y = run("scatter", args)
        monkeypatch.setattr(Tensor, "__matmul__", fail)
        with pytest.raises(MemoryError):
            y.sum().backward()
    assert torch.equal(args["weight"], before)


def test_scatter_keeps_saved_tensors_valid() -> None:
    """Two calls and another product use the weight before the first backward."""
    args = problem("sparse", lead=(4,))
    args["x"] = torch.randn(4, 53, requires_grad=True)
    square = torch.nn.functional.linear(args["x"], args["weight"])
    y = run("scatter", args).sum() + run("scatter", args).sum() + square.sum()
    y.backward()
    merged = rk.csr_add(args["weight"], args["pattern"], args["values"].detach())
    expected = 2 * merged.sum(0) + args["weight"].sum(0)
    torch.testing.assert_close(args["x"].grad, expected.expand(4, -1), rtol=1e-4, atol=1e-4)


# -- opcheck, compile, checkpointing, autocast and threads -----------------------------------------


@pytest.mark.parametrize("path", ["none", *PATHS])
@pytest.mark.parametrize("selector", [False, True])
def test_opcheck_of_forward_and_backward(path: str, selector: bool) -> None:
    args = problem("selector+sparse" if selector else "rosa")
    p = args["pattern"]
    index = [] if path == "none" else [p.crow_indices, p.col_indices]
    transpose = transpose_tensors(p) if path == "separate" else []
    values = None if path == "none" else args["values"]
    tensors = (args["bias"], values, args["lora_a"], args["lora_b"], None)
    settings = (index, transpose, [], SCALING, 0.0, path, "auto")
    torch.library.opcheck(rosa_linear_op, (args["x"], args["weight"], *tensors, *settings))
    y, h = rosa_linear_op(args["x"], args["weight"], *tensors, *settings)
    wanted = [True, True, path != "none", not selector, True]
    with torch.no_grad():
        torch.library.opcheck(
            rosa_linear_backward_op,
            (
                torch.randn_like(y),
                args["x"].detach(),
                args["weight"],
                *(t if t is None else t.detach() for t in tensors),
                h.detach(),
                *settings,
                wanted,
                args["x"].shape,
            ),
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch itself
def test_inductor_compiles_the_whole_layer() -> None:
    """One path is enough, because the op is opaque to the compiler."""
    assert_compiles_whole("scatter", backend="inductor")


@pytest.mark.parametrize("path", PATHS)
def test_aot_eager_compiles_the_whole_layer(path: str) -> None:
    assert_compiles_whole(path, backend="aot_eager")


def assert_compiles_whole(path: str, backend: str) -> None:
    args = problem()
    eager = run(path, args)
    eager.sum().backward()
    expected = {k: v.grad.clone() for k, v in args.items() if getattr(v, "grad", None) is not None}
    again = problem()

    def call(args: dict[str, Any]) -> Tensor:
        return run(path, args) * 1.0

    before = again["weight"].clone()
    got = torch.compile(call, fullgraph=True, backend=backend)(again)
    got.sum().backward()
    torch.testing.assert_close(got, eager)
    assert set(expected) == {"x", "bias", "values", "lora_a", "lora_b"}
    for name, grad in expected.items():
        torch.testing.assert_close(again[name].grad, grad)
    assert torch.equal(again["weight"], before)


@pytest.mark.parametrize("path", PATHS)
def test_checkpointing_gives_equal_gradients(path: str) -> None:
    args, again = problem(), problem()
    run(path, args).square().sum().backward()

    def call(x: Tensor) -> Tensor:
        return run(path, {**again, "x": x})

    checkpoint(call, again["x"], use_reentrant=False).square().sum().backward()
    for name in ("x", "bias", "values", "lora_a", "lora_b"):
        assert torch.equal(again[name].grad, args[name].grad), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_autocast_equals_the_op_on_cast_operands(path: str, narrow: torch.dtype) -> None:
    args, cast = problem(), problem()
    with torch.autocast("cpu", dtype=narrow):
        y = run(path, args)
    assert y.dtype == narrow
    y.sum().backward()
    assert args["x"].grad.dtype == torch.float32
    weight = cast["weight"]
    if path != "separate":  # S is added to the float32 weight, which is then cast
        with torch.no_grad():
            weight = rk.csr_add(weight, cast["pattern"], cast["values"])
    x = cast["x"].detach().to(narrow).requires_grad_()
    options = {"merged": True} if path != "separate" else {}
    expected = rk.rosa_linear(**{**cast, "x": x, "weight": weight.to(narrow)}, **options)
    assert torch.equal(y, expected)
    expected.sum().backward()
    assert torch.equal(args["x"].grad, x.grad.float())
    for name in ("bias", "values", "lora_a", "lora_b"):
        assert torch.equal(args[name].grad, cast[name].grad), name


def test_a_loss_scale_does_not_overflow_ds() -> None:
    """A float16 dS of 2**17 would be Inf. The values are float32, and so is their gradient."""
    args = problem("sparse", torch.float16, bias=False)
    y = run("scatter", args)
    dy = torch.full_like(y, 2.0**10)
    y.backward(dy)
    assert args["values"].grad.dtype == torch.float32
    assert bool(args["values"].grad.isfinite().all())
    Oracle("scatter", args, dy).check("values", args["values"].grad, torch.float32)
    assert float(Oracle("scatter", args, dy).results["values"][0].abs().max()) < 2**17
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD([args["values"]], lr=1.0)
    plain = problem("sparse", torch.float16, bias=False)
    run("scatter", plain).float().mean().backward()
    before = args["values"].detach().clone()
    optimizer.zero_grad()
    scaler.scale(run("scatter", args).float().mean()).backward()
    scaler.step(optimizer)
    step = before - args["values"].detach()
    torch.testing.assert_close(step, plain["values"].grad, rtol=2e-3, atol=1e-6)


def test_backward_in_a_thread_keeps_the_backend() -> None:
    args = problem()
    results = []
    with rk.use_backend("reference"):
        y = run("scatter", args)  # backward must use it in any thread

    def work() -> None:
        y.sum().backward()
        results.append(args["values"].grad)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    check_against = problem()
    run("scatter", check_against, backend="reference").sum().backward()
    assert torch.equal(results[0], check_against["values"].grad)


def test_threads_may_scatter_into_one_weight() -> None:
    args = problem("sparse", pattern=uniform_pattern(256, 256, 0.05), lead=(64,))
    before = args["weight"].clone()
    expected = run("scatter", args).detach()
    right = []

    def work() -> None:
        with torch.no_grad():
            right.extend(torch.equal(run("scatter", args), expected) for _ in range(100))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 300
    assert torch.equal(args["weight"], before)


def test_double_backward_is_refused() -> None:
    args = problem()
    y = run("separate", args)
    with pytest.raises(RuntimeError, match="differentiated once, got create_graph=True"):
        torch.autograd.grad(y.sum(), args["x"], create_graph=True)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": None}, ValueError, "pattern and values together, got pattern but no values"),
        ({"pattern": None}, ValueError, "pattern and values together, got values but no pattern"),
        ({"lora_b": None}, ValueError, "lora_a and lora_b together, got lora_a but no lora_b"),
        ({"lora_a": None}, ValueError, "lora_a and lora_b together, got lora_b but no lora_a"),
        ({"x": torch.randn(2, 52)}, ValueError, r"x of shape \(..., 53\) .* got \(2, 52\)"),
        ({"x": torch.randn(())}, ValueError, r"got \(\)"),
        ({"x": [1.0]}, TypeError, "x to be a tensor, got list"),
        ({"x": torch.zeros(2, 53, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"x": torch.randn(2, 53).half()}, TypeError, "weight's dtype torch.float32, got torch.fl"),
        ({"weight": torch.randn(37)}, ValueError, r"2-D, got shape \(37,\)"),
        ({"weight": torch.randn(36, 53)}, ValueError, r"weight's shape \(36, 53\), got \(37, 53\)"),
        ({"values": torch.randn(5)}, ValueError, r"shape \(nnz,\)"),
        ({"values": torch.zeros(196).half()}, TypeError, "values of dtype torch.float32, got"),
        ({"lora_a": torch.randn(3, 53)}, ValueError, r"lora_a of shape \(4, 53\), got \(3, 53\)"),
        ({"lora_b": torch.randn(4, 37)}, ValueError, r"shape \(37, r\), got \(4, 37\)"),
        ({"lora_b": torch.randn(37, 4).double()}, TypeError, "lora_b of dtype torch.float32"),
        ({"lora_a": torch.arange(3)}, ValueError, "r=4 columns like lora_b, got 3"),
        ({"lora_a": torch.arange(4).int()}, TypeError, "got torch.int32"),
        ({"bias": torch.randn(53)}, ValueError, r"bias of shape \(37,\), got \(53,\)"),
        ({"pattern": "mask"}, TypeError, "a CsrPattern, got str"),
        ({"merged": True, "scatter": True}, ValueError, "merged or scatter, got both"),
        ({"dropout": 0.5}, ValueError, "a dropout_mask with dropout=0.5, got none"),
        ({"dropout": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        (
            {"dropout": 0.5, "dropout_mask": torch.ones(3, 5, 4, dtype=torch.bool)},
            ValueError,
            r"shape \(3, 5, 53\) on cpu, got torch.bool and \(3, 5, 4\)",
        ),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.rosa_linear(**{**problem(), **change})


def test_options_without_their_branch_are_refused() -> None:
    args = problem("none")
    for name in ("merged", "scatter"):
        with pytest.raises(ValueError, match=f"pattern and values with {name}=True, got none"):
            rk.rosa_linear(**args, **{name: True})
    mask = torch.ones(3, 5, 53, dtype=torch.bool)
    with pytest.raises(ValueError, match="lora_a and lora_b with a dropout_mask, got none"):
        rk.rosa_linear(**args, dropout_mask=mask)


def test_scatter_under_autocast_refuses_narrow_values() -> None:
    args = problem("sparse")
    args["values"] = args["values"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"rosa_linear: .* values of dtype torch.float32, got"):
            run("scatter", args)
        assert run("separate", args).dtype == torch.bfloat16


def test_a_trainable_weight_is_refused() -> None:
    args = problem()
    args["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="frozen weight"):
        rk.rosa_linear(**args)


def test_scatter_refuses_weights_that_overlap_themselves() -> None:
    args = problem()
    args["weight"] = torch.randn(1, 53).expand(37, 53)
    with pytest.raises(RuntimeError, match="share memory"):
        run("scatter", args)
    check("separate", args)
