"""Chains that tests draw from: each as an expression, and as plain math in the dtype of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heddle.lowering.chains.expr import Chain, Expr, Output, View, apply, load, number, reduce
from heddle.runtime.lib.chance import STEP, least_of, mixed, passes

EPS = 1e-5
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Example:
    """`chain(C)`; `shapes(R, C)` of its tensors; `math(tensors)`, whose result per output is compared, in any dtype."""

    chain: Callable[[int], Chain]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    math: Callable[[Tensors], tuple[Tensor, ...]]
    rows: int = 1  # the number of rows is a multiple of it
    ungraded: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()  # whole numbers of rows, from which a kernel draws; they are ungraded, too


def mul(*args: Expr) -> Expr:
    found = args[0]
    for a in args[1:]:
        found = apply("mul", found, a)
    return found


def add(x: Expr, y: Expr) -> Expr:
    return apply("add", x, y)


def mean(x: Expr, columns: int) -> Expr:
    return apply("div", reduce("sum", x), number(columns))


def _scale(x: Expr, columns: int) -> Expr:
    return apply("rsqrt", add(mean(mul(x, x), columns), number(EPS)))


def add_rms_norm(c: int) -> Chain:
    h = add(load("x", "rc"), load("r", "rc"))
    rstd = _scale(h, c)
    y = mul(h, rstd, load("w", "c"))
    return Chain("add_rms_norm", c, (Output("h", h), Output("y", y)), (("h", h), ("rstd", rstd)),
                 ("a.spec:3  h = x + r", "a.spec:4  y = rms_norm(h)"))  # fmt: skip


def _drop(x: Expr, name: str, rate: float) -> Expr:
    return apply("dropout", x, load(name, "r", drawn=True), rate=rate)


def drop_norm(c: int, drop: Callable[[Expr, str, float], Expr] = _drop) -> Chain:
    """Residual, dropout and norm; and a gate that is dropped by other numbers."""
    h = add(load("r", "rc"), drop(load("x", "rc"), "drawn", 0.3))
    gate = drop(apply("sigmoid", load("z", "rc")), "drawn_", 0.5)
    y = mul(h, _scale(h, c), load("w", "c"))
    return Chain("drop_norm", c, (Output("h", h), Output("y", y), Output("o", gate)), (("h", h),))


def layer_norm(c: int, zero_centred: bool = False) -> Chain:
    x = load("x", "rc")
    mu = mean(x, c)
    centred = apply("sub", x, mu)
    rstd = _scale(centred, c)
    w = load("w", "c")
    gain = add(number(1), w) if zero_centred else w
    y = add(mul(centred, rstd, gain), load("b", "c"))
    return Chain("layer_norm", c, (Output("y", y),), (("mu", mu), ("rstd", rstd)))


def gated_norm(c: int, groups: int = 3) -> Chain:
    y = mul(load("x", "rc"), apply("silu", load("z", "rc")))
    rstd = _scale(y, c)
    w = load("w", "rc", View(modulo=groups))
    out = mul(y, rstd, w)
    return Chain("gated_norm", c, (Output("o", out),), (("y", y), ("rstd", rstd)))


def swiglu(c: int) -> Chain:
    y = mul(apply("silu", load("gate", "rc")), load("up", "rc"))
    return Chain("swiglu", c, (Output("y", y),))


def swiglu_halves(c: int) -> Chain:
    """Both halves in one tensor, as one product gives them."""
    gate, up = load("x", "rc", View(width=2 * c)), load("x", "rc", View(start=c, width=2 * c))
    return Chain("swiglu_halves", c, (Output("y", mul(apply("silu", gate), up)),), (("gate", gate), ("up", up)))


def relu2_bias(c: int) -> Chain:
    return Chain("relu2_bias", c, (Output("y", apply("relu2", add(load("x", "rc"), load("b", "c")))),))


def softplus_bias(c: int) -> Chain:
    return Chain("softplus_bias", c, (Output("dt", apply("softplus", add(load("x", "rc"), load("b", "c")))),))


def gelu(c: int) -> Chain:
    return Chain("gelu", c, (Output("y", apply("gelu", load("x", "rc"))),))


def gelu_tanh(c: int) -> Chain:
    return Chain("gelu_tanh", c, (Output("y", apply("gelu_tanh", load("x", "rc"))),))


def softcap(c: int) -> Chain:
    x = load("x", "rc")
    return Chain("softcap", c, (Output("y", mul(number(30), apply("tanh", apply("div", x, number(30))))),))


def softmax(c: int) -> Chain:
    x = load("x", "rc")
    m = apply("constant", reduce("max", x))
    e = apply("exp", apply("sub", x, m))
    total = reduce("sum", e)
    return Chain("softmax", c, (Output("p", apply("div", e, total)),), (("m", m), ("l", total)))


def scaled(c: int) -> Chain:
    """Logits by a number that is learned."""
    return Chain("scaled", c, (Output("y", mul(load("x", "rc"), load("s", ""))),))


def rope(c: int, heads: int = 3) -> Chain:
    x1, x2 = load("x", "rc", View(width=2 * c)), load("x", "rc", View(start=c, width=2 * c))
    cos, sin = (load(n, "rc", View(divide=heads), grad=False) for n in ("cos", "sin"))
    first = apply("sub", mul(x1, cos), mul(x2, sin))
    second = add(mul(x2, cos), mul(x1, sin))
    return Chain("rope", c, (Output("y", first, view=View(width=2 * c)), Output("y", second, view=View(start=c, width=2 * c))),
                 (("x1", x1), ("x2", x2)))  # fmt: skip


def gated(c: int, heads: int = 3) -> Chain:
    """A number of each token, and a tile of each, for all its heads."""
    x, g, t = load("x", "rc"), load("g", "r", View(divide=heads)), load("t", "rc", View(divide=heads))
    return Chain("gated", c, (Output("y", add(mul(x, apply("sigmoid", g)), mul(x, t))),))


def skip(c: int, heads: int = 4) -> Chain:
    """Mamba-2's skip: y + D x, a number D for each head; and the largest of a few."""
    y, x = load("y", "rc"), load("x", "rc")
    return Chain("skip", c, (Output("o", add(y, mul(load("d", "r", View(modulo=heads)), x))),))


def shared_heads(c: int) -> Chain:
    """Rows are (token, 3 key heads, 2 query heads of each): a weight of each key head, a number of each of the two."""
    x, w, b = load("x", "rc"), load("w", "rc", View(divide=2, modulo=3)), load("b", "c")
    y = add(mul(x, w), mul(b, load("d", "r", View(modulo=2))))
    return Chain("shared_heads", c, (Output("y", y),))


def everything(c: int) -> Chain:
    """The ops that no block above has, on a row and its statistics."""
    x, w, s = load("x", "rc"), load("w", "c"), load("s", "r")
    t = apply("where", apply("gt", x, w), apply("sin", x), apply("cos", mul(x, s)))
    size = apply("sqrt", add(mean(add(apply("abs", mul(t, x)), mul(s, s)), c), number(0.5)))  # s: with each column
    u = apply("pow", add(mul(x, x), number(1.0)), number(1.5))
    v = apply("log", add(apply("exp", apply("clip", x, low=-3.0, high=2.0)), apply("sigmoid", w)))
    z = apply("sub", apply("max", t, apply("min", x, w)), apply("log_sigmoid", mul(v, apply("sign", x))))
    out = apply("div", add(z, apply("neg", apply("relu", x))), mul(size, u))
    return Chain("everything", c, (Output("o", out), Output("size", size, "r")), (("size", size),))


def _tiles(*names: str) -> Callable[[int, int], dict[str, tuple[int, ...]]]:
    return lambda r, c: {n: (c,) if n in "wb" else (r, c) for n in names}


def _rms(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def _gated(t: Tensors) -> tuple[Tensor, ...]:
    groups, c = t["w"].shape
    y = (t["x"] * F.silu(t["z"])).view(-1, groups, c)
    return (_rms(y, t["w"]).view(-1, c),)


def _rope(t: Tensors) -> tuple[Tensor, ...]:
    (x1, x2), heads = t["x"].chunk(2, -1), t["x"].shape[0] // max(1, t["cos"].shape[0])
    cos, sin = (t[n].repeat_interleave(heads or 1, 0) for n in ("cos", "sin"))
    return (torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1),)


def _gated_heads(t: Tensors) -> tuple[Tensor, ...]:
    g, tile = (t[n].repeat_interleave(3, 0) for n in "gt")
    return (t["x"] * torch.sigmoid(g)[:, None] + t["x"] * tile,)


def _everything(t: Tensors) -> tuple[Tensor, ...]:
    x, w, s = t["x"], t["w"], t["s"][:, None]
    a = torch.where(x > w, x.sin(), (x * s).cos())
    size = (((a * x).abs() + s * s).mean(-1) + 0.5).sqrt()
    v = (x.clamp(-3, 2).exp() + w.sigmoid()).log()
    z = torch.maximum(a, torch.minimum(x, w.expand_as(x))) - F.logsigmoid(v * x.sign())
    return (z - x.relu()) / (size[:, None] * (x * x + 1) ** 1.5), size


def _layer_norm(extra: float) -> Callable[[Tensors], tuple[Tensor, ...]]:
    return lambda t: (F.layer_norm(t["x"], t["w"].shape, t["w"] + extra, t["b"], EPS),)


def kept(drawn: Tensor, columns: int, rate: float) -> Tensor:
    """Of rows that begin with these numbers."""
    return passes(mixed(drawn[:, None] + torch.arange(columns) * STEP), least_of(rate))


def _drop_norm(t: Tensors) -> tuple[Tensor, ...]:
    c = t["x"].shape[1]
    h = t["r"] + torch.where(kept(t["drawn"], c, 0.3), t["x"] / 0.7, 0)
    return h, _rms(h, t["w"]), torch.where(kept(t["drawn_"], c, 0.5), t["z"].sigmoid() * 2, 0)


EXAMPLES = {
    "add_rms_norm": Example(add_rms_norm, _tiles("x", "r", "w"),
                            lambda t: (t["x"] + t["r"], _rms(t["x"] + t["r"], t["w"]))),
    "layer_norm": Example(layer_norm, _tiles("x", "w", "b"), _layer_norm(0)),
    "layer_norm_1p": Example(lambda c: layer_norm(c, True), _tiles("x", "w", "b"), _layer_norm(1)),
    "gated_norm": Example(gated_norm, lambda r, c: {"x": (r, c), "z": (r, c), "w": (3, c)}, _gated, rows=3),
    "swiglu": Example(swiglu, _tiles("gate", "up"), lambda t: (F.silu(t["gate"]) * t["up"],)),
    "swiglu_halves": Example(swiglu_halves, lambda r, c: {"x": (r, 2 * c)},
                             lambda t: (F.silu(t["x"].chunk(2, -1)[0]) * t["x"].chunk(2, -1)[1],)),
    "relu2_bias": Example(relu2_bias, _tiles("x", "b"), lambda t: ((t["x"] + t["b"]).relu() ** 2,)),
    "softplus_bias": Example(softplus_bias, _tiles("x", "b"), lambda t: (F.softplus(t["x"] + t["b"], threshold=1e9),)),
    "gelu": Example(gelu, _tiles("x"), lambda t: (F.gelu(t["x"]),)),
    "gelu_tanh": Example(gelu_tanh, _tiles("x"), lambda t: (F.gelu(t["x"], approximate="tanh"),)),
    "softcap": Example(softcap, _tiles("x"), lambda t: (30 * torch.tanh(t["x"] / 30),)),
    "softmax": Example(softmax, _tiles("x"), lambda t: (t["x"].softmax(-1),)),
    "scaled": Example(scaled, lambda r, c: {"x": (r, c), "s": ()}, lambda t: (t["x"] * t["s"],)),
    "rope": Example(rope, lambda r, c: {"x": (r, 2 * c), "cos": (r // 3, c), "sin": (r // 3, c)}, _rope, rows=3,
                    ungraded=("cos", "sin")),
    "gated": Example(gated, lambda r, c: {"x": (r, c), "g": (r // 3,), "t": (r // 3, c)}, _gated_heads, rows=3),
    "skip": Example(skip, lambda r, c: {"y": (r, c), "x": (r, c), "d": (4,)},
                    lambda t: (t["y"] + t["d"].repeat(t["x"].shape[0] // 4)[:, None] * t["x"],), rows=4),
    "shared_heads": Example(
        shared_heads, lambda r, c: {"x": (r, c), "w": (3, c), "b": (c,), "d": (2,)},
        lambda t: (t["x"] * t["w"].repeat_interleave(2, 0).repeat(len(t["x"]) // 6, 1)
                   + t["b"] * t["d"].repeat(len(t["x"]) // 2)[:, None],), rows=6),
    "drop_norm": Example(
        drop_norm, lambda r, c: {**dict.fromkeys("xrz", (r, c)), "w": (c,), "drawn": (r,), "drawn_": (r,)}, _drop_norm,
        ungraded=("drawn", "drawn_"), drawn=("drawn", "drawn_")),
    "everything": Example(everything, lambda r, c: {"x": (r, c), "w": (c,), "s": (r,)}, _everything),
}  # fmt: skip
