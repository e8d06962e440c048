"""The body of one kernel of a chain: offsets, loads, math, stores, in that order, for each of the ways it is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..lowering.chains.expr import REDUCTIONS, Expr, View, level_of, ordered
from ..lowering.chains.padding import IDENTITY, held
from ..lowering.chains.plan import Kernel, Plan, Store, Sum
from ..lowering.chains.tiles import TILE, WALK
from .expressions import LONG_INSIDE, REDUCE, Printer, literal

_SHORT = 24  # characters of what is stored, beyond which it gets the tensor's name
_WORDS = ("rows", "mask_r", "cols", "mask_c", "mask", "offs", "block", "start", "group", "num_rows", "tl", "C")


class KernelPrinter(Printer):
    """Prints one kernel; `text_of()` is its lines below the docstring."""

    def __init__(self, plan: Plan, kernel: Kernel) -> None:
        super().__init__(plan.named, _WORDS, plan.chain.columns)
        self.plan, self.kernel, self.tiles = plan, kernel, kernel.tiles
        # What this compiler's own kernels wrote lies row after row.
        self.dense = {s.name for s in (*plan.forward.stores, *(s for k in plan.backward for s in k.stores))}
        self.rows_masked = held(kernel.values, "r")
        self.offsets: dict[tuple[str, str, int], str] = {}
        self.has_tiles = any("c" in dims for dims in (*kernel.dims, *(e.dims for e in kernel.loads)))

    # --- where things lie ---------------------------------------------------------------------------------------------

    def strided(self) -> list[str]:
        """The tensors whose rows lie some stride apart, which is an argument."""
        return list(dict.fromkeys(e.name for e in self.kernel.loads if e.dims == "rc" and e.name not in self.dense))

    def width(self, view: View) -> str:
        return "C" if view.width in (None, self.columns) else str(view.width)

    def offset(self, stride: str, view: View) -> str:
        """The variable of a tile's offsets, made where it is first used."""
        key = (stride, f"rows // {view.divide}" if view.divide > 1 else "rows", view.start)
        if key not in self.offsets:
            plain = stride == "C" and view == View(width=view.width)
            own = f"{stride.removesuffix('stride')}offs" if stride.endswith("_stride") else "offs"
            name = "offs" if plain else self.unused(own)
            rows = f"({key[1]})" if view.divide > 1 else key[1]
            self.line(f"{name} = {rows}[:, None] * {stride} + {self.column(view)}[None, :]")
            self.offsets[key] = name
        return self.offsets[key]

    def unused(self, name: str) -> str:
        number, found = 1, name
        while found in self.taken:
            number += 1
            found = f"{name}_{number}"
        self.taken.add(found)
        return found

    def column(self, view: View) -> str:
        return f"({view.start} + cols)" if view.start else "cols"

    def group(self, view: View) -> str:
        """The row of a tensor whose rows come again, for the rows that this program owns."""
        row = f"group // {view.divide}" if view.divide > 1 else "group"
        return row if view.period == self.kernel.groups else f"{row} % {view.modulo}"

    def load(self, e: Expr) -> str:
        view, cast = e.view, "" if e.name in self.dense and e.dims == "r" else ".to(tl.float32)"
        if e.drawn:
            return f"None if {e.name}_ptr is None else tl.load({e.name}_ptr + rows, mask=mask_r, other=0)"
        if e.dims == "rc":
            stride = self.width(view) if e.name in self.dense else f"{e.name}_stride"
            return f"tl.load({e.name}_ptr + {self.offset(stride, view)}, mask=mask, other=0.0){cast}"
        if e.dims == "r":
            rows = f"rows // {view.divide}" if view.divide > 1 else "rows"
            return f"tl.load({e.name}_ptr + {rows}, mask=mask_r, other=0.0){cast}"
        place = [self.group(view)] if view.modulo is not None else []
        if e.dims == "c":
            if place:
                row = f"({place[0]})" if "%" in place[0] or "//" in place[0] else place[0]
                place = [f"{row} * {self.width(view)}"]
            place += [f"{view.start} + cols" if view.start else "cols"]
        masked = ", mask=mask_c, other=0.0" if e.dims == "c" and self.masked else ""
        return f"tl.load({' + '.join([f'{e.name}_ptr', *place])}{masked}){cast}"

    # --- the kernel ---------------------------------------------------------------------------------------------------

    def text_of(self) -> list[str]:
        k, t = self.kernel, self.tiles
        self.begin(k.values, bool(self.columns % t.block_c))
        scope: dict[Expr, str] = {}
        if k.groups > 1:
            self.line("group = tl.program_id(1)")
        if t.mode != WALK and self.has_tiles:
            axis = 2 if k.groups > 1 else 1
            self.columns_from(f"tl.program_id({axis}) * BLOCK_C" if t.mode == TILE else "")
        for s in k.sums:
            shape = "(BLOCK_R, BLOCK_C)" if s.dims == "c" else "(BLOCK_R,)"
            self.line(f"{s.name}_acc = tl.zeros({shape}, tl.float32)")
        if t.programs:
            if t.mode != WALK:
                self.hoist(scope)
            step = "BLOCK_R" if k.groups == 1 else f"{k.groups} * BLOCK_R"
            self.line(f"for block in range(tl.program_id(0), tl.cdiv(num_rows, {step}), tl.num_programs(0)):")
            with self.inside():
                self.rows("block", scope)
            for s in k.sums:
                self.part(s)
        else:
            self.rows("tl.program_id(0)", scope)
        return self.lines

    @contextmanager
    def inside(self) -> Iterator[None]:
        before, self.offsets = self.offsets, dict(self.offsets)
        self.depth += 1
        yield
        self.depth -= 1
        self.taken -= {*self.offsets.values()} - {*before.values()}
        self.offsets = before

    def columns_from(self, start: str) -> None:
        self.line(f"cols = {start}{' + ' if start else ''}tl.arange(0, BLOCK_C)")
        if self.masked:
            self.line("mask_c = cols < C")

    def hoist(self, scope: dict[Expr, str]) -> None:
        """What no row changes, before the loop over rows."""
        for e in ordered(self.kernel.values):
            if "r" not in e.dims and e not in scope and self.stands_alone(e, None):
                self.text(e, scope)

    def rows(self, block: str, scope: dict[Expr, str]) -> None:
        groups = self.kernel.groups
        rows = f"({block} * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)"
        self.line(f"rows = {rows}{f' * {groups} + group' if groups > 1 else ''}")
        self.line("mask_r = rows < num_rows")
        if self.tiles.mode == WALK:
            self.walk(dict(scope))
        else:
            if self.has_tiles:
                self.mask()
            self.finish(self.kernel.stores, self.kernel.sums, dict(scope))

    def mask(self) -> None:
        self.line("mask = mask_r[:, None]" + (" & mask_c[None, :]" if self.masked else ""))

    def finish(self, stores: Iterable[Store], sums: Iterable[Sum], scope: dict[Expr, str]) -> None:
        for s in sums:  # before the stores: it reads what was loaded, and the registers of that are free sooner
            self.add(s, scope)
        for store in stores:
            self.store(store, scope)

    def store(self, s: Store, scope: dict[Expr, str]) -> None:
        text = self.target(s.value, s.dims, scope)
        if len(text) > _SHORT:
            name = self.unused(s.name)
            self.line(f"{name} = {text}")
            text = name
        if s.dims == "r":
            self.line(f"tl.store({s.name}_ptr + rows, {text}, mask=mask_r)")
            return
        offs = self.offset(self.width(s.view), s.view)
        self.line(f"tl.store({s.name}_ptr + {offs}, {text}, mask=mask)")

    def target(self, e: Expr, dims: str, scope: dict[Expr, str]) -> str:
        """The value as text, spread over the places of `dims`."""
        text, binds = self.text(e, scope)
        spread = {("rc", "r"): "[:, None]", ("rc", "c"): "[None, :]"}.get((dims, e.dims), "")
        text = f"({text}){spread}" if spread and binds < 100 else f"{text}{spread}"
        if not set(dims) <= set(e.dims) and e.dims != "r":  # a value that rows share is made one of each
            return f"{text} + tl.zeros({'(BLOCK_R, BLOCK_C)' if dims == 'rc' else '(BLOCK_R,)'}, tl.float32)"
        return text

    def add(self, s: Sum, scope: dict[Expr, str]) -> None:
        """Rows beyond the last hold zeros; where math does not keep those, they are put back."""
        text = self.target(s.value, "rc" if s.dims == "c" else "r", scope)
        if self.rows_masked[s.value] != 0:
            if len(text) > LONG_INSIDE and s.value not in scope and set(s.value.dims) == {"r", *s.dims}:
                text = self.assign(s.value, text, scope)
            text = f"tl.where(mask_r{'[:, None]' if s.dims == 'c' else ''}, {text}, 0.0)"
        self.line(f"{s.name}_acc += {text}")

    def part(self, s: Sum) -> None:
        groups = self.kernel.groups
        program = "tl.program_id(0)" if groups == 1 else f"(tl.program_id(0) * {groups} + group)"
        if s.dims == "c":
            mask = ", mask=mask_c" if self.masked else ""
            place = f"{program} * C + cols"
            self.line(f"tl.store({s.name}_parts_ptr + {place}, tl.sum({s.name}_acc, axis=0){mask})")
        else:
            self.line(f"tl.store({s.name}_parts_ptr + {program}, tl.sum({s.name}_acc, axis=0))")

    # --- rows that are longer than a block ----------------------------------------------------------------------------

    def walk(self, scope: dict[Expr, str]) -> None:
        """One walk over the columns for each reduction behind another, then one that stores."""
        k = self.kernel
        level = level_of(k.values)
        every = [e for e in ordered(k.values) if e.op in REDUCTIONS]
        for depth in range(1, max(level.values()) + 1):
            now = [e for e in every if level[e] == depth]
            self.outside([e.args[0] for e in now], scope)
            for e in now:
                shape = "(BLOCK_R, BLOCK_C)" if "r" in e.args[0].dims else "(BLOCK_C,)"
                start = literal(IDENTITY[e.op], self.columns, False)[0]
                how = f"tl.zeros({shape}, " if e.op == "sum" else f"tl.full({shape}, {start}, "
                self.line(f"{self.name(e)}_acc = {how}tl.float32)")
            with self.over_columns(scope) as inner:
                self.count([e.args[0] for e in now], inner)
                for e in now:
                    text, acc = self.filled(e, inner), f"{self.name(e)}_acc"
                    self.line(f"{acc} += {text}" if e.op == "sum" else f"{acc} = tl.maximum({acc}, {text})")
            for e in now:
                scope[e] = self.name(e)
                self.line(f"{scope[e]} = {REDUCE[e.op]}({self.name(e)}_acc, axis={int('r' in e.args[0].dims)})")
        rows = [s for s in k.stores if s.dims == "r"], [s for s in k.sums if s.dims == ""]
        self.count([s.value for part in rows for s in part], scope)
        self.finish(*rows, scope)
        tiles = [s for s in k.stores if s.dims == "rc"], [s for s in k.sums if s.dims == "c"]
        if any(tiles):
            values = [s.value for part in tiles for s in part]
            self.outside(values, scope)
            with self.over_columns(scope) as inner:
                self.count(values, inner)
                self.finish(*tiles, inner)

    @contextmanager
    def over_columns(self, scope: dict[Expr, str]) -> Iterator[dict[Expr, str]]:
        self.line("for start in range(0, C, BLOCK_C):")
        with self.inside():
            self.columns_from("start")
            self.mask()
            yield dict(scope)

    def outside(self, values: list[Expr], scope: dict[Expr, str]) -> None:
        """What has no columns, before a walk over them."""
        self.count(values, scope)
        for e in ordered(values, list(scope)):
            parts = e.args if "c" in e.dims and e not in scope else ()
            for a in [*parts, *([e] if e in values else [])]:
                if "c" not in a.dims and a.op != "number" and a not in scope:
                    text, _ = self.text(a, scope)
                    if a not in scope:
                        self.assign(a, text, scope)
