"""The cases of training: a layer or a small model, and its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from rosa_kernels.testing import Case

from ..measuring.names import LAYER_OPS
from .parametrization import LayerSpec, rosa_nnz

LAYER, MODEL = LAYER_OPS
FWD_BWD, STEP, STEP_FUSED = "fwd_bwd", "step", "step_fused"
MODES = (FWD_BWD, STEP, STEP_FUSED)
# Sizes of the small model. Its blocks are SmolLM2's, but it has 4 of the 30 blocks, and 6144 of the
# 49152 words. The head's share of the work is thus about the same.
HIDDEN, FFN, HEADS, KV_HEADS, BLOCKS, WORDS, BATCH = 576, 1536, 9, 3, 4, 6144, 4
# The model's loss is linear in its logits, with weights of about this size.
_LOSS_WEIGHT = 1e-2


@dataclass(frozen=True)
class LayerCase(Case):
    """One linear layer (m, n), or a small model, trained on k tokens.

    Every contender trains `rank` (m + n) parameters of a layer, as LoRA of that rank does. RoSA
    gives half of them to each branch: the low-rank branch has rank / 2, and the mask has the rest
    as entries.

    Attributes:
        rank: the rank of LoRA.
        dropout: the dropout on the input of the low-rank branch.
        modes: what is timed. "fwd_bwd" is forward and backward, down to the input's gradient.
            "step" adds AdamW with torch's defaults, "step_fused" adds the fused AdamW.
    """

    rank: int = 16
    dropout: float = 0.0
    modes: tuple[str, ...] = (FWD_BWD,)

    @property
    def is_16_bit(self) -> bool:
        """Whether the case runs under autocast, as training in its dtype does."""
        return self.dtype in (torch.bfloat16, torch.float16)


def layer_case(
    m: int,
    n: int,
    tokens: int,
    mask: str = "uniform",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    rank: int = 16,
    dropout: float = 0.0,
    modes: tuple[str, ...] = (FWD_BWD,),
) -> LayerCase:
    """The case of one layer. Its density is that of RoSA's sparse half of the budget."""
    density = rosa_nnz(m, n, rank) / (m * n)
    return LayerCase(LAYER, m, n, tokens, density, dtype, mask, seed, rank, dropout, modes)


def model_case(
    tokens: int = 512, seed: int = 0, *, rank: int = 8, modes: tuple[str, ...] = (STEP,)
) -> LayerCase:
    """The case of the small model. Its density is that of all its layers together."""
    shapes = [(m, n) for _, (m, n) in model_shapes()]
    nnz = sum(rosa_nnz(m, n, rank) for m, n in shapes)
    density = nnz / sum(m * n for m, n in shapes)
    return LayerCase(
        MODEL, HIDDEN, HIDDEN, tokens, density, torch.float32, "kinds", seed, rank, 0.0, modes
    )


def model_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (m, n) of the linear layers of a block."""
    heads = KV_HEADS * HIDDEN // HEADS
    yield from {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (heads, HIDDEN),
        "self_attn.v_proj": (heads, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }.items()


class Single(nn.Module):
    """A model of one layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        m, n = weight.shape
        self.linear = nn.Linear(n, m, bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


@dataclass
class LayerProblem:
    """A case with its weights, its inputs, and the gradient of its output."""

    case: LayerCase
    device: str = "cpu"
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        generator = torch.Generator(self.device).manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        if case.op == LAYER:
            self.x = normal(case.k, case.n).to(case.dtype)
            self.dy = normal(case.k, case.m).to(case.dtype)
            return
        shape = (BATCH, case.k // BATCH)
        self.x = torch.randint(WORDS, shape, generator=generator, device=self.device)
        self.dy = normal(*shape, WORDS).mul_(_LOSS_WEIGHT)

    @cached_property
    def specs(self) -> dict[str, LayerSpec]:
        """The layers by name."""
        case, rank = self.case, self.case.rank
        if case.op == LAYER:
            generator = torch.Generator(self.device).manual_seed(case.seed + 1)
            weight = torch.randn(case.m, case.n, generator=generator, device=self.device)
            weight = weight.div_(case.n**0.5).to(case.dtype)
            return {"linear": LayerSpec(weight, case.mask, rank, case.seed)}
        return {
            name: LayerSpec(linear.weight.detach(), name.split(".")[-1], rank, case.seed + i)
            for i, (name, linear) in enumerate(
                (name, module)
                for name, module in self._model.named_modules()
                if isinstance(module, nn.Linear) and name != "lm_head"
            )
        }

    def base(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new frozen model with the same numbers, in the case's dtype or another."""
        dtype = self.case.dtype if dtype is None else dtype
        if self.case.op == LAYER:
            root: nn.Module = Single(self.specs["linear"].weight.to(dtype, copy=True))
        else:
            root = _llama(self.case.seed, self.device)
            root.load_state_dict(self._model.state_dict())
            root.to(dtype)
        return root.requires_grad_(False)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The output of a model, whose gradient is `dy`."""
        with self._autocast():
            y: Tensor = module(x) if self.case.op == LAYER else module(input_ids=x).logits
            return y

    def leaf(self, x: Tensor | None = None) -> Tensor:
        """An input, by default `x`, as a leaf; it requires grad if it is floating-point."""
        x = (self.x if x is None else x).detach()
        return x.requires_grad_(x.is_floating_point())

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if not self.case.is_16_bit:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.case.dtype)

    @cached_property
    def _model(self) -> nn.Module:
        return _llama(self.case.seed, self.device)


def _llama(seed: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
        return model.to(device)


# -- a contender, put into a model -----------------------------------------------------------------


@dataclass
class Adapted:
    """A model with a contender's layers in it.

    Attributes:
        module: the model to call.
        trained: the trained parameters of each layer, by the names of :class:`Parametrization`.
        attach: called with the optimizer, before the first step.
        keeps: (layer, x) -> which elements of x the layer's dropout keeps. It makes the same draw
            from torch's generator as the next forward. None without dropout.
    """

    module: nn.Module
    trained: dict[str, dict[str, nn.Parameter]]
    attach: Callable[[torch.optim.Optimizer], object] = field(default=lambda optimizer: None)
    keeps: Callable[[str, Tensor], Tensor] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.trained.values() for p in layer.values()]
