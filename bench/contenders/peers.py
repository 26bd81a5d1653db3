"""The peers, one file each, declared like our kernels.

A peer's name up to the first "-" is its family. Tables of ratios show the fastest of each family.
"""

from __future__ import annotations

from rosa_kernels.testing import Case

from . import cusparse, dense, numpy_scipy, spops, sputnik, torch_sparse
from .base import Contender

# Dense comes first, because plots show it as the baseline.
_PEERS = (
    *dense.CONTENDERS,
    *cusparse.CONTENDERS,
    *sputnik.CONTENDERS,
    *torch_sparse.CONTENDERS,
    *numpy_scipy.CONTENDERS,
    *spops.CONTENDERS,
)


def contenders(case: Case, device: str = "cpu") -> list[Contender]:
    """The peers that have the case's op on the device."""
    return [peer for peer in _PEERS if peer.op == case.op and device in peer.devices]


def peer_names() -> list[str]:
    """All peers' names."""
    return list(dict.fromkeys(peer.name for peer in _PEERS))


def peer_families() -> list[str]:
    """All peers' families."""
    return list(dict.fromkeys(map(family_of, peer_names())))


def family_of(name: str) -> str:
    """The family of a peer: cusparse for cusparse-alg2."""
    return name.split("-")[0]
