"""How long a step takes, by a model that is stated and no simulator: it ranks layouts, and says what they wait for.

kernel      max(flops / products, bytes / memory, launch), one after the other; `products`, `memory` and `links`
            are peak rates times the share of them that is reached
collective  latency + bytes on the wire / link, none hidden behind kernels; rings (Thakur et al. 2005):
            all_reduce 2 (t-1)/t n, all_gather and reduce_scatter (t-1)/t n, all_to_all (t-1)/t n of n bytes in all
link        that inside a node where all ranks of the group are in one, else that between nodes
step        micro-batches + the sums of the step + the optimizer, which reads and writes all its state
pipeline    each rank takes its actions in the schedule's order, as soon as what they read has come; between two stages
            each way carries one message after the other, behind the kernels of both (`schedules.timeline`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..lib.mesh import Mesh
from .devices import Device
from .hollow import Ledger, Message

BETWEEN = ("send", "receive")
"""Messages of two ranks of a pipeline."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step, by what they go to. `waiting` is for other stages of a pipeline."""

    compute: float
    collectives: dict[str, float]
    sums: float
    optimizer: float
    waiting: float = 0.0

    @property
    def working(self) -> float:
        """What micro-batches take."""
        return self.compute + sum(self.collectives.values())

    @property
    def bubble(self) -> float:
        """Time that a rank waits for other stages as a share of the time that it works on micro-batches."""
        return self.waiting / self.working if self.waiting else 0.0

    @property
    def total(self) -> float:
        return self.working + self.waiting + self.sums + self.optimizer


def wire_bytes(message: Message, ranks: int) -> float:
    """What a rank sends of one collective, in bytes, by a ring."""
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    factor: Mapping[str, float] = {
        "all_reduce": 2 * share, "reduce_scatter": share, "all_to_all": share, "broadcast": 1.0, "send": 1.0,
        "all_gather": ranks - 1.0,  # each puts in its part only
    }  # fmt: skip
    return message.bytes * factor.get(message.kind, 0.0)


def is_inside(mesh: Mesh, axes: tuple[str, ...], node: int) -> bool:
    """Whether the ranks of a group are all in one node; ranks are numbered node by node."""
    members = mesh.members(*axes)
    return members[0] // node == members[-1] // node


def seconds(message: Message, mesh: Mesh, device: Device) -> float:
    """The time of one collective."""
    link = device.inside if is_inside(mesh, message.axes, device.node) else device.between
    sent = wire_bytes(message, mesh.size(*message.axes))
    return device.latency_s + sent / (link * device.reached[2]) if sent else 0.0


def compute_seconds(ledger: Ledger, device: Device, precision: str) -> float:
    """The time of all kernels of a ledger."""
    products, memory = device.flops[precision] * device.reached[0], device.memory_rate * device.reached[1]
    return sum(times * max(w.flops / products, w.bytes / memory, device.launch_s) for w, times in ledger.work.items())


def busy_seconds(ledger: Ledger, mesh: Mesh, device: Device, precision: str) -> float:
    """How long a rank works on a ledger: kernels and collectives. It does not wait for what it sends."""
    told = (n * seconds(m, mesh, device) for m, n in ledger.messages.items() if m.kind not in BETWEEN)
    return compute_seconds(ledger, device, precision) + sum(told)


def sending_seconds(ledger: Ledger, is_near: bool, device: Device) -> float:
    """How long what is sent to another stage is on its way, which may be in the same node."""
    link = (device.inside if is_near else device.between) * device.reached[2]
    return sum(n * (device.latency_s + m.bytes / link) for m, n in ledger.messages.items() if m.kind == "send")


def estimate(
    micro: Ledger, once: Ledger, microbatches: int, state_bytes: int, mesh: Mesh, device: Device, precision: str,
    waiting: float = 0.0,
) -> Times:  # fmt: skip
    """The time of a step. `state_bytes` are all that the optimizer reads and writes."""
    collectives: dict[str, float] = {}
    for message, times in micro.messages.items():
        if message.kind in BETWEEN:
            continue
        name = "x".join(message.axes)
        collectives[name] = collectives.get(name, 0.0) + microbatches * times * seconds(message, mesh, device)
    sums = sum(times * seconds(m, mesh, device) for m, times in once.messages.items())
    moved = 2 * state_bytes / (device.memory_rate * device.reached[1])
    return Times(microbatches * compute_seconds(micro, device, precision), collectives, sums, moved, waiting)
