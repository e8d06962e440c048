"""The kernels of cross entropy: what their file is specialised by, and the sizes of its tiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Columns of one step along a row, and the threads that share them.
MOST_COLUMNS, COLUMNS_A_WARP = 4096, 512

# Constants of the file that change the order of a sum, and so its bits: those of a row's exponentials.
NUMERICS = ("BLOCK_V", "WARPS")
TUNED = {"BLOCK_V": (1024, 2048, 4096, 8192), "WARPS": (4, 8, 16), "STAGES": (1, 2, 3, 4)}


@dataclass(frozen=True)
class Facts:
    """What one file is made of.

    vocab:   the columns of a row of logits
    linear:  the logits are a buffer of a linear map that goes on with their slope, which takes their place
    scale, softcap: the logits are first multiplied, then kept below a bound by softcap * tanh(logits / softcap)
    block_v, warps, stages: columns of one step, and how a program runs
    """

    vocab: int
    linear: bool = False
    scale: float | None = None
    softcap: float | None = None
    block_v: int | None = None
    warps: int | None = None
    stages: int = 3

    def rendered(self) -> dict[str, Any]:
        """All that the template reads, besides the name."""
        block = self.block_v or min(MOST_COLUMNS, max(16, 1 << (self.vocab - 1).bit_length()))
        warps = self.warps or max(1, min(8, block // COLUMNS_A_WARP))
        shaped = "z"
        if self.scale is not None:
            shaped = f"{self.scale!r} {shaped}"
        if self.softcap is not None:
            shaped = f"{self.softcap!r} tanh({shaped} / {self.softcap!r})"
        return asdict(self) | {"block_v": block, "warps": warps, "shaped": shaped, "is_shaped": shaped != "z"}


def kernel(use: Any, target: Any) -> Facts | None:
    """The facts of one use, or None where `why_not` says why."""
    return None if why_not(use) else Facts(use.sizes("V")[0], linear=use.head is not None)


def why_not(use: Any) -> str | None:
    """Why a use has no kernel; None where it has one."""
    return None if use.op == "cross_entropy" else "it is a step of a vocabulary that ranks share"
