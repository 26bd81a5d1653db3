"""Bad input to any op raises an error before a kernel runs. The error says what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from conftest import Served, inputs_of
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import uniform_pattern

OPERANDS = [
    ("sddmm", "a"),
    ("sddmm", "b"),
    ("spmm", "values"),
    ("spmm", "b"),
    ("csr_add", "w"),
    ("csr_add", "values"),
    ("csr_add_", "w"),
    ("csr_add_", "values"),
    ("csr_gather", "w"),
    ("csr_scatter_", "w"),
    ("csr_scatter_", "values"),
    ("csr_transpose", "values"),
]
MATRICES = [(op, name) for op, name in OPERANDS if name != "values"]
VECTORS = [(op, name) for op, name in OPERANDS if name == "values"]
HUGE = 2**31


def good_inputs(op: str, pattern: CsrPattern) -> dict[str, Tensor]:
    if op == "csr_transpose":
        return {"values": torch.ones(pattern.nnz)}
    return inputs_of(op, pattern)


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(op: str, *_: object) -> None:
        raise AssertionError(f"bad input reached the choice of a kernel for {op}")

    monkeypatch.setattr("rosa_kernels.choice.select", select)
    monkeypatch.setattr("rosa_kernels.choice.cached_kernel", select)


def refuse(
    error: type[Exception], message: str, op: str, pattern: object, inputs: dict[str, object]
) -> None:
    with pytest.raises(error, match="^" + re.escape(f"{op}: {message}")):
        getattr(rk, op)(pattern=pattern, **inputs)


FLOATS = "dtype float32, bfloat16, float16 or float64"
# A change to an operand, the error, and its message after "<op>: ". {name} is the operand's name.
BAD_TENSORS: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "list": (lambda x: x.tolist(), TypeError, "expected {name} to be a tensor, got list"),
    "none": (lambda x: None, TypeError, "expected {name} to be a tensor, got NoneType"),
    "int64": (lambda x: x.long(), TypeError, "expected {name} of " + FLOATS + ", got torch.int64"),
    "bool": (lambda x: x > 0, TypeError, "expected {name} of " + FLOATS + ", got torch.bool"),
    "complex": (
        lambda x: x.to(torch.complex64),
        TypeError,
        "expected {name} of " + FLOATS + ", got torch.complex64",
    ),
    "sparse": (
        lambda x: x.to_sparse(),
        TypeError,
        "expected {name} to be dense (torch.strided), got torch.sparse_coo",
    ),
    "device": (
        lambda x: x.to("meta"),
        RuntimeError,
        "expected {name} on the pattern's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
@pytest.mark.parametrize(("op", "name"), OPERANDS)
def test_wrong_types_dtypes_layouts_and_devices_are_refused(
    op: str, name: str, bad: str, pattern: CsrPattern
) -> None:
    change, error, message = BAD_TENSORS[bad]
    inputs = good_inputs(op, pattern)
    inputs[name] = change(inputs[name])
    refuse(error, message.format(name=name), op, pattern, inputs)


@pytest.mark.parametrize(("op", "name"), MATRICES)
def test_matrices_that_are_not_2d_are_refused(op: str, name: str, pattern: CsrPattern) -> None:
    inputs = good_inputs(op, pattern)
    for bad in (inputs[name][0], inputs[name][None], inputs[name].sum()):
        message = f"expected {name} to be 2-D, got shape {tuple(bad.shape)}"
        refuse(ValueError, message, op, pattern, {**inputs, name: bad})


@pytest.mark.parametrize(("op", "name"), MATRICES)
def test_dimensions_beyond_int32_are_refused(op: str, name: str, pattern: CsrPattern) -> None:
    """The matrices have strides 0, so they need no memory."""
    for shape in ((HUGE, 2), (2, HUGE)):
        inputs = {**good_inputs(op, pattern), name: torch.zeros(1).expand(shape)}
        message = f"expected {name} with dimensions below 2**31, got shape {shape}"
        refuse(ValueError, message, op, pattern, inputs)


@pytest.mark.parametrize(("op", "name"), VECTORS)
def test_values_of_a_wrong_shape_are_refused(op: str, name: str, pattern: CsrPattern) -> None:
    inputs = good_inputs(op, pattern)
    nnz = pattern.nnz
    for bad in (torch.ones(nnz - 1), torch.ones(nnz + 1), torch.ones(nnz, 1), torch.tensor(1.0)):
        message = f"expected values of shape (nnz,) = ({nnz},), got {tuple(bad.shape)}"
        refuse(ValueError, message, op, pattern, {**inputs, name: bad})


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("sddmm", "a", "expected a to have m=37 rows like the pattern, got shape (36, 33)"),
        (
            "sddmm",
            "b",
            "expected b to have n=53 rows like the pattern's columns, got shape (52, 33)",
        ),
        (
            "spmm",
            "b",
            "expected b to have n=53 rows like the pattern's columns, got shape (52, 33)",
        ),
        ("csr_add", "w", "expected w of the pattern's shape (37, 53), got (36, 53)"),
        ("csr_add_", "w", "expected w of the pattern's shape (37, 53), got (36, 53)"),
        ("csr_gather", "w", "expected w of the pattern's shape (37, 53), got (36, 53)"),
        ("csr_scatter_", "w", "expected w of the pattern's shape (37, 53), got (36, 53)"),
    ],
)
def test_wrong_numbers_of_rows_are_refused(
    op: str, name: str, message: str, pattern: CsrPattern
) -> None:
    inputs = good_inputs(op, pattern)
    refuse(ValueError, message, op, pattern, {**inputs, name: inputs[name][:-1]})


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("sddmm", "a", "expected b to have k=32 columns like a, got shape (53, 33)"),
        ("sddmm", "b", "expected b to have k=33 columns like a, got shape (53, 32)"),
        ("csr_add", "w", "expected w of the pattern's shape (37, 53), got (37, 52)"),
        ("csr_add_", "w", "expected w of the pattern's shape (37, 53), got (37, 52)"),
        ("csr_gather", "w", "expected w of the pattern's shape (37, 53), got (37, 52)"),
        ("csr_scatter_", "w", "expected w of the pattern's shape (37, 53), got (37, 52)"),
    ],
)
def test_wrong_numbers_of_columns_are_refused(
    op: str, name: str, message: str, pattern: CsrPattern
) -> None:
    inputs = good_inputs(op, pattern)
    refuse(ValueError, message, op, pattern, {**inputs, name: inputs[name][:, :-1]})


@pytest.mark.parametrize(
    ("operand", "other"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes_are_refused(
    operand: torch.dtype, other: torch.dtype, pattern: CsrPattern
) -> None:
    """Dense operands have one dtype. Values have that dtype, or float32 beside 16-bit operands."""
    a, b = inputs_of("sddmm", pattern, dtype=operand).values()
    message = f"expected a and b of one dtype, got {operand} and {other}"
    refuse(TypeError, message, "sddmm", pattern, {"a": a, "b": b.to(other)})
    allowed = f"{operand} or float32" if operand.itemsize == 2 else f"{operand}"
    for op in ("spmm", "csr_add", "csr_add_", "csr_scatter_"):
        inputs = inputs_of(op, pattern, dtype=operand)
        inputs["values"] = inputs["values"].to(other)
        refuse(TypeError, f"expected values of dtype {allowed}, got {other}", op, pattern, inputs)
    message = f"expected out_dtype of dtype {allowed}, got {other}"
    refuse(TypeError, message, "sddmm", pattern, {"a": a, "b": b, "out_dtype": other})


@pytest.mark.parametrize("op", sorted({op for op, _ in OPERANDS}))
def test_a_pattern_of_another_class_is_refused(op: str, pattern: CsrPattern) -> None:
    inputs = good_inputs(op, pattern)
    mask = torch.ones(pattern.shape)
    refuse(TypeError, "expected a CsrPattern, got Tensor", op, mask, inputs)
    refuse(TypeError, "expected a CsrPattern, got NoneType", op, None, inputs)


@pytest.mark.parametrize("index", ["crow_indices", "col_indices"])
@pytest.mark.parametrize("op", sorted({op for op, _ in OPERANDS}))
def test_index_tensors_changed_in_place_are_refused(op: str, index: str) -> None:
    """A pattern does not copy int32 index tensors. Writes through any view of them are noticed."""
    col = torch.tensor([0, 1, 2], dtype=torch.int32)
    crow = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    pattern = CsrPattern(crow, col, (3, 3))
    inputs = good_inputs(op, pattern)
    {"crow_indices": crow, "col_indices": col}[index][1:].add_(10**6)
    with pytest.raises(RuntimeError, match="tensors changed in place since; build a new"):
        getattr(rk, op)(pattern=pattern, **inputs)


@pytest.mark.parametrize(
    "op", ["sddmm", "spmm", "csr_add", "csr_add_", "csr_gather", "csr_scatter_"]
)
def test_unknown_backends_are_refused(op: str, pattern: CsrPattern) -> None:
    with pytest.raises(ValueError, match=r"a backend among auto, .*reference.*, got 'cpus'"):
        getattr(rk, op)(pattern=pattern, **inputs_of(op, pattern), backend="cpus")


@pytest.mark.ops("sddmm", "spmm", "csr_add_", "csr_gather", "csr_scatter_")
def test_kernels_check_the_lengths_of_operands(kernel: Served) -> None:
    """The ops of torch.ops.rosa can be called without the public op's checks.

    Kernels must not read past the end of a tensor.
    """
    pattern = uniform_pattern(20, 30, 0.2).to(kernel.device)
    crow, col = pattern.crow_indices, pattern.col_indices
    x = {name: value[:-1] for name, value in inputs_of(kernel.op, pattern).items()}
    arguments = {
        "sddmm": lambda: (crow, col, x["a"], x["b"], torch.float32),
        "spmm": lambda: (crow, col, x["values"], x["b"]),
        "csr_add_": lambda: (x["w"], crow, col, x["values"], 1.0),
        "csr_gather": lambda: (x["w"], crow, col),
        "csr_scatter_": lambda: (x["w"], crow, col, x["values"]),
    }[kernel.op]()
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        kernel.run(*arguments)
