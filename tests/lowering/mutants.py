"""Mistakes of a sharded program, one at a time: of each conversion, deferred sum, loss and group of the norm.

A mutant is a program that could have come out of the shard pass: names and types are consistent wherever the mistake
allows, so that it does not die of something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from heddle.dsl.program import Node, Value
from heddle.lowering.graph import STRUCTURE, Graph, GraphProgram, renamed_attrs
from heddle.lowering.placement.laid import Laid, Stored
from heddle.lowering.placement.types import LETTERS, legal

Splits = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Mutant:
    """A program with one mistake. `norm`, where it is of the norm alone: (graph, weight, axes of its square sum)."""

    kind: str
    what: str
    program: GraphProgram
    norm: tuple[str, str, Splits] | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


def mutants(program: GraphProgram) -> Iterator[Mutant]:
    """Every mistake, in a fixed order."""
    for name in program.laid.places:
        graph = program.graphs[name]
        for i, node in enumerate(graph.nodes):
            if node.op == "convert":
                for kind, what, made in _of_conversion(graph, i, program.laid):
                    graphs = {**program.graphs, name: made}
                    yield Mutant(kind, f"{name}.{node.name} {what}".rstrip(), program.with_graphs(graphs))
            elif node.op not in STRUCTURE and node.results[0].type.kind in ("real", "loss"):
                for atom in program.laid.mesh.names():
                    made = _inserted(graph, i, atom)
                    graphs = {**program.graphs, name: made}
                    yield Mutant("insert", f"{name}.{node.name} all_reduce over {atom}", program.with_graphs(graphs))
    yield from _of_weights(program)
    yield from _of_sums(program)


# --- conversions ----------------------------------------------------------------------------------


def _of_conversion(graph: Graph, i: int, laid: Laid) -> Iterator[tuple[str, str, Graph]]:
    node = graph.nodes[i]
    source, own = node.operands[0] or "", node.name
    rest = (*graph.nodes[:i], *graph.nodes[i + 1 :])
    yield "drop", "", _renamed(graph.with_nodes(rest), {own: source})
    users = [j for j, n in enumerate(graph.nodes) if own in n.operands]
    if len(users) + (own in graph.results) > 1:
        for j in users:
            nodes = list(graph.nodes)
            nodes[j] = _reading(nodes[j], {own: source})
            yield "drop", f"for {nodes[j].name}", graph.with_nodes(tuple(nodes))
    again = replace(node, results=(Value(f"{own}_again", node.results[0].type),), operands=(own,))
    behind = tuple(_reading(n, {own: again.name}) for n in graph.nodes[i + 1 :])
    doubled = graph.with_nodes((*graph.nodes[: i + 1], again, *behind))
    yield "double", "", _ending(doubled, {own: again.name})
    for j in users:
        moved = _moved(graph, i, j)
        if moved is not None:
            yield "move", f"behind {graph.nodes[j].name}", moved
    yield from _retyped(graph, i, node)
    axes = node.attr("axes")
    for k in range(len(axes)):
        for other in laid.mesh.names():
            if other not in axes:
                changed = (*axes[:k], other, *axes[k + 1 :])
                yield "other factor", "/".join(changed), _with_attrs(graph, i, axes=changed)
    for atom in axes if len(axes) > 1 else ():
        yield "part of the factors", atom, _with_attrs(graph, i, axes=(atom,))
    yield from _other_dims(graph, i, node)


def _retyped(graph: Graph, i: int, node: Node) -> Iterator[tuple[str, str, Graph]]:
    src, dst = node.attr("src"), node.attr("dst")
    for which, old in (("src", src), ("dst", dst)):
        for letter in LETTERS if isinstance(old, str) else ():
            pair = (letter, dst) if which == "src" else (src, letter)
            kind = legal(*pair)
            if letter != old and kind and "N" not in pair:
                made = _with_attrs(graph, i, kind=kind, src=pair[0], dst=pair[1])
                yield f"{which} type", f"{src} -> {dst} as {pair[0]} -> {pair[1]}", made


def _other_dims(graph: Graph, i: int, node: Node) -> Iterator[tuple[str, str, Graph]]:
    """Split, or joined, along another dim; the result's type says so."""
    src, dst, axes = node.attr("src"), node.attr("dst"), node.attr("axes")
    have, to = graph.values[node.operands[0] or ""].type.dims, node.attr("to")
    for which in ("src", "dst"):
        old = src if which == "src" else dst
        for dim in range(len(to)) if isinstance(old, int) else ():
            if dim == old:
                continue
            if which == "src":
                yield "other dim", f"src {dim}", _with_attrs(graph, i, src=dim)
                continue
            whole = graph.dims[have[dim]]
            size = None if whole.size is None else whole.size // 2
            axes_now = (*whole.axes, *axes)
            part = replace(whole, name=f"{whole.name}/other", size=size, axes=axes_now, whole=whole.whole or whole.name)
            dims = tuple(part.name if k == dim else d for k, d in enumerate(have))
            made = _with_attrs(graph, i, dst=dim, to=dims)
            result = Value(node.name, replace(node.results[0].type, dims=dims))
            nodes = tuple(replace(n, results=(result,)) if n.name == node.name else n for n in made.nodes)
            yield "other dim", f"dst {dim}", made.with_nodes(nodes, dims=(*graph.body.dims, part))


def _moved(graph: Graph, i: int, j: int) -> Graph | None:
    """A conversion behind what reads it, which then works on what was to be converted."""
    node, user = graph.nodes[i], graph.nodes[j]
    if user.op in (*STRUCTURE, "convert") or len(user.results) > 1:
        return None
    before, behind = graph.values[node.operands[0] or ""].type.dims, node.results[0].type.dims
    (result,), src, dst = user.results, node.attr("src"), node.attr("dst")
    swap = {b: a for a, b in zip(before, behind, strict=True) if a != b}
    dims = tuple(swap.get(d, d) for d in result.type.dims)
    places = {x: result.type.dims.index(behind[x]) for x in (src, dst)
              if isinstance(x, int) and behind[x] in result.type.dims}  # fmt: skip
    if any(isinstance(x, int) and x not in places for x in (src, dst)):
        return None
    early = Value(f"{result.name}_early", replace(result.type, dims=dims))
    attrs = renamed_attrs(user, lambda d: swap.get(d, d))
    bindings = tuple((f, tuple(swap.get(d, d) for d in ds)) for f, ds in user.bindings)
    moved_user = _reading(replace(user, results=(early,), attrs=attrs, bindings=bindings), {node.name: node.operands[0] or ""})
    converted = replace(node, results=(result,), operands=(early.name,))
    converted = _attrs(converted, src=places.get(src, src), dst=places.get(dst, dst), to=result.type.dims)
    nodes = [*graph.nodes[:j], moved_user, converted, *graph.nodes[j + 1 :]]
    if not any(node.name in n.operands for n in nodes) and node.name not in graph.results:
        nodes.remove(node)
    return graph.with_nodes(tuple(nodes))


def _inserted(graph: Graph, i: int, atom: str) -> Graph:
    """A sum over ranks that nobody asked for."""
    node = graph.nodes[i]
    result = node.results[0]
    extra = Value(f"{result.name}_extra", result.type)
    attrs = (("kind", "all_reduce"), ("axes", (atom,)), ("src", "P"), ("dst", "I"), ("to", result.type.dims))
    added = Node((extra,), "convert", (result.name,), attrs, (), node.spans)
    behind = tuple(_reading(n, {result.name: extra.name}) for n in graph.nodes[i + 1 :])
    return _ending(graph.with_nodes((*graph.nodes[: i + 1], added, *behind)), {result.name: extra.name})


# --- what a step owes -----------------------------------------------------------------------------


def _of_weights(program: GraphProgram) -> Iterator[Mutant]:
    mesh = program.laid.mesh.names()
    for name, table in program.laid.weights.items():
        trained = {w.name for w in program.graphs[name].body.weights if w.trained}
        for weight, stored in table.items():
            if weight not in trained:
                continue
            held = [a for atoms in stored.splits for a in atoms]

            def syncs(sync: tuple[str, ...], *, of: Any = (name, weight, stored)) -> GraphProgram:
                return _stored(program, of[0], of[1], replace(of[2], sync=sync))

            for atom in stored.sync:
                rest = tuple(a for a in stored.sync if a != atom)
                yield Mutant("sync dropped", f"{name}.{weight} over {atom}", syncs(rest))
                yield Mutant("sync doubled", f"{name}.{weight} over {atom}", syncs((*stored.sync, atom)))
                for other in mesh:
                    if other not in stored.sync:
                        made = tuple(other if a == atom else a for a in stored.sync)
                        yield Mutant("sync on another axis", f"{name}.{weight} over {atom} -> {other}", syncs(made))
            for atom in mesh:
                if atom not in stored.sync:
                    made = tuple(sorted((*stored.sync, atom), key=mesh.index))
                    yield Mutant("sync added", f"{name}.{weight} over {atom}", syncs(made))
            for atom in mesh:
                if atom in held:
                    splits = tuple(tuple(a for a in atoms if a != atom) for atoms in stored.splits)
                elif stored.splits:
                    splits = ((*stored.splits[0], atom), *stored.splits[1:])
                else:
                    continue
                changed = _stored(program, name, weight, replace(stored, splits=splits))
                kind = "norm group dropped" if atom in held else "norm group added"
                yield Mutant(kind, f"{name}.{weight} over {atom}", changed, (name, weight, splits))


def _of_sums(program: GraphProgram) -> Iterator[Mutant]:
    mesh = program.laid.mesh.names()
    for name, sums in program.laid.sums.items():
        for label, axes in sums.items():
            for atom in mesh:
                is_there = atom in axes
                changed = tuple(a for a in mesh if (a in axes) != (a == atom))
                laid = replace(program.laid, sums={**program.laid.sums, name: {**sums, label: changed}})
                kind = "sum dropped" if is_there else "sum added"
                yield Mutant(kind, f"{name}.{label} over {atom}", replace(program, laid=laid))


# --- changing graphs ------------------------------------------------------------------------------


def _stored(program: GraphProgram, graph: str, weight: str, stored: Stored) -> GraphProgram:
    weights = {**program.laid.weights, graph: {**program.laid.weights[graph], weight: stored}}
    return replace(program, laid=replace(program.laid, weights=weights))


def _attrs(node: Node, **changes: Any) -> Node:
    return replace(node, attrs=tuple((k, changes.get(k, v)) for k, v in node.attrs))


def _with_attrs(graph: Graph, i: int, **changes: Any) -> Graph:
    return graph.with_nodes((*graph.nodes[:i], _attrs(graph.nodes[i], **changes), *graph.nodes[i + 1 :]))


def _reading(node: Node, names: Mapping[str, str]) -> Node:
    return replace(node, operands=tuple(None if o is None else names.get(o, o) for o in node.operands))


def _ending(graph: Graph, names: Mapping[str, str]) -> Graph:
    """Results that are other values."""
    return graph.with_nodes(
        graph.nodes,
        outputs=tuple(names.get(o, o) for o in graph.body.outputs),
        emits=tuple((k, label, names.get(v, v)) for k, label, v in graph.body.emits),
    )


def _renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    return _ending(graph.with_nodes(tuple(_reading(n, names) for n in graph.nodes)), names)

