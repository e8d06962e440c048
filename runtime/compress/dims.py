"""The dims of a whole model: which dim of which block is one with which, everywhere that it occurs.

A body knows its dims by names of its own; calls say what these stand for. Following every call from the root, with
each iteration of a loop by itself, gives the model's dims: the one along the residual stream, and those that a layer
alone has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...dsl.program import Body, Instance, Node, Parameter, Program
from ...dsl.source import Span
from ...lowering.graph import STRUCTURE, op_of

Path = tuple[str | int, ...]
Local = tuple[Path, str]


@dataclass(frozen=True)
class Place:
    """A block at a place of the model. `lent` are the paths of the shared instances that it is lent.

    `caller` is where it is called from, if that is one place: (path, node). `routed` says that it runs on chosen rows.
    """

    path: Path
    body: Body
    lent: Mapping[str, Path]
    caller: tuple[Path, Node] | None = None
    routed: bool = False

    def instance_path(self, instance: Instance) -> Path:
        return (*self.path, instance.name) if instance.owned else self.lent[instance.name]


@dataclass(frozen=True)
class Tie:
    """A dim in equal runs, each with something of its own: `count` runs, numbered by the dim `by` if there is one."""

    count: int
    by: str | None
    op: str
    span: Span


@dataclass(frozen=True)
class Loop:
    """Blocks one after the other. `kinds` say of each iteration what it is, whatever its sizes."""

    path: Path
    kinds: tuple[Any, ...]
    carried: int
    span: Span
    is_residual: bool

    @property
    def name(self) -> str:
        return text(self.path)


@dataclass(frozen=True)
class Experts:
    """Blocks that take turns: one for each place of the dim `over`."""

    path: Path
    over: str
    node: Node
    place: Path


@dataclass
class _Found:
    """What a walk of the program collects."""

    parents: dict[Local, Local] = field(default_factory=dict)
    order: dict[Local, int] = field(default_factory=dict)
    places: dict[Path, Place] = field(default_factory=dict)
    weights: list[tuple[Path, tuple[str, ...]]] = field(default_factory=list)
    loops: dict[Path, Loop] = field(default_factory=dict)
    routes: dict[Path, tuple[Path, str, Node]] = field(default_factory=dict)
    calls: dict[Path, int] = field(default_factory=dict)

    def root(self, local: Local) -> Local:
        while (up := self.parents.get(local, local)) != local:
            self.parents[local] = self.parents.get(up, up)
            local = up
        return local

    def join(self, a: Local, b: Local) -> None:
        """Make two dims one; the one nearer to the root, then the earlier, gives the name."""
        first, second = sorted((self.root(a), self.root(b)), key=lambda x: (len(x[0]), self.order[x]))
        self.parents[second] = first


class Dims:
    """The dims of a model by key: `hidden`, `layer.3.attention.heads`."""

    def __init__(self, program: Program):
        self.program = program
        self._found = _Found()
        self._enter(Place((), program.model, {}))
        for place in list(self._found.places.values()):
            self._join(place)

    # --- the walk -----------------------------------------------------------------------------------

    def _enter(self, place: Place) -> None:
        """Places in the order in which `Program.tensors` gives their weights."""
        found = self._found
        found.places[place.path] = place
        for dim in place.body.dims:
            found.order[(place.path, dim.name)] = len(found.order)
        found.weights.extend((place.path, w.dims) for w in place.body.weights)
        nodes = {n.attr("instance"): n for n in place.body.nodes if n.op in STRUCTURE}
        for instance in (i for i in place.body.instances if i.owned):
            node = nodes.get(instance.name)
            path, lent = (*place.path, instance.name), {n: self._lent(place, n) for n in instance.lends}
            routed = place.routed or node is not None and node.op == "route"
            for i, which in enumerate((0,) if instance.schedule is None else instance.schedule):
                inner = path if instance.schedule is None else (*path, i)
                caller = None if node is None else (place.path, node)
                self._enter(Place(inner, self.program.bodies[instance.bodies[which]], lent, caller, routed))

    def _lent(self, place: Place, name: str) -> Path:
        return place.instance_path(next(i for i in place.body.instances if i.name == name))

    def _join(self, place: Place) -> None:
        for node in place.body.nodes:
            if node.op not in STRUCTURE:
                continue
            instance = next(i for i in place.body.instances if i.name == node.attr("instance"))
            path = place.instance_path(instance)
            if node.op == "route":
                (over,) = node.attr("over")
                self._found.routes[path] = (place.path, over, node)
            elif node.op == "loop":
                self._found.loops[path] = self._loop(path, instance, node)
            inner = [path] if instance.schedule is None else [(*path, i) for i in range(len(instance.schedule))]
            for one in inner:
                self._found.calls[one] = self._found.calls.get(one, 0) + 1
                self._join_call(place, node, self._found.places[one])

    def _join_call(self, place: Place, node: Node, callee: Place) -> None:
        join = self._found.join
        for theirs, ours in node.bindings:
            if len(ours) == 1:
                join((place.path, ours[0]), (callee.path, theirs))
        values, inner = place.body.values(), callee.body.values()
        pairs = [(values[o], v) for o, v in zip(node.operands, callee.body.inputs, strict=False) if o is not None]
        pairs += [(r, inner[o]) for r, o in zip(node.results, callee.body.outputs, strict=False)]
        for mine, theirs_ in pairs:
            for a, b in zip(mine.type.dims, theirs_.type.dims, strict=False):
                join((place.path, a), (callee.path, b))

    def _loop(self, path: Path, instance: Instance, node: Node) -> Loop:
        bodies = [self.program.bodies[name] for name in instance.bodies]
        kinds = [_kind(self.program, body) for body in bodies]
        schedule = instance.schedule or ()
        carried = len(node.results)
        residual = all(_adds(body, i) for body in bodies for i in range(carried))
        return Loop(path, tuple(kinds[i] for i in schedule), carried, node.spans[0], residual)

    # --- what is found --------------------------------------------------------------------------------

    def key(self, path: Path, dim: str) -> str:
        """The model's dim that a dim of the body at a path is."""
        at, name = self._found.root((path, dim))
        return text((*at, name))

    @property
    def places(self) -> Mapping[Path, Place]:
        return self._found.places

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each dim that the data do not decide, in order of appearance."""
        found: dict[str, int] = {}
        for place in self.places.values():
            for dim in place.body.dims:
                if dim.size is not None:
                    found.setdefault(self.key(place.path, dim.name), dim.size)
        return found

    @cached_property
    def tensors(self) -> dict[str, tuple[Parameter, tuple[str, ...]]]:
        """Every weight and buffer of the model by path, with its axes as dims of the model."""
        pairs = zip(self.program.tensors(), self._found.weights, strict=True)
        return {p.name: (p, tuple(self.key(path, d) for d in dims)) for p, (path, dims) in pairs}

    @cached_property
    def tensor_places(self) -> dict[str, Path]:
        """Where the body stands that owns a weight."""
        return {p.name: at for p, (at, _) in zip(self.program.tensors(), self._found.weights, strict=True)}

    @cached_property
    def carried(self) -> frozenset[str]:
        """Dims that a weight has."""
        return frozenset(d for _, dims in self.tensors.values() for d in dims)

    @property
    def loops(self) -> Mapping[Path, Loop]:
        return self._found.loops

    @cached_property
    def experts(self) -> dict[Path, Experts]:
        """Layers of experts by path."""
        return {
            path: Experts(path, self.key(at, over), node, at) for path, (at, over, node) in self._found.routes.items()
        }

    def nodes(self) -> Iterator[tuple[Place, Node]]:
        """Each use of an op in each place."""
        for place in self.places.values():
            for node in place.body.nodes:
                if node.op not in STRUCTURE:
                    yield place, node

    @cached_property
    def ties(self) -> dict[str, tuple[Tie, ...]]:
        """Of each dim that ops take in equal runs: how, each way once."""
        found: dict[str, list[Tie]] = {}
        for place, node in self.nodes():
            op = op_of(node)
            for formal, by in op.grouped:
                dim = node.bound(formal)[0]
                key, span = self.key(place.path, dim), node.spans[0]
                if by in op.signature.formals():
                    other = self.key(place.path, node.bound(by)[0])
                    tie = Tie(self.sizes[other], other, node.op, span)
                else:
                    setting = op.setting(by)
                    tie = Tie(node.attr(by, setting.default if setting else None), None, node.op, span)
                if tie.by != key and all((t.count, t.by) != (tie.count, tie.by) for t in found.get(key, [])):
                    found.setdefault(key, []).append(tie)
        return {key: tuple(_merged(ties)) for key, ties in found.items() if _merged(ties)}

    @cached_property
    def grouped(self) -> frozenset[str]:
        """Dims that some op takes in equal runs, also where each place is a run."""
        return frozenset(
            self.key(place.path, node.bound(formal)[0])
            for place, node in self.nodes()
            for formal, by in op_of(node).grouped
            if by in op_of(node).signature.formals()
        )

    @cached_property
    def rigid(self) -> dict[str, tuple[str, Span]]:
        """Dims of which no places can be left out: the op that reads their index or couples them, and where."""
        found: dict[str, tuple[str, Span]] = {}
        for place, node in self.nodes():
            op = op_of(node)
            for formal in (*op.coupled, *op.index):
                for dim in dict(node.bindings).get(formal, ()):
                    found.setdefault(self.key(place.path, dim), (node.op, node.spans[0]))
        for place in self.places.values():
            for merged in (d for d in place.body.dims if d.factors):
                found.setdefault(self.key(place.path, merged.name), ("reshape", place.body.span))
        return found

    def called_once(self, path: Path) -> bool:
        return self._found.calls.get(path, 0) == 1

    def span_of(self, key: str) -> Span:
        """Where a dim is first seen: at the first weight that has it, else at the model."""
        for parameter, dims in self.tensors.values():
            if key in dims:
                return parameter.weight.span
        return self.program.span


def text(path: Path) -> str:
    return ".".join(str(segment) for segment in path)


def without_numbers(key: str) -> str:
    """`layer.3.mlp.ffn` as `layer.mlp.ffn`."""
    return ".".join(s for s in key.split(".") if not s.isdigit())


def is_named(key: str, name: str) -> bool:
    """Whether a name means a key: the key, or its end with the numbers of iterations left out."""
    plain = without_numbers(key)
    return name in (key, plain) or plain.endswith(f".{name}") or key.endswith(f".{name}")


def _merged(ties: list[Tie]) -> list[Tie]:
    """Without runs of which there is one, and without a count that a dim has, too."""
    named = {t.count for t in ties if t.by is not None}
    return [t for t in ties if t.by is not None or t.count != 1 and t.count not in named]


def _kind(program: Program, body: Body) -> Any:
    """What a body is, whatever its sizes: its blocks and weights by name. How often a layer is repeated is a size."""
    inner = tuple(
        (i.name, tuple(dict.fromkeys(_kind(program, program.bodies[b]) for b in i.bodies))) for i in body.instances
    )
    return (body.block, tuple(w.name for w in body.weights), inner)


def _adds(body: Body, i: int) -> bool:
    """Whether a carried value comes out as what it was plus something: by ops that are jointly linear in both."""
    if i >= len(body.inputs) or i >= len(body.outputs):
        return False
    made = {r.name: n for n in body.nodes for r in n.results}
    at: list[str] = [body.outputs[i]]
    seen: set[str] = set()
    while at:
        name = at.pop()
        if name == body.inputs[i].name:
            return bool(seen)
        node = made.get(name)
        if node is None or node.op in STRUCTURE or name in seen:
            continue
        seen.add(name)
        op = op_of(node)
        names = [o.name for o in op.signature.operands]
        for group in op.linear:
            if len(group) > 1 and set(group) <= {o.name for o in op.inputs}:
                at.extend(o for n, o in zip(names, node.operands, strict=False) if n in group and o is not None)
    return False
