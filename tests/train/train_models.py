"""Tiny Llama and GPT-2 models, and adapters for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rosa_kernels import CsrPattern
from rosa_kernels.masks.targets import find_targets, target_shapes
from rosa_train.adapters.attach import attach, set_masks
from rosa_train.methods.budget import allocate
from rosa_train.run.optimizer import param_groups

transformers = pytest.importorskip("transformers")

# PEFT 0.21 uses a deprecated name of transformers 5.23.
ignore_pefts_warning = pytest.mark.filterwarnings("ignore:`is_gradient_check:FutureWarning")

IDS = torch.arange(12).reshape(2, 6)

# The files of an adapter, and the name and tensor prefix of one adapted layer of the tiny Llama.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}"


def make_llama(**options) -> nn.Module:
    """A Llama of two layers in eval mode; `options` change its config."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | options)).eval()


def make_gpt2(**options) -> nn.Module:
    """A GPT-2 of two layers in eval mode; `options` change its config."""
    sizes = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "attn_implementation": "sdpa",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | options)).eval()


MODELS = {"llama": make_llama, "gpt2": make_gpt2}


def give(
    model: nn.Module, method: str = "rosa", name: str = "default", *, train=True, seed=1, **options
) -> dict[str, nn.Module]:
    """Attach an adapter of rank 3 and density 5 %; returns the target layers by name.

    With `train`, noise is added to the adapter, so that it changes the model's logits.
    """
    rule = {
        key: options[key]
        for key in ("target_modules", "exclude_modules", "modules_to_save")
        if key in options
    }
    targets = find_targets(model, **rule)
    numbers = {"lora": {"rank": 3}, "lora+": {"rank": 3}, "spa": {"density": 0.05}}
    numbers = numbers.get(method, {"rank": 3, "density": 0.05})
    allocation = allocate(method, target_shapes(targets), **numbers)
    attach(model, method, allocation, targets, adapter_name=name, **options)
    generator = torch.Generator().manual_seed(seed)
    if any(allocation.nnz.values()):
        set_masks(model, make_masks(targets, generator))
    if train:
        perturb(model, generator)
    return targets


@torch.no_grad()
def perturb(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Adds noise of standard deviation 0.1 to the parameters that train."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.1)


def make_masks(targets, generator=None) -> dict[str, CsrPattern]:
    """A random mask of density 5 % for each target."""
    return {
        name: CsrPattern.from_mask(torch.rand(shape, generator=generator) < 0.05)
        for name, shape in target_shapes(targets).items()
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, and whether each parameter trains."""
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    return bits | {f"{n}?": torch.tensor(p.requires_grad) for n, p in model.named_parameters()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def groups_of(model: nn.Module, method: str = "rosa", **options):
    return param_groups(model, method, **({"lora_lr": 7e-4, "sparse_lr": 2e-4} | options))


def config_of(folder: Path) -> dict[str, Any]:
    """The config of the adapter saved in `folder`."""
    return json.loads((folder / CONFIG).read_text())
