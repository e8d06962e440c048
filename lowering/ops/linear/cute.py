"""CuTe DSL kernels of a linear map whose result is worked on before it is stored: what a file is specialised by, and
what it would save.

y = step(x W^T + bias) + residual. M rows, N columns of y, K of x; W [N, K]. A kernel is a file for one N and K; M is
free. What is decided here is printed by `cute_sm_90.py.jinja` (wgmma) and `cute_sm_100.py.jinja` (tcgen05).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from ...chains.expr import Expr, Unfit, ordered
from ...chains.fragments import FRAGMENTS
from ...chains.table import TABLE
from ...target import TARGETS, Target

HELD = ("sm_90", "sm_100")
"""The targets that have such kernels."""
WIDE = 8
"""Columns that 16 bytes of bf16 or fp16 hold: the unit in which TMA reads and writes rows."""
# Bytes of shared memory for barriers, the address of tensor memory, and the alignment of what follows to 1 KiB.
_BARRIERS = 1024
_ELEMENT = 2


@dataclass(frozen=True)
class Facts:
    """What a file is specialised by.

    `step`: what the product ends with, of the tensor `z`, place by place; `said`: the ops of what is
    behind the product, by which files are named.
    Sizes of tiles: `block_m` rows (a CTA's), `block_n`, `block_k`; `part_n` columns leave a CTA at a time.
    `stages`: tiles of x and W in flight, `saving_stages` where z is kept, and stored too; `part_stages`: parts.
    `cluster`: CTAs that share the rows of W. `band`: columns of tiles that are walked together, for the L2 cache.
    `programs`: CTAs where no GPU is asked. None of these changes a sum: each element of y is one sum over K in steps of
    16, so all configurations of a target are in one numerics class.
    """

    name: str
    target: str
    n: int
    k: int
    step: Expr | None = None
    said: str = ""
    bias: bool = False
    residual: bool = False
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    part_n: int = 32
    part_stages: int = 2
    stages: int = 4
    saving_stages: int = 4
    cluster: int = 2
    band: int = 8
    programs: int = 132

    @property
    def template(self) -> str:
        return f"cute_{self.target}.py.jinja"

    @property
    def keeps(self) -> str | None:
        """What is kept for the gradient of z: "y", where the slope of the step follows from its result, else "z"; None
        without a step."""
        if self.step is None:
            return None
        op = TABLE.get(self.step.op)
        by_result = op is not None and op.by_result and all(x.op == "load" for x in self.step.args)
        return "y" if by_result and not self.residual else "z"

    def rendered(self) -> dict[str, Any]:
        """What the template prints, beside the lines of the step and of its slope."""
        z = "x w^T" + " + bias" * self.bias
        math = (f"a({z})" if self.step is not None else z) + " + residual" * self.residual
        return {**{k: getattr(self, k) for k in self.__dataclass_fields__}, "math": math, "keeps": self.keeps}


NUMERICS: tuple[str, ...] = ()
TUNED = {
    "BLOCK_N": (64, 128, 192, 256), "STAGES": (3, 5, 6, 8), "STAGES_SAVING": (3, 5, 6, 8), "BAND": (4, 16),
    "PART_STAGES": (3,),
}  # fmt: skip


def kernel(use: Any, target: Target, step: Expr | None, said: str, residual: bool) -> Facts | None:
    """The facts of a use of an op whose result goes through `step`, of the tensor `z`, and is added to a `residual`;
    None where no kernel stands in place of such an op. Raises Unfit."""
    if use.op != "linear":
        return None
    bias = use.node.operands[2] is not None
    return fitted("kernel", target.name, use.count("N"), use.count("K"), step, said, bias=bias, residual=residual)


def shared_bytes(facts: Facts, saving: bool) -> int:
    """Shared memory of one CTA: stages of x and W, and parts of y, of z if it is stored, and of the residual."""
    rows = facts.block_m + facts.block_n // (facts.cluster if facts.target == "sm_100" else 1)
    stages = facts.saving_stages if saving else facts.stages
    parts = (1 + saving + facts.residual) * facts.part_stages * facts.block_m * facts.part_n
    return _BARRIERS + _ELEMENT * (stages * rows * facts.block_k + parts)


def fitted(name: str, target: str, n: int, k: int, step: Expr | None = None, said: str = "", *, bias: bool = False,
           residual: bool = False, **tiles: int) -> Facts:  # fmt: skip
    """The facts of a kernel, with tiles by size where `tiles` does not give them. Raises Unfit."""
    if target not in HELD:
        raise Unfit(f"target `{target}` has no kernel of products: those of {' and '.join(HELD)} stand on TMA")
    absent = [e.op for e in ordered([step] if step is not None else []) if e.args and e.op not in FRAGMENTS]
    if absent:
        raise Unfit(f"`{absent[0]}` has no text for the end of a product: those that have are {', '.join(FRAGMENTS)}")
    for size, what, whose in ((k, "inputs", "x and the weight"), (n, "outputs", "the result")):
        if size < 1 or size % WIDE:
            raise Unfit(f"a linear map with {size} {what}: rows of {whose} are read in units of 16 bytes, "
                        f"so their number has to be a multiple of {WIDE}")  # fmt: skip
    sizes: dict[str, Any] = {"block_n": _block_n(n), "programs": 148 if target == "sm_100" else 132, **tiles}
    facts = Facts(name, target, n, k, step, said, bias, residual, **sizes)
    _check(facts)
    found: dict[str, Any] = {}
    for key, saving in (("stages", False), ("saving_stages", facts.keeps == "z")):
        empty, one = (shared_bytes(replace(facts, stages=n, saving_stages=n), saving) for n in (0, 1))
        room = (TARGETS[target].shared - empty) // (one - empty)
        found[key] = tiles.get(key, min(room, 8))
        if not 2 <= found[key] <= room:
            raise Unfit(f"tiles of {facts.block_m} x {facts.block_n} x {facts.block_k} leave room for {room} stages in "
                        f"{TARGETS[target].shared} bytes of shared memory, not for {max(found[key], 2)}")  # fmt: skip
    return replace(facts, **found)


def _block_n(n: int) -> int:
    """The width of tiles that load the fewest rows of x and W: wide ones share x, narrow ones have little beside N."""
    return min((256, 192, 128, 64), key=lambda width: -(-n // width) * (128 + width))


def _check(facts: Facts) -> None:
    """Sizes that the instructions hold. Raises Unfit."""
    pair = facts.target == "sm_100"
    least = 32 if pair else 16
    for name, ok in (
        ("block_m", facts.block_m in ((128,) if pair else (64, 128))),
        ("block_n", 0 < facts.block_n <= 256 and facts.block_n % max(least, facts.part_n) == 0),
        ("block_k", facts.block_k in (64,)),
        ("part_n", facts.part_n in (32, 64)),
        ("part_stages", facts.part_stages >= 1),
        ("cluster", facts.cluster in (1, 2)),
        ("band", facts.band >= 1),
        ("programs", facts.programs >= facts.cluster),
    ):
        if not ok:
            raise Unfit(f"no kernel of products for {facts.target} has {name} = {getattr(facts, name)}")


# --- what it would save -----------------------------------------------------------------------------------------------


class Rates(Protocol):
    """What a device reaches; `runtime.plan.devices.Device` is one. Units: operations and bytes a second, seconds."""

    @property
    def name(self) -> str: ...
    @property
    def flops(self) -> dict[str, float]: ...
    @property
    def memory_rate(self) -> float: ...
    @property
    def reached(self) -> tuple[float, float, float]: ...
    @property
    def launch_s(self) -> float: ...


@dataclass(frozen=True)
class Estimate:
    """Seconds of the library's product with a kernel of rows behind it, and of one kernel at the library's rate.

    `saved_bytes` are those that do not go through memory; `needed`: the share of the library's rate at which both take
    as long.
    """

    library_s: float
    kernel_s: float
    saved_bytes: int
    needed: float

    @property
    def gain(self) -> float:
        """The share of the time that one kernel would save."""
        return (self.library_s - self.kernel_s) / self.library_s


def estimate(facts: Facts, m: int, rates: Rates, *, trains: bool) -> Estimate:
    """A roofline of both ways for M rows. `trains`: z is stored for the gradient, if it is kept, either way."""
    memory = rates.memory_rate * rates.reached[1]
    size = _ELEMENT * m * facts.n
    read = _ELEMENT * (m * facts.k + facts.n * facts.k)
    multiplied = 2.0 * m * facts.n * facts.k / (rates.flops["bf16"] * rates.reached[0])
    behind = size * (2 + facts.residual)
    own = read + size * (1 + (trains and facts.keeps == "z") + facts.residual)
    library_s = max(multiplied, (read + size) / memory) + behind / memory + 2 * rates.launch_s
    kernel_s = max(multiplied, own / memory) + rates.launch_s
    return Estimate(library_s, kernel_s, read + size + behind - own, multiplied / (library_s - rates.launch_s))


def prologue_gain(n: int, k: int, m: int, rates: Rates) -> float:
    """The most that a product would save which made its rows of K columns by itself, of what another kernel read: it
    would not be written. As a share of its time and theirs, at the library's rate."""
    memory = rates.memory_rate * rates.reached[1]
    written = _ELEMENT * m * k / memory
    moved = _ELEMENT * (m * k + n * k + m * n) / memory
    product = max(2.0 * m * n * k / (rates.flops["bf16"] * rates.reached[0]), moved)
    return written / (written + product)
