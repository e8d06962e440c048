"""From a chain to its kernels: forward, backward, and what sums the parts of weights' gradients."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cut import cut, needed
from .derive import derive
from .expr import REDUCTIONS, WHOLE, Chain, Expr, Output, Unfit, View, level_of, load, loads_of, made, ordered, rebuilt
from .fold import Folding, folded
from .table import TABLE
from .tiles import ROW, TILE, WALK, Tiles, choose

_MOST_GROUPS = 65_535  # a grid's second dimension
_OURS = {"rows", "mask_r", "cols", "mask_c", "mask", "offs", "block", "start", "group", "num_rows", "tl", "torch",
         "triton", "kernels", "C", "BLOCK_R", "BLOCK_C", "ctx", "sign", "tanh", "softplus", "dropped", "mixed",
         "Tensor", "grid", "programs"}  # fmt: skip


@dataclass(frozen=True)
class Store:
    """A value that a kernel writes, to a tensor of its own. `like`: the tensor whose dtype it has (None: fp32)."""

    name: str
    value: Expr
    dims: str
    view: View = WHOLE
    like: str | None = None


@dataclass(frozen=True)
class Sum:
    """The sum over rows of a value, of dims `c` or "": each program writes its part, and `total` adds the parts.

    view: how the tensor `of`, whose gradient it is, is read; `total` is its name.
    """

    name: str
    value: Expr
    dims: str
    of: str
    view: View


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name's end, what it stores and sums, and how it is cut. `groups`: rows that come again."""

    name: str
    stores: tuple[Store, ...]
    sums: tuple[Sum, ...]
    tiles: Tiles
    groups: int

    @property
    def values(self) -> list[Expr]:
        return [s.value for s in self.stores] + [s.value for s in self.sums]

    @property
    def is_summing(self) -> bool:
        """Whether its results depend on how it is cut: it sums along rows, or over them."""
        return bool(self.sums) or self.tiles.mode != TILE

    @property
    def dims(self) -> list[str]:
        """Of what it gives."""
        return [s.dims for s in self.stores] + [s.dims for s in self.sums]

    @property
    def loads(self) -> list[Expr]:
        return loads_of(self.values)


@dataclass(frozen=True)
class Gradient:
    """The gradient of the input `of`: the tensor `name` that a backward kernel stores, which inputs with one gradient
    share, or the gradient of an output that is theirs, too; or the sum of parts.

    divide: the sum of so many rows, one behind the other, of the tensor `NAME_rows` that a kernel stores; 1: no such.
    """

    of: str
    name: str
    summed: bool
    divide: int = 1


@dataclass(frozen=True)
class Plan:
    """All kernels of a chain.

    inputs: in order of first use; saved: what the forward pass gives beside its outputs; kept: the tensors, inputs,
    outputs and saved, that the backward pass reads; cotangents: of which outputs it reads the gradient, by name.
    """

    chain: Chain
    outputs: tuple[Output, ...]
    named: Mapping[Expr, str]
    groups: int
    inputs: tuple[Expr, ...]
    saved: tuple[Store, ...]
    forward: Kernel
    backward: tuple[Kernel, ...]
    kept: tuple[str, ...]
    cotangents: tuple[str, ...]
    gradients: tuple[Gradient, ...]
    first: str


def plan(chain: Chain, tiles: Mapping[str, Tiles] | None = None) -> Plan:
    """tiles: for kernels by the end of their names, `fwd`, `bwd`, `bwd_weights`, in place of the untuned ones.

    Raises Unfit where no kernel can be generated, ValueError where the chain says what cannot be.
    """
    small = folded([*(o.value for o in chain.outputs), *(e for _, e in chain.named)], chain.columns)
    outputs = tuple(replace(o, value=small[o.value]) for o in chain.outputs)
    named = {small[e]: name for name, e in reversed(chain.named)}
    named |= {o.value: o.name for o in reversed(outputs) if o.view == View() and o.value not in named}
    inputs = loads_of(o.value for o in outputs)
    first = next((e for e in inputs if e.dims == "rc" and e.view.divide == 1), None)
    if first is None:
        raise Unfit("no tensor that has a row of its own for each row of the chain")
    _check(chain, inputs, outputs, named)
    groups = math.lcm(*(e.view.period for e in inputs))
    if groups > _MOST_GROUPS:
        raise Unfit(f"rows that come again after {groups}: a grid has at most {_MOST_GROUPS}")
    one = _Planning(chain, outputs, named, groups, first.name, tiles or {})
    return one.plan(inputs)


def can_be_named(name: str) -> bool:
    """Whether a tensor or a value may have this name in a kernel: Python takes it, and nothing else is so called."""
    return name.isidentifier() and not keyword.iskeyword(name) and name not in _OURS and not name.startswith("d_")


def _check(chain: Chain, inputs: list[Expr], outputs: tuple[Output, ...], named: Mapping[Expr, str]) -> None:
    names = [*dict.fromkeys(e.name for e in inputs), *dict.fromkeys(o.name for o in outputs)]
    for name in {*names, *named.values()}:
        if not can_be_named(name):
            raise ValueError(f"`{name}` cannot be a name in a kernel")
    if len(set(names)) < len(names):
        raise ValueError(f"chain `{chain.name}` has an input and an output of one name")
    for e in inputs:
        if "c" in e.dims and e.view.start + chain.columns > (e.view.width or chain.columns):
            raise ValueError(f"`{e.name}` has {e.view.width} columns, fewer than are read from {e.view.start}")
    for name in dict.fromkeys(o.name for o in outputs):
        parts = sorted((o.view.start, o.view.width or chain.columns, o.dims, o.grad) for o in outputs if o.name == name)
        width = parts[0][1] if parts[0][2] == "rc" else chain.columns
        if [p[0] for p in parts] != list(range(0, width, chain.columns)) or len({p[1:] for p in parts}) > 1:
            raise ValueError(f"output `{name}` is not written once in each of its columns")


class _Planning:
    """What all steps of one plan know."""

    def __init__(
        self, chain: Chain, outputs: tuple[Output, ...], named: dict[Expr, str], groups: int, first: str,
        tiles: Mapping[str, Tiles],
    ) -> None:  # fmt: skip
        self.chain, self.outputs, self.named, self.groups = chain, outputs, named, groups
        self.first, self.tiles = first, tiles
        self.given: set[Expr] = set()
        self.taken = {*named.values(), *(o.name for o in outputs)}

    def plan(self, inputs: list[Expr]) -> Plan:
        self.taken |= {e.name for e in inputs}
        grads, cotangents = self._gradients(inputs)
        bare = plain([*grads.values(), *(o.value for o in self.outputs), *self.named])
        grads = {e: bare[g] for e, g in grads.items()}
        self.outputs = tuple(replace(o, value=bare[o.value]) for o in self.outputs)
        self.named = {bare[e]: name for e, name in reversed(self.named.items())}
        stores = [self._stored(o) for o in self.outputs]
        self.given = set(ordered(cotangents.values())) if cotangents else set()
        wanted = needed(grads.values(), cotangents.values())
        whole = [o for o in reversed(self.outputs) if o.dims == o.value.dims]
        read = {o.value: load(o.name, o.dims, o.view, grad=False) for o in whole}
        chosen = cut(wanted, read, self.chain.columns)
        saved = [Store(self._name(e, i), e, e.dims, View(), self.first if "c" in e.dims else None)
                 for i, e in enumerate((e for e in chosen if e not in read), 1)]  # fmt: skip
        read |= {s.value: load(s.name, s.dims, grad=False) for s in saved}
        again = rebuilt(grads.values(), {e: read[e] for e in chosen})
        grads = {e: again[g] for e, g in grads.items()}
        backward, gradients = self._backward(grads)
        loads = list(dict.fromkeys(e.name for k in backward for e in k.loads))
        own = {s.name for k in backward for s in k.stores}
        slopes = [f"d_{o.name}" for o in self.outputs]
        return Plan(
            self.chain, self.outputs, self.named, self.groups, tuple(inputs), tuple(saved),
            self._kernel("fwd", [*stores, *saved], []), backward,
            tuple(n for n in loads if n not in own and n not in slopes),
            tuple(dict.fromkeys(n for n in slopes if n in loads)), gradients, self.first,
        )  # fmt: skip

    def _stored(self, o: Output) -> Store:
        return Store(o.name, o.value, o.dims, o.view, self.first if o.dims == "rc" else None)

    def _name(self, e: Expr, i: int) -> str:
        name = self.named.get(e, f"saved_{i}")
        while name in self.taken and self.named.get(e) != name:
            name += "_"
        return name

    def _gradients(self, inputs: list[Expr]) -> tuple[dict[Expr, Expr], dict[Expr, Expr]]:
        """The gradient of each input, and the gradients of outputs that they are made of."""
        slopes: dict[Expr, Expr] = {}
        a = Folding(self.chain.columns)
        for o in self.outputs:
            if o.grad and o.value.op != "load":
                g = load(f"d_{o.name}", o.dims, o.view, grad=False)
                g = g if set(g.dims) <= set(o.value.dims) | {"r"} else a.sum(g)
                slopes[o.value] = a.add(slopes[o.value], g) if o.value in slopes else g
        for o in self.outputs:
            if o.grad and o.value.op == "load" and o.value.grad:
                raise Unfit(f"the output `{o.name}` is an input")
        grads = derive(slopes, self.chain.columns)
        for e in grads:
            if "r" in e.dims and e.view.divide != 1 and (e.view.start or e.view.width is not None):
                raise Unfit(f"the gradient of some columns of `{e.name}`, whose rows {e.view.divide} rows read")
        for e in grads:
            near = [f for f in grads if f is not e and f.name == e.name]
            if any(abs(f.view.start - e.view.start) < self.chain.columns for f in near):
                raise Unfit(f"the gradient of `{e.name}`, some columns of which are read in two places")
        return grads, slopes

    def _backward(self, grads: Mapping[Expr, Expr]) -> tuple[tuple[Kernel, ...], tuple[Gradient, ...]]:
        stores: list[Store] = []
        sums: list[Sum] = []
        gradients: dict[str, Gradient] = {}
        where: dict[tuple[Expr, str], str] = {}
        for e, g in grads.items():
            name, view = f"d_{e.name}", View(1, None, e.view.start, e.view.width)
            if "r" not in e.dims:
                sums.append(Sum(f"{name}_{e.view.start}" if e.view.start else name, g, e.dims, e.name, e.view))
                gradients[e.name] = Gradient(e.name, name, True)
                continue
            if e.view.divide > 1:
                gradients[e.name] = Gradient(e.name, name, True, e.view.divide)
                stores.append(Store(f"{name}_rows", g, e.dims))
                continue
            alone = view == View()
            if alone and g in self.given and g.dims == e.dims and g.view == View():
                gradients[e.name] = Gradient(e.name, g.name, False)  # that of an output, handed on
                continue
            name = where.setdefault((g, e.dims), name) if alone else name
            gradients[e.name] = Gradient(e.name, name, False)
            if name == f"d_{e.name}":
                stores.append(Store(name, g, e.dims, view, e.name))
        if not stores and not sums:
            return (), tuple(gradients.values())
        kernel = self._kernel("bwd", stores, sums)
        wide = [s for s in sums if s.dims == "c"]
        if kernel.tiles.mode != WALK or not wide:
            return (kernel,), tuple(gradients.values())
        return self._second_walk(stores, sums, wide), tuple(gradients.values())

    def _second_walk(self, stores: list[Store], sums: list[Sum], wide: list[Sum]) -> tuple[Kernel, ...]:
        """A row is longer than a block, so that no program holds a weight's gradient: the first kernel keeps what it
        knows of each row, and a second owns columns and walks over rows."""
        rows: dict[Expr, Expr] = {}
        kept: list[Store] = []
        level = level_of(s.value for s in wide)
        for e in ordered([s.value for s in wide]):
            for a in e.args:
                if "c" not in a.dims and "c" in e.dims and level[a] and a not in rows:
                    name = f"row_{len(kept) + 1}"
                    rows[a] = load(name, "r", grad=False)
                    kept.append(Store(name, a, "r"))
        for s in wide:
            if "c" not in s.value.dims and level[s.value] and s.value not in rows:
                name = f"row_{len(kept) + 1}"
                rows[s.value] = load(name, "r", grad=False)
                kept.append(Store(name, s.value, "r"))
        now = rebuilt([s.value for s in wide], rows)
        second = [replace(s, value=now[s.value]) for s in wide]
        narrow = [s for s in sums if s not in wide]
        kernels = [self._kernel("bwd", [*stores, *kept], narrow)] if stores or kept or narrow else []
        return (*kernels, self._kernel("bwd_weights", [], second))

    def _kernel(self, name: str, stores: list[Store], sums: list[Sum]) -> Kernel:
        values = [s.value for s in stores] + [s.value for s in sums]
        reduces = any(e.op in REDUCTIONS for e in ordered(values))
        wide = [s for s in sums if s.dims == "c"]
        live = len([e for e in loads_of(values) if "c" in e.dims]) + len(wide) + 1
        tiles = self.tiles.get(name) or choose(self.chain.columns, reduces, live, bool(sums))
        if reduces and tiles.mode == TILE:
            raise ValueError(f"`{name}` reduces over columns: it cannot be cut into tiles")
        if tiles.mode == ROW and tiles.block_c < self.chain.columns:
            raise ValueError(f"`{name}`: a block of {tiles.block_c} is no whole row of {self.chain.columns}")
        if bool(sums) != bool(tiles.programs):
            tiles = replace(tiles, programs=choose(self.chain.columns, reduces, live, bool(sums)).programs)
        return Kernel(name, tuple(stores), tuple(sums), tiles, self.groups)


def plain(roots: Iterable[Expr]) -> dict[Expr, Expr]:
    """Each value without its `constant`s: they say something to derivatives only."""

    def bare(op: str, args: tuple[Expr, ...], attrs: tuple[tuple[str, Any], ...], dims: str) -> Expr:
        return args[0] if op == "constant" else made(op, args, dims, attrs)

    return rebuilt(roots, {}, bare)


def calls(values: Iterable[Expr]) -> list[str]:
    """The helpers that their text calls."""
    return sorted({c for e in ordered(values) if (op := TABLE.get(e.op)) and (c := op.calls)})
