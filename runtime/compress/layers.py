"""Importance of layers: what a model does without one, or how little one changes what runs through it.

A layer is an iteration of a residual loop: one whose carried value comes out as what it was plus something, so that a
skipped iteration hands on what it was given. Sources: Men et al. 2024 (block influence); Muralidharan et al. 2024,
section 2.2 (perplexity); Taghibakhshi et al. 2025 (divergence of logits); Bercovich et al. 2025 (distance of final
states).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.diagnostics import fail
from ...lowering.graph import op_of
from ...lowering.op import first_of
from ..errors import UserError
from ..lib import Model
from .dims import Dims, Loop
from .importance import Batch
from .sites import Where, contractions, source
from .watching import module_at, watch

METRICS = ("bi", "perplexity", "kl", "mse", "hidden_mse")


def layer_importance(
    made: Model, batches: Iterable[Batch], metric: str = "bi", span: int = 1, skipped: Sequence[int] = (),
    loop: str | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """{loop: fp64 [iterations - span + 1]}: how much the model needs each iteration, or the `span` from it on together.

    bi           1 - mean over tokens of the cosine of what goes in and what comes out
    perplexity   of next tokens, without it                kl    of the logits with it to those without, nats a token
    mse          of the logits without it                  hidden_mse    of what the last product reads, without it

    `skipped` iterations are left out throughout (and score nan). `loop` names one loop; otherwise every residual loop
    is scored, none of them inside another. Tokens that are not `valid` do not count.
    Raises `SpecError` `unknown-name`; UserError: unknown-setting, no-data.
    """
    if metric not in METRICS:
        raise UserError(
            "unknown-setting", f"`metric` is `{metric}`, expected one of {', '.join(f'`{m}`' for m in METRICS)}"
        )
    dims, data = Dims(made.program), [_named(b) for b in batches]
    if not data:
        raise UserError("no-data", "importance of layers needs at least one batch of tokens")
    found = {}
    was_training = made.training
    made.eval()
    try:
        with torch.no_grad():
            for one in _loops(dims, loop):
                layers = list(_modules(made, one))
                if not 1 <= span <= len(layers):
                    raise UserError("unknown-setting", f"`span` is {span}, `{one.name}` has {len(layers)} iterations")
                with _without([layers[i] for i in skipped], one.carried):
                    score = _influence if metric == "bi" else _damage(metric)
                    values = score(made, dims, layers, one.carried, data, span, set(skipped))
                found[one.name] = torch.tensor(values, dtype=torch.float64)
    finally:
        made.train(was_training)
    return found


def without_layers(
    made: Model, batches: Iterable[Batch], count: int, metric: str = "mse", protect: Sequence[int] = (),
    loop: str | None = None,
) -> list[int]:  # fmt: skip
    """The iterations that stay when `count` go one by one, the least important first, all scored anew after each.

    Each is scored against the model as the earlier removals left it; of equal scores the earlier layer goes. Raises
    what `layer_importance` does, and UserError `unknown-setting` for a count that leaves none.
    """
    name, size = _only(made, loop)
    data = list(batches)
    gone: list[int] = []
    if not 0 <= count <= size - max(1, len(set(protect))):
        raise UserError("unknown-setting", f"{count} of the {size} iterations of `{name}` cannot go")
    for _ in range(count):
        scores = layer_importance(made, data, metric, skipped=gone, loop=name)[name]
        scores[list({*gone, *protect})] = math.inf
        gone.append(int(torch.argmin(scores)))
    return [i for i in range(size) if i not in gone]


def without_window(
    made: Model, batches: Iterable[Batch], count: int, metric: str = "bi", loop: str | None = None
) -> list[int]:
    """The iterations that stay when the `count` neighbours go that are together the least important."""
    name, size = _only(made, loop)
    if not count:
        return list(range(size))
    start = int(torch.argmin(layer_importance(made, batches, metric, span=count, loop=name)[name]))
    return [i for i in range(size) if not start <= i < start + count]


def influence(states: Sequence[Tensor], span: int = 1) -> list[float]:
    """1 - mean cosine of states [tokens, width] that are `span` apart."""
    cosine = torch.nn.functional.cosine_similarity
    return [1 - float(cosine(a.double(), b.double(), -1).mean()) for a, b in zip(states, states[span:], strict=False)]


def distance(metric: str, full: Tensor, other: Tensor) -> Tensor:
    """fp64 [tokens]: of two [tokens, width]: `kl` of softmaxes, in nats, or the mean squared difference."""
    full, other = full.double(), other.double()
    if metric == "kl":
        log_full = full.log_softmax(-1)
        return (log_full.exp() * (log_full - other.log_softmax(-1))).sum(-1)
    return (full - other).square().mean(-1)


# --- loops -------------------------------------------------------------------------------------------


def _named(batch: Batch) -> dict[str, Tensor]:
    return {"tokens": batch} if isinstance(batch, Tensor) else dict(batch)


def _loops(dims: Dims, name: str | None) -> list[Loop]:
    """The residual loops that are asked for. Raises `SpecError` `unknown-name`."""
    found = [loop for loop in dims.loops.values() if loop.is_residual and name in (None, loop.name)]
    inner = [a for a in found for b in found if a is not b and a.path[: len(b.path)] == b.path]
    found = [loop for loop in found if name is not None or loop not in inner]
    if not found:
        wanted = (
            "a loop that adds to what it carries" if name is None else f"a loop `{name}` that adds to what it carries"
        )
        raise fail("unknown-name", f"`{dims.program.name}` has no {wanted.removeprefix('a ')}", dims.program.span)
    return found


def _only(made: Model, name: str | None) -> tuple[str, int]:
    loops = _loops(Dims(made.program), name)
    if len(loops) > 1:
        named = ", ".join(f"`{loop.name}`" for loop in loops)
        raise UserError("unknown-setting", f"the model has several loops: {named}", help="`loop` names one of them")
    return loops[0].name, len(loops[0].kinds)


def _modules(made: Model, loop: Loop) -> Iterator[nn.Module]:
    for i in range(len(loop.kinds)):
        yield module_at(made, (*loop.path, i))


@contextmanager
def _without(layers: Sequence[nn.Module], carried: int) -> Iterator[None]:
    """Layers that hand on what they were given."""

    def skip(module: nn.Module, args: Any, out: Any) -> Any:
        return args[:carried] if isinstance(out, tuple) else args[0]

    handles = [layer.register_forward_hook(skip) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- scores ------------------------------------------------------------------------------------------


def _counted(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """x [batch, seq, width] as [tokens that count, width]."""
    valid = batch.get("valid")
    return x.flatten(0, -2) if valid is None else x.flatten(0, -2)[valid.flatten()]


def _influence(
    made: Model, dims: Dims, layers: list[nn.Module], carried: int, data: list[dict[str, Tensor]], span: int,
    skipped: set[int],
) -> list[float]:  # fmt: skip
    sums, tokens = [0.0] * (len(layers) - span + 1), 0
    for batch in data:
        states = _states(made, layers, batch)
        rows = [_counted(s, batch) for s in states]
        tokens += len(rows[0])
        sums = [s + len(rows[0]) * v for s, v in zip(sums, influence(rows, span), strict=True)]
    return [math.nan if i in skipped else s / tokens for i, s in enumerate(sums)]


def _states(made: Model, layers: list[nn.Module], batch: dict[str, Tensor]) -> list[Tensor]:
    """What goes into each layer, and what comes out of the last."""
    states: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda module, args: states.append(args[0])) for layer in layers]
    last = layers[-1].register_forward_hook(lambda m, args, out: states.append(first_of(out)))
    try:
        made(**batch)
    finally:
        for handle in (*handles, last):
            handle.remove()
    return states


def _damage(metric: str) -> Callable[..., list[float]]:
    """A score of what goes wrong without layers."""

    def score(
        made: Model, dims: Dims, layers: list[nn.Module], carried: int, data: list[dict[str, Tensor]], span: int,
        skipped: set[int],
    ) -> list[float]:  # fmt: skip
        if metric == "perplexity":
            return [
                math.nan if i in skipped else _measured(layers[i : i + span], carried, lambda: _perplexity(made, data))
                for i in range(len(layers) - span + 1)
            ]
        sums, tokens = [0.0] * (len(layers) - span + 1), 0
        for batch in data:
            full = _counted(_output(made, dims, metric, batch), batch)
            tokens += len(full)
            for i in range(len(sums)):
                if i not in skipped:
                    other = _measured(layers[i : i + span], carried, partial(_output, made, dims, metric, batch))
                    sums[i] += float(distance(metric, full, _counted(other, batch)).sum())
        return [math.nan if i in skipped else s / tokens for i, s in enumerate(sums)]

    return score


def _measured(layers: list[nn.Module], carried: int, run: Callable[[], Any]) -> Any:
    with _without(layers, carried):
        return run()


def _perplexity(made: Model, data: list[dict[str, Tensor]]) -> float:
    """Of the objective that trains the model, over all tokens that it scores."""
    total, scored = 0.0, 0.0
    for batch in data:
        given = (batch["tokens"], batch.get("document"), batch.get("valid"))
        sums, counts = made.losses(*given), made.counts(*given)
        total += sum(float(v) for k, v in sums.items() if k in counts)
        scored += sum(float(counts[k]) for k in sums)
    return math.exp(min(total / max(scored, 1.0), 700.0))


def _output(made: Model, dims: Dims, metric: str, batch: dict[str, Tensor]) -> Tensor:
    """The logits, or what the product reads that makes them."""
    if metric != "hidden_mse":
        return made(**batch)
    body = dims.program.model
    node = next((n for n in body.nodes if any(r.name == body.outputs[0] for r in n.results)), None)
    if (
        node is None
        or node.op in ("call", "loop", "route")
        or not contractions(op_of(node))
        or node.operands[0] is None
    ):
        raise fail("not-built-yet", "the states before a head that is no product are not built yet", body.span)
    path, value = source(dims, (), node.operands[0])
    seen: list[Tensor] = []
    where = Where(path, value, (), (), [((), node)])
    handles = watch(made, dims, where, seen.append)
    try:
        made(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1]
