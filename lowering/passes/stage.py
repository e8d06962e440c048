"""Cut the model along its layers into stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from ...dsl.diagnostics import fail
from ...dsl.layout import Stages
from ...dsl.program import Node, Value
from ..graph import STRUCTURE, Graph, GraphProgram
from ..placement.laid import Pipe, Stage
from . import lowering_pass


@lowering_pass(requires={"placed"}, ensures={"staged"})
def stage(program: GraphProgram) -> GraphProgram:
    """Split the loops of the model at the borders of stages, and say what each stage runs, takes and gives.

    before:  x = loop(layer, embedding)                     # stages over pipe, 2 ranks, 4 layers
    after:   x_1 = loop(layer, embedding, part = [0, 2])    # stage 0 gives x_1
             x   = loop(layer, x_1, part = [2, 4])          # stage 1 takes it

    Why here: behind placement, so that what crosses a border has its type; before the emitter, which writes a method a
    stage. What depends on no weight is worked out anew by each stage that reads it. Raises `SpecError`: no-layers,
    stages-do-not-fit, too-few-microbatches, not-built-yet.
    """
    layout = program.layout
    if layout is None or layout.stages is None or layout.size(layout.stages.axis) == 1:
        return program
    told, ranks = layout.stages, layout.size(layout.stages.axis)
    root = program.model
    counts = [len(root.schedule_of(n)) for n in root.nodes if n.op == "loop"]
    sizes = _sizes(sum(counts), ranks * told.chunks, told, program)
    _check(told, ranks)
    if root.body.emits:
        raise fail("not-built-yet", "a loss that the model itself states is not built yet in a pipeline", told.span)
    split, where, wholes = _split(root, sizes)
    stages = _stages(split, where, len(sizes))
    pipe = Pipe(told.axis, ranks, told.chunks, told.microbatches, told.schedule, stages)
    graphs = {**program.graphs, root.name: split}
    places = program.laid.places[root.name]
    places.update({part: places[whole] for part, whole in wholes.items()})  # a part gives what the whole gave
    return program.with_graphs(graphs, laid=replace(program.laid, pipe=pipe))


def _sizes(layers: int, stages: int, told: Stages, program: GraphProgram) -> tuple[int, ...]:
    """How many layers each stage has: as told, or as even as can be, the later ones larger."""
    name = program.program.name
    if told.layers is not None:
        if len(told.layers) != stages or sum(told.layers) != layers:
            raise fail("stages-do-not-fit", f"`{name}` has {layers} layers in {stages} stages, and these are "
                       f"{sum(told.layers)} in {len(told.layers)}", told.span, "every layer is in exactly one stage",
                       help="without `layers` they are divided evenly")  # fmt: skip
        return told.layers
    if layers < stages:
        raise fail("stages-do-not-fit", f"`{name}` has {layers} layers, which is too few for {stages} stages",
                   told.span, help=f"at most {layers} stages")  # fmt: skip
    borders = [layers * i // stages for i in range(stages + 1)]
    return tuple(b - a for a, b in pairwise(borders))


def _check(told: Stages, ranks: int) -> None:
    if told.microbatches < ranks:
        raise fail("too-few-microbatches", f"{told.microbatches} micro-batches cannot keep {ranks} stages busy",
                   told.span, help=f"`microbatches = {ranks}` or more")  # fmt: skip
    if told.chunks > 1 and told.microbatches % ranks:
        near = ranks * (told.microbatches // ranks + 1)
        raise fail("too-few-microbatches", f"a schedule with chunks takes micro-batches in groups of {ranks}",
                   told.span, f"{told.microbatches} is no multiple",
                   help=f"`microbatches = {near}` would do")  # fmt: skip


def _split(root: Graph, sizes: tuple[int, ...]) -> tuple[Graph, dict[str, int], dict[str, str]]:
    """The graph with its loops cut, the stage of each node, and what each new value is a part of the way to."""
    ends = list(accumulate(sizes))
    where: dict[str, int] = {}
    wholes: dict[str, str] = {}
    nodes: list[Node] = []
    values = set(root.values)
    done, now = 0, 0
    for node in root.nodes:
        if node.op != "loop":
            where[node.name] = now
            nodes.append(node)
            continue
        first, last = node.attr("part") or (0, len(root.schedule_of(node)))
        at, carried = first, node.operands
        while at < last:
            now = next(i for i, end in enumerate(ends) if end > done + at - first)
            to = min(last, first + ends[now] - done)
            results = node.results if to == last else tuple(_fresh(r, values) for r in node.results)
            attrs = tuple((k, v) for k, v in node.attrs if k != "part")
            if (at, to) != (0, len(root.instance(node.attr("instance")).schedule or ())):
                attrs = (*attrs, ("part", (at, to)))
            nodes.append(replace(node, results=results, operands=carried, attrs=attrs))
            where[results[0].name] = now
            wholes.update({r.name: w.name for r, w in zip(results, node.results, strict=True)})
            carried = (*(r.name for r in results), *node.operands[len(results) :])
            at = to
        done += last - first
    return root.with_nodes(tuple(nodes)), where, wholes


def _fresh(value: Value, names: set[str]) -> Value:
    n = 1
    while f"{value.name}_{n}" in names:
        n += 1
    names.add(f"{value.name}_{n}")
    return Value(f"{value.name}_{n}", value.type)


@dataclass
class _Made:
    """What one stage runs and reads, while it is found out."""

    nodes: set[str] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)


def _stages(graph: Graph, where: dict[str, int], count: int) -> tuple[Stage, ...]:
    free = _free(graph)
    made = [_Made() for _ in range(count)]

    def need(stage: int, value: str) -> None:
        """A stage reads a value: its own, one that it works out anew, or one that an earlier stage gives."""
        node = graph.producers.get(value)
        if node is None:
            return
        if node.name not in free and where[node.name] != stage:
            made[stage].reads.add(value)
            return
        if node.name not in made[stage].nodes:
            made[stage].nodes.add(node.name)
            for operand in (o for o in node.operands if o is not None):
                need(stage, operand)

    for node in graph.nodes:
        if node.name not in free:
            need(where[node.name], node.name)
    for name in graph.results:
        need(count - 1, name)
    takes: list[tuple[str, ...]] = [()] * count
    wanted: set[str] = set()
    for i in reversed(range(1, count)):  # what a later stage reads goes through those between
        here = (n for n in graph.nodes if n.name in made[i].nodes and n.name not in free)
        wanted = (wanted - {r.name for n in here for r in n.results}) | made[i].reads
        takes[i] = tuple(v for v in graph.values if v in wanted)
    found = []
    for i in range(count):
        nodes = tuple(n.name for n in graph.nodes if n.name in made[i].nodes)
        gives = takes[i + 1] if i + 1 < count else graph.results
        found.append(Stage(nodes, takes[i], gives, _owned(graph, nodes)))
    return tuple(found)


def _free(graph: Graph) -> set[str]:
    """Nodes that each stage may work out for itself: without weights but for a change of where one is."""
    weights = {w.name for w in graph.body.weights}
    inputs = {v.name for v in graph.body.inputs}
    found: set[str] = set()
    for node in graph.nodes:
        operands = [o for o in node.operands if o is not None]
        plain = all(o in inputs or o in graph.producers and graph.producers[o].name in found for o in operands)
        moved = node.op == "convert" and all(o in weights or o in graph.producers and
                                             graph.producers[o].name in found for o in operands)  # fmt: skip
        if node.op not in STRUCTURE and (plain or moved):
            found.add(node.name)
    return found


def _owned(graph: Graph, nodes: Iterable[str]) -> tuple[str, ...]:
    """The paths of what a stage owns: weights of the model, blocks, and iterations of loops."""
    kept = set(nodes)
    weights = {w.name for w in graph.body.weights}
    found: dict[str, None] = {}
    for node in (n for n in graph.nodes if n.name in kept):
        found.update(dict.fromkeys(o for o in node.operands if o in weights))
        if node.op == "call":
            found[node.attr("instance")] = None
        if node.op == "loop":
            name = node.attr("instance")
            first, last = node.attr("part") or (0, len(graph.schedule_of(node)))
            found.update(dict.fromkeys(f"{name}.{i}" for i in range(first, last)))
    return tuple(found)
