"""How a drawn case is put to its room's `reference.py`: the function, and the monoid of its marked dim.

Formals that stand for several dims are one axis here; packed documents are computed each alone and laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from heddle.lowering.ops import part

from .cases import LACKING, MASKS, POINTWISE, Case, Tensors, mask_name

State = tuple[Tensor, ...]


def steepness(case: Case, tensors: Tensors) -> float:
    """The largest 1 / sqrt(variance + eps) that a norm multiplies its rounding by; 1 where nothing is normalised."""
    if case.op.setting("eps") is None:
        return 1.0
    if case.op.setting("count") is not None:  # the squares are given; their own gradient divides by them once more
        squares = next(tensors[n] for n in ("s", "squares") if n in tensors).detach()
        return max(1.0, float((squares / case.attr("count") + case.attr("eps")).rsqrt().max())) ** 1.5
    x = flat(case, tensors)["x"].detach()
    if case.name == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    x = x.unflatten(-1, (case.attr("groups") if case.name == "rms_norm" else 1, -1))
    return max(1.0, float(((x**2).mean(-1) + case.attr("eps")).rsqrt().max()))


def flat(case: Case, tensors: Tensors) -> dict[str, Any]:
    """Operands by name in the signature, one axis a formal; repeated operands are lists, absent ones None."""
    found: dict[str, Any] = {o.name: [] if o.repeated else None for o in case.op.signature.operands}
    for a in case.given:
        own = [d for d, f in zip(a.dims, a.formals, strict=True) if f == "*"]
        lead = case.lead if a.operand in LACKING.get(case.name, ()) else own
        shape = [case.size(d) if d in own else 1 for d in lead]
        for formal in dict.fromkeys(f for f in a.formals if f != "*"):
            shape.append(math.prod(case.size(d) for d, f in zip(a.dims, a.formals, strict=True) if f == formal))
        x = tensors[a.name]
        order = [own.index(d) for d in lead if d in own]
        x = x.permute([*order, *range(len(own), x.ndim)]).reshape(shape)
        if isinstance(found[a.operand], list):
            found[a.operand].append(x)
        else:
            found[a.operand] = x
    return found


def reference(case: Case, tensors: Tensors, document: Tensor | None = None) -> tuple[Tensor, ...]:
    """The results by the room's reference math, with the dims that its type rule says."""
    made = FORWARD[case.name](case, tensors if case.name in POINTWISE else flat(case, tensors), document)
    results = made if isinstance(made, tuple) else (made,)
    return tuple(y.reshape(case.shape(dims)) for y, dims in zip(results, case.results, strict=True))


def room(case: Case) -> Any:
    return part(case.name, "reference")


def pieces(document: Tensor | None, batch: int, seq: int) -> list[list[tuple[int, int]]]:
    """The documents of each batch row as ranges of rows."""
    if document is None:
        return [[(0, seq)]] * batch
    rows = document.tolist()
    return [list(pairwise([0, *(t for t in range(1, seq) if r[t] != r[t - 1]), seq])) for r in rows]


def by_document(f: Callable[..., Tensor], document: Tensor | None, *rows: Tensor) -> Tensor:
    """f of each document alone; rows are [b, S, ...]."""
    batch, seq = rows[0].shape[:2]
    found = pieces(document, batch, seq)
    return torch.stack(
        [torch.cat([f(*(x[i : i + 1, s:e] for x in rows))[0] for s, e in found[i]]) for i in range(batch)]
    )


def seen(case: Case, document: Tensor | None) -> list[Tensor]:
    """bool [b, S, S] for each source: the mask's rule on positions that restart with each document."""
    batch, seq = case.size("batch"), case.size("s")
    found = []
    for mask in case.attr("masks"):
        allowed = torch.zeros(batch, seq, seq, dtype=torch.bool)
        for i, row in enumerate(pieces(document, batch, seq)):
            for s, e in row:
                position = torch.arange(e - s)
                allowed[i, s:e, s:e] = MASKS[mask_name(mask)][1](position[:, None], position[None])
        found.append(allowed)
    return found


def scale(case: Case) -> float:
    given = case.attr("scale")
    return case.size("d") ** -0.5 if given is None else given


def _elementwise(case: Case, t: Tensors, _: Any) -> Tensor:
    """Operands aligned by the names of their dims."""
    ops = room(case)
    wanted = case.results[0]
    args: list[Tensor] = []
    for arg, operand in zip(case.args, case.op.signature.operands, strict=True):
        if arg is None:
            args.append(torch.tensor(float(case.attr(operand.name)), dtype=torch.float64))
        elif case.name == "outer":
            args.append(t[arg.name])
        else:
            x = t[arg.name].permute([arg.dims.index(d) for d in wanted if d in arg.dims])
            args.append(x.reshape([case.size(d) if d in arg.dims else 1 for d in wanted]))
    if case.name == "clip":
        return ops.clip(args[0], case.attr("low"), case.attr("high"))
    return {**ops.UNARY, **ops.BINARY, **ops.LOGIC, "outer": ops.outer, "where": ops.where}[case.name](*args)


def _parallel(case: Case, o: Any) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias or None) of each part, one axis a formal."""
    biases = {a.name.split(".")[0]: a for a in case.given if a.operand == "biases"}
    left = list(o["biases"])
    return [(w, left.pop(0) if p in biases else None) for p, w in zip(case.attr("parts"), o["weights"], strict=True)]


def _parallel_linear(case: Case, o: Any, _: Any) -> tuple[Tensor, ...]:
    by_part = [room(case).linear(o["x"], w, b) for w, b in _parallel(case, o)]
    return tuple(torch.cat([by_part.pop(0) for _ in group], -1) for group in case.attr("give"))


def _parallel_conv(case: Case, o: Any, document: Any) -> tuple[Tensor, ...]:
    weights = _parallel(case, o)
    xs = o["x"].split([len(w) for w, _ in weights], -1)
    pairs = zip(xs, weights, strict=True)
    return tuple(
        by_document(lambda rows, w=w, b=b: room(case).causal_conv(rows, w, b), document, x) for x, (w, b) in pairs
    )


def _ssd(case: Case, o: Any, document: Any) -> Tensor:
    per_head = (o["A_log"], o["D"], o["dt_bias"])
    rows = (o["u"], o["dt"], o["b"], o["c"])
    return by_document(lambda *x: room(case).ssd(*x, *per_head), document, *rows)


def _starts(case: Case, document: Tensor | None) -> Tensor:
    """bool [b, S] of one rank's rows: those that start a document, the first row of all among them."""
    rank, ranks = case.place
    size = case.size(case.sequence)
    if document is None:
        document = torch.zeros(case.size("batch"), size * ranks, dtype=torch.int64)
    starts = torch.cat([torch.ones_like(document[:, :1]), document.diff()], 1) != 0
    return starts[:, rank * size : rank * size + size]


def _conv_behind(case: Case, o: Any, document: Any) -> Tensor:
    """Document by document; the first one of a rank's rows may stand before them already."""
    rank, ranks = case.place
    size, x, before = case.size("s"), o["x"], o["before"]
    first, found = rank * size, []
    for i, row in enumerate(pieces(document, len(x), size * ranks)):
        parts = []
        for s, e in row:
            near = before[i : i + 1, before.shape[1] - min(first - s, before.shape[1]) :] if s < first else before[:1, :0]
            if e > first and s < first + size:
                here = x[i : i + 1, max(s, first) - first : min(e, first + size) - first]
                parts.append(room(case).conv_behind(here, near, o["weight"], o["bias"])[0])
        found.append(torch.cat(parts))
    return torch.stack(found)


def _meeting(case: Case, o: Any, _: Any) -> Tensor:
    """Of one rank alone: before its rows there are none."""
    if case.name == "rows_before":
        return room(case).rows_before(o["x"], 0, case.attr("count"))
    return room(case).ssd_before(o["decay"][None][:0], o["state"][None][:0])


def options(case: Case, o: Any, document: Tensor | None) -> list[tuple[Tensor | None, Tensor | float]]:
    """For each source the query that it has of its own, and what is added to its scores, [b, Q, H, S]."""
    batch, seq, count = case.size("batch"), case.size("s"), len(o["k"])
    position = torch.stack([torch.cat([torch.arange(e - s) for s, e in row]) for row in pieces(document, batch, seq)])
    far = position[:, :, None] - position[:, None]
    found: list[tuple[Tensor | None, Tensor | float]] = []
    for i in range(count):
        added: Tensor | float = 0.0
        if o["bias"]:
            place = far.clamp(0, case.size("n") - 1)[:, :, None].expand(batch, seq, case.size("h"), seq)
            added = o["bias"][i].gather(-1, place)
        if o["slope"]:
            added = o["slope"][i][:, None] * far[:, :, None]
        found.append((o["query"][i] if o["query"] else None, added))
    return found


def _attend(case: Case, o: Any, document: Any, kept: list[Tensor] | None = None) -> Tensor:
    sources = zip(o["k"], o["v"], seen(case, document), options(case, o, document), strict=True)
    made = [(k, v, s, *more) for k, v, s, more in sources]
    return part("attend", "reference").attend(o["q"], made, scale(case), kept, case.attr("dropout"))


def attend_of(case: Case, tensors: Tensors, document: Tensor | None, kept: list[Tensor]) -> Tensor:
    """Attention in training; kept: for each source which weights are not zeroed, bool [b, Q, H, S]."""
    return _attend(case, flat(case, tensors), document, kept)


def _coordinate(case: Case, o: Any, document: Any) -> Tensor:
    return room(case).coordinate(document, case.attr("which"))


FORWARD: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(POINTWISE, _elementwise),
    "linear": lambda c, o, d: room(c).linear(o["x"], o["weight"], o["bias"]),
    "parallel_linear": _parallel_linear,
    "embed": lambda c, o, d: room(c).embed(o["ids"], o["weight"]),
    "rms_norm": lambda c, o, d: room(c).rms_norm(o["x"], o["weight"], c.attr("eps"), c.attr("groups")),
    "layer_norm": lambda c, o, d: room(c).layer_norm(
        o["x"], o["weight"], o["bias"], c.attr("eps"), c.attr("zero_centred")
    ),
    "softmax": lambda c, o, d: room(c).softmax(o["x"]),
    "log_softmax": lambda c, o, d: room(c).log_softmax(o["x"]),
    "sum": lambda c, o, d: room(c).sum(o["x"]),
    "mean": lambda c, o, d: room(c).mean(o["x"].double()),
    "max_over": lambda c, o, d: room(c).max_over(o["x"]),
    "count": lambda c, o, d: room(c).count(o["x"]),
    "top_k": lambda c, o, d: room(c).top_k(o["x"], c.attr("k")),
    "cross_entropy": lambda c, o, d: room(c).cross_entropy(o["logits"], o["target"]),
    "rotate": lambda c, o, d: room(c).rotate(o["x"], o["cos"], o["sin"]),
    "next": lambda c, o, d: room(c).next_token(o["ids"], d, c.attr("by")),
    "is_known": lambda c, o, d: room(c).is_known(o["ids"]),
    "causal_conv": lambda c, o, d: by_document(lambda x: room(c).causal_conv(x, o["weight"], o["bias"]), d, o["x"]),
    "parallel_conv": _parallel_conv,
    "ssd": _ssd,
    "group_squares": lambda c, o, d: room(c).group_squares(o["x"], c.size("g")),
    "scaled_rows": lambda c, o, d: room(c).scaled_rows(o["x"], o["weight"], o["s"], c.attr("count"), c.attr("eps")),
    "row_sums": lambda c, o, d: room(c).row_sums(o["x"]),
    "centred_squares": lambda c, o, d: room(c).centred_squares(o["x"], o["total"], c.attr("count")),
    "centred_rows": lambda c, o, d: room(c).centred_rows(
        *(o[n] for n in ("x", "weight", "bias", "total", "squares")), c.attr("count"), c.attr("eps"), c.attr("zero_centred")
    ),
    "row_max": lambda c, o, d: room(c).row_max(o["logits"]),
    "sum_exp": lambda c, o, d: room(c).sum_exp(o["logits"], o["m"]),
    "picked": lambda c, o, d: room(c).picked(o["logits"], o["target"]),
    "nll": lambda c, o, d: room(c).nll(o["s"], o["target"], o["p"], o["m"]),
    "rows_before": _meeting,
    "ssd_before": _meeting,
    "conv_behind": _conv_behind,
    "ssd_leave": lambda c, o, d: room(c).ssd_leave(
        *(o[n] for n in ("u", "dt", "b", "A_log", "dt_bias")), _starts(c, d)
    ),
    "ssd_inside": lambda c, o, d: room(c).ssd_inside(
        *(o[n] for n in ("u", "dt", "b", "c", "A_log", "D", "dt_bias")), _starts(c, d)
    ),
    "ssd_behind": lambda c, o, d: room(c).ssd_behind(
        *(o[n] for n in ("y", "dt", "c", "A_log", "dt_bias", "enter")), _starts(c, d)
    ),
    "convert": lambda c, o, d: room(c).convert(o["x"]),
    "attend": _attend,
    "attend_ring": _attend,
    "dropout": lambda c, o, d: room(c).dropout(o["x"], torch.ones_like(o["x"]), 0.0),
    "index": lambda c, o, d: room(c).index(c.size("d")),
    "slopes": lambda c, o, d: room(c).slopes(c.size("d")),
    "coordinate": _coordinate,
    "concat": lambda c, o, d: room(c).concat(o["x"], o["y"]),
    "dot": lambda c, o, d: room(c).dot(o["x"], o["y"]),
    "take": lambda c, o, d: room(c).take(o["x"], c.attr("index")),
    "reshape": lambda c, o, d: room(c).reshape(o["x"], c.shape(c.results[0])),
}


# --- monoids --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partial:
    """The monoid of a case's marked dim, its operands filled in. `width` is the length of the dim, `axis` where it
    stands in the results (None where they lack it); `finish` gives the results of one part."""

    width: int
    axis: int | None
    identity: State
    lift: Callable[[int, int], State]
    combine: Callable[[State, State], State]
    finish: Callable[[State, int, int], Tensor]


def _softmax(c: Case, o: Any, _: Any) -> Partial:
    x, r = o["x"], room(c)
    finish = r.finish if c.name == "softmax" else r.finish_log
    return Partial(
        x.shape[-1],
        -1,
        r.identity(x),
        lambda s, e: r.lift(x[..., s:e]),
        r.combine,
        lambda state, s, e: finish(state, x[..., s:e]),
    )


def _reduce(c: Case, o: Any, _: Any) -> Partial:
    x, r = o["x"].double(), room(c).PARTIAL[c.name]
    return Partial(
        x.shape[-1],
        None,
        r.identity(x),
        lambda s, e: r.lift(x[..., s:e]),
        r.combine,
        lambda state, s, e: r.finish(state),
    )


def _largest(c: Case, o: Any, _: Any) -> Partial:
    x, r, k = o["x"], room(c), c.attr("k")
    return Partial(
        x.shape[-1],
        -1,
        r.identity(x),
        lambda s, e: r.lift(x[..., s:e], s, k),
        lambda a, b: r.combine(a, b, k),
        lambda state, s, e: r.finish(state, x[..., s:e], s),
    )


def _row(c: Case, o: Any, _: Any) -> Partial:
    x, r = o["x"], room(c)
    lift = lambda s, e: r.lift(x[..., s:e], s, c.attr("index"))  # noqa: E731
    return Partial(x.shape[-1], None, r.identity(x), lift, r.combine, lambda state, s, e: r.finish(state))


def _norm(c: Case, o: Any, _: Any) -> Partial:
    """Each group of a grouped norm has a statistic of its own, so it is a leading dim."""
    r = room(c)
    groups = c.attr("groups") if c.name == "rms_norm" else 1
    x, g = o["x"].unflatten(-1, (groups, -1)), o["weight"].unflatten(-1, (groups, -1))
    b = None if o.get("bias") is None else o["bias"].unflatten(-1, (groups, -1))

    def finish(state: State, s: int, e: int) -> Tensor:
        if c.name == "rms_norm":
            return r.finish(state, x[..., s:e], g[..., s:e], c.attr("eps"))
        part_b = None if b is None else b[..., s:e]
        return r.finish(state, x[..., s:e], g[..., s:e], part_b, c.attr("eps"), c.attr("zero_centred"))

    return Partial(x.shape[-1], -1, r.identity(x), lambda s, e: r.lift(x[..., s:e]), r.combine, finish)


def _summed(f: Callable[[Case, Any, int, int], Tensor]) -> Callable[..., Partial]:
    """Sums: f gives that of some elements, which add up."""

    def partial(c: Case, o: Any, _: Any) -> Partial:
        width = next(iter(o.values())).shape[-1] // (c.size("g") if c.name == "group_squares" else 1)
        none = (torch.zeros_like(f(c, o, 0, width)),)
        return Partial(
            width,
            None,
            none,
            lambda s, e: (f(c, o, s, e),),
            lambda a, b: (a[0] + b[0],),
            lambda state, s, e: state[0],
        )

    return partial


def _top(c: Case, o: Any, _: Any) -> Partial:
    z, r = o["logits"], room(c)
    none = (torch.full(z.shape[:-1], -torch.inf, dtype=z.dtype),)
    return Partial(
        z.shape[-1],
        None,
        none,
        lambda s, e: (r.row_max(z[..., s:e]),),
        lambda a, b: (torch.maximum(a[0], b[0]),),
        lambda state, s, e: state[0],
    )


def _runs(c: Case, o: Any, s: int, e: int) -> Tensor:
    """Elements s..e of each run."""
    return room(c).group_squares(o["x"].unflatten(-1, (c.size("g"), -1))[..., s:e])[..., 0]


def _cross_entropy(c: Case, o: Any, _: Any) -> Partial:
    z, target, r = o["logits"], o["target"], room(c)
    return Partial(
        z.shape[-1],
        None,
        r.identity(z),
        lambda s, e: r.lift(z[..., s:e], target, s),
        r.combine,
        lambda state, s, e: r.finish(state, target),
    )


def _keys(c: Case, o: Any, document: Any) -> Partial:
    """Keys of all sources, one source behind the other."""
    r, width = room(c), c.size("s")
    sources = list(zip(o["k"], o["v"], seen(c, document), options(c, o, document), strict=True))

    def lift(s: int, e: int) -> State:
        state = r.identity(o["q"], c.size("e"))
        for i, (k, v, allowed, (query, added)) in enumerate(sources):
            a, b = max(0, s - i * width), min(width, e - i * width)
            if a < b:
                q = o["q"] if query is None else query
                bias = added if isinstance(added, float) else added[..., a:b]
                state = r.combine(state, r.lift(q, k[:, a:b], v[:, a:b], allowed[:, :, a:b], scale(c), bias))
        return state

    identity = r.identity(o["q"], c.size("e"))
    return Partial(width * len(sources), None, identity, lift, r.combine, lambda state, s, e: r.finish(state))


def _window(c: Case, o: Any, _: Any) -> Partial:
    r, x, taps = room(c), o["x"], c.size("taps")
    if c.name == "causal_conv":
        w, b = o["weight"], o["bias"]
    else:
        weights = _parallel(c, o)
        w = torch.cat([w for w, _ in weights])
        b = torch.cat([b for _, b in weights]) if weights[0][1] is not None else None
    return Partial(
        x.shape[1],
        1,
        r.identity(x),
        lambda s, e: r.lift(x[:, s:e], taps),
        lambda a, b: r.combine(a, b, taps),
        lambda state, s, e: r.finish(state, x[:, s:e], w, b),
    )


def _scan(c: Case, o: Any, document: Any) -> Partial:
    r, rows, per_head = room(c), [o[n] for n in ("u", "dt", "b", "c")], [o[n] for n in ("A_log", "D", "dt_bias")]
    starts = None
    if document is not None:
        starts = torch.cat([torch.ones_like(document[:, :1]), document.diff()], 1) != 0
    cut = lambda s, e: (*(x[:, s:e] for x in rows), *per_head, None if starts is None else starts[:, s:e])  # noqa: E731
    return Partial(
        o["u"].shape[1],
        1,
        r.identity(o["u"], o["b"]),
        lambda s, e: r.lift(*cut(s, e)),
        r.combine,
        lambda state, s, e: r.finish(state, *cut(s, e)),
    )


MONOIDS: dict[str, Callable[..., Partial]] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "sum": _reduce,
    "mean": _reduce,
    "max_over": _reduce,
    "count": _reduce,
    "top_k": _largest,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "cross_entropy": _cross_entropy,
    "group_squares": _summed(_runs),
    "row_sums": _summed(lambda c, o, s, e: room(c).row_sums(o["x"][..., s:e])),
    "centred_squares": _summed(lambda c, o, s, e: room(c).centred_squares(o["x"][..., s:e], o["total"], c.attr("count"))),
    "row_max": _top,
    "sum_exp": _summed(lambda c, o, s, e: room(c).sum_exp(o["logits"][..., s:e], o["m"])),
    "picked": _summed(lambda c, o, s, e: room(c).picked(o["logits"][..., s:e], o["target"], s)),
    "attend": _keys,
    "causal_conv": _window,
    "parallel_conv": _window,
    "ssd": _scan,
    "take": _row,
}
