"""RosaLinear: adapters, residency, merging, movement and storage. W comes back bit by bit."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from conftest import sweep
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from rosa_kernels import CsrPattern, RosaLinear
from rosa_kernels.nn import base_weights, make_resident, sync
from rosa_kernels.testing import uniform_pattern

M, N = 37, 53


class Conv1D(nn.Module):
    """A copy of transformers' Conv1D. Its weight has the shape (n, m)."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, m) / n**0.5)
        self.bias = nn.Parameter(torch.randn(m))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


KINDS = {
    "Linear": lambda: nn.Linear(N, M),
    "Linear-no-bias": lambda: nn.Linear(N, M, bias=False),
    "Linear-bfloat16": lambda: nn.Linear(N, M, dtype=torch.bfloat16),
    "Conv1D": lambda: Conv1D(M, N),
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=KINDS)
def linear(request: pytest.FixtureRequest) -> nn.Module:
    return KINDS[request.param]()


@pytest.fixture
def mask() -> CsrPattern:
    return uniform_pattern(M, N, 0.1, seed=1)


def mirrored(mask: CsrPattern) -> CsrPattern:
    """Another pattern with as many nonzeros in each row."""
    return CsrPattern.from_coo(mask.row_indices, N - 1 - mask.col_indices, (M, N))


def randomized(layer: RosaLinear) -> RosaLinear:
    """Fill the adapters of `layer` with random numbers. B and values are zero before training."""
    with torch.no_grad():
        for adapter in layer.adapters.values():
            for parameter in adapter.parameters():
                parameter.normal_()
    sync(layer)
    return layer


def rosa(linear: nn.Module, mask: CsrPattern | None, **options: Any) -> RosaLinear:
    return randomized(RosaLinear.from_linear(linear, rank=4, pattern=mask, alpha=8, **options))


def inputs(layer: RosaLinear) -> Tensor:
    x = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(2))
    return x.to(layer.weight.dtype)


def matrix(layer: RosaLinear, weight: Tensor) -> Tensor:
    return weight.t() if layer.fan_in_fan_out else weight


def expected(layer: RosaLinear, w0: Tensor, name: str, x: Tensor) -> Tensor:
    """The formula in float64. W + S is rounded to the weight's dtype, as in a merge."""
    adapter = layer.adapter(name)
    weight = matrix(layer, w0)
    if adapter.pattern is not None:
        weight = rk.csr_add(weight, adapter.pattern, adapter.values.detach())
    y = x.double() @ weight.double().t()
    if adapter.lora_b is not None:
        low_rank = adapter.lora_b.detach().double() @ adapter.lora_a.detach().double()
        y = y + adapter.scaling * x.double() @ low_rank.t()
    return y if layer.bias is None else y + layer.bias.detach().double()


def assert_near(got: Tensor, ref: Tensor) -> None:
    """Allow a few roundings of the largest element. test_rosa_linear.py has strict bounds."""
    eps = 16 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), ref, rtol=eps, atol=eps * float(ref.abs().max()))


def adam(layer: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=lr)


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        x = torch.randn(6, N, generator=generator).to(next(layer.parameters()).dtype)
        loss = layer(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# -- construction ----------------------------------------------------------------------------------


def test_a_new_layer_equals_the_original_one(linear: nn.Module, mask: CsrPattern) -> None:
    x = torch.randn(3, 5, N).to(linear.weight.dtype)
    before = linear(x)
    names = dict(linear.state_dict())
    layer = RosaLinear.from_linear(linear, rank=4, pattern=mask)
    torch.testing.assert_close(layer(x), before)
    assert layer.weight is linear.weight
    assert set(names) <= set(layer.state_dict())
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {f"adapters.default.{p}" for p in ("lora_a", "lora_b", "values")}
    assert (layer.out_features, layer.in_features) == (M, N)
    assert all(p.dtype == torch.float32 for p in layer.adapters.parameters())


def test_forward_equals_the_formula(linear: nn.Module, mask: CsrPattern) -> None:
    layer = rosa(linear, mask)
    w0, x = layer.weight.detach().clone(), inputs(layer)
    assert_near(layer(x), expected(layer, w0, "default", x))
    assert torch.equal(layer.weight, w0)
    assert layer.path() == ("scatter", "make_resident was not called")


def test_frozen_a_and_selectors(mask: CsrPattern) -> None:
    frozen_a = RosaLinear.from_linear(nn.Linear(N, M), rank=4, train_a=False)
    assert [n for n, p in frozen_a.named_parameters() if p.requires_grad] == [
        "adapters.default.lora_b"
    ]
    columns = torch.tensor([5, 1, 52, 7])
    layer = randomized(RosaLinear.from_linear(nn.Linear(N, M), rank=4, selector=columns))
    x = inputs(layer)
    b = layer.adapter().lora_b
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight, layer.bias) + 4 * x[..., columns] @ b.t()
    )
    torch.testing.assert_close(layer.delta_weight()[:, columns], 4 * b.detach())
    assert "adapters.default.lora_a" in layer.state_dict()


def test_dropout_acts_only_in_training(mask: CsrPattern) -> None:
    """At a dropout of 0, no mask is made and no random number is drawn."""
    layer = rosa(nn.Linear(N, M), mask, dropout=0.5)
    x = inputs(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    state = torch.get_rng_state()
    plain = rosa(nn.Linear(N, M), mask).train()
    torch.set_rng_state(state)
    plain(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.adapter().dropout_mask(x) is None


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("selector", [None, torch.arange(4)], ids=["A", "selector"])
def test_dropout_masks_keep_the_right_share(dropout: float, selector: Tensor | None) -> None:
    """The share of kept elements is right in each of the four lanes that share a random word."""
    layer = RosaLinear.from_linear(nn.Linear(N, M), rank=4, dropout=dropout, selector=selector)
    x = torch.empty(3, 20_001, N)
    mask = layer.adapter().dropout_mask(x)
    assert mask.dtype == torch.bool
    assert mask.shape == (x.shape if selector is None else (3, 20_001, 4))
    flat = mask.flatten().double()
    for lane in range(4):
        kept = flat[lane::4]
        deviation = (dropout * (1 - dropout) / len(kept)) ** 0.5
        assert abs(float(kept.mean()) - (1 - dropout)) < 5 * deviation
    pairs = flat[: len(flat) // 2 * 2].view(-1, 2)
    assert abs(float(pairs.T.corrcoef()[0, 1])) < 5 / len(pairs) ** 0.5
    assert not torch.equal(mask, layer.adapter().dropout_mask(x))
    torch.manual_seed(3)
    first = layer.adapter().dropout_mask(x)
    torch.manual_seed(3)
    assert torch.equal(first, layer.adapter().dropout_mask(x))


def test_dropout_keeps_the_expectation() -> None:
    layer = rosa(nn.Linear(N, M, bias=False), None, dropout=0.25)
    x = torch.randn(1, N)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
        layer.eval()
        spread = float(layer.delta_weight().norm() * x.norm() / M**0.5)
        assert float((mean - layer(x)).abs().max()) < 0.15 * spread


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "a rank or a pattern, got rank 0 and no pattern"),
        ({"rank": -1}, ValueError, "integer >= 0, got -1"),
        ({"rank": 2.0}, ValueError, "integer >= 0, got 2.0"),
        ({"dropout": 1.0}, ValueError, r"dropout to be a number in \[0, 1\), got 1.0"),
        ({"alpha": float("nan")}, ValueError, "alpha to be a finite number"),
        ({"pattern": "mask"}, TypeError, "a CsrPattern, got str"),
        ({"adapter_name": "a.b"}, ValueError, "without dots, got 'a.b'"),
        ({"adapter_name": ""}, ValueError, "got ''"),
        ({"adapter_name": "keys"}, ValueError, "got 'keys'"),
        ({"selector": torch.arange(3), "rank": 4}, ValueError, r"rank=4 columns, got shape \(3,\)"),
        ({"selector": torch.tensor([0, N]), "rank": 2}, ValueError, "got 0 to 53"),
        ({"selector": torch.tensor([0, -1]), "rank": 2}, ValueError, "got -1 to 0"),
        ({"selector": torch.randn(2), "rank": 2}, TypeError, "int64 selector .* torch.float32"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RosaLinear.from_linear(nn.Linear(N, M), **arguments)


def test_patterns_and_values_of_wrong_shapes_are_refused(mask: CsrPattern) -> None:
    layer = RosaLinear.from_linear(nn.Linear(N, M), rank=2)
    with pytest.raises(ValueError, match=r"weight's shape \(37, 53\), got \(53, 37\)"):
        layer.set_pattern(mask.T)
    with pytest.raises(ValueError, match="values of shape"):
        layer.set_pattern(mask, torch.zeros(3))
    with pytest.raises(ValueError, match=r"one of the adapters \['default'\], got 'other'"):
        layer.set_pattern(mask, adapter_name="other")
    assert layer.adapter().pattern is None


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Wrapped(Tensor):
    """A tensor that holds another one, with the protocol of torchao's quantised tensors."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].inner)


def changed(how: Callable[[nn.Linear], object]) -> nn.Linear:
    linear = nn.Linear(4, 4)
    how(linear)
    return linear


def with_weight(weight: Tensor) -> nn.Linear:
    return changed(lambda m: setattr(m, "weight", nn.Parameter(weight, requires_grad=False)))


REFUSED = {
    "of class Embedding": lambda: nn.Embedding(4, 4),
    "of class LayerNorm": lambda: nn.LayerNorm(4),
    "of class NoneType": lambda: None,
    "nn.MultiheadAttention reads its weight": lambda: nn.MultiheadAttention(4, 2).out_proj,
    "of class Doubled, which has a forward of its own": lambda: Doubled(4, 4),
    "whose forward was replaced": lambda: changed(lambda m: setattr(m, "forward", lambda x: x)),
    "with bias, parametrizations": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    "with bias, weight_orig, weight_u": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "with bias, weight_orig, weight_mask": lambda: changed(
        lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5)
    ),
    "with weight, bias, scale": lambda: changed(
        lambda m: m.register_buffer("scale", torch.ones(1))
    ),
    "that is not initialised yet": lambda: nn.LazyLinear(4),
    r"with a weight of shape \(4,\)": lambda: with_weight(torch.zeros(4)),
    r"with a weight of dtype torch.int8": lambda: with_weight(torch.zeros(4, 4, dtype=torch.int8)),
    "with a weight of class Wrapped": lambda: with_weight(Wrapped(torch.zeros(4, 4))),
}


@sweep(reason=[*REFUSED])
def test_layers_that_cannot_be_replaced_are_refused(reason: str) -> None:
    with pytest.raises(TypeError, match=f"a plain nn.Linear or Conv1D, got one .*{reason}"):
        RosaLinear.from_linear(REFUSED[reason](), rank=2)


def test_layers_whose_hooks_were_removed_are_plain(mask: CsrPattern) -> None:
    """accelerate leaves the class's own forward on the instance, bound to the old layer."""
    linear = nn.Linear(N, M)
    linear.forward = linear.forward  # type: ignore[method-assign]
    layer = rosa(linear, mask)
    x = torch.randn(3, N)
    assert_near(layer.to_linear("default")(x), layer(x).detach().double())


def test_another_weight_while_merged_or_resident_is_refused(mask: CsrPattern) -> None:
    for how in ("resident", "merged"):
        layer = rosa(nn.Linear(N, M), mask)
        w = layer.weight.detach().clone()
        if how == "merged":
            layer.merge()
        else:
            make_resident(layer, adam(layer))
        layer(torch.randn(3, N))
        layer.weight = nn.Parameter(w, requires_grad=False)
        layer.path()  # it must not take the new weight for the one with the adapter
        with pytest.raises(RuntimeError, match="the weight that holds the adapter, got another"):
            layer(torch.randn(3, N))


def test_hooks_and_attributes_move_to_the_new_layer(mask: CsrPattern) -> None:
    linear = nn.Linear(N, M)
    linear.note = "mine"
    linear.path = "not the method"  # type: ignore[assignment]
    called: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    handle = linear.register_forward_hook(hook("forward"))
    linear.register_forward_pre_hook(hook("pre"))
    linear.register_full_backward_hook(hook("backward"))
    linear.register_full_backward_pre_hook(hook("backward pre"))
    linear.register_state_dict_pre_hook(hook("state pre"))
    linear.register_state_dict_post_hook(hook("state"))
    linear.register_load_state_dict_pre_hook(lambda m, *_: called.append(type(m).__name__))
    linear.register_load_state_dict_post_hook(lambda m, _: called.append(type(m).__name__))

    def use(module: nn.Module) -> list[str]:
        called.clear()
        module(torch.randn(2, N, requires_grad=True)).sum().backward()
        module.load_state_dict(module.state_dict())
        return [*called]

    hooks = ["pre", "forward", "backward pre", "backward", "state pre", "state"]
    assert use(linear) == [*hooks, "Linear", "Linear"]
    layer = rosa(linear, mask)
    assert layer.note == "mine"
    assert layer.path() == ("scatter", "make_resident was not called")
    linear = nn.Linear(N, M)  # the old layer is gone, as after `attach`
    assert use(layer) == [*hooks, "RosaLinear", "RosaLinear"]
    assert use(copy.deepcopy(layer)) == [*hooks, "RosaLinear", "RosaLinear"]
    layer.register_forward_hook(hook("later"))
    plain = layer.to_linear()
    assert plain.note == "mine"
    assert use(plain) == ["pre", "forward", "later", *hooks[2:], "Linear", "Linear"]
    handle.remove()
    assert use(plain) == ["pre", "later", *hooks[2:], "Linear", "Linear"]


# -- named adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_switching_adapters(linear: nn.Module, mask: CsrPattern, resident: bool) -> None:
    layer = rosa(linear, mask)
    w0, x = layer.weight.detach().clone(), inputs(layer)
    layer.add_adapter("sparse", pattern=uniform_pattern(M, N, 0.2, seed=4))
    layer.add_adapter("low_rank", rank=2)
    layer.add_adapter("empty")
    randomized(layer)
    if resident:
        make_resident(layer, adam(layer))
    for name in ("default", "sparse", "low_rank", "sparse", "default"):
        layer.set_adapter(name)
        assert_near(layer(x), expected(layer, w0, name, x))
    for name in (None, "empty"):
        layer.set_adapter(name)
        assert torch.equal(layer.weight, w0)
        assert torch.equal(layer(x), F.linear(x, matrix(layer, w0), layer.bias))
    layer.set_adapter("sparse")
    layer.delete_adapter("sparse")
    assert layer.active_adapter is None
    assert torch.equal(layer.weight, w0)
    assert sorted(layer.adapters) == ["default", "empty", "low_rank"]
    with pytest.raises(ValueError, match="got 'sparse'"):
        layer.set_adapter("sparse")
    with pytest.raises(ValueError, match="a new adapter name without dots, got 'empty'"):
        layer.add_adapter("empty", rank=1)


# -- S inside the weight ---------------------------------------------------------------------------


def test_resident_and_scatter_training_have_equal_bits(linear: nn.Module, mask: CsrPattern) -> None:
    other = copy.deepcopy(linear)
    torch.manual_seed(1)
    scatter = RosaLinear.from_linear(linear, rank=4, pattern=mask)
    torch.manual_seed(1)
    resident = RosaLinear.from_linear(other, rank=4, pattern=mask)
    w0 = resident.weight.detach().clone()
    optimizer = adam(resident)
    handle = make_resident(resident, optimizer)
    assert handle.paths == {"": "resident"}
    assert train(resident, optimizer) == train(scatter, adam(scatter))
    merged = rk.csr_add(matrix(resident, w0), mask, resident.adapter().values.detach())
    assert torch.equal(matrix(resident, resident.weight), merged)
    assert not torch.equal(resident.weight, w0)
    for a, b in zip(resident.adapters.parameters(), scatter.adapters.parameters(), strict=True):
        assert torch.equal(a, b)
        assert bool(a.detach().any())
    handle.remove()
    assert torch.equal(resident.weight, w0)
    assert resident.path()[0] == "scatter"


def test_small_steps_survive_in_a_bfloat16_weight(mask: CsrPattern) -> None:
    """100 steps of 2e-5 beside bfloat16 weights of about 1, whose spacing is 2**-8."""
    layer = RosaLinear.from_linear(nn.Linear(N, M, dtype=torch.bfloat16), rank=0, pattern=mask)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    values = layer.adapter().values
    optimizer = torch.optim.SGD([values], lr=2e-5)
    make_resident(layer, optimizer)
    for _ in range(100):
        values.grad = torch.full_like(values, -1.0)
        optimizer.step()
    torch.testing.assert_close(values.detach(), torch.full_like(values, 2e-3), rtol=1e-4, atol=0)


def test_a_later_mask_becomes_resident_by_itself(mask: CsrPattern) -> None:
    """As in RoSA's warm-up, the layer has no S at first. Its values get a parameter group later."""
    layer = RosaLinear.from_linear(nn.Linear(N, M), rank=4)
    w0 = layer.weight.detach().clone()
    optimizer = adam(layer)
    make_resident(layer, optimizer)
    train(layer, optimizer, 1)
    assert torch.equal(layer.weight, w0)
    layer.set_pattern(mask)
    optimizer.add_param_group({"params": [layer.adapter().values]})
    train(layer, optimizer, 2)
    values = layer.adapter().values.detach()
    assert bool(values.any())
    assert torch.equal(layer.weight, rk.csr_add(w0, mask, values))


def test_a_skipped_step_keeps_weight_and_values_consistent(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    optimizer = adam(layer)
    make_resident(layer, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for scale in (1.0, float("inf")):
        scaler.scale(layer(torch.randn(4, N)).square().mean() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        merged = rk.csr_add(w0, mask, layer.adapter().values.detach())
        assert torch.equal(layer.weight, merged)


def test_a_step_between_forward_and_backward_raises(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    optimizer = adam(layer)
    make_resident(layer, optimizer)
    x = torch.randn(2, N, requires_grad=True)
    y = layer(x)
    layer.adapter().values.grad = torch.ones(mask.nnz)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_which_weights_may_be_resident(mask: CsrPattern) -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(N, M) for name in ("own", "tied", "head", "aliased", "k", "v")}
    )
    model["head"].weight = model["tied"].weight
    model["aliased"].weight.data = model["head"].weight.data
    fused = torch.randn(2 * M, N)
    model["k"].weight.data, model["v"].weight.data = fused.chunk(2)
    for name in ("own", "tied", "aliased", "k", "v"):
        model[name] = rosa(model[name], mask)
    overlapping = nn.Linear(N, M)
    overlapping.weight = nn.Parameter(torch.randn(1, N).expand(M, N))
    model["overlapping"] = rosa(overlapping, mask)
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    handle = make_resident(model, adam(model))
    assert handle.paths == {
        "own": "resident",
        "tied": "scatter: head.weight shares the weight's memory",
        "aliased": "scatter: head.weight shares the weight's memory",
        "k": "resident",
        "v": "resident",
        "overlapping": "separate: elements of the weight share memory",
    }
    assert torch.equal(model["head"].weight, before["head"])
    x = torch.randn(4, N)
    for name in handle.paths:
        assert_near(model[name](x), expected(model[name], before[name], "default", x))
    handle.remove()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in model.items())


def test_unwritable_weights_use_the_separate_path(mask: CsrPattern) -> None:
    with torch.inference_mode():
        weight = torch.randn(M, N)
    linear = nn.Linear(N, M)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = rosa(linear, mask)
    assert layer.path() == ("separate", "the weight was made in inference mode")
    with pytest.raises(RuntimeError, match="got none: the weight was made in inference"):
        layer.merge()
    shared = rosa(nn.Linear(N, M).share_memory(), mask)
    assert shared.path() == ("separate", "other processes share the weight's memory")
    x = torch.randn(4, N)
    assert_near(shared(x), expected(shared, shared.weight.detach(), "default", x))


def test_sharded_weights_are_refused(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    layer._is_fsdp_managed_module = True  # what both FSDPs set on the modules they manage
    assert layer.path() == ("separate", "the weight is sharded by FSDP")
    with pytest.raises(RuntimeError, match=r"whole, got 1 sharded by FSDP .* separate path"):
        make_resident(nn.Sequential(layer), adam(layer))


def test_an_optimizer_without_the_values_is_refused(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="holds the values of 0, got one that does not"):
        make_resident(nn.Sequential(layer), torch.optim.SGD([layer.adapter().lora_b]))
    assert torch.equal(layer.weight, before)


def test_an_optimizer_without_hooks_is_refused(mask: CsrPattern) -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.param_groups = optimizer.param_groups

    layer = rosa(nn.Linear(N, M), mask)
    before = layer.weight.detach().clone()
    for optimizer in (Wrapper(adam(layer)), None, "adam"):
        with pytest.raises(TypeError, match=r"make_resident: expected a torch.optim.Optimizer"):
            make_resident(layer, optimizer)  # type: ignore[arg-type]
    assert torch.equal(layer.weight, before)


def test_arguments_that_are_no_modules_are_refused(mask: CsrPattern) -> None:
    optimizer = adam(rosa(nn.Linear(N, M), mask))
    for op, call in {
        "make_resident": lambda: make_resident(None, optimizer),  # type: ignore[arg-type]
        "sync": lambda: sync("layer"),  # type: ignore[arg-type]
        "base_weights": lambda: base_weights(None).__enter__(),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(TypeError, match=f"{op}: expected an nn.Module, got "):
            call()


class Ascent(torch.optim.SGD):
    """SAM takes the gradient after an ascent step. No hook of `step` sees the ascent."""

    @torch.no_grad()
    def ascend(self, sign: float = 1.0) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if sign > 0:
                self.state[p]["ascent"] = p.grad.clone()
            p.add_(self.state[p]["ascent"], alpha=sign)


class Lookahead(torch.optim.Optimizer):
    """Changes the values through `.data` after the step of the optimizer that it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.mul_(0.5)


class Probing(torch.optim.SGD):
    """Calls its closure after each of two changes of the parameters through `.data`."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for shift in (0.5, -0.5):
            for p in (p for group in self.param_groups for p in group["params"]):
                p.data.add_(shift)
            with torch.enable_grad():
                closure()
        super().step()


def lbfgs(layer: RosaLinear) -> torch.optim.Optimizer:
    return torch.optim.LBFGS([layer.adapter().values], max_iter=5, line_search_fn="strong_wolfe")


STEPS = {
    "closure": (lbfgs, lambda optimizer, loss: optimizer.step(loss)),
    "closure by name": (lbfgs, lambda optimizer, loss: optimizer.step(closure=loss)),
    "closure at other places": (
        lambda layer: Probing([layer.adapter().values], lr=0.1),
        lambda optimizer, loss: optimizer.step(loss),
    ),
    "ascent": (
        lambda layer: Ascent([layer.adapter().values], lr=0.1),
        lambda optimizer, loss: (
            loss(),
            optimizer.ascend(),
            loss(),
            optimizer.ascend(-1),
            optimizer.step(),
        ),
    ),
    "lookahead": (
        lambda layer: Lookahead(torch.optim.SGD([layer.adapter().values], lr=0.1)),
        lambda optimizer, loss: (loss(), optimizer.step()),
    ),
}


@sweep(how=[*STEPS])
def test_optimizers_may_change_values_several_times(mask: CsrPattern, how: str) -> None:
    """A resident S follows the values: all losses equal those of training on the scatter path."""
    make, step = STEPS[how]
    x, target = torch.randn(8, N), torch.randn(8, M)
    linear = nn.Linear(N, M)
    losses: dict[bool, list[float]] = {False: [], True: []}
    for resident in losses:
        layer = RosaLinear.from_linear(copy.deepcopy(linear), rank=0, pattern=mask)
        optimizer = make(layer)
        if resident:
            make_resident(layer, optimizer)

        def loss(
            layer: RosaLinear = layer,
            optimizer: torch.optim.Optimizer = optimizer,
            seen: list[float] = losses[resident],
        ) -> Tensor:
            optimizer.zero_grad()
            value = (layer(x) - target).square().mean()
            value.backward()
            seen.append(value.item())
            return value

        for _ in range(3):
            step(optimizer, loss)
    assert losses[True] == losses[False]
    assert len(set(losses[True])) >= 3  # the values did change


@pytest.mark.parametrize("how", ["set_pattern", "load_state_dict"])
def test_sync_after_an_adapter_got_another_pattern(mask: CsrPattern, how: str) -> None:
    """The adapter is changed directly. The layer's method would take S out of the weight first."""
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    make_resident(layer, adam(layer))
    if how == "set_pattern":
        layer.adapter().set_pattern(mask := uniform_pattern(M, N, 0.2, seed=4))
    else:
        mask = mirrored(mask)
        layer.adapters.load_state_dict(rosa(nn.Linear(N, M), mask).adapters.state_dict())
    randomized(layer)
    assert torch.equal(layer.weight, rk.csr_add(w0, mask, layer.adapter().values.detach()))
    layer.leave_residency()
    assert torch.equal(layer.weight, w0)


def test_residency_with_a_backend_without_csr_ops(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    optimizer = adam(layer)
    with rk.use_backend("dense"):
        handle = make_resident(layer, optimizer)
        train(layer, optimizer)
        assert torch.equal(layer.state_dict()["weight"], w0)
        merged = layer.weight.clone()
        handle.remove()
    assert torch.equal(merged, rk.csr_add(w0, mask, layer.adapter().values.detach()))
    assert torch.equal(layer.weight, w0)


def test_unwritable_weights_leave_residency(mask: CsrPattern) -> None:
    shared, expanded = (rosa(nn.Linear(N, M), mask) for _ in range(2))
    w0 = shared.weight.detach().clone()
    for layer in (shared, expanded):
        make_resident(layer, adam(layer))
    shared.share_memory()
    assert shared.path() == ("separate", "other processes share the weight's memory")
    assert torch.equal(shared.weight, w0)
    overlapping = {**expanded.state_dict(), "weight": torch.randn(1, N).expand(M, N)}
    expanded.load_state_dict(overlapping, assign=True)
    assert expanded.path() == ("separate", "elements of the weight share memory")
    copy.deepcopy(shared).merge()  # a copy has its own memory


def test_make_resident_takes_a_wrapped_optimizer(mask: CsrPattern) -> None:
    """accelerate wraps an optimizer, and the wrapped one steps."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    optimizer = adam(layer)
    make_resident(layer, Wrapper(optimizer))  # type: ignore[arg-type]
    train(layer, optimizer)
    assert torch.equal(layer.weight, rk.csr_add(w0, mask, layer.adapter().values.detach()))


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_unmerge_undoes_merge_bit_by_bit(
    linear: nn.Module, mask: CsrPattern, resident: bool
) -> None:
    layer = rosa(linear, mask).eval()
    w0, x = layer.weight.detach().clone(), inputs(layer)
    y = layer(x)
    if resident:
        make_resident(layer, adam(layer))
    layer.merge(safe=True)
    assert layer.merged == "default"
    delta = matrix(layer, layer.delta_weight()) if layer.fan_in_fan_out else layer.delta_weight()
    assert torch.equal(layer.weight, (w0.float() + delta).to(w0.dtype))
    bias = None if layer.bias is None else layer.bias.double()
    assert_near(layer(x), F.linear(x.double(), matrix(layer, layer.weight).double(), bias))
    for forbidden in (
        lambda: layer.merge(),
        lambda: layer.set_adapter(None),
        lambda: layer.delete_adapter("default"),
        lambda: layer.set_pattern(mask),
        lambda: layer.to_linear(),
        lambda: layer.load_state_dict(layer.state_dict()),
    ):
        with pytest.raises(RuntimeError, match="no merged adapter, got 'default'; unmerge first"):
            forbidden()
    assert torch.equal(layer.state_dict()["weight"], w0)
    layer.unmerge()
    assert layer.merged is None
    assert torch.equal(layer.base_weight(), w0)
    assert (layer.path()[0] == "resident") == resident
    torch.testing.assert_close(layer(x), y)


def test_unmerge_without_a_copy_is_refused(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    with pytest.raises(RuntimeError, match="a merged adapter, got none"):
        layer.unmerge()
    layer.merge(keep_base=False)
    for call in (layer.unmerge, layer.base_weight, layer.state_dict):
        with pytest.raises(RuntimeError, match="keep_base=False, and subtracting it would not"):
            call()


def test_a_refused_safe_merge_changes_nothing(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    with torch.no_grad():
        layer.adapter().values[3] = float("inf")
    with pytest.raises(ValueError, match="finite weights, got NaN or Inf from adapter 'default'"):
        layer.merge(safe=True)
    assert torch.equal(layer.weight, w0)
    assert layer.merged is None
    layer.merge()
    assert not bool(layer.weight.isfinite().all())


def test_to_linear_gives_the_merged_or_original_layer(linear: nn.Module, mask: CsrPattern) -> None:
    original = linear.weight
    w0 = original.detach().clone()
    layer = rosa(linear, mask).eval()
    make_resident(layer, adam(layer))
    x = inputs(layer)
    merged = layer.to_linear("default")
    assert type(merged) is type(linear)
    assert_near(merged(x), layer(x).detach().double())
    assert not merged.weight.requires_grad
    plain = layer.to_linear()
    assert plain.weight is original
    assert torch.equal(plain(x), linear(x))
    layer.set_adapter(None)
    layer.set_adapter("default")
    assert torch.equal(plain.weight, w0)  # S is no longer added to it


def test_weights_on_meta_become_resident_once_loaded(mask: CsrPattern) -> None:
    trained = rosa(nn.Linear(N, M), mask)
    layer = RosaLinear.from_linear(nn.Linear(N, M, device="meta"), rank=4, pattern=mask, alpha=8)
    handle = make_resident(layer, adam(layer))
    assert handle.paths == {"": "separate: the weight is on the meta device"}
    layer.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    assert layer.path()[0] == "resident"
    x = inputs(layer)
    assert torch.equal(layer(x), trained(x))


# -- movement and storage --------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["apart", "resident", "merged"])
def test_state_dict_holds_w(linear: nn.Module, mask: CsrPattern, state: str) -> None:
    layer = rosa(linear, mask)
    w0 = layer.weight.detach().clone()
    if state == "resident":
        make_resident(layer, adam(layer))
    elif state == "merged":
        layer.merge()
    saved = layer.state_dict()
    assert torch.equal(saved["weight"], w0)
    assert torch.equal(layer.weight, w0) == (state == "apart")
    assert saved["adapters.default.col_indices"].dtype == torch.int32


@pytest.mark.parametrize("resident", [False, True])
def test_load_state_dict_replaces_weight_values_and_mask(
    linear: nn.Module, mask: CsrPattern, resident: bool
) -> None:
    """The weight, values and mask of another layer are loaded. A resident S follows by itself."""
    mine = rosa(copy.deepcopy(linear), mask)
    with torch.no_grad():
        linear.weight.add_(1)
    theirs = rosa(linear, mirrored(mask))
    if resident:
        make_resident(mine, adam(mine))
    saved = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert not mine.load_state_dict(saved).missing_keys
    x = inputs(mine)
    assert torch.equal(mine(x), theirs(x))
    assert torch.equal(mine.base_weight(), theirs.weight)
    assert torch.equal(mine.adapter().pattern.col_indices, theirs.adapter().pattern.col_indices)
    assert (mine.path()[0] == "resident") == resident


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("out of range", r"expected .* in \[0, 53\)"),
        ("unsorted", "sorted, unique col_indices"),
        ("another count", "as in this adapter, got"),
    ],
)
def test_load_state_dict_validates_indices(mask: CsrPattern, damage: str, message: str) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    before = {name: tensor.clone() for name, tensor in layer.adapter().state_dict().items()}
    saved = {
        name: tensor + 1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in layer.state_dict().items()
    }
    col = saved["adapters.default.col_indices"]
    if damage == "out of range":
        col[-1] = N
    elif damage == "unsorted":
        row = int((mask.row_nnz >= 2).nonzero()[0])
        start = int(mask.crow_indices[row])
        col[start : start + 2] = col[start : start + 2].flip(0)
    else:
        col = col[:-1]
        crow = saved["adapters.default.crow_indices"]
        crow[crow == mask.nnz] -= 1
        saved["adapters.default.crow_indices"] = crow
    saved["adapters.default.col_indices"] = col
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(saved)
    for name, tensor in layer.adapter().state_dict().items():
        assert torch.equal(tensor, before[name]), name
    layer(inputs(layer))  # the layer still works


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (torch.tensor([0, N]), "got 0 to 53"),
        (torch.tensor([-1, 0]), "got -1 to 0"),
        (torch.randn(2), "int64 selector .* torch.float32"),
    ],
)
def test_load_state_dict_validates_selectors(selector: Tensor, message: str) -> None:
    columns = torch.tensor([3, 1])
    layer = RosaLinear.from_linear(nn.Linear(N, M), rank=2, selector=columns)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**layer.state_dict(), "adapters.default.lora_a": selector})
    assert torch.equal(layer.adapter().lora_a, columns)


def test_load_state_dict_by_assignment_replaces_the_weight(mask: CsrPattern) -> None:
    """Nothing keeps the old weight alive, and the new weight has been checked."""
    layer = rosa(nn.Linear(N, M), mask)
    before = weakref.ref(layer.weight)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert before() is None
    x = inputs(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_layers_built_on_meta_can_be_loaded(linear: nn.Module, mask: CsrPattern, how: str) -> None:
    """The mask is loaded from the state_dict and replaces a placeholder."""
    trained = rosa(copy.deepcopy(linear), mask)
    saved = copy.deepcopy(trained.state_dict())
    placeholder = uniform_pattern(M, N, 0.1, seed=5)
    layer = RosaLinear.from_linear(linear.to("meta"), rank=4, pattern=placeholder, alpha=8)
    x = inputs(trained)
    assert layer(x.to("meta")).shape == (3, 5, M)
    assert copy.deepcopy(layer).adapter().pattern.device.type == "meta"
    if how == "assign":
        layer.load_state_dict(saved, assign=True)
    else:
        layer.to_empty(device="cpu").load_state_dict(saved)
    assert torch.equal(layer(x), trained(x))
    assert torch.equal(layer.adapter().pattern.col_indices, mask.col_indices)


def test_load_state_dict_reports_missing_and_unexpected_keys(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    saved = layer.state_dict()
    del saved["adapters.default.col_indices"]
    with pytest.raises(RuntimeError, match=r"Missing key.*adapters.default.col_indices"):
        layer.load_state_dict(saved)
    plain = rosa(nn.Linear(N, M), None)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*adapters.default.c"):
        plain.load_state_dict({**plain.state_dict(), "adapters.default.col_indices": torch.ones(1)})


def test_casting_rounds_the_weight_and_not_adapters(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    make_resident(layer, adam(layer))
    masters = [p.detach().clone() for p in layer.adapters.parameters()]
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    for now, before in zip(layer.adapters.parameters(), masters, strict=True):
        assert torch.equal(now, before)
    assert torch.equal(layer.base_weight(), w0.bfloat16())
    values = layer.adapter().values.detach()
    assert torch.equal(layer.weight, rk.csr_add(w0.bfloat16(), mask, values))
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert layer(inputs(layer)).dtype == torch.float64


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_return_from_float64_to_float32(
    mask: CsrPattern, dtype: torch.dtype, resident: bool
) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    layer.add_adapter("later")  # it has no parameter whose dtype could change yet
    if resident:
        make_resident(layer, adam(layer))
    layer.double()
    layer.set_pattern(mask, adapter_name="later")
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer.to(dtype)
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}
    assert layer(inputs(layer)).dtype == dtype


def test_casting_a_merged_layer_casts_its_copy(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.state_dict()["weight"].dtype == torch.bfloat16
    layer.unmerge()
    assert torch.equal(layer.weight, w0.bfloat16())


def test_deep_copies_are_independent_and_hold_w(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0 = layer.weight.detach().clone()
    make_resident(layer, adam(layer))
    other = copy.deepcopy(layer)
    assert other.path()[0] == "scatter"  # no optimizer's hook knows it
    assert torch.equal(other.weight, w0)
    assert not torch.equal(layer.weight, w0)
    x = inputs(layer)
    assert torch.equal(other(x), layer(x))
    assert other.adapter().values is not layer.adapter().values


@pytest.mark.parametrize("resident", [False, True])
def test_pickled_layers_hold_w(mask: CsrPattern, resident: bool) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    w0, x = layer.weight.detach().clone(), inputs(layer)
    if resident:
        make_resident(layer, adam(layer))
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))
    assert other.path()[0] == "scatter"  # no optimizer's hook knows it
    assert torch.equal(other.weight, w0)
    assert (layer.path()[0] == "resident") == resident


def test_base_weights_holds_w_inside_its_block(mask: CsrPattern) -> None:
    model = nn.Sequential(rosa(nn.Linear(N, M), mask), nn.Tanh())
    w0 = model[0].weight.detach().clone()
    make_resident(model, adam(model))
    with base_weights(model):
        assert torch.equal(model[0].weight, w0)
        assert model.state_dict()["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert model[0].path()[0] == "resident"
    assert not torch.equal(model[0].weight, w0)
    with base_weights(model):
        with base_weights(model):
            pass
        assert torch.equal(model[0].weight, w0)
    model[0].merge()
    with pytest.raises(RuntimeError, match="unmerge first"), base_weights(model):
        pass


def test_repr_shows_sizes_and_options(mask: CsrPattern) -> None:
    text = repr(rosa(nn.Linear(N, M), mask, dropout=0.5))
    for part in ("in_features=53", "rank=4", "alpha=8", "dropout=0.5", f"nnz={mask.nnz}"):
        assert part in text


# -- compile, checkpointing, autocast and distributed training -------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_aot_eager_compiles_the_whole_layer(mask: CsrPattern, resident: bool) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    other = copy.deepcopy(layer)
    if resident:
        make_resident(layer, adam(layer))
    x = inputs(layer)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    other(x).square().sum().backward()
    for a, b in zip(layer.adapters.parameters(), other.adapters.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_checkpointing_with_dropout(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask, dropout=0.5)
    x = inputs(layer).requires_grad_()
    gradients = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(4)
        y = call(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *layer.adapters.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_autocast_rounds_results_to_bfloat16(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    x = inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        layer.set_adapter(None)
        base = layer(x)
    assert y.dtype == base.dtype == torch.bfloat16
    layer.set_adapter("default")
    assert_near(y.detach(), layer(x).detach().double())


ignore_nested_warning = pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")


@ignore_nested_warning
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_calls_the_layers(padded: bool) -> None:
    """Without care, torch in eval mode would read the weights and pack a padded batch."""
    block = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(block, 2)
    for layer in encoder.layers:
        for name in ("linear1", "linear2"):
            linear = layer.get_submodule(name)
            pattern = uniform_pattern(*linear.weight.shape, 0.2, seed=1)
            setattr(layer, name, rosa(linear, pattern))
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = padded
    given = padding if padded else None
    with torch.no_grad():
        trained = encoder.train()(x, src_key_padding_mask=given)
        y = encoder.eval()(x, src_key_padding_mask=given)
    torch.testing.assert_close(y[~padding], trained[~padding])


@ignore_nested_warning
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_served(mask: CsrPattern, layout: torch.layout) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    parts = [torch.randn(3, N), torch.randn(0, N), torch.randn(2, N)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    assert y.layout == layout
    for row, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(row, layer(part))


@pytest.mark.parametrize("shape", [(4, N), (2, 3, N)], ids=str)
def test_the_output_may_be_changed_in_place(mask: CsrPattern, shape: tuple[int, ...]) -> None:
    """nn.ReLU(inplace=True) and `hidden += residual` write to it."""
    layer = rosa(nn.Linear(N, M), mask)
    x = torch.randn(shape, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).relu().sum(), x)
    (got,) = torch.autograd.grad(nn.functional.relu_(layer(x)).sum(), x)
    assert torch.equal(got, expected)


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    """A process group that has only this process."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_training_under_distributed_data_parallel(mask: CsrPattern) -> None:
    """DDP broadcasts buffers in place in every forward. The indices must not be among them."""
    layer = rosa(nn.Linear(N, M), mask)
    other = copy.deepcopy(layer)
    parallel = nn.parallel.DistributedDataParallel(layer)
    optimizer = adam(parallel)
    make_resident(parallel, optimizer)
    train(parallel, optimizer)
    train(other, adam(other))
    for a, b in zip(layer.adapters.parameters(), other.adapters.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shard", [fsdp1, fsdp2])
def test_fsdp_uses_the_separate_path(
    mask: CsrPattern, shard: Callable[[nn.Module], nn.Module]
) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    other = copy.deepcopy(layer)
    sharded = shard(nn.Sequential(layer, nn.Tanh()))
    assert layer.path() == ("separate", "the weight is sharded by FSDP")
    optimizer = adam(sharded)
    with pytest.raises(RuntimeError, match="whole, got 1 sharded by FSDP"):
        make_resident(sharded, optimizer)
    losses = train(sharded, optimizer)
    model = nn.Sequential(other, nn.Tanh())
    assert losses == pytest.approx(train(model, adam(model)), rel=1e-5)


def test_the_pattern_follows_parameters_to_their_device(mask: CsrPattern) -> None:
    layer = rosa(nn.Linear(N, M), mask)
    for module in (layer, layer.adapter()):
        module._is_fsdp_managed_module = True
        for name, p in module.named_parameters(recurse=False):  # fully_shard moves them to its mesh
            module.register_parameter(name, nn.Parameter(p.to("meta"), p.requires_grad))
    assert layer(torch.randn(2, N, device="meta")).shape == (2, M)
    assert layer.adapter().pattern.device.type == "meta"


@pytest.mark.usefixtures("alone")
def test_sharded_parts_of_a_layer_are_refused(mask: CsrPattern) -> None:
    whole, part = (rosa(nn.Linear(N, M), mask) for _ in range(2))
    fsdp2(part.adapter())
    fsdp2(nn.Sequential(whole))
    for layer in (whole, part):  # `whole` is called without the module that was sharded
        with pytest.raises(RuntimeError, match="whole tensors in forward, got a DTensor; apply"):
            layer(torch.randn(2, N))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns about its devices
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("where", ["one process", "fsdp2", "fsdp2 from meta"])
def test_distributed_checkpoints_are_saved_and_loaded(
    mask: CsrPattern, where: str, tmp_path: Any
) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    trained = nn.Sequential(rosa(nn.Linear(N, M), mask))
    linear = nn.Linear(N, M, device="meta" if "meta" in where else None)
    other = mirrored(mask)
    model = nn.Sequential(RosaLinear.from_linear(linear, rank=4, pattern=other, alpha=8))
    if where == "one process":
        make_resident(model, adam(model))
    for m in (trained, model) if "fsdp2" in where else ():
        fsdp2(m)
    x = torch.randn(6, N)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
    assert torch.equal(state["0.adapters.default.col_indices"], mask.col_indices)
    set_model_state_dict(model, copy.deepcopy(state), options=full)
    assert torch.equal(model(x), trained(x))
    # A broadcast reaches only these buffers. DistributedDataParallel must not see them.
    known = dict(trained[0].adapter().named_buffers(recurse=False))
    assert set(known) == {"crow_indices", "col_indices"}
    assert not dict(trained.named_buffers())
    # load() writes into the tensors of a state_dict. They must not be the tensors in use.
    randomized(trained[0])
    dcp.save(get_model_state_dict(trained), checkpoint_id=tmp_path / "saved")
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    set_model_state_dict(model, state)
    assert torch.equal(model(x), trained(x))
