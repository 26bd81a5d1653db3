"""The accuracy policy on real RoSA masks, whose heavy rows and columns no uniform mask has."""

from __future__ import annotations

import pytest
import torch
from conftest import Served, check, inputs_of, sweep

from bench import masks


@pytest.mark.ops("sddmm", "spmm", dtypes=[torch.bfloat16])
@sweep(name=masks.real_names())
def test_real_masks(kernel: Served, name: str) -> None:
    """Seventy tokens are a full line of 64 and one that is not full."""
    pattern = masks.real(name)
    check(kernel, pattern, inputs_of(kernel.op, pattern, 70, torch.bfloat16, kernel.device))
