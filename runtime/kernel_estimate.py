"""What kernels and their peers would take on a device, without it: an estimate, from what their programs really do.

Of each launch a few programs run in the interpreter (`counted.py`), of PyTorch's ops the bytes and operations are
those that their shapes say. Each then takes what its bytes take at the rate of the device's memory, or its products at
that of its tensor cores, whichever is more, and at least as long as a kernel does. What that leaves out makes real
times longer: caches that are asked too much, too few programs for all processors, waiting, arithmetic beside products.
A package that takes another way on a CPU (more ops of PyTorch, one program in place of one a processor) is counted so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .counted import Counted, count
from .errors import said
from .kernel_bench import Case, Measured, Work, forward, row_of, work
from .peers import NotServed
from .plan.devices import Device
from .plan.estimate import compute_seconds
from .plan.hollow import Ledger

GENERATED = 0.4
"""Share of the peak that products inside of kernels written in Triton reach: attention in Triton runs at 340 to 403 of
989 TFLOP/s on an H100 (Shah et al. 2024, FlashAttention-3, figure 5)."""


@dataclass(frozen=True)
class Side:
    """One way to compute a use: `moved` bytes of memory, `requested` by programs (of torch's ops: moved), `flops` of
    products, `kernels` started, `seconds` all of that takes."""

    seconds: float
    moved: float
    requested: float
    flops: float
    kernels: int


@dataclass(frozen=True)
class Counts:
    """What one side does: its launches, each in the forms that it may have, and PyTorch's ops."""

    launches: list[list[Counted]]
    beside: Ledger


@dataclass(frozen=True)
class Done:
    """One kernel: a row without times, and what each side does, whatever the device."""

    row: Measured
    sides: dict[str, Counts]


@dataclass(frozen=True)
class Estimated:
    """One kernel: the row that a measurement would fill, and what each side does."""

    row: Measured
    sides: dict[str, Side]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self.row) | {"sides": {name: vars(side) for name, side in self.sides.items()}}


def done(case: Case) -> Done:
    """What each side of one kernel does: ours, and other packages that are there. What eager PyTorch does on a GPU is
    not seen on a CPU, for which the library has other ways."""
    ours = work(case, case.kind)
    row = row_of(case, ours)
    row.estimated = True
    row.memory["ours"] = ours.peak
    sides = {"ours": _counts(ours)}
    for offer in case.offers():
        row.notes[offer.name] = offer.note
        if offer.kind is None:
            continue
        try:
            if offer.peer.counts is None:
                theirs = work(case, offer.kind)
                sides[offer.name], row.memory[offer.name] = _counts(theirs), theirs.peak
            else:
                told = offer.peer.counts(case.plain, partial(forward, case))
                sides[offer.name] = Counts([[one] for one in told], Ledger())
        except NotServed as why:
            row.notes[offer.name] = str(why)
        except Exception as why:  # what does not run without a GPU has no estimate
            row.notes[offer.name] = f"no estimate: {said(why)}"
    return Done(row, sides)


def _counts(what: Work) -> Counts:
    return Counts([[count(form) for form in forms] for forms in what.launches], what.beside)


def estimated(one: Done, device: Device) -> Estimated:
    """What that takes on a device."""
    row, sides = replace(one.row), {name: side_of(counts, device) for name, counts in one.sides.items()}
    row.seconds = sides["ours"].seconds
    if not row.launches:  # one of the library's own kernels, whose products are not counted: it is what peers are
        row.seconds, sides = max(row.seconds, row.flops / (device.flops["bf16"] * device.reached[0])), {}
    row.copy_share = row.bytes / row.seconds / (device.memory_rate * device.reached[1])
    row.matmul_share = row.flops / row.seconds / (device.flops["bf16"] * device.reached[0])
    row.peers = {name: side.seconds / row.seconds for name, side in sides.items() if name != "ours"}
    return Estimated(row, sides)


def side_of(counts: Counts, device: Device) -> Side:
    """The sum of all; of forms of one launch the one that takes least."""
    best = [min(forms, key=lambda one: launch_seconds(one, device)) for forms in counts.launches]
    work = counts.beside.work.items()
    flops, moved = (sum(n * getattr(w, what) for w, n in work) for what in ("flops", "bytes"))
    seconds = sum(launch_seconds(one, device) for one in best) + compute_seconds(counts.beside, device, "bf16")
    return Side(
        seconds, moved + sum(one.moved for one in best), moved + sum(one.requested for one in best),
        flops + sum(one.flops for one in best), len(best) + sum(n for _, n in work),
    )  # fmt: skip


def launch_seconds(one: Counted, device: Device) -> float:
    """The time of one launch at a device's rates."""
    memory = device.memory_rate * device.reached[1]
    return max(one.moved / memory, one.flops / (device.flops["bf16"] * GENERATED), device.launch_s)
