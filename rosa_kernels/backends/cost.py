"""The cost model of the CUDA kernels: seconds by stage, from sizes and a machine's rates.

A stage takes as long as its busiest resource: bytes to and from HBM, bytes from L2, or products.
Nothing here reads a tensor. No estimate is exact, and each says how much longer the kernel may
take. A model returns None for a call that is not on CUDA or that lacks the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rosa_kernels.backends.machine import Machine, machine_of
from rosa_kernels.backends.slabs import slab_edges
from rosa_kernels.kernel import Call, Estimate
from rosa_kernels.tile_plan import PlanSizes

Model = Callable[[Call], Estimate | None]

# DRAM and L2 deliver this many bytes at a time.
_SECTOR = 32
# Neighbouring rows or columns that a pack reads together.
_SECTOR_INDICES = 16
# Most bytes of the panels of one chunk of tokens: kPanelMib of cpp/src/cuda/device.cu.
_PANEL_BYTES = 128 << 20
# How much longer than predicted a kernel may take, as a share. The GEMM's rate is the best known of
# all. Our kernels' rates are trusted more once this kind of device is calibrated.
_DENSE_UNCERTAINTY, _CALIBRATED_UNCERTAINTY, _UNCERTAINTY = 0.03, 0.10, 0.25
# Bytes of shared memory that one block may use, by compute capability, and _LEAST_SHARED_BYTES for
# all others. spmm's staging needs _STAGING_BYTES of them for itself.
_SHARED_BYTES = {(8, 0): 163 << 10, (9, 0): 227 << 10}
_LEAST_SHARED_BYTES, _STAGING_BYTES = 99 << 10, 20 << 10
# Products per second and multiprocessor of 16-bit tokens staged in shared memory: 24 per clock at
# 1.7 GHz, which includes random bank conflicts. The latency is the loads before the first product.
_STAGED_PRODUCTS, _STAGED_LATENCY = 24 * 1.7e9, 1.5e-6
# Time in which one multiprocessor takes a 128 x 128 tile's nonzeros out of its sums.
_SAMPLE_SECONDS = 1e-6


def _machine(call: Call) -> Machine | None:
    if call.device_type != "cuda" or call.device is None or call.nnz is None:
        return None
    return machine_of(call.device)


def _estimate(machine: Machine, stages: dict[str, float]) -> Estimate:
    known = machine.calibrated
    return Estimate(stages, _CALIBRATED_UNCERTAINTY if known else _UNCERTAINTY)


def _pack(machine: Machine, plan: PlanSizes | None, call: Call, packed: list[int]) -> float:
    """Seconds to pack the operands with the numbers in `packed`: to read them and write panels."""
    m, k, n = call.shape
    size = call.dtype.itemsize
    indices = {
        0: (plan.active_rows, plan.row_sectors) if plan else (m, -(-m // _SECTOR_INDICES)),
        1: (plan.active_cols, plan.col_sectors) if plan else (n, -(-n // _SECTOR_INDICES)),
    }
    written = size * k * sum(indices[i][0] for i in packed)
    read = 0.0
    for i in packed:
        active, sectors = indices[i]
        # A token-major operand is read in whole sectors, a row-major one only in its active rows.
        read += size * k * (active if call.in_place[i] else sectors * _SECTOR_INDICES)
    # Panels larger than half of L2 are written to HBM and read back.
    spilled = 2 * written if written > machine.l2_bytes / 2 else 0
    return max((read + spilled) / machine.hbm, (read + written) / machine.l2)


def _gathered(machine: Machine, call: Call, entries: int, rows: int) -> float:
    """Seconds of a dot product of k tokens per entry.

    Every entry reads a row of b. A row of a is read once per row and per 32 entries of a warp.
    """
    k, size = call.shape[1], call.dtype.itemsize
    lines = entries + min(entries, entries / 32 + rows)
    return lines * k * size / machine.l2


def _finalized(machine: Machine, call: Call, entries: int) -> float:
    """Seconds to read partial sums and their places, and to write a permuted result.

    Each entry of a permuted result takes a whole sector.
    """
    return entries * (4 + 4 + _SECTOR) / machine.hbm


def sddmm_gather(call: Call) -> Estimate | None:
    """Pack operands that cannot be read in place, take a dot product per nonzero, finalize."""
    machine = _machine(call)
    if machine is None:
        return None
    nnz = call.nnz or 0
    packed = [i for i in (0, 1) if not call.in_place[i]]
    rows = call.plan.active_rows if call.plan else call.shape[0]
    return _estimate(
        machine,
        {
            "pack": _pack(machine, call.plan, call, packed),
            "gather": _gathered(machine, call, nnz, rows),
            "finalize": nnz * 8 / machine.hbm,
            "launch": machine.launch * (2 * _chunks(call, packed) + 1),
        },
    )


def _chunks(call: Call, packed: list[int]) -> int:
    m, k, n = call.shape
    if call.plan:
        m, n = call.plan.active_rows, call.plan.active_cols
    panel = call.dtype.itemsize * k * sum((m, n)[i] for i in packed)
    return max(math.ceil(panel / _PANEL_BYTES), 1)


def _sddmm_tiles(rate: Callable[[Machine], float]) -> Model:
    def model(call: Call) -> Estimate | None:
        machine, plan = _machine(call), call.plan
        if machine is None or plan is None:
            return None
        k, size, edges = call.shape[1], call.dtype.itemsize, plan.tile_rows + plan.tile_cols
        area = plan.tile_rows * plan.tile_cols
        chunks = _chunks(call, [0, 1])
        # This ASSUMES that every read of a panel but the first hits L2. Stream-K's blocks work at
        # unrelated tokens, so reads may miss. The stage table of `python -m bench stages` tests it.
        sampled = _SAMPLE_SECONDS * area / 2**14 * (plan.tiles / machine.multiprocessors + 1)
        tiles = max(
            2 * area * k * plan.tiles / rate(machine), edges * k * size * plan.tiles / machine.l2
        )
        launches = chunks * (1 + (plan.tiles > 0) + (plan.light_nnz > 0)) + 1
        return _estimate(
            machine,
            {
                "pack": _pack(machine, plan, call, [0, 1]),
                "tiles": tiles + chunks * sampled * (plan.tiles > 0),
                "gather": _gathered(machine, call, plan.light_nnz, plan.active_rows),
                "finalize": _finalized(machine, call, plan.nnz),
                "launch": machine.launch * launches,
            },
        )

    return model


sddmm_tile = _sddmm_tiles(lambda machine: machine.tile16)
sddmm_wgmma = _sddmm_tiles(lambda machine: machine.wgmma16)


def _gemm(machine: Machine, m: int, n: int, k: int, dtype: torch.dtype) -> float:
    """Seconds of torch.mm of (m, k) by (k, n).

    They are the longer of whole waves of 128 x 128 tiles and reading the operands, plus a launch.
    """
    rate = machine.gemm16 if dtype.itemsize == 2 else machine.gemm32
    if dtype == torch.float64:
        rate /= 2
    tiles = math.ceil(m / 128) * math.ceil(n / 128)
    waves = tiles / machine.multiprocessors
    # If there are fewer tiles than multiprocessors, torch splits them along k.
    padded = math.ceil(waves) / waves if waves > 1 else 1.0
    flop = 2 * 128 * 128 * tiles * k * padded
    read = dtype.itemsize * k * (m + n)
    return max(flop / rate, read / machine.hbm) + machine.launch


def dense_sddmm(call: Call) -> Estimate | None:
    """A GEMM and a gather per slab of rows, then one conversion of the results."""
    machine = _machine(call)
    if machine is None:
        return None
    m, k, n = call.shape
    width = 8 if call.dtype == torch.float64 else 4
    edges = slab_edges(m, n * width)
    if edges is None:
        return None
    slabs = len(edges) - 1
    return Estimate(
        {
            "gemm": slabs * _gemm(machine, math.ceil(m / slabs), n, k, call.dtype),
            "gather": (call.nnz or 0) * (_SECTOR + 4 + width) / machine.l2,
            "launch": machine.launch * (slabs + 1),
        },
        _DENSE_UNCERTAINTY,
    )


def dense_spmm(call: Call) -> Estimate | None:
    """Each slab of rows is zeroed, scattered into, multiplied and copied to the result."""
    machine = _machine(call)
    if machine is None:
        return None
    m, n, k = call.shape
    size = call.dtype.itemsize
    edges = slab_edges(m, n * size)
    if edges is None:
        return None
    slabs = len(edges) - 1
    rows = math.ceil(m / slabs)
    return Estimate(
        {
            "scatter": m * n * size / machine.l2 + (call.nnz or 0) * 2 * _SECTOR / machine.l2,
            "gemm": slabs * _gemm(machine, rows, k, n, call.dtype),
            "copy": m * k * (max(size, 4) + size) / machine.hbm,
            "launch": machine.launch * 3 * slabs,
        },
        _DENSE_UNCERTAINTY,
    )


def _spmm_operands(machine: Machine, call: Call) -> tuple[float, float]:
    """Seconds to pack b into rows (0 if read in place), and the least HBM time of any kernel."""
    m, n, k = call.shape
    size = call.dtype.itemsize
    values = (call.values_dtype or call.dtype).itemsize
    cols = call.plan.active_cols if call.plan else n
    sectors = call.plan.col_sectors if call.plan else -(-n // _SECTOR_INDICES)
    pack = 0.0
    if not call.in_place[0]:
        read, written = size * k * sectors * _SECTOR_INDICES, size * k * cols
        spilled = 2 * written if written > machine.l2_bytes / 2 else 0
        pack = max((read + spilled) / machine.hbm, (read + written) / machine.l2)
    least = (size * k * (cols + m) + (call.nnz or 0) * (4 + values) + 4 * m) / machine.hbm
    return pack, least


def _staged_slot(machine: Machine, n: int, k: int, size: int) -> int | None:
    """Bytes of a column's slot in shared memory, or None if b is not staged.

    The rule is that of choose_slots in cpp/src/cuda/spmm.cu.
    """
    shared = _SHARED_BYTES.get(machine.capability, _LEAST_SHARED_BYTES) - _STAGING_BYTES
    for slot, most_tokens in ((16, math.inf), (8, 512), (4, 64)):
        if n * slot <= shared and (k <= most_tokens or k <= slot // size):
            return slot
    return None


def spmm_gather(call: Call) -> Estimate | None:
    """Stage a few tokens of all of b in shared memory, or read a row of b per nonzero.

    :func:`_staged_slot` decides between the two.
    """
    machine = _machine(call)
    if machine is None:
        return None
    _, n, k = call.shape
    size, nnz = call.dtype.itemsize, call.nnz or 0
    slot = _staged_slot(machine, n, k, size)
    pack, least = _spmm_operands(machine, call)
    if slot is None:
        row = max(k * size, _SECTOR)
        stages = {
            "pack": pack,
            "gather": max(nnz * row / machine.l2, least),
            "launch": machine.launch * (1 + (pack > 0)),
        }
        return _estimate(machine, stages)
    groups = math.ceil(k * size / slot)
    # The rows are divided into parts, each with its own copy of b, as launch_staged does.
    parts = max(min(math.sqrt(67 * nnz / max(n, 1) / max(groups, 1)), machine.multiprocessors), 1)
    parts = max(min(parts, machine.multiprocessors / max(groups, 1)), 1)
    products = nnz * k * size / 2 / (_STAGED_PRODUCTS * machine.multiprocessors)
    indices = groups * nnz * (4 + (call.values_dtype or call.dtype).itemsize) / machine.l2
    return _estimate(
        machine,
        {
            "stage": parts * n * k * size / machine.l2 + _STAGED_LATENCY,
            "gather": max(products, indices, least),
            "launch": machine.launch,
        },
    )


def spmm_tile(call: Call) -> Estimate | None:
    """Write out heavy tiles and multiply them on tensor cores, gather the light nonzeros."""
    machine, plan = _machine(call), call.plan
    if machine is None or plan is None:
        return None
    m, _, k = call.shape
    size = call.dtype.itemsize
    pack, least = _spmm_operands(machine, call)
    area, tokens = plan.tile_rows * plan.tile_cols, math.ceil(k / 128) * 128
    tiles = max(
        2 * area * tokens * plan.tiles / machine.tile16,
        (area + plan.tile_cols * tokens) * size * plan.tiles / machine.l2,
    )
    row = max(k * size, _SECTOR)
    # A token-major result is written to a panel first, then read back and copied.
    back = 0.0 if call.in_place[0] else 2 * m * k * size / machine.hbm
    return _estimate(
        machine,
        {
            "pack": pack,
            "tiles": tiles,
            "gather": max(plan.light_nnz * row / machine.l2, least),
            "unpermute": back,
            "launch": machine.launch * (1 + (pack > 0) + (back > 0)),
        },
    )
