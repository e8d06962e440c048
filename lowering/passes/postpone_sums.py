"""The last sum of an iteration, where it costs nothing: in the kernel that reads it."""

from __future__ import annotations

from dataclasses import replace

from ...dsl.program import Instance, Node, Value
from ..chains.fused import is_fusible
from ..graph import Graph, GraphProgram
from . import lowering_pass


@lowering_pass(requires={"streamed"}, ensures={"postponed"})
def postpone_sums(program: GraphProgram) -> GraphProgram:
    """An iteration that ends with a sum gives both terms, and the next begins with the sum.

    before:  x -> y = rms_norm(x);  m = mlp(y);  return x + m
    after:   x, late -> x_1 = x + late;  y = rms_norm(x_1);  m = mlp(y);  return x_1, m

    Why here: before kernels are found, of which the sum and the norm behind it become one: a value is written and read
    once less. The first iteration has nothing to add, and is a block of its own. Not where iterations are made again in
    the backward pass, which keep what they are given: two terms are more than a sum. Identity for a target without
    kernels, and in a pipeline, whose stages send one value to the next. On a mesh both terms lie as their sum does,
    which is proved before.
    """
    piped = program.laid is not None and program.laid.pipe is not None
    if not program.target.kernels or piped:
        return program
    for name in program.graphs:
        for node in program.graphs[name].nodes:
            if node.op == "loop":
                program = _postponed(program, program.graphs[name], node)
    return program


def _postponed(program: GraphProgram, graph: Graph, loop: Node) -> GraphProgram:
    """The program with one loop changed, or as it is where that cannot be or would not pay."""
    instance = graph.instance(loop.attr("instance"))
    length = len(instance.schedule or ())
    if length < 2 or len(loop.results) != 1 or loop.attr("part") or loop.attr("recompute") or not instance.owned:
        return program
    elsewhere = [i for g in program.graphs.values() for i in g.body.instances if i is not instance]
    if any(set(i.bodies) & set(instance.bodies) for i in elsewhere):
        return program
    bodies = [program.graphs[b] for b in instance.bodies]
    if not all(_ends_with_sum(b) and _begins_with_kernel(b) for b in bodies):
        return program
    first = bodies[(instance.schedule or (0,))[0]]
    own = f"{first.name}_first"
    made = {b.name: _later(b) for b in bodies} | {own: _first(first, own)}
    states = program.states | ({own: program.states[first.name]} if first.name in program.states else {})
    graphs = {**program.graphs, **made, graph.name: _in_two(graph, loop, instance, own)}
    return program.with_graphs(graphs, states=states)


def _last(body: Graph) -> Node | None:
    return body.producers.get(body.body.outputs[0]) if len(body.body.outputs) == 1 else None


def _ends_with_sum(body: Graph) -> bool:
    """Whether a block gives a sum of two values of its shape, which nothing else reads, and neither is made by a kernel
    of rows for the sum alone."""
    last, given = _last(body), body.body.inputs[:1]
    if last is None or last.op != "add" or not is_fusible(body, last) or body.users.get(last.name):
        return False
    made = [body.producers[o] for o in last.operands if o in body.producers]
    if any(is_fusible(body, n) and body.users.get(n.name) == (last,) for n in made):
        return False  # that kernel writes the sum in place of its term
    kinds = [body.values[o].type for o in last.operands if o is not None]
    weights = {w.name for w in body.body.weights}
    return (
        len(kinds) == 2
        and all(k == last.results[0].type == given[0].type for k in kinds)
        and not weights & set(last.operands)
    )


def _begins_with_kernel(body: Graph) -> bool:
    """Whether a kernel reads what the block is given first, so that the sum costs it nothing."""
    users = body.users.get(body.body.inputs[0].name, ())
    return any(is_fusible(body, n) for n in users if n is not _last(body))


def _terms(body: Graph) -> tuple[str, ...]:
    last = _last(body)
    assert last is not None
    return tuple(o for o in last.operands if o is not None)


def _without_sum(body: Graph) -> tuple[Node, ...]:
    return tuple(n for n in body.nodes if n is not _last(body))


def _first(body: Graph, name: str) -> Graph:
    """The block that gives both terms of its sum."""
    return body.with_nodes(_without_sum(body), name=name, outputs=_terms(body))


def _later(body: Graph) -> Graph:
    """The block that begins with the sum of two terms, and gives two."""
    x, *rest = body.body.inputs
    names = set(body.values)
    late, whole = (Value(_free(n, names), x.type) for n in ("late", x.name))
    add = _last(body)
    assert add is not None
    begins = Node((whole,), "add", (x.name, late.name), add.attrs, add.bindings, add.spans)
    nodes = (
        begins,
        *(
            replace(n, operands=tuple(whole.name if o == x.name else o for o in n.operands))
            for n in _without_sum(body)
        ),
    )
    outputs = tuple(whole.name if t == x.name else t for t in _terms(body))
    return body.with_nodes(nodes, inputs=(x, late, *rest), outputs=outputs)


def _in_two(graph: Graph, loop: Node, instance: Instance, own: str) -> Graph:
    """The loop as its first iteration, the others, and the last sum."""
    schedule = instance.schedule or ()
    bodies = (*instance.bodies, own)
    kept = sorted({bodies.index(own), *schedule[1:]})
    changed = replace(
        instance,
        bodies=tuple(bodies[i] for i in kept),
        schedule=(kept.index(len(bodies) - 1), *(kept.index(i) for i in schedule[1:])),
    )
    names, (result,) = set(graph.values), loop.results
    terms = [tuple(Value(_free(n, names), result.type) for n in (result.name, "late")) for _ in range(2)]
    start, *rest = loop.operands
    attrs = tuple((k, v) for k, v in loop.attrs if k != "part")
    one = replace(loop, results=terms[0], operands=(start, *rest), attrs=(*attrs, ("part", (0, 1))))
    given = (*(t.name for t in terms[0]), *rest)
    others = replace(loop, results=terms[1], operands=given, attrs=(*attrs, ("part", (1, len(schedule)))))
    whole = Node((result,), "add", tuple(t.name for t in terms[1]), (), (("D", result.type.dims),), loop.spans)
    nodes = tuple(m for n in graph.nodes for m in ((one, others, whole) if n is loop else (n,)))
    instances = tuple(changed if i is instance else i for i in graph.body.instances)
    return graph.with_nodes(nodes, instances=instances)


def _free(name: str, names: set[str]) -> str:
    """A name that no value has yet; it is taken from now on."""
    number, found = 1, name
    while found in names:
        number += 1
        found = f"{name}_{number}"
    names.add(found)
    return found
