"""Checks the output and all gradients of a contender against dense float64.

The oracle is y = x (W + S + s B A)^T and its derivatives, without merging, gathering or tuners. For
a single layer, every checked element has its own bound,

    |got - ref| <= (4 sqrt(k) 2^-24 + 4 u) (scale + |ref|).

k is the longest reduction, and u is the unit roundoff of the case's dtype. scale is the root of the
sum of the squares of all products behind the element, because many rounding errors add up like
that. The term 4 u is for roundings between the products (of W + S, x A^T, dy B), which float32 sums
do not have.

The four blocks of the model amplify errors in a way that the products do not show. For the model,
the norm of each error is bounded instead. A missing or doubled term exceeds this bound by a factor
of a hundred. Only the first tokens of each sequence are checked, because float64 of all tokens
would take longer than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .case import LAYER, Adapted, LayerProblem
from .parametrization import Parametrization

# The numbers of tokens, of rows of a full gradient, and of entries of dS that are compared. NaN and
# shapes are checked everywhere.
_TOKENS, _ROWS, _ENTRIES = 64, 64, 4096
_MODEL_TOKENS = 32  # per sequence
_SEED = 1234
_MODEL_BOUND = 1e-4  # in float32; observed errors are 2e-6
_U32 = 2.0**-24


@dataclass(frozen=True)
class Result:
    """The results of one forward and backward of a contender."""

    y: Tensor
    dx: Tensor | None
    gradients: dict[str, dict[str, Tensor]]
    keep: Tensor | None


class Check:
    """Compares the contenders of one problem with the oracle."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        case = problem.case
        self._x, self._dy = problem.x, problem.dy
        if case.op != LAYER:
            self._x, self._dy = problem.x[:, :_MODEL_TOKENS], problem.dy[:, :_MODEL_TOKENS]
        generator = torch.Generator().manual_seed(case.seed)
        self._tokens = _some(case.k, _TOKENS, generator)
        self._rows = _some(case.m, _ROWS, generator)

    def __call__(self, adapted: Adapted, parametrizations: dict[str, Parametrization]) -> float:
        """The largest error, relative to its element's scale; for the model, to its tensor's norm.

        `parametrizations` say what the contender should compute now, with its current numbers.

        Raises:
            AssertionError: an element is wrong. The message says which one and by how much.
        """
        result = self._result(adapted)
        if self.problem.case.op == LAYER:
            weight = adapted.trained["linear"].get("weight")
            return self._layer(result, parametrizations["linear"], weight)
        return self._model(result, adapted, parametrizations)

    def _result(self, adapted: Adapted) -> Result:
        problem = self.problem
        x, keep = problem.leaf(self._x), None
        for parameter in adapted.parameters:
            parameter.grad = None
        with torch.random.fork_rng(devices=[problem.device] if problem.device == "cuda" else []):
            if adapted.keeps is not None:
                torch.manual_seed(_SEED)
                with torch.no_grad():
                    keep = adapted.keeps("linear", self._x)
                torch.manual_seed(_SEED)
            y = problem.run(adapted.module, x)
            y.backward(self._dy)
        gradients: dict[str, dict[str, Tensor]] = {}
        for name, parameters in adapted.trained.items():
            gradients[name] = {}
            for part, parameter in parameters.items():
                if parameter.grad is None:
                    raise AssertionError(f"{name}.{part}: expected a gradient, got none")
                gradients[name][part] = parameter.grad
                parameter.grad = None
        return Result(y.detach(), x.grad, gradients, keep)

    # -- one layer ---------------------------------------------------------------------------------

    def _layer(
        self, result: Result, parametrization: Parametrization, trained: Tensor | None
    ) -> float:
        refs = self._references(parametrization, result.keep, trained)
        case = self.problem.case
        got: dict[str, Any] = {"y": result.y, "dx": result.dx, **result.gradients["linear"]}
        u = _U32 if not case.is_16_bit else float(torch.finfo(case.dtype).eps) / 2
        k = max(case.k, case.m, case.n)
        worst = 0.0
        for name, (shape, picked, ref, scale) in refs.items():
            tensor = got.pop(name)
            _check_whole(name, tensor, shape)
            size = scale + ref.abs()
            error = (tensor[picked].double() - ref).abs()
            bound = (4 * k**0.5 * _U32 + 4 * u) * size
            if bool((error > bound).any()):
                at = int((error - bound).argmax())
                where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), ref.shape))
                raise AssertionError(
                    f"{name}: {int((error > bound).sum())} of {ref.numel()} elements outside the "
                    f"bound; worst at {where} of those compared: expected {ref[where]:.9g} +- "
                    f"{bound[where]:.3g}, got {float(tensor[picked][where]):.9g}"
                )
            worst = max(worst, float((error / size.clamp(min=1e-300)).max()))
        if got:
            raise AssertionError(f"expected no gradient of {', '.join(got)}, got one")
        return worst

    def _references(
        self, parametrization: Parametrization, keep: Tensor | None, trained: Tensor | None
    ) -> dict[str, tuple[tuple[int, ...], Any, Tensor, Tensor]]:
        """For each tensor: its shape, the compared part, the exact values, and their scale."""
        problem, case = self.problem, self.problem.case
        m, n, tokens = case.m, case.n, case.k
        base = problem.specs["linear"].weight if trained is None else trained.detach()
        w = base.double()
        if parametrization.pattern is not None and parametrization.values is not None:
            rows, cols = (
                parametrization.pattern.row_indices.long(),
                parametrization.pattern.col_indices.long(),
            )
            w[rows, cols] += parametrization.values.double()
        x, dy = self._x.double(), self._dy.double()
        some = self._tokens.to(x.device)
        xs, ds = x[some], dy[some]
        y, y2 = xs @ w.t(), xs.square() @ w.square().t()
        dx, dx2 = ds @ w, ds.square() @ w.square()
        refs: dict[str, tuple[tuple[int, ...], Any, Tensor, Tensor]] = {}
        if parametrization.a is not None and parametrization.b is not None:
            a, b, s = (
                parametrization.a.double(),
                parametrization.b.double(),
                parametrization.scaling,
            )
            factor = torch.ones_like(x)
            if keep is not None:
                factor = self._factor(parametrization, keep, factor)
            dropped = x * factor
            h, h2 = dropped @ a.t(), dropped.square() @ a.square().t()
            g, g2 = dy @ b, dy.square() @ b.square()
            h2, g2 = h2 + h.square(), g2 + g.square()
            y = y + s * h[some] @ b.t()
            y2 = y2 + s * s * h2[some] @ b.square().t()
            dx = dx + s * factor[some] * (g[some] @ a)
            dx2 = dx2 + s * s * factor[some].square() * (g2[some] @ a.square())
            refs["b"] = (
                (m, b.shape[1]),
                ...,
                s * dy.t() @ h,
                s * (dy.square().t() @ h2).sqrt(),
            )
            refs["a"] = (
                (a.shape[0], n),
                ...,
                s * g.t() @ dropped,
                s * (g2.t() @ dropped.square()).sqrt(),
            )
        if parametrization.pattern is not None:
            count = parametrization.pattern.nnz
            at = _some(count, _ENTRIES, torch.Generator().manual_seed(case.seed)).to(x.device)
            rows = parametrization.pattern.row_indices.long()[at]
            cols = parametrization.pattern.col_indices.long()[at]
            products = dy[:, rows] * x[:, cols]
            refs["values"] = ((count,), at, products.sum(0), products.square().sum(0).sqrt())
        at = self._rows.to(x.device)
        dw, dw2 = dy[:, at].t() @ x, dy[:, at].square().t() @ x.square()
        refs["weight"] = ((m, n), at, dw, dw2.sqrt())
        refs = {name: ref for name, ref in refs.items() if name in parametrization.trains}
        refs["y"] = ((tokens, m), some, y, y2.sqrt())
        refs["dx"] = ((tokens, n), some, dx, dx2.sqrt())
        return refs

    def _factor(self, parametrization: Parametrization, keep: Tensor, ones: Tensor) -> Tensor:
        """The factors of x under dropout. A selector limits dropout to the selected columns."""
        kept = keep.double() / (1 - self.problem.case.dropout)
        if parametrization.selector is None:
            return kept
        ones[:, parametrization.selector] = kept
        return ones

    # -- the model ---------------------------------------------------------------------------------

    def _model(
        self, result: Result, adapted: Adapted, parametrizations: dict[str, Parametrization]
    ) -> float:
        root = self.problem.base(torch.float64)
        weights: dict[str, nn.Parameter] = {}
        for name, parametrization in parametrizations.items():
            weights[name] = root.get_submodule(name).weight  # type: ignore[assignment]
            with torch.no_grad():
                if "weight" in parametrization.trains:
                    weights[name].copy_(adapted.trained[name]["weight"])
                weights[name].add_(parametrization.delta())
            weights[name].requires_grad_(bool(parametrization.trains))
        y = self.problem.run(root, self._x)
        worst = _norm_error("y", result.y, y.detach())
        if y.requires_grad:
            y.backward(self._dy.double())
        for name, parametrization in parametrizations.items():
            if not parametrization.trains:
                continue
            dense = weights[name].grad
            assert dense is not None
            for part, ref in _through(parametrization, dense).items():
                got = result.gradients[name][part]
                worst = max(worst, _norm_error(f"{name}.{part}", got, ref))
        return worst


def _through(parametrization: Parametrization, dense: Tensor) -> dict[str, Tensor]:
    """The gradients of a parametrization's parts, from the gradient of the dense weight."""
    found = {}
    for part in parametrization.trains:
        if part == "weight":
            found[part] = dense
        elif part == "values":
            assert parametrization.pattern is not None
            rows, cols = (
                parametrization.pattern.row_indices.long(),
                parametrization.pattern.col_indices.long(),
            )
            found[part] = dense[rows, cols]
        else:
            assert parametrization.a is not None
            assert parametrization.b is not None
            a, b = parametrization.a.double(), parametrization.b.double()
            found[part] = parametrization.scaling * (
                b.t() @ dense if part == "a" else dense @ a.t()
            )
    return found


def _norm_error(name: str, got: Tensor, ref: Tensor) -> float:
    _check_whole(name, got, tuple(ref.shape))
    error = float((got.double() - ref).norm() / ref.norm().clamp(min=1e-300))
    if not error <= _MODEL_BOUND:
        raise AssertionError(
            f"{name}: expected an error of at most {_MODEL_BOUND:g} of its norm, got {error:.3g}"
        )
    return error


def _check_whole(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AssertionError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if bool(tensor.isnan().any()):
        raise AssertionError(f"{name}: expected no NaN, got {int(tensor.isnan().sum())}")


def _some(count: int, most: int, generator: torch.Generator) -> Tensor:
    """About `most` numbers of range(count), ascending, including the first and the last."""
    if count <= most:
        return torch.arange(count)
    drawn = torch.randperm(count, generator=generator)[:most]
    ends = torch.tensor([0, count - 1])
    found: Tensor = torch.unique(torch.cat([drawn, ends]))
    return found
