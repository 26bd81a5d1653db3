"""Streamed weight gradients equal dense autograd, and the model stays unchanged."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from mask_models import (
    assert_top,
    batches,
    dense,
    dense_gradients,
    dense_scores,
    enable_checkpointing,
    loss_of,
    tiny,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from rosa_kernels import RosaLinear
from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.gradients import add_weight_gradients, base_weight, frozen_for_scoring
from rosa_kernels.masks.targets import find_targets, target_shapes


def a_tenth(targets: dict[str, nn.Module]) -> dict[str, int]:
    return {name: m * n // 10 for name, (m, n) in target_shapes(targets).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("score", ["grad_mean", "grad_mean_squared"])
def test_masks_match_those_of_dense_gradients(
    family: str, checkpointing: bool, count: int, score: str
) -> None:
    model = tiny(family)
    data = batches(count)
    expected = dense_scores(model, data, score)
    if checkpointing:
        enable_checkpointing(model)
    targets = find_targets(model)
    nnz = a_tenth(targets)
    masks = build_masks(model, targets, nnz, score=score, batches=data, loss_fn=loss_of(model))
    assert_top(masks, expected, nnz)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_gradients_equal_autograd(family: str) -> None:
    model = tiny(family)
    data = batches(1)
    with frozen_for_scoring(model):
        sums = add_weight_gradients(find_targets(model), data, loss_of(model), [1.0])
    for name, expected in dense_gradients(model, data)[0].items():
        torch.testing.assert_close(sums[name], expected, rtol=1e-4, atol=1e-7)


def test_squared_gradients_equal_autograd_for_any_row_count() -> None:
    # One row, fewer rows than the 8 chunks, 8 rows, and 8 chunks with a remainder.
    for m in (1, 3, 8, 67):
        layer = nn.Linear(5, m)
        x = torch.randn(11, 5)
        (g,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
        (squares,) = add_weight_gradients(
            {"layer": layer}, [x, x], lambda x, layer=layer: layer(x).square().sum(), [1.0, 3.0],
            squared=True,
        ).values()  # fmt: skip
        torch.testing.assert_close(squares, 4 * g**2)


def test_checkpointed_layers_run_again_in_backward() -> None:
    model = tiny("llama")
    enable_checkpointing(model)
    runs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    targets = find_targets(model, ["q_proj"])
    build_masks(model, targets, a_tenth(targets), batches=batches(1), loss_fn=loss_of(model))
    assert len(runs) == 2 * len(model.model.layers)


def test_adapters_are_part_of_the_forward() -> None:
    # After a LoRA warm-up, gradients are taken of the full weight W0 + B A, without dropout.
    model = tiny("llama")
    merged = copy.deepcopy(model)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        lora = RosaLinear.from_linear(attention.q_proj, rank=4, dropout=0.5)
        adapter = lora.adapters["default"]
        nn.init.normal_(adapter.lora_b, std=0.2)
        attention.q_proj = lora
        weight = merged.model.layers[index].self_attn.q_proj.weight
        weight.data += lora.delta_weight("default")
    data = batches(2)
    expected = dense_scores(merged, data, "grad_mean")
    targets = find_targets(model)
    nnz = a_tenth(targets)
    masks = build_masks(
        model, targets, nnz, score="grad_mean", batches=data, loss_fn=loss_of(model)
    )
    assert_top(masks, expected, nnz)


class Shared(nn.Module):
    """A layer that is used three times. The third output does not enter the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)
        self.last = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = self.layer(y.tanh())
        self.unused = self.layer(y)
        return self.last(y).square().mean()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("squared", [False, True])
def test_gradients_of_a_module_used_several_times(count: int, squared: bool) -> None:
    torch.manual_seed(0)
    model = Shared()
    data = [torch.randn(6, 24) for _ in range(count)]
    power = 2 if squared else 1
    expected = sum(torch.autograd.grad(model(x), model.layer.weight)[0] ** power for x in data)
    received = {}
    targets = {"layer": model.layer, "last": model.last}
    for receive in (None, received.__setitem__) if count == 1 else (None,):
        sums = add_weight_gradients(
            targets, data, model, [1.0] * count, squared=squared, receive=receive
        )
        found = sums if receive is None else received
        torch.testing.assert_close(found["layer"], expected)


class InPlace(nn.Module):
    """Changes a layer's output in place, as models do with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(input=x)  # by keyword
        y += x
        return self.b(y).relu_().sum()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_in_place_ops_and_keyword_inputs(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(5, 16)
    expected = torch.autograd.grad(model(x), [model.a.weight, model.b.weight])

    def loss_fn(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    sums = add_weight_gradients({"a": model.a, "b": model.b}, [x], loss_fn, [1.0])
    for found, wanted in zip(sums.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # More tokens than one chunk of the conversion to float32, which has 4,096 / 40 tokens.
    layer, x = nn.Linear(40, 24, dtype=dtype), torch.randn(250, 40, dtype=dtype)
    captured = {}

    def loss_fn(x: Tensor) -> Tensor:
        y = layer(x)
        y.register_hook(lambda dy: captured.update(dy=dy))
        return y.float().square().mean()

    (found,) = add_weight_gradients({"layer": layer}, [x], loss_fn, [1.0]).values()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (captured["dy"].double().T @ x.double()).float())


def test_gradients_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 24), torch.randn(50, 40)

    def loss_fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().square().mean()

    (found,) = add_weight_gradients({"layer": layer}, [x], loss_fn, [1.0]).values()
    expected = torch.autograd.grad(layer(x).square().mean(), layer.weight)[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-3)


def test_shift_equals_a_change_of_the_weights() -> None:
    torch.manual_seed(0)
    model = tiny("gpt2")
    data, targets = batches(1), find_targets(model)
    shift = {name: 0.1 * torch.randn(shape) for name, shape in target_shapes(targets).items()}
    with frozen_for_scoring(model):
        found = add_weight_gradients(targets, data, loss_of(model), [1.0], shift=shift)
    for name, module in targets.items():
        base_weight(module).add_(shift[name])
    for name, expected in dense_gradients(model, data)[0].items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


def state(model: nn.Module) -> list[object]:
    return [
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, id(p), p._version) for name, p in model.named_parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_hooks_with_kwargs)) for m in model.modules()],
        torch.get_rng_state(),
    ]


def assert_same(before: list[object], after: list[object]) -> None:
    torch.testing.assert_close(before[2], after[2], rtol=0, atol=0)
    torch.testing.assert_close(before[4], after[4], rtol=0, atol=0)
    assert [before[i] for i in (0, 1, 3)] == [after[i] for i in (0, 1, 3)]


@pytest.fixture
def mixed() -> Iterator[nn.Module]:
    """A model with frozen and training parameters, and with modules in eval and train mode."""
    model = tiny("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    for parameter in model.transformer.h[1].parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("score", ["grad_mean_squared", "grasp", "rpca"])
@pytest.mark.parametrize("fails", ["never", "forward", "backward"])
def test_scoring_leaves_the_model_unchanged(mixed: nn.Module, score: str, fails: str) -> None:
    targets = find_targets(mixed)
    data, loss_fn = batches(2), loss_of(mixed)
    before = state(mixed)

    def failing(batch: dict[str, Tensor]) -> Tensor:
        loss = loss_fn(batch)
        if batch is data[1]:
            if fails == "forward":
                raise KeyError("no such thing")
            if fails == "backward":
                loss.register_hook(lambda _: 1 / 0)
        return loss

    def run() -> None:
        build_masks(mixed, targets, a_tenth(targets), score=score, batches=data, loss_fn=failing)

    if fails == "never":
        run()
    else:
        with pytest.raises((KeyError, ZeroDivisionError)):
            run()
    assert_same(before, state(mixed))


def test_dropout_does_not_affect_the_masks(mixed: nn.Module) -> None:
    targets = find_targets(mixed)
    nnz, data = a_tenth(targets), batches(1)
    masks = build_masks(mixed, targets, nnz, batches=data, loss_fn=loss_of(mixed))
    mixed.eval()
    again = build_masks(mixed, targets, nnz, batches=data, loss_fn=loss_of(mixed))
    for name in nnz:
        assert dense(masks[name]).equal(dense(again[name]))


def test_masks_can_be_built_under_no_grad() -> None:
    model = tiny("llama").requires_grad_(False)
    targets = find_targets(model)
    with torch.no_grad():
        masks = build_masks(
            model, targets, a_tenth(targets), batches=batches(1), loss_fn=loss_of(model)
        )
    assert len(masks) == len(targets)


def test_targets_without_a_gradient_are_named() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("used", "idle")})
    nnz = dict.fromkeys(model, 5)

    def build(loss_fn: object) -> None:
        build_masks(model, dict(model), nnz, batches=[torch.randn(3, 8)], loss_fn=loss_fn)

    with pytest.raises(ValueError, match="got 1 of 2 without a gradient: idle"):
        build(lambda x: model["used"](x).sum())
    with pytest.raises(ValueError, match="got 2 of 2 without a gradient: used, idle"):
        build(lambda x: x.sum())
    with pytest.raises(ValueError, match="got 1 of 2 without a gradient: idle"):
        # `idle` runs, but its output is detached from the loss.
        build(lambda x: model["used"](x).sum() + 0 * model["idle"](x).detach().sum())


def test_target_may_be_unused_in_some_batches() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("always", "sometimes")})
    data = [(torch.randn(3, 8), False), (torch.randn(3, 8), True), (torch.randn(3, 8), False)]

    def loss_fn(batch: tuple[Tensor, bool]) -> Tensor:
        x, both = batch
        y = model["always"](x)
        return (model["sometimes"](y) if both else y).square().mean()

    sums = add_weight_gradients(dict(model), data, loss_fn, [1.0, 2.0, 4.0])
    weight = model["sometimes"].weight
    torch.testing.assert_close(
        sums["sometimes"], 2 * torch.autograd.grad(loss_fn(data[1]), weight)[0]
    )


# -- memory --------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Layers with weights of 4 MB. With 8 tokens, all other tensors are small."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (768, 1400, 768, 1400, 768)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak of allocated bytes during `run`, from the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize(
    ("score", "count", "scope", "layers"),
    [
        ("grad_mean", 1, "layer", 1.0),
        ("grad_mean_squared", 1, "layer", 1.0),
        ("grad_mean", 3, "layer", 1.0),
        ("grad_mean_squared", 3, "layer", 1.0 + 1 / 16),  # squares of 1/16 of a layer
        ("grad_mean_squared", 1, "global", 1.0 + 1 / 12),  # chunks of scores
        ("random", 0, "layer", 1.0 + 1 / 12),
        ("magnitude", 0, "layer", 1 / 12),
        ("grasp", 1, "layer", 2.0),
    ],
)
def test_extra_memory_stays_near_one_layer(
    score: str, count: int, scope: str, layers: float
) -> None:
    model = Wide().requires_grad_(False)
    targets = find_targets(model)
    largest = max(4 * m * n for m, n in target_shapes(targets).values())
    nnz = {name: m * n // 160 for name, (m, n) in target_shapes(targets).items()}
    x = torch.randn(8, 768)

    def plain() -> None:  # only the input gets a gradient
        model(x.requires_grad_()).backward()
        x.grad = None

    masks = {}

    def build() -> None:
        masks.update(
            build_masks(
                model,
                targets,
                nnz,
                score=score,
                batches=[x.detach()] * count,
                loss_fn=model,
                scope=scope,
                memory_bytes=largest,
            )
        )

    plain()  # allocates what stays allocated
    extra = peak_bytes(build) - (peak_bytes(plain) if count else 0)
    indices = sum(4 * (mask.nnz + mask.shape[0] + 1) for mask in masks.values())
    candidates = 8 * sum(nnz.values()) if scope == "global" else 0
    # Any training of these layers keeps their inputs too, but plain() does not.
    inputs = sum(4 * len(x) * n for _, n in target_shapes(targets).values())
    assert extra <= layers * largest + indices + candidates + inputs + 64 * 1024
    if layers >= 1:
        assert extra > 0.9 * largest  # the measurement is not empty


def test_checkpointing_still_saves_memory() -> None:
    def build(checkpointed: bool) -> int:
        model = tiny("llama")
        if checkpointed:
            enable_checkpointing(model)
        targets = find_targets(model)
        nnz, data = a_tenth(targets), batches(1, tokens=60, rows=40)

        def run() -> None:
            build_masks(model, targets, nnz, batches=data, loss_fn=loss_of(model))

        run()
        return peak_bytes(run)

    assert build(True) < 0.8 * build(False)
