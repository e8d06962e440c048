"""Where this process stands among others, and what its model runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .errors import UserError


@dataclass(frozen=True)
class World:
    """What torchrun tells a process: its rank, of how many, and its place on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def world() -> World:
    """This process among those that torchrun started; alone where it was not started so."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return World(*map(int, found)) if all(x.isdigit() for x in found) else World()


def place(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto`: GPUs where torch sees any. Of several GPUs a process takes the one of its
    place on its machine. Raises UserError `unknown-device`."""
    count = torch.cuda.device_count()
    if name == "cpu" or name == "auto" and not count:
        return torch.device("cpu")
    kind, colon, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or colon and not number.isdigit()):
        raise UserError("unknown-device", f"no device is named `{name}`", help="auto, cpu, cuda or cuda:N")
    index = int(number) if colon else world().local
    if index >= count:
        there = f"torch sees {count} on this machine" if count else f"torch {torch.__version__} sees none"
        raise UserError("unknown-device", f"there is no GPU {index}: {there}", help="--device cpu runs without")
    return torch.device("cuda", index)
