"""The kernels of causal convolutions: what their file is specialised by, and the sizes of its tiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

# Rows that a program may keep in registers: of each channel it has as many weights, sums and unfinished gradients.
MOST_TAPS = 16
THREADS = 64

# Constants of the file that change the order of a sum, and so its bits. All others change only the time it takes.
NUMERICS = ("BACK_ROWS",)
TUNED = {
    "BLOCK_C": (32, 64, 128, 256, 512), "ROWS": (16, 32, 64, 128), "BACK_ROWS": (64, 128, 256), "WARPS": (1, 2, 4, 8),
    "STAGES": (2, 3, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What one file is made of.

    widths: the channels of each part that stands beside the others; a convolution of its own has one part
    taps:   rows that a result reads, its own included; at most `MOST_TAPS`
    block_c, rows, back_rows, warps, stages: channels and rows of a program, forward and backward, and how it runs
    """

    widths: tuple[int, ...]
    taps: int
    bias: bool = False
    act: str | None = None
    block_c: int | None = None
    rows: int = 64
    back_rows: int = 128
    warps: int = THREADS // 32
    stages: int = 4

    def rendered(self) -> dict[str, Any]:
        """All that the template reads, besides the name."""
        parts, first, blocks = [], 0, "0"
        for i, width in enumerate(self.widths):
            parts.append({"i": i, "first": first, "width": width, "blocks": blocks})
            here = f"({width - 1} + BLOCK_C) // BLOCK_C"
            first, blocks = first + width, here if i == 0 else f"{blocks} + {here}"
        lags = [{"lag": lag, "tap": self.taps - 1 - lag, "newer": lag - 1} for lag in range(self.taps)]
        return asdict(self) | {
            "block_c": self.block_c or _channels(max(self.widths), self.taps),
            "channels": first,
            "parts": parts,
            "lags": lags,
            "past": lags[1:],
            "deepest": self.taps - 1,
            "sums": self.taps + self.bias,
        }


def kernel(use: Any, target: Any) -> Facts | None:
    """The facts of one use, or None where it has no kernel; `why_not` says why."""
    if why_not(use):
        return None
    if use.op == "parallel_conv":
        widths = tuple(prod(use.weight_sizes(weight)[:-1]) for weight in use.operands[1::2])
        bias = use.operands[2]
    else:
        widths, bias = (prod(use.sizes("C")),), use.operands[-1]
    return Facts(widths, use.attr("taps"), bias is not None, use.attr("act"))


def why_not(use: Any) -> str | None:
    """Why a use has no kernel, in words of the spec; None where it has one."""
    if use.op == "rows_before":
        return "it hands rows from rank to rank"
    if use.attr("taps") > MOST_TAPS:
        return f"{use.attr('taps')} taps are more than the {MOST_TAPS} rows that a kernel keeps in registers"
    if use.attr("act") not in (None, "silu"):
        return f"`{use.attr('act')}` is not an activation that the kernel of a convolution knows"
    return None


def _channels(width: int, taps: int) -> int:
    """Channels of a program: fewer a thread the more rows it keeps of each, and no more than there are. Of few taps a
    thread has 8, 16 bytes of them in bf16: backward then takes 206 registers at most, and as much of memory is on its
    way as with 4 (built for sm_80, sm_90 and sm_100 by Triton 3.7)."""
    each = next(n for n, most in ((8, 4), (4, 8), (2, MOST_TAPS)) if taps <= most)
    return min(each * THREADS, max(16, 1 << (width - 1).bit_length()))
