"""The accuracy policy on real RoSA masks, which are less even than uniform masks."""

from __future__ import annotations

import pytest
import torch
from conftest import Served, check, inputs_of, sweep

from bench import masks


@pytest.mark.ops("sddmm", "spmm", dtypes=[torch.bfloat16])
@sweep(name=masks.real_names())
def test_results_on_real_masks_are_accurate(kernel: Served, name: str) -> None:
    """70 tokens are one full line of 64 tokens and one line that is not full."""
    pattern = masks.real(name)
    check(kernel, pattern, inputs_of(kernel.op, pattern, 70, torch.bfloat16, kernel.device))
