"""`heddle certify`: what is known of a model under a layout, as one card that a machine can read.

Three opinions that share nothing but the declarations of ops: the static proof, for any size; that of spmd_types' own
checker on the generated module, where that package is installed; and numbers, where the model is small enough to run
here: every rank, simulated, against one device in fp64. Beside them is one step on shapes alone, for any size: where a
checker gives no answer, that says whether the module is what cannot be run.
"""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor

from ..dsl.layout import Layout
from ..dsl.program import Program
from ..lowering.graph import GraphProgram
from .compile import Artifact, build, class_of, instantiate
from .distributed import check_stored, over_of
from .lib import Gathered, Model
from .lib.laid import (
    global_counts,
    global_sums,
    gradient_norm,
    laid_parameters,
    part,
    sync_gradients,
    take_whole,
)
from .lib.pipeline import keep_stages, pipelined
from .lib.schedules import order
from .lib.simulated import simulate
from .opinion.ask import ask, is_installed
from .plan.dry import dry_run
from .plan.step import Feed, inputs
from .train.rows import check_cuts

MOST_WEIGHTS, MOST_RANKS = 4_000_000, 16
"""What is run here: as many weights on as many ranks."""
CLOSE = 1e-10
"""How near numbers of ranks must be to those of one device, in fp64, relative to their size or to one."""


def certify(program: Program, layout: Layout, seq: int, seed: int = 0) -> dict[str, Any]:
    """The card: `holds` says whether all that was looked at holds, and the module was seen to run to its end.

    Raises `SpecError` for a layout that cannot be, UserError `uneven-batch` for rows that it cannot cut, and
    `UnprovedLayout` (a fault of ours) for one that is not proved.
    """
    check_stored(layout)
    artifact = build(program, layout=layout)
    check_cuts(class_of(artifact), seq)
    lowered = artifact.lowered
    hollow = instantiate(artifact, seed=None, device="meta")
    inside = prod(n for axis, n in hollow.axes.items() if axis not in hollow.rows)
    feed = Feed(2, lcm(seq, inside), documents=False)
    run = dry_run(artifact, feed, over_of(artifact, layout))
    card: dict[str, Any] = {
        "model": program.name,
        "layout": layout.name,
        "ranks": layout.ranks,
        "mesh": dict(layout.mesh),
        "artifact": artifact.name,
        "proof": _proof(lowered),
        "run": run.to_json(),
        "opinion": _opinion(artifact, hollow, feed),
        "pipeline": _pipeline(lowered),
        "numbers": {"close": None, "why": "the module does not run"} if run.ends is False
        else _numbers(program, artifact, layout, seq, seed),
    }  # fmt: skip
    pipeline = card["pipeline"]
    said = (run.ends, card["numbers"]["close"], card["opinion"]["accepted"])
    schedule = all(pipeline.get(k, True) for k in ("once", "ends"))
    card["holds"] = False not in said and True in said and schedule
    return card


def _proof(lowered: GraphProgram) -> dict[str, Any]:
    """What was proved when the layout was compiled: it would not have compiled otherwise."""
    laid = lowered.laid
    kinds = Counter(n.attr("kind") for g in lowered.graphs.values() for n in g.nodes if n.op == "convert")
    weights = [stored for own in laid.weights.values() for stored in own.values()]
    return {
        "values": sum(len(places) for places in laid.places.values()),
        "conversions": dict(sorted(kinds.items())),
        "weights": len(weights),
        "split": sum(any(s.splits) for s in weights),
        "owed": sum(bool(s.sync) for s in weights),
        "contracts": len(lowered.layout.expects) if lowered.layout is not None else 0,
    }


def _pipeline(lowered: GraphProgram) -> dict[str, Any]:
    """That each layer is in exactly one stage, and that no rank waits for what another never sends."""
    pipe = lowered.laid.pipe
    if pipe is None:
        return {}
    layers = Counter(path for stage in pipe.stages for path in stage.owns if path.rpartition(".")[2].isdigit())
    orders = [order(rank, pipe.size, pipe.microbatches, pipe.chunks, pipe.parts) for rank in range(pipe.size)]
    return {
        "stages": [list(stage.owns) for stage in pipe.stages],
        "once": all(n == 1 for n in layers.values()),
        "ends": _ends(orders, pipe.size, pipe.chunks),
    }


def _ends(orders: list[Any], ranks: int, chunks: int) -> bool:
    """Whether a schedule runs to its end where a rank waits for what it takes, and for nothing else."""
    done: set[tuple[str, int, int]] = set()
    at = [0] * ranks
    last = ranks * chunks - 1
    moving = True
    while moving:
        moving = False
        for rank, actions in enumerate(orders):
            while at[rank] < len(actions):
                kind, batch, chunk = actions[at[rank]]
                stage = rank + chunk * ranks
                needs = {"F": ("F", batch, stage - 1), "B": ("B", batch, stage + 1), "W": ("B", batch, stage)}[kind]
                if needs[2] not in (-1, last + 1) and needs not in done:
                    break
                done.add((kind, batch, stage))
                at[rank] += 1
                moving = True
    return all(at[rank] == len(actions) for rank, actions in enumerate(orders))


def _opinion(artifact: Artifact, hollow: Model, feed: Feed) -> dict[str, Any]:
    """What spmd_types says; `accepted` is None where it was not asked, or could not answer."""
    if not is_installed():
        return {"accepted": None, "why": "spmd_types is not installed; the extra `spmd` of heddle-lang brings it"}
    lowered = artifact.lowered
    tokens, _, given = inputs(hollow, lowered, feed)
    large = lowered.program.num_parameters() > MOST_WEIGHTS
    said = ask(lowered, tokens, given, device="meta" if large else "cpu")
    return {"by": f"spmd_types {version('spmd_types')}", **said.to_json()}


# --- numbers --------------------------------------------------------------------------------------


def _numbers(program: Program, artifact: Artifact, layout: Layout, seq: int, seed: int) -> dict[str, Any]:
    """Loss, norm and every gradient of one step, on simulated ranks against one device; `close` is None where they were
    not run."""
    why = _too_large(program, artifact, layout)
    if why is not None:
        return {"close": None, "why": why}
    one = instantiate(build(program), seed=seed).double().eval()
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    pipe = artifact.lowered.laid.pipe
    batches = pipe.microbatches if pipe is not None else 1
    first = artifact.lowered.model.dims[artifact.lowered.model.body.inputs[0].type.dims[0]]
    rows = 2 * batches * artifact.lowered.laid.mesh.size(first.axes)
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, one.vocab or 2, (rows, seq), generator=source)
    sums, counts = one.losses(tokens, gathered=Gathered()), one.counts(tokens)
    total = torch.stack([sums[k] / max(1, int(counts[k])) for k in sums]).sum()
    total.backward()
    norm = torch.stack([p.grad.square().sum() for p in one.parameters() if p.grad is not None]).sum().sqrt()
    wanted = _gradients(one)

    def rank(mesh: Any) -> dict[str, float]:
        model = instantiate(artifact, seed=None, mesh=mesh).double().eval()
        if model.pipe is not None:
            keep_stages(model)
        take_whole(model, state)
        mine = part(tokens, [model.rows, ()], mesh)
        loss = _step(model, mine, batches)
        sync_gradients(model)
        found = {"loss": _far(loss, total.detach()), "norm": _far(gradient_norm(model), norm)}
        for laid in laid_parameters(model):
            own = torch.zeros_like(laid.view) if laid.holder.grad is None else laid.holder.grad
            found[laid.path] = _far(own, part(wanted[laid.path], laid.splits, mesh))
        return found

    far: dict[str, float] = {}
    for found in simulate(dict(artifact_axes(artifact)), rank):
        for name, value in found.items():
            far[name] = max(far.get(name, 0.0), value)
    worst = max(far, key=far.__getitem__)
    return {"close": far[worst] < CLOSE, "worst": worst, "difference": far[worst], "tokens": [rows, seq],
            "compared": len(far)}  # fmt: skip


def artifact_axes(artifact: Artifact) -> dict[str, int]:
    """The axes of the mesh that an artifact was compiled for, by factors."""
    return dict(instantiate(artifact, seed=None, device="meta").axes)


def _too_large(program: Program, artifact: Artifact, layout: Layout) -> str | None:
    if program.num_parameters() > MOST_WEIGHTS:
        return f"{program.num_parameters():,} weights, of which at most {MOST_WEIGHTS:,} are run here"
    if layout.ranks > MOST_RANKS:
        return f"{layout.ranks} ranks, of which at most {MOST_RANKS} are run here"
    if not program.objectives:
        return "no objective trains it"
    if [v.name for v in artifact.lowered.model.body.inputs] != ["tokens"]:
        return "it reads more than tokens"
    return None


def _step(model: Any, tokens: Tensor, batches: int) -> Tensor:
    """One step's loss, on every rank; gradients stay on the weights."""
    gathered = Gathered()
    if model.pipe is None:
        sums, known = model.losses(tokens, gathered=gathered), global_counts(model, model.counts(tokens))
        torch.stack([sums[k] / known[k].clamp_min(1) for k in sums]).sum().backward()
    else:
        pieces = [(piece,) for piece in tokens.chunk(batches)]
        counts: dict[str, Any] = {}
        for (piece,) in pieces:
            for label, n in model.counts(piece).items():
                counts[label] = counts.get(label, 0) + n
        known = global_counts(model, counts)

        def at_of(i: int) -> Any:
            at = model._rows(pieces[i][0], None, None, None)
            at.gathered = gathered
            return at

        sums = pipelined(model, pieces, known, at_of)
    whole = global_sums(model, sums)
    return torch.stack([whole[k] / known[k].clamp_min(1) for k in whole]).sum()


def _gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for path, holder, view in model.named_logical_parameters():
        grad = torch.zeros_like(holder) if holder.grad is None else holder.grad
        offset = view.storage_offset() - holder.storage_offset()
        found[path] = grad.as_strided(view.size(), view.stride(), grad.storage_offset() + offset)
    return found


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / (1 + b.abs().max())) if a.numel() else 0.0
