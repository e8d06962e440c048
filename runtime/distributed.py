"""From the processes that torchrun started to the mesh of a layout, and what is said where one of them fails."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..dsl.diagnostics import fail
from ..dsl.layout import Layout
from .compile import Artifact, class_of
from .errors import UserError
from .lib.mesh import Axes
from .lib.processes import Processes
from .place import World
from .train.divided import spread
from .train.rows import Ranks

_WIRE = re.compile(r"^\w+ along .* on rank \d+ failed")
_COMMENT = re.compile(r"^\s*# (\S+:\d+  .*)$")


def check_fits(layout: Layout | None, here: World) -> None:
    """Raises UserError `mesh-does-not-fit` where there are not as many processes as the mesh has ranks."""
    if layout is None and here.size == 1 or layout is not None and layout.ranks == here.size:
        return
    there = f"{here.size} process{'es' * (here.size > 1)}"
    if layout is None:
        least = "--layout NAME; a layout `mesh data = N`, `shard batch over data` is the least"
        raise UserError("mesh-does-not-fit", f"there are {there}, and no layout says what they share", help=least)
    mesh = " x ".join(f"{axis} {size}" for axis, size in layout.mesh) or "no axis"
    raise UserError(
        "mesh-does-not-fit",
        f"`{layout.name}` has {layout.ranks} rank{'s' * (layout.ranks > 1)} ({mesh}), and there "
        f"{'are' if here.size > 1 else 'is'} {there}",
        help=_what_fits(layout, here),
    )


def _what_fits(layout: Layout, here: World) -> str:
    """Meshes of as many ranks, of the same axes, the nearest first; and how to start what the layout asks for."""
    axes = [axis for axis, _ in layout.mesh]
    sizes = [n for n in range(1, here.size + 1) if here.size % n == 0]
    fitting = [m for m in product(sizes, repeat=min(len(axes), 4)) if _product(m) == here.size and len(m) == len(axes)]
    fitting.sort(key=lambda m: (sum(a != b for a, b in zip(m, dict(layout.mesh).values(), strict=True)), m))
    start = f"`heddle launch` or `torchrun --nproc-per-node {layout.ranks}` starts {layout.ranks}"
    if here.size == 1 or not fitting:
        return start
    mesh = ", ".join(f"{a} = {n}" for a, n in zip(axes, fitting[0], strict=True))
    return f"`mesh {mesh}` has {here.size}; {start}"


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def check_stored(layout: Layout) -> None:
    """Raises `SpecError` `not-built-yet` for what is to be stored in parts and cannot be yet."""
    whole = layout.stored_over("parameters")
    for what, axes, span in layout.stored:
        if what == "gradients" and any(layout.size(a) > 1 and a not in whole for a in axes):
            where = ", ".join(f"`{a}`" for a in axes)
            raise fail("not-built-yet", f"storing gradients alone over {where} is not built yet", span,
                       help="`parameters` with them, or `optimizer`, is")  # fmt: skip


def over_of(artifact: Artifact, layout: Layout) -> Axes:
    """The axes of the artifact's mesh over which the optimizer is divided."""
    laid = artifact.lowered.laid
    return () if laid is None else tuple(a for x in layout.stored_over("optimizer") for a in laid.mesh.names(x))


def axes_of(artifact: Artifact) -> dict[str, int]:
    """The axes of the mesh of an artifact's module, the outermost first."""
    return dict(class_of(artifact).axes)


def groups(artifact: Artifact, over: Axes) -> list[Axes]:
    """Every set of axes along which a step of a laid out model talks, in one order on all ranks."""
    laid = artifact.lowered.laid
    assert laid is not None
    order = laid.mesh.names()
    found: dict[Axes, None] = {tuple(axes_of(artifact)): None, over: None}
    if laid.pipe is not None:
        found.update(dict.fromkeys(((laid.pipe.axis,), (laid.pipe.axis, "back"))))
    for graph in artifact.lowered.graphs.values():
        for node in graph.nodes:
            found.update({tuple(axes): None for name, axes in node.attrs if name == "axes"})
    for weights in laid.weights.values():
        for stored in weights.values():
            rest = tuple(a for a in stored.sync if a not in over)
            found.update(dict.fromkeys((stored.sync, rest, spread(order, stored.splits, over))))
    for sums in laid.sums.values():
        found.update(dict.fromkeys(sums.values()))
    return [axes for axes in found if axes]


@contextmanager
def connected(
    artifacts: list[Artifact], layout: Layout, here: World, timeout: float, where: torch.device
) -> Iterator[tuple[Processes, Ranks]]:
    """The mesh of artifacts, the first of which is trained `where` it says, over the processes that torchrun started,
    and what these need to save together. What is on a GPU goes through NCCL, what is on the CPU through gloo.

    timeout: seconds that a rank waits for others. Raises UserError `rank-failed`, which names the rank, what it did
    and the line of the spec; other errors go on with a note of the rank and the line.
    """
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(where)
    patience = timedelta(seconds=timeout)
    axes, over = axes_of(artifacts[0]), over_of(artifacts[0], layout)
    asked = dict.fromkeys(axes for artifact in artifacts for axes in groups(artifact, over))
    with _said(artifacts, here):
        try:
            store = _fresh(next(rendezvous("env://", timeout=patience))[0])
            given = {"store": store, "rank": here.rank, "world_size": here.size, "timeout": patience}
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **given)
        except dist.DistError:
            raise UserError("rank-failed", f"rank {here.rank}: the other ranks did not come within {timeout:g} s",
                            help="all ranks start with one MASTER_ADDR and MASTER_PORT") from None  # fmt: skip
        mesh = Processes(axes, asked, timeout)
        yield mesh, Ranks(dist.new_group(backend="gloo", timeout=patience), over)
        dist.destroy_process_group()


def _fresh(store: Any) -> Any:
    """A store without what ranks that died left in it. torchrun keeps one store for all its attempts (torch 2.13), and
    gloo would look for ranks of the last attempt where they were.

    Machines count their attempts each for itself, so only those of one machine are known by number; `heddle launch`
    tells torchrun to make each attempt a store of its own.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def _said(artifacts: list[Artifact], here: World) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        line = spec_line(error, artifacts)
        if not (isinstance(error, dist.DistError) or _is_wire(error)):
            error.add_note(f"on rank {here.rank}" + (f", at {line}" if line else ""))
            raise
        said = str(error).split("\n")[0].split("failed: ")
        what = f"{said[0]}failed" if len(said) > 1 else "talking to another rank failed"
        cure = "a rank that ended says why above; --resume goes on from the last whole checkpoint"
        more = [*[f"at {line}"] * bool(line), said[-1].strip()[:200], cure]
        raise UserError("rank-failed", f"rank {here.rank}: {what}", help="\n".join(more)) from error
    except Exception as error:
        if not isinstance(error, UserError):
            line = spec_line(error, artifacts)
            error.add_note(f"on rank {here.rank}" + (f", at {line}" if line else ""))
        raise


def _is_wire(error: BaseException | None) -> bool:
    """Whether it is about ranks that cannot reach each other."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or _WIRE.match(text) or "gloo" in text or "NCCL" in text:
            return True
        error = error.__cause__
    return False


def spec_line(error: BaseException, artifacts: list[Artifact]) -> str | None:
    """`model.spec:18  x = x + layer(rms_norm(x))`: the line of the spec whose code was running, the innermost."""
    sources = {f"{artifact.name}/model.py": artifact.source.splitlines() for artifact in artifacts}
    frames = [(frame.f_code.co_filename, n) for frame, n in walk_tb(error.__traceback__)]
    name, line = next(((f, n) for f, n in reversed(frames) if f in sources), ("", 0))
    for i in range(line - 1, -1, -1):
        if found := _COMMENT.match(sources[name][i]):
            return found.group(1)
    return None
