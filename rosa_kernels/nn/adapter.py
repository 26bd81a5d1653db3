"""RosaAdapter: the pattern and the parameters of one adapter in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.bounds import FINITE, FRACTION_BELOW_1, NON_NEGATIVE_INTEGER
from rosa_kernels.pattern import CsrPattern


class RosaAdapter(nn.Module):
    """A low-rank branch, a sparse branch, or both, for a weight of shape (m, n).

    Formula: dW = S + (alpha / rank) B A.

    The parameters are master weights: float64 for a float64 layer, else float32. So
    ``.to(torch.bfloat16)`` leaves them in float32. The pattern's indices are in the state_dict, but
    they are not buffers. DistributedDataParallel would send buffers to every rank in every forward,
    and write them in place. Code that asks for this module's own tensors finds them all the same,
    as torch.distributed.checkpoint does: by name, and in :meth:`named_buffers`.

    Attributes:
        lora_a: (r, n) parameter, Kaiming-uniform at first; or (r,) int64 buffer, a selector of
            input columns; or None.
        lora_b: (m, r) parameter, zero at first; or None.
        values: (nnz,) parameter, zero at first; or None.
        pattern: (m, n) CsrPattern of `values`; or None.
        crow_indices, col_indices: the pattern's index tensors; or None.
        rank, alpha, scaling, dropout: numbers; scaling = alpha / rank.

    Raises:
        ValueError, TypeError: the rank, alpha or dropout is invalid; the selector or the pattern
            does not fit (m, n).
    """

    lora_a: Tensor | None
    lora_b: Tensor | None
    values: Tensor | None
    _is_fsdp_managed_module = False  # FSDP sets this, as in RosaLinear

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int = 0,
        pattern: CsrPattern | None = None,
        alpha: float = 16.0,
        dropout: float = 0.0,
        train_a: bool = True,
        selector: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        m, n = shape
        rank = NON_NEGATIVE_INTEGER.check("RosaAdapter", rank, "rank")
        self.shape = (m, n)
        self.rank = rank
        self.alpha = float(FINITE.check("RosaAdapter", alpha, "alpha"))
        self.dropout = float(FRACTION_BELOW_1.check("RosaAdapter", dropout, "dropout"))
        self.dtype = dtype
        self.pattern: CsrPattern | None = None
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.register_parameter("values", None)
        if rank:
            self.lora_b = nn.Parameter(torch.zeros(m, rank, dtype=dtype, device=device))
            if selector is not None:
                del self.lora_a
                self.register_buffer("lora_a", _check_selector(selector, rank, n).to(device))
            else:
                self.lora_a = nn.Parameter(
                    torch.empty(rank, n, dtype=dtype, device=device), requires_grad=train_a
                )
                nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        elif selector is not None:
            raise ValueError("RosaAdapter: expected a rank with a selector, got rank 0")
        if pattern is not None:
            self.set_pattern(pattern, device=device)

    @property
    def scaling(self) -> float:
        """alpha / rank, or 0 if there is no low-rank branch."""
        return self.alpha / self.rank if self.rank else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether the adapter has neither branch yet."""
        return self.lora_b is None and self.values is None

    @property
    def crow_indices(self) -> Tensor | None:
        """The pattern's row pointers, or None."""
        return None if self.pattern is None else self.pattern.crow_indices

    @property
    def col_indices(self) -> Tensor | None:
        """The pattern's column indices, or None."""
        return None if self.pattern is None else self.pattern.col_indices

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers of this module, and the pattern's indices.

        A model's ``named_buffers`` does not call this. So DistributedDataParallel does not see the
        indices. torch.distributed.checkpoint asks each module, and loads what it finds here.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if "_old_forward" in vars(self):
            return  # accelerate hooks this module, and would move what is listed as a buffer
        for name, index in self._indices().items():
            yield f"{prefix}.{name}" if prefix else name, index.detach()

    def _indices(self) -> dict[str, Tensor]:
        """The pattern's indices by their names in the state_dict."""
        if self.pattern is None:
            return {}
        return {
            "crow_indices": self.pattern.crow_indices,
            "col_indices": self.pattern.col_indices,
        }

    def set_pattern(
        self,
        pattern: CsrPattern,
        values: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Give the adapter a sparse branch, or replace the one that it has.

        The branch gets a new parameter: a copy of `values` if given, else zeros. The parameter is
        on `device` if given, else on the pattern's device.

        Raises:
            TypeError: `pattern` is not a CsrPattern, or `values` not a tensor.
            ValueError: `pattern` is not of the weight's shape, or `values` not of length nnz.
        """
        if not isinstance(pattern, CsrPattern):
            raise TypeError(f"RosaAdapter: expected a CsrPattern, got {type(pattern).__name__}")
        if pattern.shape != self.shape:
            raise ValueError(
                f"RosaAdapter: expected a pattern of the weight's shape {self.shape}, "
                f"got {pattern.shape}"
            )
        if device is not None:
            pattern = pattern.to(device)
        if values is None:
            values = torch.zeros(pattern.nnz, dtype=self.dtype, device=pattern.device)
        elif not isinstance(values, Tensor):
            raise TypeError(
                f"RosaAdapter: expected values to be a tensor, got {type(values).__name__}"
            )
        elif values.shape != (pattern.nnz,):
            raise ValueError(
                f"RosaAdapter: expected values of shape ({pattern.nnz},), got {tuple(values.shape)}"
            )
        self.values = nn.Parameter(values.detach().to(pattern.device, self.dtype, copy=True))
        self.pattern = pattern

    def delta_weight(self) -> Tensor:
        """The dense (m, n) S + scaling * B A in the parameters' dtype, for merging and export."""
        reference = self.values if self.lora_b is None else self.lora_b
        if reference is None:
            raise ValueError("RosaAdapter: expected a branch, got an adapter that has none yet")
        with torch.no_grad():
            delta = reference.new_zeros(self.shape)
            if self.lora_a is not None and self.lora_b is not None:
                if self.lora_a.dim() == 1:
                    delta.index_add_(1, self.lora_a, self.lora_b, alpha=self.scaling)
                else:
                    torch.addmm(
                        delta, self.lora_b, self.lora_a, beta=0, alpha=self.scaling, out=delta
                    )
            if self.pattern is not None and self.values is not None:
                rows, cols = self.pattern.row_indices.long(), self.pattern.col_indices.long()
                delta.index_put_((rows, cols), self.values, accumulate=True)
        return delta

    def dropout_mask(self, x: Tensor) -> Tensor | None:
        """A bool mask of the low-rank branch's inputs that this forward keeps; None keeps all."""
        if not (self.training and self.dropout and self.lora_a is not None):
            return None
        shape = (*x.shape[:-1], self.rank) if self.lora_a.dim() == 1 else x.shape
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # Each random word gives four draws of 16 bits. Per million elements this takes 1.4 ms,
            # and bernoulli_ takes 5.8 ms, in a layer of 50 ms. The probability is off by 2**-17 at
            # most.
            draws = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64)
            draws = draws.random_(-(2**63), None).view(torch.int16)[: math.prod(shape)]
            return (draws >= round(self.dropout * 2**16) - 2**15).view(shape)
        return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.dropout)

    def extra_repr(self) -> str:
        parts = [f"rank={self.rank}", f"alpha={self.alpha:g}"] if self.rank else []
        if self.dropout:
            parts.append(f"dropout={self.dropout:g}")
        if self.pattern is not None:
            parts.append(f"nnz={self.pattern.nnz}, density={self.pattern.density:.3%}")
        return ", ".join(parts)

    # -- movement and storage --------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RosaAdapter:
        def at_least_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor.is_floating_point() and applied.itemsize < torch.float32.itemsize:
                return tensor.to(applied.device, torch.float32)
            return applied

        super()._apply(at_least_float32, recurse)  # type: ignore[no-untyped-call]
        # Not read from a parameter, because the adapter may have none yet.
        self.dtype = at_least_float32(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        # From the meta device `to_empty` would make indices of anything. A state_dict brings them.
        if self.pattern is not None and not self.pattern.col_indices.is_meta:
            self.pattern = self.pattern.to(fn(self.pattern.col_indices).device)
        return self

    def forward(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A, B and values. If accelerate has offloaded them, its hook brings them for a call."""
        return self.lora_a, self.lora_b, self.values

    def follow(self, device: torch.device) -> CsrPattern | None:
        """The pattern on a device: FSDP and accelerate move parameters past ``_apply``."""
        if self.pattern is not None and self.pattern.device != device:
            self.pattern = self.pattern.to(device)
        return self.pattern

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, index in self._indices().items():
            # A copy: torch.distributed.checkpoint.load writes into the tensors of a state_dict.
            destination[prefix + name] = index.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + "crow_indices", prefix + "col_indices"]
        given = [name for name in names if name in state_dict]
        if self.pattern is not None and strict:
            missing_keys += [name for name in names if name not in given]
        try:
            # Check the indices before values are loaded: values of other entries are useless.
            self._load_indices(
                state_dict, prefix, local_metadata.get("assign_to_params_buffers", False)
            )
        except (ValueError, TypeError, RuntimeError) as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        known: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, known, error_msgs
        )
        expected = given if self.pattern is not None else []
        unexpected_keys += [name for name in known if name not in expected]

    def _load_indices(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Validate the selector and the pattern in `state_dict`, and take the pattern."""
        selector = state_dict.get(prefix + "lora_a")
        if selector is not None and self.lora_a is not None and self.lora_a.dim() == 1:
            _check_selector(selector, self.rank, self.shape[1])
        crow, col = (state_dict.get(prefix + name) for name in ("crow_indices", "col_indices"))
        if self.pattern is None or self.values is None or crow is None or col is None:
            return
        device = col.device if assign else self.values.device
        crow, col = (index.detach().clone() for index in (crow, col))
        pattern = CsrPattern(crow, col, self.shape).to(device)
        if pattern.nnz != self.pattern.nnz:
            raise ValueError(
                f"expected {self.pattern.nnz} nonzeros as in this adapter, got {pattern.nnz}; "
                "call set_pattern first"
            )
        self.pattern = pattern


def check_whole(tensor: Tensor | None) -> None:
    """Raise RuntimeError if FSDP has sharded `tensor` and not gathered it for this forward."""
    if hasattr(tensor, "__tensor_flatten__"):
        raise RuntimeError(
            f"RosaLinear: expected whole tensors in forward, got a {type(tensor).__name__}; apply "
            "fully_shard to the layer or a module around it, not to its parts, and call that module"
        )


def _check_selector(selector: Tensor, rank: int, n: int) -> Tensor:
    if not isinstance(selector, Tensor) or selector.dtype not in (torch.int32, torch.int64):
        got = selector.dtype if isinstance(selector, Tensor) else type(selector).__name__
        raise TypeError(f"RosaAdapter: expected an int64 selector of columns, got {got}")
    if selector.shape != (rank,):
        raise ValueError(
            f"RosaAdapter: expected a selector of rank={rank} columns, "
            f"got shape {tuple(selector.shape)}"
        )
    if rank and not selector.is_meta and (int(selector.min()) < 0 or int(selector.max()) >= n):
        raise ValueError(
            f"RosaAdapter: expected columns in [0, {n}), "
            f"got {int(selector.min())} to {int(selector.max())}"
        )
    return selector.long()
