"""Tables and targets of layers in training. All their ratios are computed here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rosa_train.cli.tables import Table

from ..layer.case import FWD_BWD, LAYER, MODEL, STEP
from ..layer.contenders import FULL, OURS, PEFT_REFERENCE, REFERENCE, SHIRA, SUPER_TUNING
from ..measuring.names import LAYER_OPS
from ..measuring.results import Row
from .rows import geomean, milliseconds

Group = dict[str, Row]  # kernel -> row


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Group]:
    """Rows that are compared: (run, device, case, mode) -> kernel -> row, with any status."""
    found: dict[tuple[str, str, str, str], Group] = defaultdict(dict)
    for row in rows:
        if row["op"] in LAYER_OPS:
            found[row["run_id"], row["device"], row["case"], row["mode"]][row["kernel"]] = row
    return dict(found)


def peak(row: Row) -> int | None:
    """Peak training memory: bytes kept between steps, and the peak of live tensors beyond them."""
    if row["held_bytes"] is None or row["live_bytes"] is None:
        return None
    return int(row["held_bytes"] + row["live_bytes"])


def seconds(row: Row) -> float | None:
    """The median time of a call."""
    return row["median_s"]  # type: ignore[no-any-return]


def ratio(group: Group, name: str, other: str, of: Callable[[Row], float | None]) -> float | None:
    """`of` one contender over `of` another, or None if one was not measured."""
    found = [of(group[key]) if key in group else None for key in (name, other)]
    if found[0] is None or not found[1]:
        return None
    return found[0] / found[1]


def tables(rows: Iterable[Row]) -> list[Table]:
    """One table per case and mode, fastest first, and the targets."""
    found = groups(rows)
    made = [_table(*key[1:], group) for key, group in found.items() if _measured(group)]
    made.append(target_table(found))
    return [table for table in made if table.rows]


def _measured(group: Group) -> bool:
    return any(row["status"] == "ok" for row in group.values())


def _table(device: str, case: str, mode: str, group: Group) -> Table:
    table = Table(
        f"{case}, {mode}, {device}: time and memory; x lora is the ratio to our own LoRA",
        [
            *("contender", "parameters", "ms", "20-80 %", "x lora", "x peft-lora"),
            *("live MB", "resident MB", "saved MB", "training MB", "x lora"),
        ],
    )
    for name, row in sorted(group.items(), key=lambda item: seconds(item[1]) or float("inf")):
        if row["status"] != "ok":
            table.rows.append([name, *["-"] * 3, row["status"], *["-"] * 6])
            continue
        spread = f"{row['p20_s'] * 1e3:.2f}-{row['p80_s'] * 1e3:.2f}"
        table.rows.append(
            [
                name,
                str(row["trainable"]),
                milliseconds(row, 2),
                spread,
                _cell(ratio(group, name, REFERENCE, seconds)),
                _cell(ratio(group, name, PEFT_REFERENCE, seconds)),
                *(_mb(row[column]) for column in ("live_bytes", "peak_bytes", "saved_bytes")),
                _mb(peak(row)),
                _cell(ratio(group, name, REFERENCE, peak)),
            ]
        )
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f}"


# -- targets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTarget:
    """An upper limit on the ratio of ours to another contender, in every case.

    Attributes:
        what: the target in words.
        most: the limit, by device.
        other: the contender that ours is divided by.
        of: the quantity of a row that is compared.
        applies: whether the target applies to a row of ours.
        strict: whether the ratio must be below the limit, not equal to it.
    """

    what: str
    most: dict[str, float]
    other: str
    of: Callable[[Row], float | None]
    applies: Callable[[Row], bool]
    strict: bool = False


def target_table(found: dict[tuple[str, str, str, str], Group]) -> Table:
    """Every target on every device that has rows: reached, missed or not measured."""
    table = Table(
        "Targets of a RoSA layer: ratio of rosa to the other; the worst case decides",
        ["target", "limit", "geometric mean (worst)", "cases", "verdict"],
    )
    devices = list(dict.fromkeys(key[1] for key in found))
    for device in devices:
        own = [group for key, group in found.items() if key[1] == device and OURS in group]
        for target in TARGETS:
            table.rows.append(_target_row(target, device, own))
    return table


def _target_row(target: LayerTarget, device: str, own: Sequence[Group]) -> list[str]:
    limit = target.most[device]
    sign = "<" if target.strict else "<="
    measured = [
        value
        for group in own
        if target.applies(group[OURS])
        and (value := ratio(group, OURS, target.other, target.of)) is not None
    ]
    cells = [f"{device}: {target.what}", f"{sign} {limit:g}"]
    if not measured:
        return [*cells, "-", "0", "not measured"]
    worst = max(measured)
    reached = worst < limit if target.strict else worst <= limit
    verdict = "reached" if reached else "missed"
    return [*cells, f"{geomean(measured):.3f} ({worst:.3f})", str(len(measured)), verdict]


def promised(row: Row) -> bool:
    """Whether a layer has a shape with speed targets; on a CPU 512 tokens of 2048 x 2048."""
    if row["op"] != LAYER or row["dropout"]:
        return False
    shape = (row["m"], row["n"], row["k"], row["dtype"])
    if row["device"] == "cpu":
        return shape == (2048, 2048, 512, "float32")
    return shape in ((4096, 4096, 8192, "bfloat16"), (11008, 4096, 8192, "bfloat16"))


def _in(mode: str, op: str = LAYER) -> Callable[[Row], bool]:
    return lambda row: (row["mode"], row["op"]) == (mode, op) and _any(row)


def _any(row: Row) -> bool:
    return promised(row) or row["op"] == MODEL


def _both(limit: float) -> dict[str, float]:
    return {"cpu": limit, "cuda": limit}


_LAYER_TIME = {"cpu": 1.05, "cuda": 1.10}
TARGETS = (
    LayerTarget(
        "layer, forward + backward: time over our LoRA's",
        _LAYER_TIME,
        REFERENCE,
        seconds,
        _in(FWD_BWD),
    ),
    LayerTarget(
        "layer, forward + backward: time over PEFT LoRA's",
        _LAYER_TIME,
        PEFT_REFERENCE,
        seconds,
        _in(FWD_BWD),
    ),
    *(
        LayerTarget(
            f"layer, forward + backward: {what} over PEFT {title}'s",
            _both(1.0),
            name,
            of,
            _in(FWD_BWD),
            strict=True,
        )
        for name, title in ((SUPER_TUNING, "Super-Tuning"), (SHIRA, "SHiRA"))
        for of, what in ((seconds, "time"), (peak, "memory"))
    ),
    LayerTarget("layer, step: time over full fine-tuning's", _both(0.75), FULL, seconds, _in(STEP)),
    LayerTarget(
        "model, step: time over full fine-tuning's", _both(0.75), FULL, seconds, _in(STEP, MODEL)
    ),
    LayerTarget("peak training memory over our LoRA's", _both(1.03), REFERENCE, peak, _any),
    LayerTarget("peak training memory over PEFT LoRA's", _both(1.03), PEFT_REFERENCE, peak, _any),
)
