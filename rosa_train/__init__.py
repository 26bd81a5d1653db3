"""rosa_train: fine-tune Hugging Face causal language models with RoSA and its relatives.

``python -m rosa_train train`` and :func:`rosa_train.run.train.train` run a whole fine-tuning. The
names here are its parts. They import transformers and accelerate only when they are called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_kernels.masks.build import build_masks
    from rosa_kernels.masks.mask_files import load_masks, save_masks
    from rosa_kernels.masks.robust_pca import rpca
    from rosa_kernels.masks.targets import find_targets, target_shapes
    from rosa_train.adapters.attach import attach, set_masks
    from rosa_train.adapters.load import load_adapter
    from rosa_train.adapters.merge import export_merged, merge, unload, unmerge
    from rosa_train.adapters.save import save_adapter
    from rosa_train.adapters.switch import (
        delete_adapter,
        disable_adapter,
        print_trainable_parameters,
        set_adapter,
        trainable_parameters,
    )
    from rosa_train.methods.budget import Allocation, allocate
    from rosa_train.methods.method import METHODS, Method
    from rosa_train.run.optimizer import param_groups

_HOME = {
    "rosa_kernels.masks.build": ("build_masks",),
    "rosa_kernels.masks.mask_files": ("load_masks", "save_masks"),
    "rosa_kernels.masks.robust_pca": ("rpca",),
    "rosa_kernels.masks.targets": ("find_targets", "target_shapes"),
    "rosa_train.adapters.attach": ("attach", "set_masks"),
    "rosa_train.adapters.load": ("load_adapter",),
    "rosa_train.adapters.merge": ("export_merged", "merge", "unload", "unmerge"),
    "rosa_train.adapters.save": ("save_adapter",),
    "rosa_train.adapters.switch": (
        "delete_adapter",
        "disable_adapter",
        "print_trainable_parameters",
        "set_adapter",
        "trainable_parameters",
    ),
    "rosa_train.methods.budget": ("Allocation", "allocate"),
    "rosa_train.methods.method": ("METHODS", "Method"),
    "rosa_train.run.optimizer": ("param_groups",),
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
    # Names are imported when used, so that `python -m rosa_train --help` need not load torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
