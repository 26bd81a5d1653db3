"""This project's contenders: every registered kernel of the op, and what "auto" takes."""

from __future__ import annotations

from torch import Tensor

import rosa_kernels as rk
from bench.contender import FROM_TOKEN_MAJOR, OP, Contender, Problem, Run
from rosa_kernels import registry
from rosa_kernels.testing import Case

# The reference backend is the oracle, written to be read: past this many multiply-adds one call of
# it takes longer than all other contenders together.
REFERENCE_LIMIT = 2**26


def contenders(case: Case) -> list[Contender]:
    """ "auto" first, then each kernel by name."""
    backends = {"auto": "auto", **{k.name: k.backend for k in rk.kernels(case.op)}}
    return [_contender(case.op, name, backend) for name, backend in backends.items()]


def _contender(op: str, name: str, backend: str) -> Contender:
    return Contender(
        op,
        name,
        backend,
        prepare=lambda problem, charge: op_call(problem, name),
        reject=lambda problem: _reject(problem, name),
        token_major=True,
        serves=lambda problem: selected(problem, name).name,
        charges=(OP, FROM_TOKEN_MAJOR) if op in ("sddmm", "spmm") else (OP,),
    )


def op_call(problem: Problem, backend: str) -> Run:
    """The public op on the problem's inputs as they lie, by the given backend."""
    op, pattern, x = problem.case.op, problem.pattern, problem.inputs
    if op == "sddmm":
        return lambda: rk.sddmm(pattern, x["a"], x["b"], backend=backend)
    if op == "spmm":
        return lambda: rk.spmm(pattern, x["values"], x["b"], backend=backend)
    if op == "csr_gather":
        return lambda: rk.csr_gather(x["w"], pattern, backend=backend)
    if op == "csr_add":
        return lambda: rk.csr_add(x["w"], pattern, x["values"], backend=backend)
    if op == "csr_add_":
        w = x["w"].clone()  # the call accumulates; only its first result is compared
        return lambda: rk.csr_add_(w, pattern, x["values"], backend=backend)
    raise ValueError(f"op_call: expected an op that is benchmarked, got {op!r}")


def adapter_call(problem: Problem) -> Run:
    """The kernel that "auto" takes, called past the op: no validation, dispatcher, autograd."""
    op, pattern, x = problem.case.op, problem.pattern, problem.inputs
    run = selected(problem).run
    crow, col = pattern.crow_indices, pattern.col_indices
    if op == "sddmm":
        return lambda: run(crow, col, x["a"], x["b"], x["a"].dtype)
    if op == "spmm":
        return lambda: run(crow, col, x["values"], x["b"])
    if op == "csr_gather":
        return lambda: run(x["w"], crow, col)
    if op != "csr_add_":
        raise ValueError(f"adapter_call: expected an op that is benchmarked, got {op!r}")
    w = x["w"].clone()

    def add() -> Tensor:
        run(w, crow, col, x["values"], 1.0)
        return w

    return add


def selected(problem: Problem, backend: str = "auto") -> rk.Kernel:
    """The kernel that serves the problem under `backend`.

    Raises:
        RuntimeError: none does; the message has every candidate's reason.
    """
    case = problem.case
    shape = {
        "sddmm": (case.m, case.k, case.n),
        "spmm": (case.m, case.n, case.k),
    }.get(case.op, (case.m, case.n))
    call = registry.Call(problem.device, case.dtype, shape)
    return registry.select(case.op, call, backend)


def _reject(problem: Problem, name: str) -> str | None:
    try:
        kernel = selected(problem, name)
    except RuntimeError as error:
        return str(error)
    work = problem.pattern.nnz * problem.case.k
    if kernel.backend == "reference" and name != "auto" and work > REFERENCE_LIMIT:
        return f"the oracle, timed up to {REFERENCE_LIMIT} multiply-adds only; this has {work}"
    return None
