"""What a target offers: which generation of GPU a kernel is written and built for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A target by its name.

    `capability`: the compute capability as one number, None where any will do (`triton`: the GPU that is there, or the
    interpreter). `shared`: bytes of shared memory that one program may have. Source: CUDA C++ Programming Guide,
    technical specifications by compute capability.
    """

    name: str
    kernels: bool = True
    capability: int | None = None
    shared: int = 101_376


TARGETS = {
    t.name: t
    for t in (
        Target("cpu", kernels=False),
        Target("triton"),
        Target("sm_80", capability=80, shared=166_912),
        Target("sm_90", capability=90, shared=232_448),
        Target("sm_100", capability=100, shared=232_448),
    )
}
