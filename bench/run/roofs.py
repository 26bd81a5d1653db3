"""Roofs: the peak rates of the machine, measured in the same run as the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from rosa_kernels.backends import native

from ..measuring import clocks, timing
from ..measuring.names import OP, dtype_name
from ..measuring.results import Row

# On a GPU the copy is much larger than L2, and the GEMM has enough tiles to fill the GPU several
# times.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
# Half of the smallest L2 of a data-centre GPU (A100: 40 MiB). It is read so often that the first
# pass, from DRAM, does not count.
_L2_BYTES, _L2_PASSES = 24 * 2**20, 64
_LAUNCHES = 100


def roof_rows(dtypes: Sequence[torch.dtype], rule: timing.StoppingRule, device: str) -> list[Row]:
    """Copy bandwidth and the GEMM rate of each dtype; on CUDA also L2 bandwidth and launch time.

    The rows have some columns of the schema. The caller fills in the others.
    """
    source = torch.zeros(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = _GEMM_SIZE[device]
    calls: dict[str, clocks.Call] = {"copy": lambda: target.copy_(source)}
    columns: dict[str, Row] = {"copy": {"kernel": "copy", "bytes": 2 * source.numel()}}
    for dtype in dtypes:
        x, name = torch.randn(size, size, device=device).to(dtype), dtype_name(dtype)
        calls[name] = partial(torch.mm, x, x)
        shape = {"m": size, "n": size, "k": size, "dtype": name}
        columns[name] = {"kernel": "gemm", "flops": 2 * size**3} | shape
    if device == "cuda":
        calls["read_l2"], columns["read_l2"] = _read_l2(device)
        calls["launch"], columns["launch"] = _launch(device)
    rows = []
    for name, samples in timing.interleaved(calls, rule, clocks.clock_on(device)).items():
        if name == "launch":
            samples.seconds = [seconds / _LAUNCHES for seconds in samples.seconds]
            samples.calls_per_sample *= _LAUNCHES
        common = {"case": f"roof/{name}", "op": "roof", "mode": "no_grad", "charge": OP}
        rows.append({"backend": "torch"} | common | columns[name] | timing.time_columns(samples))
    return rows


def _read_l2(device: str) -> tuple[clocks.Call, Row]:
    """Reads L2 by our kernel of 16-byte loads past L1, or by torch's sum if it was not built."""
    data = torch.zeros(_L2_BYTES // 4, device=device)
    columns = {"kernel": "read_l2", "bytes": _L2_BYTES * _L2_PASSES}
    sums = torch.zeros((), device=device)
    if not hasattr(native._C, "cuda_read_bandwidth"):

        def read() -> None:
            for _ in range(_L2_PASSES):
                torch.sum(data, dim=0, out=sums)

        return read, columns
    # Four blocks of 512 threads fill a multiprocessor.
    blocks = 4 * torch.cuda.get_device_properties().multi_processor_count
    where = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream

    def read_natively() -> None:
        size = (_L2_BYTES, _L2_PASSES, blocks)
        native._C.cuda_read_bandwidth(data.data_ptr(), *size, sums.data_ptr(), *where)

    return read_natively, {"backend": "cuda"} | columns


def _launch(device: str) -> tuple[clocks.Call, Row]:
    """Kernels that do (next to) nothing, launched one after the other on one stream."""
    columns = {"kernel": "launch"}
    if not hasattr(native._C, "cuda_launch_empty"):
        one = torch.zeros(1, device=device)

        def launch() -> None:
            for _ in range(_LAUNCHES):
                one.zero_()

        return launch, columns
    where = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    call = partial(native._C.cuda_launch_empty, _LAUNCHES, *where)
    return call, {"backend": "cuda"} | columns
