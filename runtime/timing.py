"""Times of calls on a GPU: several sides in turn, inputs that no cache holds, medians of many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Seconds of one call."""
Timer = Callable[[list[Run]], list[list[float]]]
"""Seconds of each of several calls, each several times, in turn."""
ROUNDS, WARM = 30, 3
_AHEAD = 4_000_000
"""Clock ticks (about 2 ms) that the GPU idles before a call, so that the host has told it all of the call by then."""


def in_turn(runs: Sequence[Run], rounds: int = ROUNDS, clock: Clock | None = None) -> list[list[float]]:
    """Times of each call, one a round, after `WARM` that do not count; in each round another side begins, so that none
    always comes behind the same one."""
    clock = clock or events
    found: list[list[float]] = [[] for _ in runs]
    for number in range(-WARM, rounds):
        for place in range(len(runs)):
            i = (place + number) % len(runs)
            took = clock(runs[i])
            if number >= 0:
                found[i].append(took)
    return found


def events(run: Run) -> float:
    """The time on the GPU from the first kernel of a call to the end of the last, by its own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def rotated(make: Callable[[], Run], size: int, cache: int) -> Run:
    """A call whose inputs, of `size` bytes, are others each time, so many in turn that twice the `cache` lies between:
    `make` gives the call on inputs of its own."""
    copies = max(1, min(8, -(-2 * cache // max(1, size))))
    each = itertools.cycle([make() for _ in range(copies)])
    return lambda: next(each)()


def cache_bytes(device: torch.device) -> int:
    """Of the second level."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def peak_memory(run: Run, device: torch.device) -> int | None:
    """The most bytes that a call takes beside what is there before it; None without a GPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
