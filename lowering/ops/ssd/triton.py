"""What the kernels of the state space scan are specialised by, and the tiles that a target gets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

# What one program holds whole: a head_dim and a state. Beyond them a tile of the state no longer fits.
MAX_HEAD_DIM, MAX_STATE = 128, 256
# The fewest rows that a product takes, and the most whose tiles fit the registers.
MIN_CHUNK, MAX_CHUNK = 16, 64


# Constants of the file that change the order of a sum, and so its bits: also tiles and warps that decide by which
# instructions of tensor cores a product is summed. All others change only the time it takes.
NUMERICS = (
    "CHUNK", "SUMS_BLOCK", "STATES_BLOCK_P", "STATES_WARPS", "CHUNKS_WARPS", "BC_BLOCK_N", "BC_WARPS", "X_BLOCK_I",
    "X_WARPS", "STEP_BLOCK_P", "STEP_WARPS",
)  # fmt: skip
TUNED = {
    "CHUNK": (32, 64, 128), "STATES_BLOCK_P": (16, 32, 64), "STATES_WARPS": (4, 8), "STATES_STAGES": (1, 2, 3),
    "CHUNKS_WARPS": (4, 8), "CHUNKS_STAGES": (1, 2, 3), "BC_BLOCK_N": (16, 32, 64, 128), "BC_WARPS": (4, 8),
    "BC_STAGES": (1, 2, 3), "X_BLOCK_I": (16, 32), "X_WARPS": (4, 8), "X_STAGES": (1, 2, 3),
    "STEP_BLOCK_P": (8, 16, 32), "STEP_WARPS": (1, 2, 4),
}  # fmt: skip


Shape = tuple[int, int, int]
"""A tile's side, warps, stages."""


@dataclass(frozen=True)
class Facts:
    """What one file is made of: heads of a group, head_dim, state; then the tiles, warps and stages of its kernels.

    chunk: rows that are one product; heads_per_program: of a group, with one product of c and b
    bc_block_n, x_block_i: columns of a state and receiving rows of a program, in the backward pass
    states_block_p, step_block_p: columns of a head_dim of a program; sums_block: rows summed at once
    full_states, full_bc, full_x: of fp32, the tile, warps and stages of a kernel, where they are not those of two bytes
    """

    per_group: int
    head_dim: int
    state: int
    chunk: int = MAX_CHUNK
    sums_block: int = 1024
    bc_block_n: int = 32
    x_block_i: int = 16
    heads_per_program: int = 1
    states_block_p: int = 64
    states_warps: int = 4
    states_stages: int = 2
    chunks_warps: int = 8
    chunks_stages: int = 2
    bc_warps: int = 4
    bc_stages: int = 2
    x_warps: int = 4
    x_stages: int = 2
    step_block_p: int = 16
    step_warps: int = 4
    full_states: Shape | None = None
    full_bc: Shape | None = None
    full_x: Shape | None = None

    @property
    def block_p(self) -> int:
        """The block that holds a head_dim."""
        return block(self.head_dim)

    @property
    def block_n(self) -> int:
        """The block that holds a state."""
        return block(self.state)

    def rendered(self) -> dict[str, Any]:
        """What the template reads."""
        full = {
            "full_states": self.full_states or (self.states_block_p, self.states_warps, self.states_stages),
            "full_bc": self.full_bc or (self.bc_block_n, self.bc_warps, self.bc_stages),
            "full_x": self.full_x or (self.x_block_i, self.x_warps, self.x_stages),
        }  # fmt: skip
        return {**asdict(self), **full, "block_p": self.block_p, "block_n": self.block_n}


def block(size: int) -> int:
    """The least power of two that holds `size`, and that products take."""
    return max(16, 1 << (size - 1).bit_length())


def facts(per_group: int, head_dim: int, state: int, chunk: int, target: Any) -> Facts:
    """Untuned tiles: of those that build without spilled registers for a target (Triton 3.7.1), the largest.

    `chunk` of the spec is the most rows that are one product; the kernel takes a power of two.
    """
    recent = target.capability is not None and target.capability >= 90  # its products need fewer registers
    broad, long = head_dim > 64, state > 128
    most = MAX_CHUNK if recent or not long else 32
    rows = min(most, max(MIN_CHUNK, 1 << (max(chunk, 1).bit_length() - 1)))
    # Heads share c b^T: that of 8 costs a tenth of what they do themselves.
    heads = max(n for n in range(1, min(8, per_group) + 1) if per_group % n == 0)
    if recent:
        tiles = {"bc_block_n": 32 if broad else 64, "bc_warps": 8, "x_block_i": 16 if broad else 32}
    else:
        tiles = {"bc_block_n": 16 if broad else 32, "bc_warps": 4, "x_block_i": 16}
    tiles["bc_block_n"] = min(tiles["bc_block_n"], block(state))
    tiles["x_block_i"] = min(tiles["x_block_i"], rows)
    tiles["states_block_p"] = min(64, block(head_dim))
    tiles["states_warps"] = 8 if long else 4
    # In fp32 each operand is two, of which a thread holds parts; warps share them, so there are 8. Some are spilled all
    # the same, on sm_90 by head_dims of 64 and states of 128: 64 loads of `bwd_bc`, 58 of `bwd_x`, 116 of `chunks`; by
    # larger ones more. Chunks of 16 rows would spill none, and write and read twice as many states, which is slower.
    states_p = tiles["states_block_p"] if recent else min(32, block(head_dim))
    return replace(
        Facts(per_group, head_dim, state, rows, heads_per_program=heads),
        **tiles,
        full_states=(states_p, tiles["states_warps"], 2), full_bc=(min(64, block(state)), 8, 2),
        full_x=(min(16, rows), 8, 2),
    )  # fmt: skip


def kernel(use: Any, target: Any) -> Facts | None:
    """The facts of one use, or None where it has no kernel; `why_not` says why."""
    if why_not(use):
        return None
    (heads,), (groups,), (head_dim,), (state,) = (use.sizes(formal) for formal in "HGPN")
    return facts(heads // groups, head_dim, state, use.attr("chunk"), target)


def why_not(use: Any) -> str | None:
    """Why a use has no kernel, in words of the spec; None where it has one."""
    if use.op not in ("ssd", "ssd_inside"):
        return "it is what ranks hand to each other"
    for formal, name, most in (("P", "head_dim", MAX_HEAD_DIM), ("N", "state", MAX_STATE)):
        (size,) = use.sizes(formal)
        if size > most:
            return f"a {name} of {size} is more than the {most} that one program of its kernel holds"
    return None
