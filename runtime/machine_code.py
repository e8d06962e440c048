"""What a built kernel asks of a GPU: read from its machine code by tools that come with Triton, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Instructions of tensor cores by the name of the instruction set: warps (mma), groups of warps (wgmma), one thread
# for all (tcgen05). Source: CUDA Binary Utilities, instruction set reference of Ampere, Hopper and Blackwell.
_TENSOR_CORES = {
    "mma": re.compile(r"[HIDQO]MMA"),
    "wgmma": re.compile(r"[HIQBO]GMMA"),
    "tcgen05": re.compile(r"UTC[A-Z]*MMA"),
}
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)
_USAGE = re.compile(r"\b(REG|STACK):(\d+)")


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers of a thread and bytes of its stack; instructions by kind, each counted where it stands.

    `spill_loads`, `spill_stores`: of memory that a thread has for what its registers do not hold. `tensor_cores`: by
    instruction set (mma, wgmma, tcgen05), those of them that there are. `loads`: from global memory, `wide_loads` those
    of 16 bytes a thread, or of whole tiles.
    """

    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    tensor_cores: tuple[tuple[str, int], ...]
    loads: int
    wide_loads: int


def resources(cubin: bytes) -> Resources:
    """What the machine code of one kernel uses. Raises CalledProcessError where the tools cannot read it."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _printed(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _printed(knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = {name: int(number) for name, number in _USAGE.findall(usage)}
    kinds, wide = _instructions(code)
    cores = {
        kind: sum(count for name, count in kinds.items() if pattern.fullmatch(name))
        for kind, pattern in _TENSOR_CORES.items()
    }
    return Resources(
        registers=found["REG"], stack_bytes=found["STACK"], spill_loads=kinds["LDL"], spill_stores=kinds["STL"],
        tensor_cores=tuple((kind, count) for kind, count in cores.items() if count),
        loads=kinds["LDG"] + kinds["LDGSTS"] + kinds["UTMALDG"], wide_loads=wide,
    )  # fmt: skip


def _instructions(code: str) -> tuple[Counter[str], int]:
    """How often each instruction stands in a listing, and how many loads are wide."""
    kinds: Counter[str] = Counter()
    wide = 0
    for name, options in _INSTRUCTION.findall(code):
        kinds[name] += 1
        wide += (name in ("LDG", "LDGSTS") and ".128" in options) or name == "UTMALDG"
    return kinds, wide


def _printed(tool: str, *words: str) -> str:
    return subprocess.run([tool, *words], check=True, capture_output=True, text=True).stdout
