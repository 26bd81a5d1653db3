"""The layer RosaLinear, its adapters, and residency: S inside the weight during training."""

from rosa_kernels.nn.adapter import RosaAdapter
from rosa_kernels.nn.linear import RosaLinear
from rosa_kernels.nn.residency import Residency, base_weights, make_resident, sync

__all__ = ["Residency", "RosaAdapter", "RosaLinear", "base_weights", "make_resident", "sync"]
