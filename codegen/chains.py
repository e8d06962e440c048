"""The file of a chain: its kernels, the functions that launch them, and the one that a module calls."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ..lowering.chains.expr import WHOLE, Chain, Expr, View, made, ordered, rebuilt
from ..lowering.chains.plan import Kernel, Plan, Store, calls, plan
from ..lowering.chains.tiles import TILE, Tiles, power
from ..lowering.target import Target
from .chain_kernels import KernelPrinter
from .expressions import meaning
from .kernels import render_file


def source(chain: Chain, target: Target, name: str, tiles: Mapping[str, Tiles] | None = None) -> str:
    """The text of a file with one public function `name(*inputs)`, of the chain's tensors in the order of `inputs`.

    tiles: how kernels are cut, by `fwd`, `bwd` and `bwd_weights`, where it is not as untuned. Raises Unfit.
    """
    return render_file("chain.py.jinja", _Facts(plan(chain, tiles), name).all())


def inputs(chain: Chain) -> tuple[str, ...]:
    """The names of a chain's tensors, in the order of its function's arguments: that of first use."""
    return tuple(dict.fromkeys(e.name for e in plan(chain).inputs))


class _Facts:
    """What the template prints, as plain values."""

    def __init__(self, p: Plan, name: str) -> None:
        self.p, self.name = p, name
        self.inputs = _by_name(p.inputs)
        self.stores = _by_name(p.forward.stores)
        own = {g.name for g in p.gradients if not g.summed}
        self.grads = _by_name(s for k in p.backward for s in k.stores if s.name in own)
        self.sums = [s for k in p.backward for s in k.sums]
        self.first = self.inputs[p.first]

    def all(self) -> dict[str, Any]:
        p = self.p
        public = list(dict.fromkeys(o.name for o in p.outputs))
        fixed = [*(s.name for s in p.saved), *dict.fromkeys(o.name for o in p.outputs if not o.grad)]
        used = {*p.cotangents, *(g.name for g in p.gradients)}
        return {
            "name": self.name,
            "columns": p.chain.columns,
            "lines": p.chain.lines,
            "title": textwrap.shorten(self.math()[-1], 112),
            "math": [part for line in self.math() for part in _wrapped(line)],
            "helpers": calls([*p.forward.values, *(v for k in p.backward for v in k.values)]),
            "idle": self.idle(),
            "kernels": [self.kernel(k) for k in (p.forward, *p.backward)],
            "constants": [c for k in (p.forward, *p.backward) for c in self.constants(k)],
            "total_block": min(128, power(p.chain.columns)),
            "arguments": list(self.inputs),
            "fwd_head": self.head(f"{self.name}_fwd", len(self.stores)),
            "public_head": self.head(self.name, len(public)),
            "public_call": self.public_call(public),
            "legend": "\n".join(_wrapped(self.said())),
            "public_legend": self.legend(False).replace("[R", "[..."),
            "first": p.first,
            "groups": p.groups,
            "given": [self.given(e) for e in self.inputs.values()],
            "floats": [n for n, e in self.inputs.items() if not e.drawn],
            "drawn": [n for n, e in self.inputs.items() if e.drawn],
            "outputs": [(n, self.shape(s) + ("," if s.dims == "r" else ""), s.like) for n, s in self.stores.items()],
            "public": public,
            "results": [self.result(n) for n in public],
            "fixed": fixed,
            "kept": p.kept,
            "kept_outputs": [n if n in p.kept or n in fixed else f"_{n}" for n in self.stores],
            "slope": p.cotangents[0] if p.cotangents else None,
            "all_slopes": [f"d_{n}" if f"d_{n}" in used else f"_{n}" for n in self.stores],
            "made": self.stored_gradients(),
            "rows": [(s.name, self.shape(s) + ("," if s.dims == "r" else ""))
                     for k in p.backward for s in k.stores if s.name not in self.grads],
            "spread": [(g.name, g.divide, self.width(self.inputs[g.of].view) if "c" in self.inputs[g.of].dims else "1")
                       for g in p.gradients if g.divide > 1],
            "totals": self.totals(),
            "bwd_parameters": filled([*(f"{n}: {self.type_of(n)}" for n in (*p.kept, *p.cotangents)),
                                      *(f"{n}_dtype: torch.dtype" for n in self.made_names())]),
            "bwd_arguments": filled([*p.kept, *(self.slope(n) for n in p.cotangents), *self.dtypes()], " " * 8),
            "bwd_returns": self.made_names(),
            "has_gradients": bool(p.gradients),
            "returned": [self.returned(n) for n in self.inputs],
        }

    def head(self, name: str, results: int) -> str:
        """The first line of a function of the chain's tensors."""
        gives = "Tensor" if results == 1 else f"tuple[{', '.join(['Tensor'] * results)}]"
        return fitted(f"def {name}(", [f"{n}: {self.type_of(n)}" for n in self.inputs], f") -> {gives}:")

    def public_call(self, public: list[str]) -> str:
        """What the public function does with its arguments."""
        outputs = ", ".join(n if n in public else f"_{n}" for n in self.stores)
        given = ("rows" if n == self.p.first else how for n, how in map(self.given, self.inputs.values()))
        return fitted(f"{outputs} = {self.name}_fwd(", given, ")", "    ")

    def type_of(self, name: str) -> str:
        return "Tensor | None" if name in self.inputs and self.inputs[name].drawn else "Tensor"

    def idle(self) -> list[str]:
        """The tensors that are the outputs where nothing is drawn, if each is one."""
        outputs = [o.value for o in self.p.outputs]

        def undropped(op: str, args: tuple[Expr, ...], attrs: tuple[tuple[str, Any], ...], dims: str) -> Expr:
            return args[0] if op == "dropped" else made(op, args, dims, attrs)

        bare = rebuilt(outputs, {}, undropped)
        found = [bare[e] for e in outputs]
        given = all(e.op == "load" and e.dims == "rc" and e.view == WHOLE for e in found)
        return [e.name for e in found] if given else []

    def stored_gradients(self) -> list[dict[str, Any]]:
        return [self.made(n, s) for n, s in self.grads.items()]

    def totals(self) -> list[dict[str, Any]]:
        return [self.total(n) for n in dict.fromkeys(s.of for s in self.sums)]

    def made_names(self) -> list[str]:
        spread = [g.name for g in self.p.gradients if g.divide > 1]
        return [*(g["name"] for g in (*self.stored_gradients(), *self.totals())), *spread]

    def dtypes(self) -> list[str]:
        spread = [f"ctx.{g.of}_dtype" for g in self.p.gradients if g.divide > 1]
        return [*(g["dtype"] for g in (*self.stored_gradients(), *self.totals())), *spread]

    # --- words --------------------------------------------------------------------------------------------------------

    def math(self) -> list[str]:
        """What the chain computes, a line for each value with a name, in order."""
        p = self.p
        roots = [o.value for o in p.outputs]
        named = {e: n for e, n in p.named.items() if e.op not in ("load", "number")}
        inside = [e for e in ordered(roots) if e in named]
        lines = [f"{named[e]} = {meaning(e, named, p.chain.columns, top=True)[0]}" for e in inside]
        for o in p.outputs:
            if named.get(o.value) != o.name:
                place = f"[{o.view.start}:{o.view.start + p.chain.columns}]" if o.view.width is not None else ""
                lines.append(f"{o.name}{place} = {meaning(o.value, named, p.chain.columns)[0]}")
        return lines

    def said(self) -> str:
        """What the file's first words end with."""
        more = "; and the gradients" if self.p.gradients else ""
        return f"R rows of C = {self.p.chain.columns} columns: {self.legend(True)}{more}."

    def legend(self, saved: bool) -> str:
        """x, r [R, C], w [C] -> y [R, C]."""
        public = [o.name for o in self.p.outputs]
        outputs = [(n, f"[{self.shape(s, 'R')}]") for n, s in self.stores.items() if saved or n in public]
        return f"{_grouped((n, self.dims(e)) for n, e in self.inputs.items())} -> {_grouped(outputs)}"

    def dims(self, e: Expr) -> str:
        rows = f"R // {e.view.divide}" if e.view.divide > 1 else "R"
        if e.view.modulo is not None:
            rows = str(e.view.modulo)
        has = [rows] if "r" in e.dims or e.view.modulo is not None else []
        return f"[{', '.join([*has, *([self.width(e.view)] if 'c' in e.dims else [])])}]"

    def width(self, view: View) -> str:
        return "C" if view.width in (None, self.p.chain.columns) else str(view.width)

    def shape(self, s: Store, rows: str = "num_rows") -> str:
        return f"{rows}, {self.width(s.view)}" if s.dims == "rc" else rows

    # --- kernels ------------------------------------------------------------------------------------------------------

    def kernel(self, k: Kernel) -> dict[str, Any]:
        printer = KernelPrinter(self.p, k)
        body = printer.text_of()
        strided = printer.strided()
        pointers: list[tuple[str, str]] = []
        for n in dict.fromkeys(e.name for e in k.loads):
            pointers += [(f"{n}_ptr", n), *([(f"{n}_stride", f"{n}.stride(0)")] if n in strided else [])]
        pointers += [(f"{n}_ptr", n) for n in dict.fromkeys(s.name for s in k.stores)]
        pointers += [(f"{s.name}_parts_ptr", f"{s.name}_parts") for s in k.sums]
        used = [c for c in ("BLOCK_R", "BLOCK_C") if any(c in line for line in body)]
        upper = k.name.upper()
        blocks = f"triton.cdiv(num_rows, {upper}_BLOCK_R)"
        if k.groups > 1:
            blocks = f"triton.cdiv(num_rows // {k.groups}, {upper}_BLOCK_R)"
        grid = ["programs" if k.tiles.programs else blocks]
        grid += [str(k.groups)] if k.groups > 1 else []
        if k.tiles.mode == TILE and printer.has_tiles:
            grid.append(f"triton.cdiv(C, {upper}_BLOCK_C)")
        return {
            "name": k.name,
            "doc": "\n    ".join(textwrap.wrap(self.doc(k), 112)),
            "parameters": filled([*(p for p, _ in pointers), "num_rows", "C: tl.constexpr",
                                  *(f"{c}: tl.constexpr" for c in used)]),
            "body": body,
            "blocks": blocks,
            "programs": f"{upper}_PROGRAMS" if k.tiles.programs else None,
            "grid": grid,
            "launch": filled([f"{self.name}_{k.name}_kernel", "grid", *(a for _, a in pointers), "num_rows", "C=C",
                              *(f"{c}={upper}_{c}" for c in used), f"num_warps={upper}_WARPS"], " " * 8),
            "parts": [(s.name, "C" if s.dims == "c" else "1") for s in k.sums],
        }  # fmt: skip

    def constants(self, k: Kernel) -> list[tuple[str, int]]:
        t, upper = k.tiles, k.name.upper()
        found = [(f"{upper}_BLOCK_R", t.block_r), (f"{upper}_BLOCK_C", t.block_c), (f"{upper}_WARPS", t.warps)]
        return found + ([(f"{upper}_PROGRAMS", t.programs)] if t.programs else [])

    def doc(self, k: Kernel) -> str:
        """What one program owns."""
        rows = "BLOCK_R rows" if not k.tiles.programs else "every programs-th block of BLOCK_R rows"
        if k.groups > 1:
            rows += f" of one of {k.groups} groups (row r is of group r % {k.groups})"
        how = {"row": "", "walk": ", in walks over their columns", "tile": " and BLOCK_C columns"}[k.tiles.mode]
        does = {"fwd": "", "bwd": "Gradients. ", "bwd_weights": "Gradients of what rows share. "}[k.name]
        return f"{does}One program owns {rows}{how}."

    # --- the functions around them ------------------------------------------------------------------------------------

    def given(self, e: Expr) -> tuple[str, str]:
        """How the public function hands an argument to the op: tiles as [rows, width], weights as [rows, width]."""
        view, name = e.view, e.name
        width = self.width(view) if "c" in e.dims else "1"
        rows = f"num_rows // {view.divide}" if view.divide > 1 else "num_rows"
        if e.dims != "rc":
            return name, f"kernels.table({name}, {rows if e.dims == 'r' else view.modulo or 1}, {width})"
        return name, f"kernels.rows({name}, {width}{'' if name == self.p.first else f', {rows}'})"

    def result(self, name: str) -> str:
        """An output in the shape that the caller knows."""
        s, width = self.stores[name], self.width(self.first.view)
        if s.dims == "rc" and self.width(s.view) == width:
            return f"{name}.view({self.p.first}.shape)"
        more = f", {self.width(s.view)}" if s.dims == "rc" else ""
        return f"{name}.view(*kernels.lead({self.p.first}, {width}){more})"

    def slope(self, name: str) -> str:
        """How the backward pass hands the gradient of an output on."""
        s = self.stores[name.removeprefix("d_")]
        how = f"rows({name}, {self.width(s.view)})" if s.dims == "rc" else f"table({name}, {name}.shape[0], 1)"
        return f"kernels.{how}"

    def sharing(self, name: str) -> list[str]:
        return [g.of for g in self.p.gradients if g.name == name]

    def made(self, name: str, s: Store) -> dict[str, Any]:
        """A gradient that a kernel stores: its shape, and the dtype that holds it for all inputs that share it."""
        dtype = ""
        for of in self.sharing(name):
            dtype = f"torch.promote_types({dtype}, ctx.{of}_dtype)" if dtype else f"ctx.{of}_dtype"
        parts = [t for k in self.p.backward for t in k.stores if t.name == name]
        covered = len(parts) * self.p.chain.columns == int(s.view.width or self.p.chain.columns) or s.dims == "r"
        shape = f"num_rows, {self.width(s.view)}" if s.dims == "rc" else "num_rows, 1"
        return {"name": name, "shape": shape, "dtype": dtype, "zero": not covered}

    def total(self, of: str) -> dict[str, Any]:
        """A gradient that programs have parts of: its shape, and the launches that add them."""
        e, sums = self.inputs[of], [s for s in self.sums if s.of == of]
        wide = "c" in e.dims
        covered = not wide or len(sums) * self.p.chain.columns == int(e.view.width or self.p.chain.columns)
        return {
            "name": f"d_{of}",
            "rows": e.view.modulo or 1,
            "divide": e.view.divide,
            "width": self.width(e.view) if wide else "1",
            "columns": "C" if wide else "1",
            "dtype": f"ctx.{of}_dtype",
            "zero": not covered,
            "parts": [(f"{s.name}_parts", s.view.start) for s in sums],
        }

    def returned(self, of: str) -> str:
        found = next((g for g in self.p.gradients if g.of == of), None)
        if found is None:
            return "None"
        own = found.name in self.grads or found.summed
        return found.name if own and len(self.sharing(found.name)) == 1 else f"{found.name}.to(ctx.{of}_dtype)"


def _grouped(items: Iterable[tuple[str, str]]) -> str:
    """x, r [R, C], w [C]: neighbours of one shape say it once."""
    items = list(items)
    last = [i + 1 == len(items) or items[i + 1][1] != dims for i, (_, dims) in enumerate(items)]
    return ", ".join(f"{n} {dims}" if end else n for (n, dims), end in zip(items, last, strict=True))


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 116, subsequent_indent="    ", break_long_words=False)


def filled(items: Iterable[str], indent: str = "    ") -> str:
    """Items of a call or a signature on as few lines as they need."""
    lines = [indent.rstrip("\n")]
    for item in items:
        if len(lines[-1]) + len(item) > 117 and lines[-1] != indent:
            lines.append(indent)
        lines[-1] += f"{item}, " if lines[-1].endswith((" ", indent)) else f" {item},"
    return "\n".join(line.rstrip() for line in lines).removesuffix(",")


def fitted(opens: str, items: Iterable[str], closes: str, indent: str = "") -> str:
    """A call or a signature, indented already, on one line where it fits."""
    items = list(items)
    line = f"{opens}{', '.join(items)}{closes}"
    return line if len(indent) + len(line) <= 120 else f"{opens}\n{filled(items, indent + '    ')},\n{indent}{closes}"


def _by_name(items: Iterable[Any]) -> dict[str, Any]:
    """The first of each name, in order."""
    found: dict[str, Any] = {}
    for item in items:
        found.setdefault(item.name, item)
    return found
