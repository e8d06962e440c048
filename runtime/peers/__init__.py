"""Other packages' kernels for what ours do: what there is for one use, and how it is called.

A peer's function takes the place of ours in the block that a kernel is by itself, so it gets the same inputs, weights
and cotangents, and is compared with the same numbers in fp64. A package is loaded when a use is asked for that it has
something for, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

from ...lowering.alone import Alone
from ..errors import said
from .attention import PEERS as ATTENTION
from .rows import PEERS as ROWS
from .seam import NotServed, Peer, Plain

__all__ = ["PEERS", "NotServed", "Offer", "Peer", "offers"]

PEERS = (*ROWS, *ATTENTION)


@dataclass(frozen=True)
class Offer:
    """What a peer has for one use: its version, and the class of the block with it; or why there is none."""

    peer: Peer
    version: str | None
    kind: type[nn.Module] | None
    why_not: str = ""

    @property
    def name(self) -> str:
        """The peer's."""
        return self.peer.name

    @property
    def note(self) -> str:
        """Its version, or why there is no class."""
        return self.why_not if self.kind is None or self.version is None else self.version


def offers(alone: Alone, plain: Plain) -> list[Offer]:
    """Of every peer that has something for the ops of a use. `plain` gives the block in PyTorch's math."""
    ops = tuple(n.op for n in alone.nodes)
    return [_offer(peer, alone, plain) for peer in PEERS if ops in peer.ops]


def _offer(peer: Peer, alone: Alone, plain: Plain) -> Offer:
    try:
        version = torch.__version__ if peer.package is None else metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        return Offer(peer, None, None, f"{peer.package} is not installed")
    try:
        return Offer(peer, version, peer.make(alone, plain))
    except NotServed as error:
        return Offer(peer, version, None, str(error))
    except Exception as error:  # a package that does not load says why in a way of its own
        return Offer(peer, version, None, f"does not load: {said(error)}")
