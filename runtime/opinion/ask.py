"""What the checker of the package spmd_types says of a generated module: a second opinion on a layout.

The package is Meta's (0.3, BSD-3). The module runs once, forward, as rank 0 of a process group that is not there.
Weights and inputs carry the types that the layout gives them; conversions are spmd_types' own, and so is the reading of
PyTorch's ops, in its global mode: a type for each axis, and for what varies the dim that is split, by DTensor's rules.
A use that it cannot read (a function of ours with a backward pass of its own, one that reads a global index, one in
which ranks meet) is trusted: what it is given must lie as its op declares, and what it gives is typed by that.

It does not see gradients, their sums or their norm, what runs behind a step, whether an index is right, nor whether
what meets is a sum or the largest. Of the 1,696 mistakes in conversions of values (`benchmarks/layout_mutants.py`)
that the proof refuses it refuses 1,514 by a type and 156 do not run; 18 stand behind a step, 8 take a largest for a
sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...lowering.graph import GraphProgram
from ...lowering.pipeline import lower
from ...lowering.placement.types import I, N, P, Place, R
from .. import lib
from ..compile import class_of, emitted
from ..distributed import groups
from ..lib import spmd
from ..lib.laid import entry
from ..lib.mesh import Group
from ..lib.processes import Processes
from ..shorter import shorten
from .said import Opinion, Refused, first_line
from .types import Types
from .uses import Uses


def is_installed() -> bool:
    """Whether spmd_types is there."""
    return find_spec("spmd_types") is not None


def ask(program: GraphProgram, tokens: Tensor, more: dict[str, Tensor] | None = None,
        good: tuple[GraphProgram, Opinion] | None = None, device: str = "cpu") -> Opinion:  # fmt: skip
    """What spmd_types says of a program under a layout, lowered to its end. tokens: the rows of rank 0, [batch, seq];
    more: the other inputs. `good`: of a program with a mistake, the one without, which says what uses are parts of, and
    what was said of it: ops that could be read there are not trusted here. device: "meta" for what is too large to
    hold; what asks for a number then fails."""
    # Passes behind `shard` mark nodes and cut loops, which hides what a graph is of.
    whole = good[0] if good else lower(program.program, until="shard", layout=program.layout)
    run = _Run(program, whole, set(good[1].why_not) if good else None, device)
    with _nobody(run.ranks), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecated", FutureWarning)  # of torch 2.13, about what spmd_types calls
        run.go(tokens, more or {})
    return run.said


@contextmanager
def _nobody(ranks: int) -> Iterator[None]:
    """A process group of this process and others that are not there. What is running is put aside."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Run:
    def __init__(self, program: GraphProgram, good: GraphProgram, trust: set[str] | None, device: str) -> None:
        import spmd_types as theirs

        self.theirs: Any = theirs
        self.program, self.good, self.laid, self.trust = program, good, program.laid, trust
        self.mesh, self.said, self.device = program.laid.mesh, Opinion(), device
        self.artifact = emitted(program, named=True)
        self.kind = class_of(self.artifact)
        self.ranks = 1
        for size in self.kind.axes.values():
            self.ranks *= size
        self.rows = tuple(self.kind.rows)

    # --- running ----------------------------------------------------------------------------------

    def go(self, tokens: Tensor, more: dict[str, Tensor]) -> None:
        """Run it; what is wrong is in `said`."""
        theirs = self.theirs
        from spmd_types._checker import typecheck

        atoms = [(a,) for a in self.mesh.names()]
        asked = dict.fromkeys([*atoms, *groups(self.artifact, ())])
        made = Processes(dict(self.kind.axes), asked)
        axes = {a: theirs.MeshAxis.of(made[a].wire.group) for a in self.mesh.names()}  # type: ignore[union-attr]
        self.types = Types(theirs, self.mesh, axes)
        self.uses = Uses(self.types, self.program, self.good, self.trust, self.rows, self.device, self.said)
        self.kind.run.__globals__.update(lib=self._lib(), spmd=self._spmd())
        with torch.device(self.device):
            model: Any = self.kind()
        shorten(model)
        model.mesh, model.chance = made, 0
        for p in model.parameters():
            p.data.fill_(0.5)  # no number matters, and NaN is none
        try:
            with theirs.set_current_mesh(axes):
                self._type_weights(model)
                given, read = {n: self._input(x) for n, x in more.items()}, self._input(tokens)
                with typecheck(local=False):
                    self._losses(model, read, given)
        except (Refused, theirs.SpmdTypeError) as wrong:
            self.said.accepted, self.said.why, self.said.cause = False, first_line(wrong), wrong
        except Exception as failed:  # of the module, or of the checker: this cannot tell, a run without it can
            self.said.why, self.said.cause = f"{type(failed).__name__}: {first_line(failed)}", failed
        else:
            self.said.accepted = True

    def _losses(self, model: Any, tokens: Tensor, more: dict[str, Tensor]) -> None:
        """Every loss ends P where it is a sum of parts, else I."""
        with self.theirs.no_typecheck():
            at = model._rows(tokens, None, None, None)
            rest = model._more(more, at, model.scored)
            at.gathered = lib.Gathered()
        if not self.program.program.objectives:
            model.run(tokens, *rest, at, lib.STATELESS)
            return
        ran: tuple[Any, ...] = ()
        if model.pipe is not None:
            for stage in range(len(model.pipe.owns)):
                ran = getattr(model, f"stage_{stage}")(tokens, *rest, *(ran if stage else ()), at)
                ran = ran if isinstance(ran, tuple) else (ran,)
        losses = model.losses_of(tokens, *rest, at, *ran[-1:])
        for label, loss in losses.items():
            for atom in self.mesh.names():
                want = P if atom in model.partial.get(label, ()) else I
                have = self.types.letter(loss, atom)
                if have != want and not (want == I and have == R and not loss.requires_grad):
                    raise Refused(f"the loss `{label}` is {have} over `{atom}`, and taken for {want}")

    def _lib(self) -> Any:
        """The library, where what is made again in the backward pass is made once, and every expert reads every row:
        which rows it reads depends on numbers, and no type does."""
        return SimpleNamespace(**{**vars(lib), "recompute": _recompute, "route": _route})

    def _spmd(self) -> Any:
        ways = {kind: partial(self._convert, kind) for kind in spmd.LEGAL}
        return SimpleNamespace(**ways, all_max=self._all_max, use=self.uses.use)

    # --- types and conversions ---------------------------------------------------------------------

    def _type_weights(self, model: Any) -> None:
        for path, holder, _ in model.named_logical_parameters():
            splits, sync = entry(model.stored, path)
            held = {a for atoms in splits for a in atoms}
            letters = tuple((a, R if a in sync else I) for a in self.mesh.names() if a not in held)
            if not self.theirs.has_local_type(holder):
                self.types.stamp(holder, Place(tuple(map(tuple, splits)), letters))
        for buffer in model.buffers():
            self.types.stamp(buffer, Place(((),) * buffer.dim(), tuple((a, N) for a in self.mesh.names())))

    def _input(self, x: Tensor) -> Tensor:
        letters = tuple((a, N) for a in self.mesh.names() if a not in self.rows)
        return self.types.stamp(x.to(self.device, copy=True), Place((self.rows, *((),) * (x.dim() - 1)), letters))

    def _convert(self, kind: str, x: Tensor, group: Group, *, src: Any, dst: Any) -> Tensor:
        """Over one factor after the other: spmd_types makes one axis of several, which no other type speaks of. What is
        split is joined from the inside out, and split from the outside in."""
        if group.wire is None:
            return x
        self.said.conversions += 1
        theirs = self.theirs
        if kind == "all_to_all" and len(group.axes) > 1:
            whole = self._convert("all_gather", x, group, src=src, dst=spmd.R)
            return self._convert("convert", whole, group, src=spmd.R, dst=dst)
        types = [theirs.S(t.dim) if isinstance(t, spmd.S) else getattr(theirs, t.value) for t in (src, dst)]
        expert = {"expert_mode": True} if kind in ("convert", "reinterpret") else {}
        for atom in group.axes[::-1] if isinstance(src, spmd.S) else group.axes:
            one = group.mesh[(atom,)].wire.group  # type: ignore[union-attr]
            x = getattr(theirs, kind)(x, one, src=types[0], dst=types[1], **expert)
        return x

    def _all_max(self, x: Tensor, group: Group) -> Tensor:
        """spmd_types has no type of what is the largest over ranks, and takes it for P."""
        have = self.types.known(x)
        if any(have.on(a) != P for a in group.axes):
            raise Refused(f"all_max over {group.axes} of what lies {have.place}")
        with self.theirs.no_typecheck():
            made = x.detach().clone()
        place = have.place
        for atom in group.axes:
            place = place.put(atom, N, self.mesh.names())
        self.said.conversions += 1
        return self.types.stamp(made, place)


def _recompute(run: Callable[..., Any], at: Any, *given: Any) -> Any:
    return run(*given)


def _route(x: Tensor, routing: Tensor, experts: Any, at: Any, *more: Any) -> Tensor:
    """The dense sum of what the experts that were kept give, with weights [..., experts]."""
    weights = routing.split(1, -1)[: len(experts)]
    made = [expert(x, at, lib.STATELESS, *more) * weight for expert, weight in zip(experts, weights, strict=True)]
    out = made[0]
    for y in made[1:]:
        out = out + y
    return out
