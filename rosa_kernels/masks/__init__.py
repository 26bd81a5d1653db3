"""Masks for any training loop: which entries of which weights train.

`import rosa_kernels` does not import this package.
"""

from rosa_kernels.masks.build import build_masks
from rosa_kernels.masks.mask_files import load_masks, save_masks
from rosa_kernels.masks.robust_pca import rpca
from rosa_kernels.masks.scores import SCORES
from rosa_kernels.masks.targets import find_targets, target_shapes

__all__ = [
    "SCORES",
    "build_masks",
    "find_targets",
    "load_masks",
    "rpca",
    "save_masks",
    "target_shapes",
]
