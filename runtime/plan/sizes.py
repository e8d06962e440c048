"""The weights of a rank, by block and by line of the spec, and which part of each it has."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...dsl.program import Parameter
from ...dsl.source import Span
from ...lowering.graph import GraphProgram


@dataclass(frozen=True)
class Held:
    """A weight as one rank holds it: `shape` is that of its part, `splits` the axes that split each dim, `width` the
    bytes of a number. `line` declared it."""

    path: str
    block: str
    line: str
    dims: tuple[str, ...]
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    splits: tuple[tuple[str, ...], ...]
    width: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * self.width


@dataclass(frozen=True)
class Ranks:
    """Numbers of ranks: `run` of them from `first` on, and the same again `times` times in all, `every` so many."""

    first: int
    run: int
    every: int
    times: int

    @classmethod
    def along(cls, axes: dict[str, int], axis: str, place: int) -> Ranks:
        """The ranks of a mesh, the outermost axis first, that are at a place of one of its axes."""
        names = list(axes)
        inner = prod(axes[a] for a in names[names.index(axis) + 1 :])
        return cls(place * inner, inner, axes[axis] * inner, prod(axes[a] for a in names[: names.index(axis)]))

    @property
    def count(self) -> int:
        return self.run * self.times

    def runs(self) -> list[tuple[int, int]]:
        """(first, how many) of neighbours."""
        return [(self.first + i * self.every, self.run) for i in range(self.times)]

    def all(self) -> list[int]:
        """Each of them."""
        return [rank for first, count in self.runs() for rank in range(first, first + count)]


def held(program: GraphProgram, precision: str) -> list[Held]:
    """Every weight of a rank. Those that an op keeps in fp32 stay so in any precision."""
    low = 2 if precision == "bf16" else 4
    return [_held(program, p, 4 if p.weight.keep else low) for p in program.program.parameters()]


def _held(program: GraphProgram, p: Parameter, width: int) -> Held:
    names, whole = tuple(d for d, _ in p.dims), p.shape
    splits: tuple[tuple[str, ...], ...] = ((),) * len(whole)
    if program.laid is not None:
        splits = program.laid.weights[p.body][p.weight.name].splits
    shape = tuple(n // program.laid.mesh.size(a) if a else n for n, a in zip(whole, splits, strict=True))
    return Held(p.name, block_of(p.name), line_of(p.weight.span), names, whole, shape, splits, width)


def line_of(span: Span) -> str:
    """`model.spec:18`, or nothing where no file said it."""
    return f"{span.source.name.replace(chr(92), '/').rsplit('/', 1)[-1]}:{span.line}" if span.source.text else ""


def block_of(path: str) -> str:
    """The block that a module or a weight is of: iterations are one, weights are their owner's."""
    parts = path.split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    head = parts[: depth + 2] if depth is not None else parts[:1]
    return ".".join("*" if part.isdigit() else part for part in head) or "model"
