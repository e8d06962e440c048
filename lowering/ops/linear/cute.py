"""CuTe DSL kernels of a linear map whose result is worked on before it is stored, and whether one is used.

y = step(x W^T + bias) + residual. M rows, N columns of y, K of x; W [N, K]. A kernel is a file for one N and K; M is
free. What is decided here is printed by `cute_sm_90.py.jinja` (wgmma) and `cute_sm_100.py.jinja` (tcgen05).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from ...target import TARGETS


class Unfit(ValueError):
    """No kernel can be made for a linear map; the text says what is in the way, in words for who wrote the spec."""


@dataclass(frozen=True)
class Step:
    """A pointwise function of the product, in the languages that need it.

    cute: lines from `z`, a fragment in fp32, to `a`. slope: a torch expression for the gradient of z, of `d_y` and `z`
    in the storage dtype.
    """

    math: str
    cute: tuple[str, ...]
    slope: str


# A comparison with NaN is false, so what is replaced is what is known to be smaller than 0, as torch's relu does.
STEPS: Mapping[str, Step] = MappingProxyType(
    {
        "relu2": Step(
            "max(z, 0)^2",
            ("r = cute.where(z < 0.0, cute.full_like(z, 0.0), z)", "a = r * r"),
            "d_y * (2.0 * torch.relu(z))",
        ),
        "silu": Step(
            "z / (1 + e^-z)",
            ("a = z * cute.math.rcp(1.0 + cute.math.exp(-z, fastmath=True), approx=True, ftz=True)",),
            "torch.ops.aten.silu_backward(d_y, z)",
        ),
        # (1 + tanh u) / 2 is 1 / (1 + e^-2u), which needs no tanh and is exact where that is 0.
        "gelu_tanh": Step(
            "z / (1 + e^-2u), u = sqrt(2 / pi) (z + 0.044715 z^3)",
            (
                "u = 0.7978845608028654 * (z + 0.044715 * (z * z * z))",
                "a = z * cute.math.rcp(1.0 + cute.math.exp(-2.0 * u, fastmath=True), approx=True, ftz=True)",
            ),
            'torch.ops.aten.gelu_backward(d_y, z, approximate="tanh")',
        ),
    }
)

WIDE = 8
"""Columns that 16 bytes of bf16 or fp16 hold: the unit in which TMA reads and writes rows."""
# Bytes of shared memory for barriers, the address of tensor memory, and the alignment of what follows to 1 KiB.
_BARRIERS = 1024
_ELEMENT = 2


@dataclass(frozen=True)
class Facts:
    """What a file is specialised by.

    Sizes of tiles: `block_m` rows (a CTA's), `block_n`, `block_k`; `part_n` columns leave a CTA at a time.
    `stages`: tiles of x and W in flight, `saving_stages` where z is stored too; `part_stages`: parts.
    `cluster`: CTAs that share the rows of W. `band`: columns of tiles that are walked together, for the L2 cache.
    `programs`: CTAs where no GPU is asked. None of these changes a sum: each element of y is one sum over K in steps of
    16, so all configurations of a target are in one numerics class.
    """

    name: str
    target: str
    n: int
    k: int
    step: str | None = None
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

    def values(self) -> dict[str, Any]:
        """What the template prints."""
        step = STEPS[self.step] if self.step else None
        z = "x w^T" + " + bias" * self.bias
        return {
            **{k: getattr(self, k) for k in self.__dataclass_fields__},
            "math": (f"{self.step}({z})" if step else z) + " + residual" * self.residual,
            "step_math": f"{self.step}(z) = {step.math}" if step else None,
            "step_lines": step.cute if step else (),
            "slope": step.slope if step else None,
            "tensor_columns": tensor_columns(self.block_n),
        }


def shared_bytes(facts: Facts, saving: bool) -> int:
    """Shared memory of one CTA: stages of x and W, and parts of y, of z if it is stored, and of the residual."""
    rows = facts.block_m + facts.block_n // (facts.cluster if facts.target == "sm_100" else 1)
    stages = facts.saving_stages if saving else facts.stages
    parts = (1 + saving + facts.residual) * facts.part_stages * facts.block_m * facts.part_n
    return _BARRIERS + _ELEMENT * (stages * rows * facts.block_k + parts)


def fitted(name: str, target: str, n: int, k: int, step: str | None = None, *, bias: bool = False,
           residual: bool = False, **tiles: int) -> Facts:  # fmt: skip
    """The facts of a kernel, with tiles by size where `tiles` does not give them. Raises Unfit."""
    if target not in ("sm_90", "sm_100"):
        raise Unfit(f"target `{target}` has no kernel of products: those of sm_90 and sm_100 stand on TMA")
    if step is not None and step not in STEPS:
        raise Unfit(f"`{step}` has no text for the end of a product: those that have are {', '.join(STEPS)}")
    for size, what, whose in ((k, "inputs", "x and the weight"), (n, "outputs", "the result")):
        if size < 1 or size % WIDE:
            raise Unfit(f"a linear map with {size} {what}: rows of {whose} are read in units of 16 bytes, "
                        f"so their number has to be a multiple of {WIDE}")  # fmt: skip
    sizes: dict[str, Any] = {"block_n": _block_n(n), "programs": 148 if target == "sm_100" else 132, **tiles}
    facts = Facts(name, target, n, k, step, bias, residual, **sizes)
    _check(facts)
    found = {}
    for key, saving in (("stages", False), ("saving_stages", step is not None)):
        empty, one = (shared_bytes(_with(facts, stages=n, saving_stages=n), saving) for n in (0, 1))
        room = (TARGETS[target].shared - empty) // (one - empty)
        found[key] = tiles.get(key, min(room, 8))
        if not 2 <= found[key] <= room:
            raise Unfit(f"tiles of {facts.block_m} x {facts.block_n} x {facts.block_k} leave room for {room} stages in "
                        f"{TARGETS[target].shared} bytes of shared memory, not for {max(found[key], 2)}")  # fmt: skip
    return _with(facts, **found)


def _with(facts: Facts, **more: Any) -> Facts:
    return Facts(**{**{k: getattr(facts, k) for k in facts.__dataclass_fields__}, **more})


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


def tensor_columns(block_n: int) -> int:
    """Columns of tensor memory for two tiles of sums, one that is summed and one that is stored: a power of two."""
    return 1 << (2 * block_n - 1).bit_length()


# --- whether it is used -----------------------------------------------------------------------------------------------


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


# (device, target) -> the rate of these kernels as a share of the library's, from files of benchmarks/results. Empty: no
# GPU has run one, so none is used. A number goes in with the file that shows it.
MEASURED: Mapping[tuple[str, str], float] = MappingProxyType({})


@dataclass(frozen=True)
class Decision:
    """`kernel`: this kernel instead of the library's product and a chain behind it. Times are estimates in seconds.

    `saved_bytes` are those that do not go through memory; `needed`: the share of the library's rate at which both take
    as long.
    """

    kernel: bool
    reason: str
    library_s: float
    kernel_s: float
    saved_bytes: int
    needed: float


def choose(
    facts: Facts, m: int, rates: Rates, *, trains: bool, measured: Mapping[tuple[str, str], float] = MEASURED
) -> Decision:
    """Whether the kernel pays for M rows: a roofline of both ways. `trains`: z is stored for the gradient either way.

    The library's product adds a bias, or a residual where there is no bias and no step, at no cost.
    """
    product, memory, _ = rates.reached
    size = _ELEMENT * m * facts.n
    operations = 2.0 * m * facts.n * facts.k
    read = _ELEMENT * (m * facts.k + facts.n * facts.k)
    saves = trains and facts.step is not None

    def product_s(moved: int, share: float = 1.0) -> float:
        return max(operations / (rates.flops["bf16"] * product * share), moved / (rates.memory_rate * memory))

    free = facts.step is None and not (facts.residual and facts.bias)
    chain = 0 if free else size * (2 + facts.residual)
    own = read + size * (1 + saves + facts.residual)
    library_bytes = read + size * (1 + (facts.residual and free)) + chain
    library_s = product_s(library_bytes - chain) + rates.launch_s
    library_s += 0 if free else chain / (rates.memory_rate * memory) + rates.launch_s
    kernel_s = product_s(own) + rates.launch_s
    # The rate of its products at which both take as long.
    needed = operations / (rates.flops["bf16"] * product) / (library_s - rates.launch_s)
    saved = library_bytes - own
    about = f"{m} x {facts.n} x {facts.k} on {rates.name}"
    if free:
        return Decision(False, f"library: {about}: its product does all of this", library_s, kernel_s, saved, needed)
    gain = (library_s - kernel_s) / library_s
    what = (f"{about}: one kernel saves {saved / 1e6:.3g} MB, by estimate {(library_s - kernel_s) * 1e6:.3g} of "
            f"{library_s * 1e6:.3g} us ({gain:.0%}), if it reaches {needed:.0%} of the library's rate")  # fmt: skip
    share = measured.get((rates.name, facts.target))
    if share is None:
        return Decision(False, f"library: {what}; no committed measurement says so", library_s, kernel_s, saved, needed)
    kernel_s = product_s(own, share) + rates.launch_s
    better = kernel_s < library_s
    return Decision(better, f"{'kernel' if better else 'library'}: {what}; it was measured at {share:.0%}",
                    library_s, kernel_s, saved, needed)  # fmt: skip
