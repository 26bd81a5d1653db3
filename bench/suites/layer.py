"""The suite of a whole layer in training, on a CPU and on one large GPU.

Every contender of a case trains as many parameters as LoRA of the case's rank. A layer has
speed targets at the shape of the first case on a CPU, and at both shapes with 8192 tokens on CUDA.
"""

from __future__ import annotations

from ..layer.case import FWD_BWD, STEP, STEP_FUSED, LayerCase, layer_case, model_case
from .builders import BF16

_ALL = (FWD_BWD, STEP, STEP_FUSED)
DROPOUT = 0.05


def cpu(seed: int) -> list[LayerCase]:
    """A layer of 2048 x 2048, the largest layer of SmolLM2-135M, and four blocks of that model."""
    square = (2048, 2048)
    return [
        layer_case(*square, 512, seed=seed, modes=_ALL),
        model_case(512, seed, modes=(STEP,)),
        layer_case(*square, 512, seed=seed, dropout=DROPOUT),
        layer_case(576, 1536, 2048, "down_proj", seed=seed, modes=(FWD_BWD, STEP)),
        layer_case(*square, 2048, seed=seed),
        layer_case(*square, 512, dtype=BF16, seed=seed),
        # Rank 4 is the largest rank at which the real mask has enough entries for RoSA's sparse
        # half.
        layer_case(576, 1536, 512, "real:14.down_proj", seed=seed, rank=4),
    ]


def cuda(seed: int) -> list[LayerCase]:
    """bfloat16 under autocast, 8192 tokens."""
    square, tall = (4096, 4096), (11008, 4096)
    return [
        layer_case(*square, 8192, "q_proj", BF16, seed, modes=_ALL),
        layer_case(*tall, 8192, "gate_proj", BF16, seed, modes=_ALL),
        layer_case(*square, 8192, "uniform", BF16, seed),
        layer_case(*tall, 8192, "uniform", BF16, seed),
        layer_case(*square, 8192, "q_proj", BF16, seed, dropout=DROPOUT),
        layer_case(*tall, 8192, "gate_proj", BF16, seed, dropout=DROPOUT),
        layer_case(*square, 2048, "q_proj", BF16, seed),
        model_case(4096, seed, modes=(STEP, STEP_FUSED)),
    ]
