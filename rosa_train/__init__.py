"""rosa_train: fine-tune Hugging Face causal language models with RoSA and its relatives.

``python -m rosa_train train``, or :func:`rosa_train.run.train.train`, does it all. These are its
parts. What needs transformers or accelerate imports them when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_kernels.masks.build import build_masks
    from rosa_kernels.masks.mask_files import load_masks, save_masks
    from rosa_kernels.masks.robust_pca import rpca
    from rosa_kernels.masks.targets import find_targets, target_shapes
    from rosa_train.adapters.merge import export_merged, merge, unload, unmerge
    from rosa_train.adapters.save import load_adapter, save_adapter
    from rosa_train.adapters.switch import (
        attach,
        delete_adapter,
        disable_adapter,
        param_groups,
        print_trainable_parameters,
        set_adapter,
        set_masks,
        trainable_parameters,
    )
    from rosa_train.demo.smollm2 import fetch_smollm2
    from rosa_train.methods.budget import Allocation, allocate
    from rosa_train.methods.method import METHODS, Method

_HOME = {
    "rosa_kernels.masks.build": ("build_masks",),
    "rosa_kernels.masks.mask_files": ("load_masks", "save_masks"),
    "rosa_kernels.masks.robust_pca": ("rpca",),
    "rosa_kernels.masks.targets": ("find_targets", "target_shapes"),
    "rosa_train.adapters.merge": ("export_merged", "merge", "unload", "unmerge"),
    "rosa_train.adapters.save": ("load_adapter", "save_adapter"),
    "rosa_train.adapters.switch": (
        "attach",
        "delete_adapter",
        "disable_adapter",
        "param_groups",
        "print_trainable_parameters",
        "set_adapter",
        "set_masks",
        "trainable_parameters",
    ),
    "rosa_train.demo.smollm2": ("fetch_smollm2",),
    "rosa_train.methods.budget": ("Allocation", "allocate"),
    "rosa_train.methods.method": ("METHODS", "Method"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "METHODS",
    "Allocation",
    "Method",
    "allocate",
    "attach",
    "build_masks",
    "delete_adapter",
    "disable_adapter",
    "export_merged",
    "fetch_smollm2",
    "find_targets",
    "load_adapter",
    "load_masks",
    "merge",
    "param_groups",
    "print_trainable_parameters",
    "rpca",
    "save_adapter",
    "save_masks",
    "set_adapter",
    "set_masks",
    "target_shapes",
    "trainable_parameters",
    "unload",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    # `python -m rosa_train --help` must not wait seconds for torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
