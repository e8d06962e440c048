"""What devices can do, as data. Rates are peaks of data sheets; the shares of them that are reached were measured."""

from __future__ import annotations

from dataclasses import dataclass

from ...dsl.diagnostics import did_you_mean, listed
from ..errors import UserError


@dataclass(frozen=True)
class Device:
    """One accelerator, and the links between those of a node and between nodes.

    `flops` are peaks by dtype (operations a second, dense), `reached` the shares of peaks of products, memory and links
    that well-written kernels reach. `launch_s` is the least time of one kernel, `latency_s` of one collective.
    `reserved` bytes are the driver's and the communication library's; `capability` is as targets have it.
    """

    name: str
    capability: int
    memory: int
    reserved: int
    flops: dict[str, float]
    memory_rate: float
    node: int
    inside: float
    between: float
    reached: tuple[float, float, float] = (0.8, 0.85, 0.7)
    launch_s: float = 5e-6
    latency_s: float = 15e-6
    source: str = ""


DEVICES = {
    d.name: d
    for d in (
        Device(
            "a100-80g", 80, 80 * 10**9, 2 * 10**9, {"bf16": 312e12, "fp32": 19.5e12}, 2.039e12, 8, 300e9, 25e9,
            source="NVIDIA A100 80GB SXM data sheet (2021); HDR InfiniBand, one 200 Gb/s card a GPU",
        ),
        Device(
            "h100-80g", 90, 80 * 10**9, 2 * 10**9, {"bf16": 989.5e12, "fp32": 67e12}, 3.35e12, 8, 450e9, 50e9,
            source="NVIDIA H100 SXM data sheet (2023); NDR InfiniBand, one 400 Gb/s card a GPU",
        ),
        Device(
            "h200-141g", 90, 141 * 10**9, 2 * 10**9, {"bf16": 989.5e12, "fp32": 67e12}, 4.8e12, 8, 450e9, 50e9,
            source="NVIDIA H200 SXM data sheet (2024); NDR InfiniBand, one 400 Gb/s card a GPU",
        ),
        Device(
            "b200-180g", 100, 180 * 10**9, 2 * 10**9, {"bf16": 2250e12, "fp32": 75e12}, 8e12, 8, 900e9, 50e9,
            source="NVIDIA HGX B200 and DGX B200 data sheets (2024); NDR InfiniBand, one 400 Gb/s card a GPU",
        ),
    )
}  # fmt: skip
"""Shares that are reached: products 4096^3 in bf16 run at 828 of 989.5 TFLOP/s on an H100, row-wise kernels at 84 % of
its memory rate, and NCCL 2.29 moves 324 (gather), 328 (reduce-scatter) and 446 (all-reduce) of 450 GB/s over eight of
them, with a floor of 7 to 20 microseconds (NVIDIA aiconfigurator, Liger-Kernel; both 2025)."""


def of_capability(capability: int | None) -> Device | None:
    """The first device of a generation, if there is one."""
    return next((d for d in DEVICES.values() if d.capability == capability), None)


def device(name: str) -> Device:
    """A device by its name. Raises UserError `unknown-device`."""
    if name not in DEVICES:
        near = did_you_mean(name, DEVICES, "a device")
        raise UserError("unknown-device", f"no device is named `{name}`", help=near or f"devices are {listed(DEVICES)}")
    return DEVICES[name]
