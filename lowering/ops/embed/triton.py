"""The kernels of the gradient of an embedding: what their file is specialised by, and the sizes of its tiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

MOST_COLUMNS, COLUMNS_A_WARP = 1024, 256

# Constants of the file that change the order of a sum, and so its bits.
NUMERICS = ("RUN",)
TUNED = {"RUN": (16, 32, 64, 128), "BLOCK_N": (128, 256, 512, 1024), "WARPS": (1, 2, 4, 8), "STAGES": (2, 3, 4)}


@dataclass(frozen=True)
class Facts:
    """What one file is made of.

    width: the columns of the table
    run, block_n, warps, stages: places of a program in the order of the tokens, its columns, and how it runs
    """

    width: int
    run: int = 32
    block_n: int | None = None
    warps: int | None = None
    stages: int = 4

    def rendered(self) -> dict[str, Any]:
        """All that the template reads, besides the name."""
        block = self.block_n or min(MOST_COLUMNS, max(16, 1 << (self.width - 1).bit_length()))
        return asdict(self) | {"block_n": block, "warps": self.warps or max(1, block // COLUMNS_A_WARP)}


def kernel(use: Any, target: Any) -> Facts:
    """The facts of one use."""
    return Facts(prod(use.sizes("N")))
