"""Drawn cases of attention, their fp64 meaning with every gradient, and what rounding may cost each result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from heddle.codegen.kernels import render
from heddle.lowering.ops.attend import reference
from heddle.lowering.ops.attend.triton import Attend, Sized, Source, Tiles
from heddle.runtime import lib
from heddle.runtime.lib.rows import Keys

from . import harness


def tiles(rows: int, keys: int, split_rows: int = 0, split_keys: int = 16) -> Tiles:
    """The same small tile everywhere; without `split_rows` no keys are read in parts."""
    each = Sized((rows, keys, 4, 1), (rows, keys, 4, 1))
    return Tiles(each, each, each, each, split_rows, split_keys)


SMALL = tiles(8, 8)
CLOCK = lib.Clock(lambda token: token.position // 4, 4)
PAST = lib.Mask(lambda query, key: key.position // 2 < query.position // 4, None, None)
MASKS = {
    "causal": lib.Mask(lambda query, key: key.position <= query.position, None, 0),
    "window": lib.Mask(lambda query, key: (key.position <= query.position) & (query.position - key.position < 5), 4, 0),
    "piece": lib.Mask(lambda query, key: key.position // 3 == query.position // 3, 2, 2),
    "ahead": lib.Mask(lambda query, key: query.position + 2 <= key.position, -2, None),
    "past": PAST,
    "recent": lib.Mask(
        lambda query, key: (key.position // 2 < query.position // 4) & (query.position // 4 - key.position // 2 <= 2),
        None,
        None,
    ),
    "all": lib.Mask(None, None, None),
}
# Which place of its bias a key of a window of 5, or of two rows for each of the two groups before, is at.
DISTANCES = {
    "window": (lambda query, key: query.position - key.position, 5),
    "recent": (lambda query, key: query.position // 4 * 2 - 1 - key.position, 4),
}


def FAR(query: Any, key: Any) -> Any:
    """What times a slope: no two queries ask alike, and keys that share a place hold alike."""
    return key.position // 2 - query.position


@dataclass(frozen=True)
class Form:
    """What a kernel is made for: masks of its sources, which of them have a query of their own, a bias or a slope."""

    masks: tuple[str, ...]
    group: int = 1
    width: int = 16
    value_width: int = 16
    queries: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    slopes: tuple[str, ...] = ()

    def facts(self, of: Tiles = SMALL) -> Attend:
        sources = tuple(Source(m, m in self.queries, DISTANCES[m][1] if m in self.biases else 0, m in self.slopes)
                        for m in self.masks)  # fmt: skip
        return Attend(self.group, self.width, self.value_width, sources, tiles=of)


FORMS = {
    "one key head": Form(("causal",), group=3, width=20, value_width=24),
    "heads of their own": Form(("window",), width=16, value_width=7),
    "pieces": Form(("piece",), group=2),
    "later keys": Form(("ahead",), group=5, width=3, value_width=16),
    "window and summaries": Form(("window", "past"), group=2),
    "distances in both": Form(("window", "recent"), group=1, width=12, queries=("window",), biases=("window", "recent")),
    "one of two with a query": Form(("causal", "window"), queries=("causal",), biases=("window",)),
    "all but its own query": Form(("window",), group=2, queries=("window",)),
    "a slope of each head": Form(("causal",), group=2, slopes=("causal",)),
    "slopes, a bias and neither": Form(("causal", "window", "all"), width=12, biases=("window",), slopes=("causal",)),
    "three sources": Form(("window", "past", "all")),
}


@cache
def text(form: Form, of: Tiles = SMALL) -> str:
    facts = form.facts(of)
    return render("attend", {"name": "attend", **facts.rendered()})


def module(form: Form, of: Tiles = SMALL) -> ModuleType:
    return harness.load(text(form, of))


@dataclass
class Case:
    """Tensors of one call: q, and of each source k, v and perhaps query and bias, in the order of `names`."""

    form: Form
    at: lib.At
    tensors: dict[str, Tensor]
    scale: float = 0.4
    names: list[str] = field(default_factory=list)

    def source(self, mask: str, tensors: dict[str, Tensor]) -> lib.Source:
        rows = {"past": lib.on(self.at, CLOCK, 2), "recent": lib.on(self.at, CLOCK, 2), "all": None}.get(mask, "same")
        more: dict[str, Any] = {} if rows == "same" else {"rows": rows}
        if mask in self.form.queries:
            more["query"] = tensors[f"{mask} query"]
        if mask in self.form.biases:
            more |= {"bias": tensors[f"{mask} bias"], "distance": DISTANCES[mask][0]}
        if mask in self.form.slopes:
            more |= {"slope": tensors[f"{mask} slope"], "distance": FAR}
        return lib.Source(tensors[f"{mask} k"], tensors[f"{mask} v"], MASKS[mask], **more)

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys of their own sequence, side by side."""
        position = self.at.keys().position
        return position[:, :, None], position[:, None]

    def sources(self, tensors: dict[str, Tensor]) -> list[lib.Source]:
        return [self.source(mask, tensors) for mask in self.form.masks]

    def run(self, kernel: Callable[..., Tensor] | None, tensors: dict[str, Tensor] | None = None) -> Tensor:
        tensors = self.tensors if tensors is None else tensors
        self.at.memo.clear()
        return lib.attend(tensors["q"], *self.sources(tensors), at=self.at, scale=self.scale, kernel=kernel)


def case(
    form: Form, batch: int, seq: int, kv: int, dtype: torch.dtype, seed: int, scale: float = 1.0,
    layout: str = "contiguous", document: Tensor | None = None, valid: Tensor | None = None,
) -> Case:  # fmt: skip
    """A case with drawn values. Rows of `all` are 11. What torch would do itself is said to be one document."""
    if document is None and valid is None and form.masks == ("causal",):
        document = torch.zeros(batch, seq, dtype=torch.int64)
    at = lib.At((batch, seq), document=document, valid=valid)
    rows = lib.on(at, CLOCK, 2).seq
    heads = kv * form.group
    shapes: dict[str, tuple[int, ...]] = {"q": (batch, seq, heads, form.width)}
    for mask in form.masks:
        number = {"past": rows, "recent": rows, "all": 11}.get(mask, seq)
        shapes |= {f"{mask} k": (batch, number, kv, form.width), f"{mask} v": (batch, number, kv, form.value_width)}
        if mask in form.queries:
            shapes[f"{mask} query"] = shapes["q"]
        if mask in form.biases:
            shapes[f"{mask} bias"] = (batch, seq, heads, DISTANCES[mask][1])
        if mask in form.slopes:
            shapes[f"{mask} slope"] = (heads,)
    tensors = {
        name: harness.laid(harness.values(shape, dtype, seed + i, scale if name.endswith("v") else 1.0), layout)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Case(form, at, {name: x.requires_grad_() for name, x in tensors.items()}, names=list(shapes))


# --- meaning --------------------------------------------------------------------------------------


def spelled(one: Case, tensors: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """The sources as the reference takes them: who sees what, and the bias of each score."""
    made = []
    for mask, source in zip(one.form.masks, one.sources(tensors)):
        if source.rows is None:
            keys = Keys(torch.arange(source.k.shape[1])[None], None, None)
        else:
            keys = (source.rows if isinstance(source.rows, lib.At) else one.at).keys()
        seen = MASKS[mask].visible(one.at, keys)[:, 0].expand(len(source.k), one.at.seq, source.k.shape[1])
        bias: Tensor | float = 0.0
        if source.bias is not None:
            query = lib.Coordinates(one.at.keys().position[:, :, None], None)
            place = source.distance(query, lib.Coordinates(keys.position[:, None], None))
            place = place.clamp(0, source.bias.shape[-1] - 1)[:, :, None].expand(-1, -1, source.bias.shape[2], -1)
            bias = source.bias.gather(-1, place.expand(len(source.bias), -1, -1, -1))
        if source.slope is not None:
            bias = source.slope[:, None] * FAR(*(lib.Coordinates(x, None) for x in one.places))[:, :, None]
        k, v = source.k, source.v
        if one.at.valid is not None and source.rows is lib.sources.SAME:  # padding may hold anything
            k, v = (torch.where(one.at.valid[:, :, None, None], x, 0) for x in (k, v))
        made.append((k, v, seen, source.query, bias))
    return made


def meant(one: Case, tensors: dict[str, Tensor], up: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and every gradient by the reference, in the dtype of the tensors."""
    own = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    o = reference.attend(own["q"], spelled(one, own), one.scale)
    wrt = [own[name] for name in one.names]
    grads = torch.autograd.grad(o, wrt, up.to(o.dtype), allow_unused=True, materialize_grads=True)
    return o.detach(), dict(zip(one.names, grads))


def allowed(one: Case, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """What rounding may cost the result and each gradient, elementwise, to first order.

    s is a sum of D products in fp32, so a weight p is off by r = u32 (2 (D + 4) S + steps), S the largest sum of
    |q||k| and |bias|; p and the gradient of s, at most M = p (|d_o||v| + |d_o||o|), are rounded to the storage dtype as
    operands, and d_o . o reads o as it was stored. A store rounds once more; nothing is smaller than a subnormal.
    """
    wide = {name: x.detach().double() for name, x in one.tensors.items()}
    sources, group, up = spelled(one, wide), one.form.group, up.double()
    kinds = torch.finfo(dtype)
    u, tiny, single = kinds.eps / 2, kinds.smallest_normal * kinds.eps, torch.finfo(torch.float32).eps / 2

    def heads(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 2)

    scores, sizes = [], [torch.zeros(())]
    for k, _, seen, query, bias in sources:
        q = wide["q"] if query is None else query
        s = one.scale * torch.einsum("bqhd,bshd->bqhs", q, heads(k)) + bias
        scores.append(s.masked_fill(~seen[:, :, None], -torch.inf))
        size = one.scale * torch.einsum("bqhd,bshd->bqhs", q.abs(), heads(k).abs()) + torch.as_tensor(bias).abs()
        sizes.append(torch.where(seen[:, :, None], size, 0).max() if size.numel() else torch.zeros(()))
    joined = torch.cat(scores, -1)
    some = joined.isfinite().any(-1, keepdim=True)
    weights = torch.where(some, joined.masked_fill(~some, 0.0).softmax(-1), 0.0).split([s.shape[-1] for s in scores], -1)
    steps = one.form.width + one.form.value_width + joined.shape[-1] + 8
    rounded = u + single * (2 * (one.form.width + 4) * float(max(x.max() for x in sizes)) + steps)
    o = reference.attend(wide["q"], sources, one.scale)
    own = (up.abs() * o.abs()).sum(-1)
    result = torch.zeros_like(o)
    found = {name: torch.zeros_like(x) for name, x in wide.items()}

    def folded(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, group)).sum(3)

    for mask, (k, v, seen, query, _), p in zip(one.form.masks, sources, weights):
        result += rounded * torch.einsum("bqhs,bshe->bqhe", p, heads(v).abs()) + tiny * heads(v.abs().sum(1, True))
        m = p * (torch.einsum("bqhe,bshe->bqhs", up.abs(), heads(v).abs()) + own[..., None])
        q, name = (wide["q"], "q") if query is None else (query, f"{mask} query")
        loss = 2 * rounded * m + tiny * seen[:, :, None]
        found[name] += one.scale * torch.einsum("bqhs,bshd->bqhd", loss, heads(k).abs())
        found[f"{mask} k"] += folded(one.scale * torch.einsum("bqhs,bqhd->bshd", loss, q.abs()))
        weight = rounded * p + tiny * seen[:, :, None]
        found[f"{mask} v"] += folded(torch.einsum("bqhs,bqhe->bshe", weight, up.abs()))
        if mask in one.form.biases:
            found[f"{mask} bias"] += loss.amax(-1, keepdim=True) if loss.shape[-1] else 0.0
        if mask in one.form.slopes:
            far = (FAR(*(lib.Coordinates(x, None) for x in one.places)).abs())[:, :, None]
            found[f"{mask} slope"] += ((loss + single * (steps + p.shape[0] * p.shape[1]) * m) * far).sum((0, 1, 3))
    return result + u * o.abs() + tiny, {n: x + tiny for n, x in found.items()}


def check(one: Case, kernel: Callable[..., Tensor], up: Tensor) -> float:
    """Compare the result and each gradient with the fp64 reference; -> the largest error as a share of what is allowed.

    Memory is poisoned and guarded; padding is given no gradient and its result is not looked at.
    """
    dtype = up.dtype
    live = one.at.validity[..., None, None] if one.at.valid is not None else torch.ones(())
    up = (up * live).to(dtype)
    called = 0

    def counted(*args: Any, **more: Any) -> Tensor:
        nonlocal called
        called += 1
        return kernel(*args, **more)

    with harness.poisoned():
        o = one.run(counted)
        assert called == 1, "it went through torch"
        grads = torch.autograd.grad(o, [one.tensors[n] for n in one.names], up, allow_unused=True, materialize_grads=True)
    wide = {name: x.detach().double() for name, x in one.tensors.items()}
    (want, want_grads), (eager, eager_grads) = meant(one, wide, up.double()), meant(one, one.tensors, up)
    floor, floors = allowed(one, up, dtype)
    u = torch.finfo(dtype).eps / 2
    shares = [harness.worst(o.detach() * live, want * live, eager * live, floor, "o")]
    for name, grad in zip(one.names, grads):
        shares.append(harness.worst(grad, want_grads[name], eager_grads[name], floors[name] + u * want_grads[name].abs(),
                                    f"the gradient of {name}"))  # fmt: skip
    return max(shares)


@st.composite
def rows(draw: st.DrawFn, batch: int, seq: int, holes: bool) -> tuple[Tensor | None, Tensor | None]:
    """Documents and validity: neither, or packed documents (some of length 1), and padding: with `holes` anywhere, else
    at both ends. A hole may cut a group in two, whose rows then share places of a bias."""
    document = valid = None
    if draw(st.booleans()):
        each = [draw(harness.documents(seq)) for _ in range(batch)]
        document = torch.stack([
            torch.repeat_interleave(torch.arange(len(e)), torch.tensor(e, dtype=torch.int64)) if e
            else torch.zeros(0, dtype=torch.int64)
            for e in each
        ])  # fmt: skip
    if draw(st.integers(0, 3)) == 0:
        valid = torch.tensor([[draw(st.integers(0, 4)) > 0 for _ in range(seq)] for _ in range(batch)], dtype=torch.bool)
        if not holes:
            valid = (valid.cumsum(1) > 0) & (valid.flip(1).cumsum(1).flip(1) > 0)
    return document, valid
