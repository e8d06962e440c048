"""What the shard pass decided: plain data for the emitter, the proof and the plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..graph import Graph
from .types import I, Mesh, Place, R


@dataclass(frozen=True)
class Stored:
    """How a weight is stored on each rank: for each of its dims the factors that split it, and over which factors its
    gradient is a sum that is still to be made, once a step."""

    splits: tuple[tuple[str, ...], ...]
    sync: tuple[str, ...] = ()

    def place(self, mesh: Mesh) -> Place:
        """The type of the weight: split, R where its gradient is a deferred sum, else I."""
        held = {a for atoms in self.splits for a in atoms}
        letters = tuple((a, R if a in self.sync else I) for a in mesh.names() if a not in held)
        return Place(self.splits, letters)


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: the model's nodes that it runs, the values that it takes from the one before and gives to
    the one behind, and the paths of what it owns."""

    nodes: tuple[str, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    owns: tuple[str, ...]


@dataclass(frozen=True)
class Pipe:
    """A pipeline over an axis: rank r runs the stages r, r + size, .. of `chunks` rounds."""

    axis: str
    size: int
    chunks: int
    microbatches: int
    schedule: str
    stages: tuple[Stage, ...]

    @property
    def parts(self) -> int:
        """In how many parts its schedule has a backward pass: two where gradients of weights come later."""
        return 2 if self.schedule == "zero_bubble" else 1


@dataclass(frozen=True)
class Laid:
    """`places[graph][value]`: where each value is; `weights[graph][weight]` how each is stored.

    `sums[graph][name]` are the factors over which what a block states (`loss:lm`, `sum:load`, `mean:name`) is partial.
    `whole` are the graphs as they were before, on whole dims.
    """

    mesh: Mesh
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    weights: dict[str, dict[str, Stored]] = field(default_factory=dict)
    sums: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    pipe: Pipe | None = None
    whole: dict[str, Graph] = field(default_factory=dict)
