"""Derive what a step of a stream must remember, from roles: the state of decoding.

The law: what is receiver-free and only grows is folded into one state; what a later receiver may still read is kept for
as long as its mask allows; the rest is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...dsl import syntax as sx
from ...dsl.diagnostics import Diagnostic, Label, SpecError
from ...dsl.program import TOKENS, Dim, Node
from ...dsl.source import NOWHERE, Span
from ..afterwards import parts
from ..clocks import Reach, groups, reach, widest
from ..graph import STRUCTURE, Graph, GraphProgram, State, op_of
from ..masks import hull
from . import lowering_pass


@lowering_pass(requires={"stacked"}, ensures={"streamed"})
def stream(program: GraphProgram) -> GraphProgram:
    """Add to `states` what each node keeps; note what cannot be streamed.

    before:  uc = causal_conv(u, taps = 4)
    after:   uc = causal_conv(u, taps = 4)        # keeps 3 rows of u

    Why here: fused ops keep one state for all their parts. Raises nothing: a model that cannot be streamed still
    trains;
    `streaming_errors` says why, and `generate` asks.
    """
    return program.with_graphs(program.graphs, states={g.name: tuple(_states(g)) for g in program.graphs.values()})


def _states(graph: Graph) -> list[State]:
    found = []
    for node in graph.nodes:
        if node.op in STRUCTURE or op_of(node).monoid is None:
            continue
        monoid = op_of(node).monoid
        assert monoid is not None
        if not _along_stream(graph, node, monoid.formal):
            continue
        if monoid.peers == "earlier" and monoid.receiver_free:
            found.append(_fold(graph, node))
        elif monoid.peers == "neighbours":
            found.append(_window(graph, node))
        elif monoid.peers == "group":
            found.extend(_open(graph, node))
        elif monoid.peers == "masked":
            found.extend(_caches(graph, node))
    return found


def _along_stream(graph: Graph, node: Node, formal: str) -> bool:
    """Whether a formal, of a repeated operand in any of its places, stands for rows that come one after the other."""
    return any(
        graph.dims[d].clock is not None
        for f, dims in node.bindings
        if f == formal or f.rstrip("0123456789") == formal
        for d in dims
    )


def _sizes(graph: Graph, dims: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(graph.size(d) or 0 for d in dims)


def _fold(graph: Graph, node: Node) -> State:
    """A scan: one state for all earlier rows."""
    rows = tuple((f.lower(), _sizes(graph, node.bound(f))) for f in ("H", "P", "G", "N"))
    return State(node.name, "fold", None, rows, "a scan: what is earlier is one state, whoever asks")


def _window(graph: Graph, node: Node) -> State:
    keep = node.attr("taps") - 1
    return State(node.name, "window", keep, (("row", _sizes(graph, node.bound("C"))),), f"a window of {keep + 1} rows")


def _open(graph: Graph, node: Node) -> Iterator[State]:
    """The rows of the group that is open: a group's rows come with its last token."""
    _, clock = node.attr("by")
    width = widest(clock)
    if width is None:
        return
    heads = _sizes(graph, node.bound("H"))
    rows = (("x", heads + _sizes(graph, node.bound("D"))), ("say", heads + _sizes(graph, node.bound("R"))))
    yield State(node.name, "open", width - 1, rows, f"a group has {width} rows, and ends with the last")


def _sources(graph: Graph, node: Node) -> Iterator[tuple[sx.Expr, Dim, Dim]]:
    """Each source's mask, and the dims of its queries and keys."""
    (queries,) = node.bound("Q")
    for i, mask in enumerate(node.attr("masks")):
        (keys,) = node.bound(f"S{i + 1}" if i else "S")
        yield mask, graph.dims[queries], graph.dims[keys]


def _reach(mask: sx.Expr, queries: Dim, keys: Dim) -> Reach:
    """What a stream must keep of the keys of a source, and whether a query would have to wait."""
    if keys.clock is None or queries.clock is None:
        return Reach(None, True)
    if queries.name == keys.name:
        bounds = hull(mask)
        return Reach(
            bounds.behind if bounds.behind is None else max(0, bounds.behind), bounds.ahead is None or bounds.ahead > 0
        )
    return reach(mask, queries.clock, keys.clock)


def _caches(graph: Graph, node: Node) -> Iterator[State]:
    """Keys and values of each source, as far back as its mask lets see."""
    (kv,), (d,), (e,) = node.bound("K"), node.bound("D"), node.bound("E")
    rows = (("k", _sizes(graph, (kv, d))), ("v", _sizes(graph, (kv, e))))
    for mask, queries, keys in _sources(graph, node):
        keep = _reach(mask, queries, keys).keep
        why = "later queries may see every key" if keep is None else f"later queries see {keep} keys back"
        yield State(node.name, "cache", keep, rows, why, None if keys.clock == TOKENS else keys.clock)


def state_bytes(program: GraphProgram, length: int, item_bytes: int = 2) -> int:
    """Bytes that one sequence of `length` tokens keeps: rows in the compute dtype, folded states in fp32."""
    return sum(_bytes(program, program.model, length, item_bytes).values())


def _bytes(program: GraphProgram, graph: Graph, length: int, item_bytes: int) -> dict[str, int]:
    total = {"rows": 0, "folds": 0}
    for state in program.states[graph.name]:
        if state.kind == "fold":
            sizes = {name: math.prod(size) for name, size in state.rows}
            total["folds"] += 4 * sizes["h"] * sizes["p"] * sizes["n"]
        else:
            most = length if state.clock is None else groups(state.clock, length) * state.clock.times
            rows = most if state.keep is None else min(state.keep, most) if state.kind == "cache" else state.keep
            total["rows"] += rows * item_bytes * sum(math.prod(size) for _, size in state.rows)
    for node in (n for n in graph.nodes if n.op in ("call", "loop")):  # an expert keeps nothing
        instance = graph.instance(node.attr("instance"))
        each = [_bytes(program, program.graphs[b], length, item_bytes) for b in instance.bodies]
        for which in graph.schedule_of(node):
            for key, value in each[which].items():
                total[key] += value
    return total


def streaming_errors(program: GraphProgram) -> tuple[Diagnostic, ...]:
    """Why a model cannot generate token by token: masks that look ahead, statistics along the stream."""
    found = _many(program.graphs[program.program.root])
    reached = _reached(program)
    for graph in (g for g in program.graphs.values() if g.name in reached):
        for node in parts(graph, program.emitting).result:  # losses may look ahead
            if node.op in STRUCTURE or op_of(node).monoid is None:
                continue
            found.extend(_late(graph, node))
    return tuple(found)


def _many(graph: Graph) -> list[Diagnostic]:
    """A stream is one sequence for each batch row."""
    for dim in graph.dims.values():
        if dim.clock == TOKENS and len(dim.lead) > 1:
            several = ", ".join(dim.lead)
            first = next((n.spans[0] for n in graph.nodes if n.spans), NOWHERE)
            return [
                Diagnostic(
                    "not-built-yet",
                    f"decoding a `{dim.name}` for each of [{several}] is not built yet",
                    Label(first, "tokens are read here"),
                    help="the model can be trained, but not sampled from",
                )
            ]
    return []


def _reached(program: GraphProgram) -> set[str]:
    names, waiting = set(), [program.program.root]
    while waiting:
        name = waiting.pop()
        names.add(name)
        graph = program.graphs[name]
        called = [n.attr("instance") for n in parts(graph, program.emitting).result if n.op in STRUCTURE]
        waiting.extend(b for i in called for b in graph.instance(i).bodies if b not in names)
    return names


def _late(graph: Graph, node: Node) -> list[Diagnostic]:
    monoid, span = op_of(node).monoid, node.spans[0] if node.spans else NOWHERE
    assert monoid is not None
    if not _along_stream(graph, node, monoid.formal):
        return []
    if monoid.peers == "all":
        return [
            Diagnostic(
                "not-causal",
                f"`{node.op}` reads the whole sequence, so tokens cannot be made one by one",
                Label(span, "needs the last token for the first row"),
                help="the model can be trained, but not sampled from",
            )
        ]
    if monoid.peers == "group" and widest(node.attr("by")[1]) is None:
        return [
            Diagnostic(
                "not-causal",
                f"`{node.op}` waits for the last token of a document, so tokens cannot be made one by one",
                Label(span, "a group may be as long as its document"),
                help="`seq.piece = seq.position // 16` makes groups that end",
            )
        ]
    if monoid.peers == "masked":
        for mask, queries, keys in _sources(graph, node):
            if found := _looks_ahead(mask, queries, keys, span):
                return [found]
    return []


def _looks_ahead(mask: sx.Expr, queries: Dim, keys: Dim, span: Span) -> Diagnostic | None:
    if not _reach(mask, queries, keys).late:
        return None
    if queries.name == keys.name:
        ahead = hull(mask).ahead
        far = "every later key" if ahead is None else f"{ahead} keys ahead"
        return Diagnostic(
            "not-causal",
            f"attention sees {far}, so tokens cannot be made one by one",
            Label(span, "this mask looks ahead"),
            help="`causal` and `window(span)` are masks that look back only",
        )
    if keys.clock is None or queries.clock is None:
        which = keys if keys.clock is None else queries
        return Diagnostic(
            "not-built-yet",
            f"decoding with attention between `{queries.name}` and `{keys.name}` is not built yet",
            Label(span, f"`{which.name}` does not come with the tokens"),
        )
    return Diagnostic(
        "not-causal",
        f"a row of `{queries.name}` may see rows of `{keys.name}` that come later, so tokens cannot be made one by one",
        Label(span, "this mask is not proved to look back only"),
        help=f"a group comes with its last token: `key.{keys.clock.name} < query.{keys.clock.name}` sees those that"
        " ended",
    )


def require_causal(program: GraphProgram) -> None:
    """Raises `not-causal`, with the line of each op that looks ahead."""
    errors = streaming_errors(program)
    if errors:
        raise SpecError(errors)
