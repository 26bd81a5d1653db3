"""People walk before a still background: frames, and the picture of how rpca takes them apart.

`python -m docs.figures.rpca_frames` draws rpca_frames.png beside this file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rosa_kernels.masks.robust_pca import rpca

HEIGHT, WIDTH, FRAMES = 48, 72, 40
# Where each person's feet are in frame 0, pixels a frame, and grey value.
_PEOPLE = ((44, -6.0, 2.1, 0.95), (41, 78.0, -1.7, 0.05), (46, 20.0, 1.4, 0.8))


def video() -> tuple[Tensor, Tensor]:
    """(frames, background): (HEIGHT * WIDTH, FRAMES) and (HEIGHT * WIDTH, 1), greys in [0, 1]."""
    y, x = torch.meshgrid(
        torch.arange(HEIGHT).double(), torch.arange(WIDTH).double(), indexing="ij"
    )
    background = 0.75 - 0.3 * y / HEIGHT  # a sky
    for left, top, grey in ((3, 12, 0.35), (22, 6, 0.5), (40, 15, 0.3), (55, 9, 0.45)):
        house = (x >= left) & (x < left + 13) & (y >= top) & (y < 34)
        window = house & ((x - left) % 5 > 2) & ((y - top) % 6 > 3)
        background = torch.where(house, grey, background)
        background = torch.where(window, 0.85, background)
    background = torch.where(y >= 34, 0.55 - 0.004 * (y - 34), background)  # a street
    frames = []
    for t in range(FRAMES):
        frame = background.clone()
        for feet, start, speed, grey in _PEOPLE:
            at = start + speed * t
            head = (x - at) ** 2 + (y - (feet - 14)) ** 2 < 6.5
            body = ((x - at) / 2.6) ** 2 + ((y - (feet - 8)) / 4.5) ** 2 < 1
            stride = 1.6 * abs((t % 6) - 3) / 3 + 0.4
            legs = ((x - at).abs() - stride).abs() < 0.9
            frame[head | body | (legs & (y > feet - 5) & (y <= feet))] = grey
        frames.append(frame.flatten())
    return torch.stack(frames, dim=1), background.flatten().unsqueeze(1)


def draw(path: Path) -> None:
    """Rows: frame, L, S; a column for each of four frames."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    frames, _ = video()
    low_rank, sparse = rpca(frames)
    shown = (4, 14, 24, 34)
    figure, axes = pyplot.subplots(3, len(shown), figsize=(8, 4.3), layout="constrained")
    rows = (
        ("frame", frames, "gray", (0, 1)),
        ("L: low rank", low_rank, "gray", (0, 1)),
        ("S: sparse", sparse, "RdBu_r", (-0.7, 0.7)),
    )
    for (label, matrix, colours, (low, high)), row in zip(rows, axes, strict=True):
        for t, axis in zip(shown, row, strict=True):
            image = matrix[:, t].view(HEIGHT, WIDTH)
            axis.imshow(image, cmap=colours, vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    for t, axis in zip(shown, axes[0], strict=True):
        axis.set_title(f"{t + 1} of {FRAMES}", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
