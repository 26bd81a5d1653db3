"""The suite of a whole layer in training, on a CPU and on one large GPU.

Every contender of a case trains as many parameters as LoRA of the case's rank; the first case of
either device is the one that speeds are promised for.
"""

from __future__ import annotations

from ..layer.case import FWD_BWD, STEP, STEP_FUSED, LayerCase, layer_case, model_case
from .builders import BF16

_ALL = (FWD_BWD, STEP, STEP_FUSED)
DROPOUT = 0.05


def cpu(seed: int) -> list[LayerCase]:
    """2048 x 2048 and the largest layer of SmolLM2-135M; then that model, four blocks of it."""
    square = (2048, 2048)
    return [
        layer_case(*square, 512, seed=seed, modes=_ALL),
        model_case(512, seed, modes=(STEP,)),
        layer_case(*square, 512, seed=seed, dropout=DROPOUT),
        layer_case(576, 1536, 2048, "down_proj", seed=seed, modes=(FWD_BWD, STEP)),
        layer_case(*square, 2048, seed=seed),
        layer_case(*square, 512, dtype=BF16, seed=seed),
        # As many entries as the real mask lets RoSA have beside half of such a rank.
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
