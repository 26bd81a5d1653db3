"""The drop-in module: RosaLinear, its adapters, and S merged into the weight while training."""

from rosa_kernels.nn.adapter import RosaAdapter
from rosa_kernels.nn.linear import RosaLinear
from rosa_kernels.nn.residency import Residency, base_weights, make_resident, sync

__all__ = ["Residency", "RosaAdapter", "RosaLinear", "base_weights", "make_resident", "sync"]
