"""The accuracy policy on RoSA's own masks, whose heavy rows and columns no uniform mask has."""

from __future__ import annotations

import pytest
import torch
from conftest import Served, check, inputs_of

from bench import masks


@pytest.mark.ops("sddmm", "spmm")
@pytest.mark.parametrize("name", masks.real_names())
def test_real_masks(kernel: Served, name: str) -> None:
    """Seventy tokens: a line of 64, and one that is not full."""
    pattern = masks.real(name)
    dtype = torch.bfloat16
    check(kernel, pattern, inputs_of(kernel.op, pattern, 70, dtype, kernel.device))
