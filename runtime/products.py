"""Products of a kernel, and by which instructions of tensor cores a target is to compute them."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

# What instructions of several warps want of a product: rows a multiple of 64, columns of a few, a depth of 32 bytes.
# Source: PTX ISA, wgmma.mma_async (m64nNk, N a multiple of 8) and tcgen05.mma (N one of 16).
_ROWS, _DEPTH_BITS = 64, 256
_COLUMNS = {"wgmma": 8, "tcgen05": 16}
# Whole groups of four warps; Triton reads tensor memory with one or two of them.
_WARPS = {"wgmma": (4, 8, 16, 32), "tcgen05": (4, 8)}

_DOT = re.compile(
    r"\btt\.dot\b(?P<how>.*?): tensor<(?P<m>\d+)x(?P<k>\d+)x(?P<kind>\w+)> \* tensor<\d+x(?P<n>\d+)x\w+>"
)


class Product(NamedTuple):
    """[m, k] times [k, n] of elements of so many bits; `exact`: as IEEE 754 says it, which no tensor core computes."""

    m: int
    n: int
    k: int
    bits: int
    exact: bool


def products(ttir: str) -> list[Product]:
    """The products that are written in a kernel, from its first intermediate form, each where it stands."""
    found = []
    for dot in _DOT.finditer(ttir):
        kind = dot["kind"]
        bits = 8 if kind.startswith("f8") else int(re.sub(r"\D", "", kind))
        exact = bits > 16 and "tf32" not in dot["how"]
        found.append(Product(int(dot["m"]), int(dot["n"]), int(dot["k"]), bits, exact))
    return found


def expected(found: list[Product], capability: int, warps: int) -> tuple[tuple[str, int], ...]:
    """How many products tensor cores are to compute by each of their instruction sets, in the order of their names."""
    kinds = Counter(_kind(one, capability, warps) for one in found if not one.exact)
    return tuple(sorted(kinds.items()))


def _kind(one: Product, capability: int, warps: int) -> str:
    """The instruction set for one product: the newest of the target if the product is large enough, or that of single
    warps, which all have."""
    newest = "tcgen05" if capability >= 100 else "wgmma" if capability >= 90 else "mma"
    if newest == "mma":
        return newest
    large = one.m % _ROWS == 0 and one.n % _COLUMNS[newest] == 0 and one.k * one.bits >= _DEPTH_BITS
    return newest if large and warps in _WARPS[newest] else "mma"


def lost(found: tuple[tuple[str, int], ...], wanted: tuple[tuple[str, int], ...]) -> list[str]:
    """What is wrong with the instructions that were found where these were wanted: one each at least for a product."""
    have = dict(found)
    return [
        f"products for {kind}: {count}, and its instructions: {have.get(kind, 0)}"
        for kind, count in wanted
        if have.get(kind, 0) < count
    ]
