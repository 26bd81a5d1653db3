"""The table of experiments: our kernels with other settings, against their defaults."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from rosa_train.cli.tables import Table

from ..contenders.experiments import MODE, SETTINGS, kernel_of
from ..measuring.names import FROM_TOKEN_MAJOR
from ..measuring.results import Row
from .rows import geomean, milliseconds, timed


def tables(rows: Iterable[Row]) -> list[Table]:
    """Time of each experiment over that of the same kernel's default. Empty without experiments."""
    times: dict[tuple[str, str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in timed(rows):
        if row["charge"] == FROM_TOKEN_MAJOR and row["mode"] in (MODE, "no_grad"):
            kernel = kernel_of(row["kernel"])
            suffix = row["kernel"][len(kernel) + 1 :]
            times[row["run_id"], row["device"], row["case"], kernel][suffix] = row
    table = Table(
        "Experiments: time over the time with default settings; below 1 is faster",
        ["case", "kernel", "default ms", *SETTINGS],
    )
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, _, case, kernel), found in times.items():
        if "" not in found or len(found) == 1:
            continue
        cells = []
        for suffix in SETTINGS:
            ratio = found[suffix]["median_s"] / found[""]["median_s"] if suffix in found else None
            cells.append("-" if ratio is None else f"{ratio:.3f}")
            if ratio is not None:
                ratios[kernel][suffix].append(ratio)
        table.rows.append([case, kernel, milliseconds(found[""]), *cells])
    for kernel, by_suffix in ratios.items():
        cells = [f"{geomean(by_suffix[s]):.3f}" if s in by_suffix else "-" for s in SETTINGS]
        table.rows.append(["geometric mean", kernel, "", *cells])
    return [table] if table.rows else []
