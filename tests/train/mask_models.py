"""Tiny models for the tests of masks, and the scores that a dense backward gives on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.targets import find_targets

Batch = dict[str, Tensor]
VOCABULARY = 61


def tiny(family: str, **options: object) -> nn.Module:
    """A causal LM of two layers, float32, in train mode, with eager attention."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
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
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
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
        model = GPT2LMHeadModel(config)
    with torch.no_grad():  # as after some training: gradients of all layers are of one size
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.train()


def enable_checkpointing(model: nn.Module) -> None:
    # Its older name is deprecated where there is the newer one.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def batches(count: int, tokens: int = 9, rows: int = 2) -> list[Batch]:
    """Batches of which the later have more tokens, so that weights matter."""
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
    """dL_k / dW of each batch by plain autograd, as (m, n), of every target, in eval mode."""
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
    """The boolean mask (m, n)."""
    return pattern.to_torch(torch.ones(pattern.nnz)).to_dense().bool()


def assert_top(
    masks: Mapping[str, CsrPattern],
    scores: Mapping[str, Tensor],
    nnz: Mapping[str, int],
    tolerance: float = 1e-4,
) -> None:
    """Each mask holds its nnz largest scores, up to what rounding moves across the cut."""
    assert list(masks) == list(nnz)
    for name, pattern in masks.items():
        assert pattern.shape == scores[name].shape
        assert pattern.nnz == nnz[name]
        mask = dense(pattern)
        low, high = scores[name][mask].min(), scores[name][~mask].max()
        assert low >= high - tolerance * scores[name].abs().max(), name
