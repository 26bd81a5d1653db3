"""Tiny models for the tests of masks, and the scores that a dense backward gives on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.targets import find_targets

Batch = dict[str, Tensor]
VOCABULARY = 61


def tiny(family: str, **options: object) -> nn.Module:
    """A causal LM of two layers, float32, in train mode, with eager attention.

    Without transformers, the test that calls this is skipped.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
            attn_implementation="eager",
            **options,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="eager",
            **options,
        )
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # noise makes the gradients of all layers similar in size
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.train()


class Stack(nn.Module):
    """Linear layers of several shapes, one after the other."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(sizes))

    def targets(self) -> dict[str, nn.Module]:
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def inputs(count: int, size: int) -> list[Tensor]:
    """Batches of 7 tokens for a `Stack` of input size `size`."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(7, size, generator=generator) for _ in range(count)]


def enable_checkpointing(model: nn.Module) -> None:
    # Newer releases of transformers deprecate the second name.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def batches(count: int, tokens: int = 9, rows: int = 2) -> list[Batch]:
    """Batches of increasing length, so that weighting them by their tokens makes a difference."""
    generator = torch.Generator().manual_seed(count)
    ids = [
        torch.randint(VOCABULARY, (rows, tokens + 2 * i), generator=generator) for i in range(count)
    ]
    return [{"input_ids": x, "labels": x.clone()} for x in ids]


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    def loss_fn(batch: Batch) -> Tensor:
        return model(**batch).loss

    return loss_fn


def tokens_in(batch: Batch) -> int:
    rows, length = batch["labels"].shape
    return rows * (length - 1)


def dense_gradients(model: nn.Module, data: list[Batch]) -> list[dict[str, Tensor]]:
    """dL_k / dW by plain autograd in eval mode, as (m, n), for each batch k and each target."""
    targets = find_targets(model)
    found = []
    flags = [p.requires_grad for p in model.parameters()]
    was_training = model.training
    model.eval().requires_grad_(True)
    for batch in data:
        weights = [module.weight for module in targets.values()]
        gradients = torch.autograd.grad(loss_of(model)(batch), weights)
        found.append(
            {
                name: g.T if transposed(module) else g
                for (name, module), g in zip(targets.items(), gradients, strict=True)
            }
        )
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    model.train(was_training)
    return found


def transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "fan_in_fan_out", False))


def dense_scores(model: nn.Module, data: list[Batch], score: str) -> dict[str, Tensor]:
    """The definition of `grad_mean` and `grad_mean_squared`, from dense gradients in float64."""
    power = 2 if score == "grad_mean_squared" else 1
    gradients = dense_gradients(model, data)
    return {
        name: sum(
            tokens_in(batch) * g[name].double() ** power
            for batch, g in zip(data, gradients, strict=True)
        ).abs()
        for name in gradients[0]
    }


def dense(pattern: CsrPattern) -> Tensor:
    """The pattern as a boolean mask (m, n)."""
    return pattern.to_torch(torch.ones(pattern.nnz)).to_dense().bool()


def assert_top(
    masks: Mapping[str, CsrPattern],
    scores: Mapping[str, Tensor],
    nnz: Mapping[str, int],
    tolerance: float = 1e-4,
) -> None:
    """Each mask holds its `nnz` largest scores. Scores within `tolerance` of the cut may differ."""
    assert list(masks) == list(nnz)
    for name, pattern in masks.items():
        assert pattern.shape == scores[name].shape
        assert pattern.nnz == nnz[name]
        mask = dense(pattern)
        low, high = scores[name][mask].min(), scores[name][~mask].max()
        assert low >= high - tolerance * scores[name].abs().max(), name
