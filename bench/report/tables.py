"""Tables of a run: speed-ups, efficiency, overhead, cases that peers win, missing times."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from rosa_train.cli.tables import Table

from ..measuring.names import FROM_TOKEN_MAJOR, OP
from ..measuring.results import Row
from ..measuring.timing import noise
from .rows import (
    Ratio,
    by_device,
    geomean,
    is_overhead,
    mask_kind,
    milliseconds,
    ratios_to_peers,
    timed,
)


def efficiency(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """Median over 1-5 % of (t_dense / t_ours) * density, per (op, dtype, kind of mask).

    1 would be the rate of dense GEMM on the nonzeros only.
    """
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for ratio in ratios_to_peers(rows, FROM_TOKEN_MAJOR):
        density = ratio.ours["density"]
        if ratio.peer["kernel"] == "dense" and 0.01 <= density <= 0.05:
            group = (ratio.ours["op"], ratio.ours["dtype"], mask_kind(ratio.ours["mask"]))
            groups[group].append(ratio.value * density)
    return {group: statistics.median(values) for group, values in groups.items()}


def overheads(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Per op: seconds of the adapter, and what the op adds to it without and with grad."""
    medians: dict[str, dict[str, float]] = defaultdict(dict)
    for row in timed(rows):
        if is_overhead(row):
            medians[row["op"]][row["mode"]] = row["median_s"]
    return {
        op: {
            mode: median - (modes["adapter"] if mode != "adapter" else 0.0)
            for mode, median in modes.items()
        }
        for op, modes in medians.items()
        if "adapter" in modes
    }


# -- tables --------------------------------------------------------------------------------------


def summary(rows: list[Row], limit: int | None = None) -> list[Table]:
    """The summary of a run, per device. `limit` bounds the lists of cases that peers win."""
    devices = by_device(rows)
    return [
        replace(table, title=f"{device}: {table.title}") if len(devices) > 1 else table
        for device, own in devices.items()
        for table in _summary(own, limit)
    ]


def _summary(rows: list[Row], limit: int | None) -> list[Table]:
    charges = (FROM_TOKEN_MAJOR, OP)
    tables = [
        roof_table(rows),
        *(speedup_table(rows, charge) for charge in charges),
        efficiency_table(rows),
        overhead_table(rows),
        *(losing_table(rows, charge, limit) for charge in charges),
        status_table(rows),
    ]
    return [table for table in tables if table.rows]


def noise_note(rows: list[Row], limit: float = 0.2) -> str | None:
    """A warning if many times vary a lot, as they do if other processes share the cores."""
    found = [row for row in timed(rows) if len(row["samples_s"]) > 1]
    noisy = [row for row in found if noise(row["samples_s"]) > limit]
    if len(noisy) <= len(found) / 20:
        return None
    return (
        f"{len(noisy)} of {len(found)} times vary by more than {limit:.0%} (half of p80 - p20 "
        "over the median). Another process probably ran on this machine. Measure again, and do not "
        "trust ratios near 1."
    )


def roof_table(rows: list[Row]) -> Table:
    """The peak rates of the machine, measured in the same run."""
    table = Table("Roofs, measured in this run", ["what", "rate"])
    for row in timed(rows):
        if row["op"] != "roof":
            continue
        seconds = row["median_s"]
        if row["flops"]:
            size = f"{row['m']}x{row['n']}x{row['k']}"
            cells = [f"{row['dtype']} GEMM, {size}", f"{row['flops'] / seconds / 1e12:.3g} TFLOP/s"]
        elif row["bytes"]:
            what = {"copy": "copy, read and written", "read_l2": "L2 cache, read"}[row["kernel"]]
            cells = [what, f"{row['bytes'] / seconds / 1e9:.4g} GB/s"]
        else:
            cells = ["kernel launch, one after the other", f"{seconds * 1e6:.2f} us"]
        table.rows.append(cells)
    return table


def speedup_table(rows: list[Row], charge: str) -> Table:
    """Geometric mean and worst case against each peer."""
    groups: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for ratio in ratios_to_peers(rows, charge):
        group = (ratio.ours["op"], ratio.ours["dtype"], mask_kind(ratio.ours["mask"]))
        groups[group][ratio.peer["kernel"]].append(ratio.value)
    peers = list(dict.fromkeys(peer for by_peer in groups.values() for peer in by_peer))
    table = Table(
        f"How many times faster auto is than each peer, charge {charge}: geometric mean (worst)",
        ["op, dtype, masks", "cases", *peers],
    )
    for group, by_peer in sorted(groups.items()):
        count = max(len(values) for values in by_peer.values())
        cells = [
            f"{geomean(by_peer[peer]):.1f} ({min(by_peer[peer]):.1f})" if peer in by_peer else "-"
            for peer in peers
        ]
        table.rows.append([", ".join(group), str(count), *cells])
    return table


def efficiency_table(rows: list[Row]) -> Table:
    """Efficiency: the part of the limit 1 / density that the speed-up over dense reaches."""
    table = Table(
        "Efficiency: (t_dense / t_sparse) * density, median over 1-5 %",
        ["op, dtype, masks", "efficiency"],
    )
    for group, value in sorted(efficiency(rows).items()):
        table.rows.append([", ".join(group), f"{value:.2f}"])
    return table


def overhead_table(rows: list[Row]) -> Table:
    """Microseconds of a call in addition to its kernel."""
    table = Table(
        "Call overhead in us: the op minus the bare adapter of its kernel",
        ["op", "adapter", "+ op, no grad", "+ op, with grad"],
    )
    for op, modes in overheads(rows).items():
        cells = [
            f"{modes[mode] * 1e6:.1f}" if mode in modes else "-"
            for mode in ("adapter", "no_grad", "grad")
        ]
        table.rows.append([op, *cells])
    return table


def losing_table(rows: list[Row], charge: str, limit: int | None = None) -> Table:
    """The cases that a peer wins, worst first, up to a limit."""
    lost = sorted((r for r in ratios_to_peers(rows, charge) if r.value < 1), key=lambda r: r.value)
    total = len(ratios_to_peers(rows, charge))
    shown = lost[:limit]
    more = f"; here the worst {len(shown)}, `report` shows all" if len(shown) < len(lost) else ""
    table = Table(
        f"A peer is faster, charge {charge}: {len(lost)} of {total} comparisons{more}",
        ["case", "peer", "ours ms", "peer ms", "peer / ours"],
    )
    for ratio in shown:
        times = map(milliseconds, ratio)
        case, peer = ratio.ours["case"], ratio.peer["kernel"]
        table.rows.append([case, peer, *times, f"{ratio.value:.2f}"])
    return table


def status_table(rows: list[Row]) -> Table:
    """The pairs without a time, with the reason. Equal reasons are counted together."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] != "ok" and row["charge"] == OP:
            reason = row["reason"].split(", got")[0].split("; this has")[0]
            found[row["status"], reason].append(row["kernel"])
    table = Table("Pairs without a time", ["reason", "status", "pairs", "kernels"])
    for (status, reason), kernels in sorted(found.items()):
        names = ", ".join(dict.fromkeys(kernels))
        table.rows.append([reason[:90], status, str(len(kernels)), names])
    return table


def case_tables(rows: list[Row]) -> list[Table]:
    """Every case, by device and charge."""
    tables = [
        case_table(own, charge, device)
        for device, own in by_device(rows).items()
        for charge in (FROM_TOKEN_MAJOR, OP)
    ]
    return [table for table in tables if table.rows]


def case_table(rows: list[Row], charge: str, device: str) -> Table:
    """Every case: our time, and how many times faster it is than dense and the best other peer."""
    cases: dict[str, list[Ratio]] = defaultdict(list)
    for ratio in ratios_to_peers(rows, charge):
        cases[ratio.ours["case"]].append(ratio)
    table = Table(
        f"Cases on {device}, charge {charge}",
        ["case", "kernel", "ms", "x dense", "fastest sparse peer", "ms", "x peer"],
    )
    for case, found in cases.items():
        dense = [ratio for ratio in found if ratio.peer["kernel"] == "dense"]
        sparse = [ratio for ratio in found if ratio.peer["kernel"] != "dense"]
        best = min(sparse, key=lambda ratio: ratio.value, default=None)
        ours = found[0].ours
        table.rows.append(
            [
                case,
                ours["backend"],
                milliseconds(ours),
                f"{dense[0].value:.1f}" if dense else "-",
                best.peer["kernel"] if best else "-",
                milliseconds(best.peer) if best else "-",
                f"{best.value:.1f}" if best else "-",
            ]
        )
    return table
