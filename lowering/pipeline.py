"""The compiler on one page: the passes, in order, each order with its reason."""

from __future__ import annotations

from dataclasses import replace

from ..dsl.layout import Layout
from ..dsl.program import Program
from .build import build
from .graph import GraphProgram
from .passes import Pass
from .passes.drop_dead import drop_dead
from .passes.find_epilogues import find_epilogues
from .passes.fuse_chains import fuse_chains
from .passes.fuse_parallel import fuse_parallel
from .passes.hoist import hoist
from .passes.infer_types import infer_types
from .passes.join_heads import join_heads
from .passes.keep_contracts import keep_contracts
from .passes.mark_recompute import mark_recompute
from .passes.postpone_sums import postpone_sums
from .passes.prove_placement import prove_placement
from .passes.settle import settle
from .passes.shard import shard
from .passes.stage import stage
from .passes.stream import stream
from .target import TARGETS, Target

PASSES: tuple[Pass, ...] = (
    infer_types,  # first: everything later trusts the types
    drop_dead,  # before fusion, which must not see readers that are not there
    settle,  # before fusion, which may join what runs at different times
    hoist,  # before fusion, which must not mix constants with data
    shard,  # before fusion, whose products must be of parts that lie alike; identity without a layout
    prove_placement,  # behind shard, and at once: what follows joins what is on one rank
    keep_contracts,  # behind placement: all collectives are there
    stage,  # behind placement: what crosses a border has its type
    mark_recompute,  # behind placement: a collective inside is made again, too
    fuse_parallel,  # before state, which belongs to the fused op
    stream,  # state of what is really computed
    postpone_sums,  # before kernels are found, of which a sum and what reads it become one
    fuse_chains,  # behind all that changes nodes: joins what keeps nothing between steps; identity without kernels
    find_epilogues,  # behind what is one kernel: that is what a product may end with as a whole
    join_heads,  # last: nothing more changes what is read by whom
)


def check_order(passes: tuple[Pass, ...] = PASSES) -> None:
    """Every pass finds the facts that it needs. Raises ValueError."""
    known = frozenset({"built"})
    for p in passes:
        if not p.requires <= known:
            raise ValueError(f"{p.name} needs {sorted(p.requires - known)}, which no pass before it gives")
        known |= p.ensures


check_order()


def lower(
    program: Program, until: str | None = None, layout: Layout | None = None, target: Target = TARGETS["cpu"]
) -> GraphProgram:
    """Run the passes, verify behind each; stop behind the pass named `until`. Raises KeyError for an unknown name.

    With a layout the graphs are those of one rank of its mesh; `target` is what kernels are for.
    """
    names = [p.name for p in PASSES]
    if until is not None and until not in ("build", *names):
        raise KeyError(until)
    graphs = replace(build(program), layout=layout, target=target)
    if until == "build":
        return graphs
    for step in PASSES:
        before = sum(len(g.nodes) for g in graphs.graphs.values())
        graphs = step(graphs)
        for graph in graphs.graphs.values():
            graph.verify()
        history = (*graphs.history, (step.name, before))
        graphs = graphs.with_graphs(graphs.graphs, facts=graphs.facts | step.ensures, history=history)
        if step.name == until:
            break
    return graphs
