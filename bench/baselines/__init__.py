"""The peers, one file each, declared like our kernels."""

from __future__ import annotations

from bench.baselines import dense, numpy_scipy, spops, torch_sparse
from bench.contender import Contender
from rosa_kernels.testing import Case

# Dense first: every ratio to the roof is drawn against it.
_PEERS = (*dense.CONTENDERS, *torch_sparse.CONTENDERS, *numpy_scipy.CONTENDERS, *spops.CONTENDERS)


def contenders(case: Case) -> list[Contender]:
    """The peers that have the case's op at all."""
    return [peer for peer in _PEERS if peer.op == case.op]


def names() -> list[str]:
    """All peers' names."""
    return list(dict.fromkeys(peer.name for peer in _PEERS))
