"""rosa_train: fine-tune Hugging Face causal language models with RoSA and its relatives.

``python -m rosa_train train``, or :func:`rosa_train.train.train`, does it all; these are its parts.
What needs transformers or accelerate imports them when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_train.adapter import load_adapter, save_adapter
    from rosa_train.budget import Allocation, allocate
    from rosa_train.export import export_merged, merge, unload, unmerge
    from rosa_train.masks import build_masks, load_masks, save_masks
    from rosa_train.methods import METHODS, Method
    from rosa_train.model import (
        attach,
        delete_adapter,
        disable_adapter,
        param_groups,
        print_trainable_parameters,
        set_adapter,
        set_masks,
        trainable_parameters,
    )
    from rosa_train.robust_pca import rpca
    from rosa_train.smollm2 import fetch_smollm2
    from rosa_train.targets import find_targets, target_shapes

_HOME = {
    "adapter": ("load_adapter", "save_adapter"),
    "budget": ("Allocation", "allocate"),
    "export": ("export_merged", "merge", "unload", "unmerge"),
    "masks": ("build_masks", "load_masks", "save_masks"),
    "methods": ("METHODS", "Method"),
    "model": (
        "attach",
        "delete_adapter",
        "disable_adapter",
        "param_groups",
        "print_trainable_parameters",
        "set_adapter",
        "set_masks",
        "trainable_parameters",
    ),
    "robust_pca": ("rpca",),
    "smollm2": ("fetch_smollm2",),
    "targets": ("find_targets", "target_shapes"),
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
    return getattr(importlib.import_module(f"rosa_train.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
