"""From nodes to plain facts: what the CPU code of an op's room asks about one use of it."""

from __future__ import annotations

import math
from typing import Any

from ..dsl import syntax as sx
from ..dsl.program import TOKENS, Node
from ..lowering.graph import STRUCTURE, Graph, op_of
from . import names


class Use:
    """One use of an op in a graph. `args` are Python expressions for the operands, None for absent ones."""

    def __init__(self, graph: Graph, node: Node, writer: Any):
        self.graph, self.node, self.writer = graph, node, writer
        self.op, self.operands = node.op, node.operands
        self._op = op_of(node)

    @property
    def args(self) -> list[str | None]:
        return [None if o is None else self.writer.expression(o) for o in self.operands]

    @property
    def own(self) -> str | None:
        """The submodule that owns this op's weights, or None if they belong elsewhere."""
        owner = self.writer.owner_of(self.node)
        return None if owner is None else f"{self.writer.owner}.{names.attribute(owner)}"

    @property
    def past(self) -> str:
        """The state of this use."""
        return f"state.{names.attribute(slot_name(self.graph, self.node))}"

    def attr(self, name: str) -> Any:
        setting = self._op.setting(name)
        return self.node.attr(name, setting.default if setting else None)

    @property
    def kernel(self) -> str:
        """The argument that gives this use its kernel, or nothing where it has none."""
        name = self.writer.kernel(self)
        return f", kernel={name}" if name else ""

    @property
    def epilogue(self) -> str:
        """The arguments that give a product what it ends with and its kernel, or nothing where it ends with itself."""
        found: str = self.writer.epilogue_of(self.node)
        return found

    @property
    def head(self) -> tuple[str, str, str | None] | None:
        """What the linear map reads whose result this use makes by itself, its weight and bias; None where it is given
        the result."""
        found: tuple[str, str, str | None] | None = self.writer.head_of(self.node)
        return found

    def literal(self, name: str) -> str | None:
        """A number that stands in place of a tensor."""
        value = self.node.attr(name)
        return None if value is None else repr(value)

    def dim_sizes(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.graph.size(d) or 0 for d in dims)

    def sizes(self, formal: str) -> tuple[int, ...]:
        """Sizes of the dims that a formal stands for."""
        return self.dim_sizes(self.node.bound(formal))

    def bound(self, formal: str) -> tuple[str, ...]:
        """The dims that a formal stands for."""
        return self.node.bound(formal)

    def operand_dims(self, place: int) -> tuple[str, ...]:
        return self.graph.values[self.operands[place] or ""].type.dims

    def weight_sizes(self, weight: str | None) -> tuple[int, ...]:
        return self.dim_sizes(self.graph.values[weight or ""].type.dims)

    def is_batch(self, dim: str) -> bool:
        """Whether a dim numbers the rows of a batch: the first of what positions vary along."""
        return any(d.clock == TOKENS and d.lead[:1] == (dim,) for d in self.graph.dims.values())

    def drawn(self, dims: tuple[str, ...]) -> tuple[str, str]:
        """The arguments that say what random numbers of places along dims depend on: the name of the use, and where a
        rank's places are in the whole."""
        more = "" if dims and self.is_batch(dims[0]) else ", by_row=False"
        axes = tuple(self.graph.dims[d].axes for d in dims)
        if any(a for d, a in zip(dims, axes, strict=True) if not self.is_batch(d)):
            more += f", axes={axes}"
        return f'"{self.node.name}"', more

    def is_cut(self, formal: str) -> bool:
        """Whether a dim of a formal is one rank's part."""
        return any(self.graph.dims[d].axes for d in self.node.bound(formal))

    def group(self) -> str:
        """The ranks that tell each other something in this use."""
        return f"at.mesh[{_quoted(self.attr('axes'))}]"

    def rows_of(self, place: int) -> str:
        """The coordinates of the rows of an operand's sequence that are here."""
        dims = (self.graph.dims[d] for d in self.operand_dims(place))
        axes = next((d.axes for d in dims if d.sequence and d.clock == TOKENS), ())
        return f"at.part({_quoted(axes)})" if axes else "at"

    def start(self, formal: str) -> str:
        """Where this rank's part of a formal's dim begins."""
        (dim,) = self.node.bound(formal)
        axes, size = self.graph.dims[dim].axes, self.graph.size(dim)
        return f"{size} * at.mesh.place({_quoted(axes)})" if axes else "0"

    def result_width(self, formal: str) -> int:
        return len(self.node.bound(formal))

    def mask(self, mask: sx.Expr) -> str:
        return self.writer.mask(mask)

    @property
    def is_kept(self) -> bool:
        """Whether a stream keeps something for this use."""
        return self.node.name in self.writer.states

    def at(self, dim: str, times: int | None = None) -> str:
        """The coordinates of the rows of a sequence; None for one that is there as a whole. `times` replaces how many
        rows a group has."""
        clock, axes = self.graph.dims[dim].clock, self.graph.dims[dim].axes
        if clock is None or clock == TOKENS:
            return "None" if clock is None else f"at.part({_quoted(axes)})" if axes else "at"
        times = clock.times if times is None else times
        rows = f"lib.on(at, {self.writer.clock(clock)}{'' if times == 1 else f', {times}'})"
        return f"{rows}.part({_quoted(axes)})" if axes else rows

    def clock_of(self, state: Any) -> str:
        """The arguments of a cache that say whose rows it keeps: nothing for tokens."""
        if state.clock is None:
            return ""
        times = "" if state.clock.times == 1 else f", times={state.clock.times}"
        return f", clock={self.writer.clock(state.clock)}{times}"

    # --- pointwise --------------------------------------------------------------------------------

    @property
    def aligned(self) -> list[str | None]:
        """Operands that broadcast to the result: dims that they lack are inserted."""
        wanted = self.node.results[0].type.dims
        return [None if o is None else self.align(o, wanted) for o in self.operands]

    def align(self, operand: str, wanted: tuple[str, ...]) -> str:
        """An operand that broadcasts to these dims."""
        have = self.graph.values[operand].type.dims
        text = self.writer.expression(operand)
        if self.op == "outer" or not have or have == wanted[len(wanted) - len(have) :]:
            return text
        order = [d for d in wanted if d in have]
        if tuple(order) != have:
            text = f"{self.wrap(text)}.permute({', '.join(str(have.index(d)) for d in order)})"
        first = wanted.index(order[0])
        places = [":" if d in have else "None" for d in wanted[first:]]
        return f"{self.wrap(text)}[{', '.join(places)}]"

    def wrap(self, text: str | None) -> str:
        """In parentheses, if an operator of the text would bind less tightly than one around it."""
        text = text or ""
        return f"({text})" if " " in _outside_brackets(text) or text.startswith("-") else text

    def producer(self, operand: int) -> str | None:
        """The op whose expression was written in place of an operand."""
        name = self.operands[operand] if operand < len(self.operands) else None
        node = self.graph.producers.get(name) if name else None
        return node.op if node is not None and self.writer.is_inlined(node) else None

    def inner(self, operand: int) -> str:
        """The argument of the op that was written in place of an operand."""
        node = self.graph.producers[self.operands[operand] or ""]
        return self.writer.expression(node.operands[0] or "")


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{n}"' for n in names)


def _outside_brackets(text: str) -> str:
    depth, kept = 0, []
    for c in text:
        depth += c in "([{"
        if depth == 0:
            kept.append(c)
        depth -= c in ")]}"
    return "".join(kept)


def owner_of(graph: Graph, node: Node) -> str | None:
    """The name under which a node owns its weights: of an op's own instance, or of several stacked ones."""
    owned = {w.name: w for w in graph.body.weights}
    weights = [o for o in node.operands if o in owned]
    if not weights or any("." not in w for w in weights):
        return None
    parts = node.attr("parts")
    if parts:
        return "_".join(parts)
    owners = {w.rsplit(".", 1)[0] for w in weights}
    if len(owners) != 1 or any(owned[w].op != node.op for w in weights):
        return None
    return owners.pop()


def slot_name(graph: Graph, node: Node) -> str:
    """The name of a node's state: its own, or its owner's; a shared op keeps something for each of its uses."""
    owner = owner_of(graph, node)
    if owner is None:
        return names.variable(node.name)
    uses = [n.name for n in graph.nodes if n.op not in STRUCTURE and owner_of(graph, n) == owner]
    place = uses.index(node.name)
    return f"{owner}_{place + 1}" if place else owner


def parameters_in(sizes: tuple[int, ...]) -> int:
    return math.prod(sizes)
