"""This project's contenders: every registered kernel of the op, and "auto"."""

from __future__ import annotations

from torch import Tensor

import rosa_kernels as rk
from rosa_kernels.kernel import AUTO_FINITE
from rosa_kernels.testing import Case

from ..measuring.names import FROM_TOKEN_MAJOR, OP, PRODUCTS
from .base import Contender, Problem, Run
from .peers import peer_names
from .workspace import workspace_bytes

# Above this many multiply-adds the oracle, which is written to be read, takes longer than all other
# contenders together.
TIMED_LIMIT = 2**26
# The registry's GEMM fallback and the dense peer are both called "dense". This prefix tells them
# apart in rows.
_PREFIX = "rosa-"


def contenders(case: Case, device: str = "cpu") -> list[Contender]:
    """ "auto" first, then every kernel that serves the device, by name.

    On CUDA also "auto-finite", if there are kernels for finite operands only that it could take.
    """
    kernels = [kernel for kernel in rk.kernels(case.op) if device in kernel.devices]
    choices = ["auto"]
    if device == "cuda" and any(kernel.finite_only for kernel in kernels):
        choices.append(AUTO_FINITE)
    return [
        *(_contender(case.op, name, "auto") for name in choices),
        *(_contender(case.op, kernel.name, kernel.backend) for kernel in kernels),
    ]


def auto_may_take(op: str, name: str) -> bool:
    """Whether "auto" may take a kernel. True for a kernel that is not registered here."""
    found = [kernel for kernel in rk.kernels(op) if kernel.name == name]
    return not any(kernel.finite_only or kernel.on_request for kernel in found)


def _contender(op: str, name: str, backend: str) -> Contender:
    return Contender(
        op,
        row_name(name),
        backend,
        prepare=lambda problem, charge: op_call(problem, name),
        reject=lambda problem: _reject(problem, name),
        token_major=True,
        serves=lambda problem: selected(problem, name).name,
        workspace=lambda problem: workspace_bytes(problem, selected(problem, name)),
        charges=(OP, FROM_TOKEN_MAJOR) if op in PRODUCTS else (OP,),
    )


def row_name(kernel: str) -> str:
    """The name of our kernel in rows. No peer has the same name."""
    return _PREFIX + kernel if kernel in peer_names() else kernel


def op_call(problem: Problem, backend: str) -> Run:
    """The public op on the problem's inputs, without conversion, by the given backend."""
    op, pattern, x = problem.case.op, problem.pattern, problem.inputs
    if op == "sddmm":
        return lambda: rk.sddmm(pattern, x["a"], x["b"], backend=backend)
    if op == "spmm":
        return lambda: rk.spmm(pattern, x["values"], x["b"], backend=backend)
    if op == "csr_gather":
        return lambda: rk.csr_gather(x["w"], pattern, backend=backend)
    if op == "csr_add":
        return lambda: rk.csr_add(x["w"], pattern, x["values"], backend=backend)
    if op not in ("csr_add_", "csr_scatter_"):
        raise ValueError(f"op_call: expected an op that is benchmarked, got {op!r}")
    write = getattr(rk, op)
    w = x["w"].clone()  # csr_add_ accumulates; only its first result is compared
    return lambda: write(w, pattern, x["values"], backend=backend)


def adapter_call(problem: Problem) -> Run:
    """The kernel that "auto" takes, without the op: no validation, dispatcher or autograd."""
    op, pattern, x = problem.case.op, problem.pattern, problem.inputs
    kernel = selected(problem)
    run = kernel.run
    crow, col = pattern.crow_indices, pattern.col_indices
    plan = ([],) if kernel.reads_plan else ()
    if problem.device in kernel.reads_plan:
        plan = (pattern.tile_plan.tensors,)
    if op == "sddmm":
        return lambda: run(crow, col, x["a"], x["b"], x["a"].dtype, *plan)
    if op == "spmm":
        return lambda: run(crow, col, x["values"], x["b"], *plan)
    if op == "csr_gather":
        return lambda: run(x["w"], crow, col)
    if op not in ("csr_add_", "csr_scatter_"):
        raise ValueError(f"adapter_call: expected an op that is benchmarked, got {op!r}")
    w = x["w"].clone()
    alpha = (1.0,) if op == "csr_add_" else ()

    def write() -> Tensor:
        run(w, crow, col, x["values"], *alpha)
        return w

    return write


def selected(problem: Problem, backend: str = "auto") -> rk.Kernel:
    """The kernel that serves the problem under `backend`.

    Raises:
        RuntimeError: no kernel does. The message has every candidate's reason.
    """
    case = problem.case
    asked = rk.explain(case.op, problem.pattern, k=case.k, dtype=case.dtype, backend=backend)
    if asked.chosen is None:
        reasons = "; ".join(f"{found.kernel.name} {found.reason}" for found in asked.candidates)
        raise RuntimeError(f"{case.op}: no kernel serves backend {backend!r}: {reasons}")
    return asked.chosen


def _reject(problem: Problem, name: str) -> str | None:
    try:
        kernel = selected(problem, name)
    except RuntimeError as error:
        return str(error)
    case = problem.case
    for backend, what, work in (
        ("reference", "this kernel is the slow oracle", problem.pattern.nnz * case.k),
        ("dense", "on a CPU this kernel is the dense peer in slabs", _dense(case)),
    ):
        skipped = problem.device == "cpu" or backend == "reference"
        if name == kernel.name == backend and skipped and work > TIMED_LIMIT:
            return (
                f"not run: {what}, measured only for small cases, got {work} multiply-adds "
                f"(limit {TIMED_LIMIT})"
            )
    return None


def _dense(case: Case) -> int:
    return case.m * case.n * case.k
