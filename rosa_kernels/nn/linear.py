"""RosaLinear: a linear layer with RoSA adapters. It replaces nn.Linear or GPT-2's Conv1D."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.nn.adapter import RosaAdapter, check_whole
from rosa_kernels.nn.replaced import attributes, load_hooks, template, why_not_plain
from rosa_kernels.ops import csr_gather, csr_scatter_, rosa_linear
from rosa_kernels.pattern import CsrPattern
from rosa_kernels.strides import overlaps_itself

RESIDENT, SCATTER, SEPARATE = "resident", "scatter", "separate"
# The backend that copies S, whatever backend is requested: all copy the same bits, and a requested
# "dense" has no such op.
_ANY = "auto"


class RosaLinear(nn.Module):
    """A frozen linear layer with any number of named adapters, of which at most one is active.

    Formula: y = x (W + S)^T + (alpha / rank) drop(x) A^T B^T + bias.

    The layer keeps the parameters of the layer that it replaces, under the same names. So a model's
    state_dict keeps its keys and gains those of the adapters. The state_dict always holds W, even
    if S or an adapter is inside the weight.

    :meth:`path` says where S is during training:

    - "resident": inside the weight, where :func:`make_resident` has put it.
    - "scatter", the default: written into the weight for the length of each product.
    - "separate": a product of its own, if the weight cannot be written to.

    Shapes: x (..., n) -> (..., m).
    Source: Nikdan et al., RoSA, arXiv 2401.04679.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    _is_fsdp_managed_module = False  # FSDP sets this. Without it, a lookup costs forward 1 us.

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        reason = why_not_plain(linear)
        if reason:
            raise TypeError(f"RosaLinear: expected a plain nn.Linear or Conv1D, got one {reason}")
        vars(self).update(attributes(linear, self))
        self.fan_in_fan_out = not isinstance(linear, nn.Linear)
        self.weight = linear.weight  # type: ignore[assignment]
        self.register_parameter("bias", linear._parameters.get("bias"))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        m, n = self._matrix().shape
        self.out_features, self.in_features = m, n
        self.adapters = nn.ModuleDict()
        # In eval mode nn.TransformerEncoderLayer reads the weights of its layers and does not call
        # them, unless a submodule has a hook. `adapters` is never called, so its hook costs
        # nothing.
        self.adapters.register_forward_hook(_never_called)
        self.active_adapter: str | None = None
        # Tuples hide the template and the checked weight from nn.Module.
        self._template = (template(linear),)
        self._write_check: tuple[Tensor, str] = (self.weight, "")
        self._check_weight()
        # make_resident sets _may_reside. _resident is set while S is in the weight: the pattern,
        # and W's original entries there.
        self._may_reside = False
        self._resident: tuple[CsrPattern, Tensor] | None = None
        # The `values` that are in the weight, and their version then. A tuple hides them, too.
        self._synced: tuple[Tensor, int] | None = None
        # While an adapter is merged: its name, and the copy of W on the host if one is kept.
        self._merged: str | None = None
        self._kept: Tensor | None = None
        self.train(linear.training)
        self.register_load_state_dict_post_hook(_insert_sparse_after_load)  # type: ignore[no-untyped-call]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 16,
        pattern: CsrPattern | None = None,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        adapter_name: str = "default",
        train_a: bool = True,
        selector: Tensor | None = None,
    ) -> RosaLinear:
        """A RosaLinear that shares `linear`'s parameters, now frozen, with one active adapter.

        Args:
            linear: nn.Linear, or Conv1D of transformers.
            rank: rank of the low-rank branch; 0 for no such branch.
            pattern: pattern of the sparse branch; None for no such branch.
            alpha: the low-rank branch is scaled by alpha / rank.
            dropout: probability that an element of the low-rank branch's input is dropped.
            adapter_name: its key in `adapters`.
            train_a: False freezes A.
            selector: (rank,) indices of input columns, in place of A.

        Raises:
            TypeError: `linear` is of another class or dtype. It has a forward of its own, or other
                tensors than a weight and a bias. Its weight is quantised or sharded.
            ValueError: rank is 0 and pattern is None.
            ValueError, TypeError: what :class:`RosaAdapter` raises.
        """
        if not rank and pattern is None:
            raise ValueError("RosaLinear: expected a rank or a pattern, got rank 0 and no pattern")
        layer = cls(linear)
        layer.add_adapter(
            adapter_name,
            rank=rank,
            pattern=pattern,
            alpha=alpha,
            dropout=dropout,
            train_a=train_a,
            selector=selector,
        )
        layer.set_adapter(adapter_name)
        return layer

    # -- adapters ----------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        *,
        rank: int = 0,
        pattern: CsrPattern | None = None,
        alpha: float = 16.0,
        dropout: float = 0.0,
        train_a: bool = True,
        selector: Tensor | None = None,
    ) -> RosaAdapter:
        """Add an adapter without activating it. Its sparse branch may be added later.

        Raises:
            ValueError: the name is taken, is empty, is not a string or has a dot.
            ValueError, TypeError: what :class:`RosaAdapter` raises.
        """
        if not isinstance(name, str) or not name or "." in name or hasattr(self.adapters, name):
            raise ValueError(
                f"RosaLinear: expected a new adapter name without dots, got {name!r}; the layer "
                f"has {sorted(self.adapters)}"
            )
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        adapter = RosaAdapter(
            (self.out_features, self.in_features),
            rank=rank,
            pattern=pattern,
            alpha=alpha,
            dropout=dropout,
            train_a=train_a,
            selector=selector,
            dtype=dtype,
            device=self.weight.device,
        )
        adapter.train(self.training)
        self.adapters[name] = adapter
        return adapter

    def adapter(self, name: str | None = None) -> RosaAdapter:
        """The adapter of that name, or the active one. Raises ValueError if there is none."""
        name = self.active_adapter if name is None else name
        if name is None or name not in self.adapters:
            raise ValueError(
                f"RosaLinear: expected one of the adapters {sorted(self.adapters)}, got {name!r}"
            )
        return self.adapters[name]  # type: ignore[return-value]

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter the active one. None disables all: then y = x W^T + bias."""
        if name is not None:
            self.adapter(name)
        self._refuse_while_merged("set_adapter")
        self._restore_weight()
        self.active_adapter = name
        self._insert_sparse()

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter. If it was the active one, no adapter is active afterwards."""
        self.adapter(name)
        self._refuse_while_merged("delete_adapter")
        if self.active_adapter == name:
            self.set_adapter(None)
        del self.adapters[name]

    def set_pattern(
        self, pattern: CsrPattern, values: Tensor | None = None, adapter_name: str | None = None
    ) -> None:
        """Call :meth:`RosaAdapter.set_pattern` of an adapter, by default the active one.

        The new `values` parameter is in no optimizer yet.
        """
        self._refuse_while_merged("set_pattern")
        adapter = self.adapter(adapter_name)
        self._restore_weight()
        try:
            adapter.set_pattern(pattern, values, self.weight.device)
        finally:
            self._insert_sparse()

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if getattr(x, "is_nested", False):
            return self._forward_nested(x)
        weight: Tensor = self._matrix()
        bias: Tensor | None = self.bias
        if self._is_fsdp_managed_module:
            check_whole(weight)
            if type(self.weight) is Tensor:
                # FSDP1's view of its flat parameter. That one trains if any part of it does.
                weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self._holds_adapter() and not torch.compiler.is_compiling():
            self._refuse_another_weight()
        if self.active_adapter is None or self._merged is not None:
            return nn.functional.linear(x, weight, bias)
        adapter: RosaAdapter = self.adapters[self.active_adapter]  # type: ignore[assignment]
        if adapter.is_empty:
            return nn.functional.linear(x, weight, bias)
        if adapter._is_fsdp_managed_module:
            for parameter in adapter._parameters.values():
                check_whole(parameter)
        lora_a, lora_b, values = adapter.lora_a, adapter.lora_b, adapter.values
        if (values if lora_b is None else lora_b).is_meta and not x.is_meta:  # type: ignore[union-attr]
            lora_a, lora_b, values = adapter()
        pattern = None if values is None else adapter.follow(values.device)
        if self._resident is not None and not torch.compiler.is_compiling() and self._stale(values):
            self.sync()
        mask = adapter.dropout_mask(x)
        return rosa_linear(
            x,
            weight,
            pattern,
            values,
            lora_a,
            lora_b,
            adapter.scaling,
            bias,
            merged=self._resident is not None,
            scatter=values is not None and self._resident is None and self.path()[0] == SCATTER,
            dropout=0.0 if mask is None else adapter.dropout,
            dropout_mask=mask,
        )

    def _forward_nested(self, x: Tensor) -> Tensor:
        """forward of the rows of a nested tensor, which the ops do not take.

        nn.TransformerEncoder makes one of a batch with padding.
        """
        if x.layout == torch.jagged:
            rows = self.forward(x.values())
            offsets, lengths = x.offsets(), x.lengths()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(rows, offsets, lengths)
        parts = x.unbind()
        rows = self.forward(torch.cat(parts))
        return torch.nested.as_nested_tensor([*rows.split([len(part) for part in parts])])

    def path(self) -> tuple[str, str]:
        """Where S is in forward and backward ("resident", "scatter" or "separate"), and why."""
        if self._resident is not None:
            return RESIDENT, ""
        reason = self._cannot_be_written()
        if reason:
            return SEPARATE, reason
        return SCATTER, "make_resident was not called"

    def _cannot_be_written(self) -> str:
        """Why S cannot be written into the weight, or "" if it can."""
        if self._is_fsdp_managed_module:
            return "the weight is sharded by FSDP"
        if self._write_check[0] is not self.weight and not self._holds_adapter():
            self._check_weight()
        return self._write_check[1]

    def _holds_adapter(self) -> bool:
        """Whether S or a merged adapter is in the weight. A state_dict holds W all the same."""
        return self._resident is not None or self._merged is not None

    def _refuse_another_weight(self) -> None:
        """Raise RuntimeError if another Parameter is in the place of the one that holds S."""
        weight = self._parameters.get("weight")
        if weight is self._write_check[0] or type(weight) is not nn.Parameter:
            return
        if not self._is_fsdp_managed_module:  # FSDP shards the weight with what it holds
            raise RuntimeError(
                "RosaLinear: expected the weight that holds the adapter, got another Parameter in "
                "its place, as accelerate puts W there when it offloads a model; unmerge or end "
                "residency before that"
            )

    def _check_weight(self) -> None:
        """Check whether this weight can be written to, and remember the answer.

        The check would cost every forward 3 us, and torch.compile cannot trace it.
        """
        weight, reason = self.weight, ""
        if type(weight) is not nn.Parameter:
            reason = f"the weight is a {type(weight).__name__}"
        elif weight.is_meta:
            reason = "the weight is on the meta device"
        elif weight.is_inference():
            reason = "the weight was made in inference mode"
        elif weight.device.type == "cpu" and weight.is_shared():
            reason = "other processes share the weight's memory"
        elif overlaps_itself(weight):
            reason = "elements of the weight share memory"
        self._write_check = weight, reason

    def _matrix(self) -> Tensor:
        """The weight as an (m, n) matrix. Conv1D stores its transpose."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    # -- S inside the weight -----------------------------------------------------------------------

    def _insert_sparse(self) -> None:
        """Put the active adapter's S into the weight, if that is allowed and not done yet."""
        if not self._may_reside or self._resident is not None or self._merged is not None:
            return
        pattern = self.adapter().pattern if self.active_adapter else None
        if pattern is not None and not self._cannot_be_written():
            originals = csr_gather(self._matrix().detach(), pattern, backend=_ANY)
            self._resident = pattern, originals
            self.sync()

    def _restore_weight(self) -> None:
        """Take S out of the weight, which restores W bit by bit."""
        if self._resident is not None:
            csr_scatter_(self._matrix().detach(), *self._resident, backend=_ANY)
            self._resident = None

    @torch.no_grad()
    def sync(self) -> None:
        """If S is resident, write round(W + S) again. Call this after `values` have changed."""
        if self._resident is None:
            return
        pattern, originals = self._resident
        adapter = self.adapter()
        if adapter.pattern is not pattern:  # the adapter was given or loaded another
            self._restore_weight()
            self._insert_sparse()
            return
        assert adapter.values is not None
        values = adapter.values
        merged = originals.to(values.dtype) + values
        csr_scatter_(self._matrix().detach(), pattern, merged, backend=_ANY)
        self._synced = None if values.is_inference() else (values, values._version)

    def _stale(self, values: Tensor | None) -> bool:
        """Whether `values` were changed in place since the last :meth:`sync`, as by SAM's ascent.

        It costs forward 0.3 us. It cannot replace the optimizer's hooks: fused optimizers and
        changes of ``values.data`` do not raise the version.
        """
        if self._synced is None or values is not self._synced[0]:
            return False
        return values._version != self._synced[1]

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """W as it is stored, without S or a merged adapter: a copy if the weight holds one.

        Raises:
            RuntimeError: an adapter was merged with keep_base=False.
        """
        if self._merged is not None:
            if self._kept is None:
                raise RuntimeError(_NOT_KEPT.format(self._merged))
            return self._kept.to(self.weight.device, self.weight.dtype, copy=True)
        if self._resident is None:
            return self.weight.detach()
        weight = self.weight.detach().clone()
        matrix = weight.t() if self.fan_in_fan_out else weight
        csr_scatter_(matrix, *self._resident, backend=_ANY)
        return weight

    # -- an adapter merged into the weight ---------------------------------------------------------

    @property
    def merged(self) -> str | None:
        """The name of the adapter whose branches :meth:`merge` added to the weight, or None."""
        return self._merged

    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """The dense (m, n) S + scaling * B A of an adapter, by default the active one."""
        return self.adapter(adapter_name).delta_weight()

    @torch.no_grad()
    def merged_weight(self, adapter_name: str | None = None) -> Tensor:
        """A new tensor round(W + S + scaling * B A), stored like W, rounded once from float32."""
        weight = self.base_weight()
        delta = self.delta_weight(adapter_name)
        return (
            delta.t().add_(weight).to(weight.dtype)
            if self.fan_in_fan_out
            else (delta.add_(weight).to(weight.dtype))
        )

    @torch.no_grad()
    def merge(
        self, adapter_name: str | None = None, *, safe: bool = False, keep_base: bool = True
    ) -> None:
        """Merge both branches of an adapter into the weight, so that forward is one product.

        Args:
            adapter_name: the adapter; by default the active one.
            safe: raise, before anything changes, if the merged weight is not finite.
            keep_base: keep W on the host, from which :meth:`unmerge` restores it bit by bit.

        Raises:
            RuntimeError: an adapter is merged already, or the weight cannot be written to.
            ValueError: there is no such adapter; or `safe`, and the merged weight has NaN or Inf.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._refuse_while_merged("merge")
        self.adapter(name)
        reason = self._cannot_be_written()
        if reason:
            raise RuntimeError(f"RosaLinear.merge: expected a writable weight, got none: {reason}")
        merged = self.merged_weight(name)
        if safe and not bool(merged.isfinite().all()):
            raise ValueError(
                f"RosaLinear.merge: expected finite weights, got NaN or Inf from adapter {name!r}"
            )
        self._restore_weight()
        self._kept = self.weight.detach().to("cpu", copy=True) if keep_base else None
        self.weight.detach().copy_(merged)
        self._merged = name

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W bit by bit from the copy that :meth:`merge` kept.

        Raises:
            RuntimeError: nothing is merged, or no copy was kept. Subtracting the adapter would not
                give back the same bits.
        """
        if self._merged is None:
            raise RuntimeError("RosaLinear.unmerge: expected a merged adapter, got none")
        self.weight.detach().copy_(self.base_weight())
        self._merged = self._kept = None
        self._insert_sparse()

    def to_linear(self, adapter_name: str | None = None) -> nn.Module:
        """A plain layer of the replaced class, with W itself or with an adapter's merged weight.

        It has the hooks of this layer.

        Raises:
            RuntimeError: an adapter is merged, or accelerate has hooked this layer's forward.
        """
        if "_old_forward" in vars(self):
            raise RuntimeError(
                "RosaLinear.to_linear: expected a layer without accelerate's hooks, got one with; "
                "call accelerate.hooks.remove_hook_from_module first"
            )
        if adapter_name is None:
            self._refuse_while_merged("to_linear")
            self.leave_residency()  # the plain layer shares the weight
            weight = self.weight
        else:
            weight = nn.Parameter(self.merged_weight(adapter_name), requires_grad=False)
        plain = copy.copy(self._template[0])
        plain._parameters = {**plain._parameters, "weight": weight, "bias": self.bias}
        vars(plain).update(load_hooks(self, plain, without=_insert_sparse_after_load))
        return plain.train(self.training)

    def _refuse_while_merged(self, what: str) -> None:
        if self._merged is not None:
            raise RuntimeError(
                f"RosaLinear.{what}: expected no merged adapter, got {self._merged!r}; "
                "unmerge first"
            )

    # -- movement and storage ----------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> RosaLinear:
        # S is taken out first: a cast of round(W + S) is not the sum of S and the cast W.
        self._restore_weight()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._check_weight()
        self._insert_sparse()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RosaLinear:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.leave_residency()  # no optimizer's hook would sync the copy
        new._check_weight()
        return new

    def __getstate__(self) -> dict[str, Any]:
        none = dict.fromkeys(("_write_check", "_resident", "_synced"))
        state = {**self.__dict__, **none, "_may_reside": False}
        if self._resident is not None:  # no optimizer's hook would sync the unpickled layer
            weight = nn.Parameter(self.base_weight(), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._check_weight()

    def leave_residency(self) -> None:
        """Undo :func:`make_resident` for this layer: take S out of the weight and keep it out."""
        self._restore_weight()
        self._may_reside = False

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._resident is not None or self._merged is not None:
            destination[prefix + "weight"] = self.base_weight()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._refuse_while_merged("load_state_dict")
        self._restore_weight()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, active_adapter={self.active_adapter!r}"
        )


_NOT_KEPT = (
    "RosaLinear: expected a kept copy of the weight, got none: adapter {!r} was merged with "
    "keep_base=False, and subtracting it would not give back the same bits"
)


def _never_called(*_: Any) -> None:
    pass


def _insert_sparse_after_load(layer: RosaLinear, _: Any) -> None:
    layer._check_weight()  # load_state_dict(assign=True) replaces the weight
    layer._insert_sparse()
