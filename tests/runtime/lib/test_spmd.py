"""Meshes, conversions of placements with their gradients, and the simulation of ranks, against dense definitions.

Tensors are small whole numbers in fp64, so every sum is exact and results are compared exactly.
"""

from __future__ import annotations

import time
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime.lib import Mesh, spmd
from heddle.runtime.lib.mesh import Record
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.lib.spmd import LEGAL, I, P, R, S, V

law = settings(deadline=None, max_examples=60)
DUAL = {R: P, I: I, P: R, V: V}


def dual(kind):
    """The type of a gradient."""
    return kind if isinstance(kind, S) else DUAL[kind]


# Meaning: the value that the tensors of a group's ranks stand for, and the tensors that stand for a value.


def meant(kind, held):
    if isinstance(kind, S):
        return torch.cat(held, kind.dim)
    return {R: held[0], I: held[0], P: sum(held), V: torch.stack(held)}[kind]


def held(kind, value, ranks, split):
    """What each rank holds. Of the many ways to hold a partial sum: each its own part, where the dim was split; else the first all."""
    if isinstance(kind, S):
        return list(value.chunk(ranks, kind.dim))
    if kind is V:
        return list(value.unbind())
    if kind is not P:
        return [value] * ranks
    if split in (R, I):
        return [value] + [torch.zeros_like(value)] * (ranks - 1)
    dim = split.dim if isinstance(split, S) else 0
    parts = value.chunk(ranks, dim)
    return [torch.cat([p if k == r else torch.zeros_like(p) for r, p in enumerate(parts)], dim) for k in range(ranks)]


def expected(name, src, dst, xs):
    """What the ranks hold after a conversion, and (with the dual types, the other way round) in its backward."""
    if name == "reinterpret":
        return [sum(xs)] * len(xs) if dst is I else xs  # I: the gradient of I -> V and I -> P
    value = meant(src, xs)
    if src is V and dst is V:
        value = value.transpose(0, 1)
    return held(dst, value, len(xs), src)


def pairing(kind, grads, xs):
    """The one number that a gradient and a direction make, whatever the ranks are."""
    both = {R: (sum(grads), xs[0]), I: (grads[0], xs[0]), P: (grads[0], sum(xs))}
    a, b = both.get(kind, (torch.stack(grads), torch.stack(xs)))
    return (a * b).sum()


def numbers(seed, *shape):
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


@st.composite
def conversions(draw):
    """A function of `spmd` and two types that it takes, with dims for a tensor of `ndim` dims."""
    name = draw(st.sampled_from(sorted(LEGAL)))
    src, dst = draw(st.sampled_from(sorted(LEGAL[name]))).split(" -> ")
    ndim = draw(st.integers(2, 3))
    dims = draw(st.permutations(range(ndim)))
    rows = name != "reinterpret" and draw(st.booleans())

    def kind(letter, dim):
        if letter == "S":
            return V if rows else S(dim)
        return {"R": R, "I": I, "P": P, "V": V}[letter]

    both = name == "all_to_all"
    return name, kind(src, dims[0]), kind(dst, dims[1 if both else 0]), ndim


@st.composite
def meshes(draw):
    """A mesh of up to 8 ranks, and some of its axes in any order."""
    names = draw(st.permutations(["data", "context", "tensor"]))
    sizes = draw(st.sampled_from([s for s in product(range(1, 5), repeat=3) if prod(s) <= 8]))
    axes = dict(zip(names, sizes))
    some = draw(st.integers(0, 3))
    return axes, tuple(draw(st.permutations(names))[:some])


def tensors(name, kind, seed, ranks, ndim, factors):
    """Random tensors of a group's ranks, by their place, as this type needs them: what is split divides, V has rows."""
    shape = [ranks * f for f in factors[:ndim]]
    if isinstance(kind, S):
        shape[kind.dim] //= ranks
    elif kind is V and name != "reinterpret":
        shape = [ranks, *shape[1:]]
    made = [numbers(seed + k, *shape) for k in range(ranks)]
    return made[:1] * ranks if kind in (R, I) else made


def rows_first(name, src, dst, made):
    """R, I and P that become V, or came from it: their first dim is the ranks."""
    if V in (src, dst) and name not in ("reinterpret", "all_to_all", "all_gather") and src is not V:
        return [x[: len(made)] for x in made]
    return made


@law
@given(meshes(), conversions(), st.lists(st.integers(1, 2), min_size=3, max_size=3), st.integers(0, 10**6))
def test_conversions_and_their_gradients_are_what_they_mean(mesh, conversion, factors, seed):
    axes, along = mesh
    name, src, dst, ndim = conversion
    ranks = prod(axes[a] for a in along)
    fn = getattr(spmd, name)

    def inputs(m, offset, like=None):
        """This group's tensors: each group has its own numbers."""
        base = seed + 100 * (1 + m.members(*along)[0]) + offset
        if like is None:
            return rows_first(name, src, dst, tensors(name, src, base, ranks, ndim, factors))
        made = [numbers(base + k, *like.shape) for k in range(ranks)]
        return made[:1] * ranks if dual(dst) in (R, I) else made

    def run(m):
        group, k = m[along], m.place(*along)
        x, u = inputs(m, 0)[k].requires_grad_(), inputs(m, 30)[k]
        y = fn(x, group, src=src, dst=dst)
        g = inputs(m, 60, y)[k].requires_grad_()
        (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
        # The backward is linear in g as well: its own gradient is the forward.
        (again,) = torch.autograd.grad(grad, g, u)
        return (
            m.members(*along),
            y.detach(),
            grad.detach(),
            again.detach(),
            inputs(m, 0),
            inputs(m, 30),
            inputs(m, 60, y),
        )

    results = simulate(axes, run)
    for members, *_, xs, us, gs in results:
        ys, grads, agains = ([results[r][i] for r in members] for i in (1, 2, 3))
        same(ys, expected(name, src, dst, xs))
        same(grads, expected(name, dual(dst), dual(src), gs))
        same(agains, expected(name, src, dst, us))
        if name != "reinterpret" and (src, dst) != (V, V):
            assert torch.equal(meant(src, xs), meant(dst, ys))
        assert pairing(src, grads, xs) == pairing(dst, gs, ys)


def same(made, wanted):
    assert len(made) == len(wanted)
    for a, b in zip(made, wanted):
        assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@law
@given(st.integers(2, 4), conversions(), st.lists(st.integers(1, 2), min_size=3, max_size=3), st.integers(0, 10**6))
def test_conversions_are_those_of_spmd_types(ranks, conversion, factors, seed):
    """Values and gradients, for the same tensors, of the package whose names and meanings these are."""
    theirs = pytest.importorskip("spmd_types")
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    name, src, dst, ndim = conversion
    xs = rows_first(name, src, dst, tensors(name, src, seed, ranks, ndim, factors))

    def run(m):
        x = xs[m.rank].clone().requires_grad_()
        y = getattr(spmd, name)(x, m["tensor"], src=src, dst=dst)
        g = numbers(seed + (50 if dual(dst) in (R, I) else 50 + m.rank), *y.shape)
        y.backward(g)
        return y.detach(), g, x.grad

    ours = simulate({"tensor": ranks}, run)

    def their(kind):
        return theirs.S(kind.dim) if isinstance(kind, S) else getattr(theirs, repr(kind))

    expert = {"expert_mode": True} if name in ("convert", "reinterpret") else {}
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with LocalTensorMode(ranks) as mode:
            x = mode.rank_map(lambda r: xs[r].clone()).requires_grad_()
            y = getattr(theirs, name)(x, dist.group.WORLD, src=their(src), dst=their(dst), **expert)
            y.backward(mode.rank_map(lambda r: ours[r][1].clone()))
        for r, (value, _, grad) in enumerate(ours):
            same([value, grad], [y._local_tensors[r].detach(), x.grad._local_tensors[r]])
    finally:
        dist.destroy_process_group()


@law
@given(conversions(), st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_a_group_of_one_does_nothing(conversion, factors):
    name, src, dst, ndim = conversion
    (x,) = rows_first(name, src, dst, tensors(name, src, 0, 1, ndim, factors))
    x.requires_grad_()
    mesh = Mesh({"data": 1, "tensor": 1})
    mesh.record = []
    for axes in ("tensor", ("data", "tensor"), ()):
        y = getattr(spmd, name)(x, mesh[axes], src=src, dst=dst)
        if y is not x:
            assert (src is V) != (dst is V) and torch.equal(y, expected(name, src, dst, [x])[0])
            assert "_Linear" not in type(y.grad_fn).__name__
    assert mesh.record == []
    assert torch.equal(spmd.all_max(x, mesh["tensor"]), x.detach())


@law
@given(meshes(), st.integers(0, 10**6))
def test_primitives(mesh, seed):
    """What has no gradient, and what it says of itself."""
    axes, along = mesh
    ranks = prod(axes[a] for a in along)

    def run(m):
        group, x = m[along], numbers(seed + m.rank, 2, ranks)
        got = [
            group.all_reduce(x, "max"),
            spmd.all_max(x.requires_grad_(), group),
            group.broadcast(x.detach(), ranks - 1),
        ]
        group.barrier()
        mine = x.detach().clone()
        for step in range(4):  # nobody else sees what a rank does to its own tensors
            assert torch.equal(group.all_reduce(mine, "max"), got[0] + step)
            mine += 1
        for op in ("sum", "max"):
            room, m.record = x.detach().clone(), []
            group.all_reduce_(room, op)
            in_place, m.record = m.record, []
            assert torch.equal(room, group.all_reduce(x.detach(), op)) and m.record == in_place
        with pytest.raises(ValueError, match="not contiguous" if ranks > 1 else "mean"):
            group.all_reduce_(x.detach().T) if ranks > 1 else group.all_reduce_(x.detach(), "mean")
        m.record = None
        if ranks > 1:
            m.record, m.label = [], "ring"
            group.send(x.detach(), (group.rank + 1) % ranks)
            got.append(group.receive(x, (group.rank - 1) % ranks))
            assert m.record == [Record("send", along, 16 * ranks, "ring"), Record("receive", along, 0, "ring")]
            got.append(group.swap(x.detach(), (group.rank + 1) % ranks, x, (group.rank - 1) % ranks))
            assert m.record[2:] == m.record[:2]
        return m.members(*along), got

    for rank, (members, got) in enumerate(simulate(axes, run)):
        xs = [numbers(seed + r, 2, ranks) for r in members]
        largest = torch.stack(xs).amax(0)
        ring = [xs[(members.index(rank) - 1) % ranks]] * 2 if ranks > 1 else []
        same(got, [largest, largest, xs[-1], *ring])
        assert not got[1].requires_grad


@law
@given(meshes())
def test_groups_are_those_of_the_box(mesh):
    axes, along = mesh
    box = torch.arange(prod(axes.values())).view(*axes.values())
    names = list(axes)
    rest = [a for a in names if a not in along]
    # Rows: groups. The group's own axes come last, in the order that is asked for.
    rows = box.permute([names.index(a) for a in (*rest, *along)]).reshape(-1, prod(axes[a] for a in along))
    for rank in range(box.numel()):
        m = Mesh(axes, rank)
        assert box[tuple(m.coordinates.values())] == rank and list(m.coordinates) == names
        (row,) = [r.tolist() for r in rows if rank in r]
        assert m.members(*along) == tuple(row)
        assert m.place(*along) == row.index(rank) and m.size(*along) == len(row)


def test_meshes_refuse_what_is_not_there():
    mesh = Mesh({"data": 1, "tensor": 2}, 1)
    for wrong, said in (
        (lambda: mesh["pipe"], r"no axis `pipe`; the mesh has `data` x `tensor`"),
        (lambda: mesh.size("pipe"), "no axis `pipe`"),
        (lambda: mesh["data", "data"], "twice"),
        (lambda: mesh["tensor"], "2 ranks, and this mesh is for one process"),
        (lambda: Mesh({"data": 0}), "at least one rank"),
        (lambda: Mesh({"data": 2}, 2), r"ranks 0 \.\. 1, not 2"),
        (lambda: mesh["data"].all_reduce(torch.ones(1), "mean"), "mean"),
        (lambda: mesh["data"].broadcast(torch.ones(1), 1), "no rank 1"),
        (lambda: mesh["data"].send(torch.ones(1), 0), "no peer 0"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    assert mesh["data"] is mesh[("data",)]


KINDS = (R, I, P, V, S(0), S(1))


@pytest.mark.parametrize("name", sorted(LEGAL))
def test_other_pairs_are_refused(name):
    group, x = Mesh({"tensor": 1})["tensor"], torch.ones(1, 1)
    taken = 0
    for src, dst in product(KINDS, KINDS):
        a, b = ("S" if isinstance(k, S) or (k is V and name != "reinterpret") else repr(k) for k in (src, dst))
        legal = f"{a} -> {b}" in LEGAL[name]
        if name == "all_to_all":
            legal = (src, dst) in ((V, V), (S(0), S(1)), (S(1), S(0)))
        if legal:
            getattr(spmd, name)(x, group, src=src, dst=dst)
            taken += 1
        else:
            with pytest.raises(ValueError, match=rf"{name} does not take (\S+ -> \S+), but \S+ -> ") as error:
                getattr(spmd, name)(x, group, src=src, dst=dst)
            assert f"{src!r} -> {dst!r}" in str(error.value)
    assert taken >= len(LEGAL[name])


@pytest.mark.parametrize(
    ("name", "src", "dst", "said"),
    [
        ("reduce_scatter", P, S(1), "dim 1 of size 5 .* over the 2 ranks along `tensor`"),
        ("convert", R, S(-1), "dim 1 of size 5 .* over the 2 ranks along `tensor`"),
        ("all_to_all", S(0), S(1), "dim 1 of size 5 .* over the 2 ranks along `tensor`"),
        ("reduce_scatter", P, V, "2 ranks along `tensor`, not 3 rows"),
        ("convert", I, V, "2 ranks along `tensor`, not 3 rows"),
        ("all_gather", S(2), R, r"no dim 2 .* \[3, 5\]"),
    ],
)
def test_what_does_not_divide_is_refused(name, src, dst, said):
    with pytest.raises(RuntimeError, match=f"rank [01]: ValueError: .*{said}"):
        simulate({"tensor": 2}, lambda m: getattr(spmd, name)(torch.ones(3, 5), m["tensor"], src=src, dst=dst))


# A program that is sharded by hand: two layers, tokens over `data`, the middle dim over `tensor`.


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 1000))
def test_a_sharded_program_is_the_whole_one(tensor, data, sequence, seed):
    """Megatron's two layers, with and without split sequences: the loss and all gradients."""

    def made(*shape, at):
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + at))

    x, up, down = made(2, 4, 3, at=0), made(3, 8, at=1), made(8, 3, at=2)
    whole = [t.clone().requires_grad_() for t in (up, down)]
    loss = ((x + (x @ whole[0]).relu() @ whole[1]) ** 2).sum()
    loss.backward()

    def run(m):
        t, d = m["tensor"], m["data"]
        up_part = (
            spmd.convert(up, t, src=I, dst=S(1)).clone().requires_grad_()
        )  # a group of one gives `up`, which all share
        down_part = spmd.convert(down, t, src=I, dst=S(0)).clone().requires_grad_()
        h = spmd.convert(x, d, src=R, dst=S(0))
        if sequence:
            h = spmd.convert(h, t, src=R, dst=S(1))
            wide = spmd.all_gather(h, t, src=S(1), dst=R)
        else:
            wide = spmd.convert(h, t, src=I, dst=R)
        up_all, down_all = (spmd.convert(w, d, src=I, dst=R) for w in (up_part, down_part))
        y = (wide @ up_all).relu() @ down_all
        y = spmd.reduce_scatter(y, t, src=P, dst=S(1)) if sequence else spmd.all_reduce(y, t, src=P, dst=I)
        mine = ((h + y) ** 2).sum()
        if sequence:
            mine = spmd.all_reduce(spmd.reinterpret(mine, t, src=V, dst=P), t, src=P, dst=I)
        total = spmd.all_reduce(spmd.reinterpret(mine, d, src=V, dst=P), d, src=P, dst=I)
        total.backward()
        return total.detach(), t.all_gather_into(up_part.grad, 1), t.all_gather_into(down_part.grad, 0)

    for got in simulate({"data": data, "tensor": tensor}, run):
        for a, b in zip(got, (loss.detach(), whole[0].grad, whole[1].grad)):
            assert (a - b).abs().max() < 1e-10 * (1 + b.abs().max())


# What goes wrong is said, and nothing hangs.

STEPS = {
    "all_reduce": lambda g, x: g.all_reduce(x),
    "all_gather": lambda g, x: g.all_gather(x),
    "backward": lambda g, x: spmd.convert(x.requires_grad_(), g, src=I, dst=R).sum().backward(),
    "reduce_scatter": lambda g, x: g.reduce_scatter(x, 0),
    "barrier": lambda g, x: g.barrier(),
}
MISTAKES = ("leave out", "other kind", "other shape", "other dtype", "other axes", "raise", "twice")


@law
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5),
    st.sampled_from(MISTAKES),
    st.integers(0, 3),
    st.data(),
)
def test_a_mistake_of_one_rank_is_found_at_once(steps, mistake, who, data):
    at = data.draw(st.integers(0, len(steps) - 1))
    if steps[at] == "barrier" and mistake in ("other shape", "other dtype"):
        mistake = "raise"

    def run(m):
        for i, step in enumerate(steps):
            group, kind, x = m["data", "tensor"], step, torch.ones(4, 2)
            if (i, m.rank) == (at, who):
                if mistake == "raise":
                    raise LookupError("planted")
                if mistake == "leave out":
                    continue
                kind = "broadcast" if mistake == "other kind" else kind
                x = torch.ones(4, 3) if mistake == "other shape" else x.double() if mistake == "other dtype" else x
                group = m["tensor", "data"] if mistake == "other axes" else group
                if mistake == "twice":
                    STEPS[kind](group, x.clone())
            if kind == "broadcast":
                group.broadcast(x)
            else:
                STEPS[kind](group, x)

    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        simulate({"data": 2, "tensor": 2}, run, timeout=20)
    assert time.monotonic() - start < 10
    said = str(error.value)
    if mistake == "raise":
        assert said == f"rank {who}: LookupError: planted" and isinstance(error.value.__cause__, LookupError)
    else:
        assert all(f"rank {r}: " in said for r in range(4))


def test_what_each_rank_called_is_said():
    def run(m):
        spmd.convert(torch.ones(3), m["tensor"], src=I, dst=R)
        return m["tensor"].all_gather(torch.ones(3)) if m.rank else m["tensor"].all_reduce(torch.ones(3))

    with pytest.raises(RuntimeError) as error:
        simulate({"tensor": 2}, run)
    calls = "rank 0: all_reduce sum of float32[3]; rank 1: all_gather of float32[3]"
    assert str(error.value) == f"the ranks along `tensor` do not call the same: {calls}"

    def crossed(m):
        peer = 1 - m.rank
        m["tensor"].receive(torch.ones(2), peer)
        m["tensor"].send(torch.ones(2), peer)

    with pytest.raises(
        RuntimeError, match="no rank can go on: rank 0: waits in receive from rank 1 along `tensor`; rank 1: w"
    ):
        simulate({"tensor": 2}, crossed)

    def misread(m):
        return m["tensor"].receive(torch.ones(3), 1) if m.rank == 0 else m["tensor"].send(torch.ones(2), 0)

    with pytest.raises(RuntimeError, match=r"rank 0: .*rank 1 sent float32\[2\], and float32\[3\] is expected"):
        simulate({"tensor": 2}, misread)


def test_a_rank_that_stands_still_is_named():
    def run(m):
        if m.rank == 1:
            time.sleep(1)
        m["tensor"].barrier()

    said = "nothing happened for 0.2 s: rank 0: waits in barrier .*; rank 1: computes"
    with pytest.raises(RuntimeError, match=said):
        simulate({"tensor": 2}, run, timeout=0.2)
    simulate({"tensor": 2}, run, timeout=20)


def test_threads_keep_the_grad_mode_of_the_caller():
    with torch.no_grad():
        assert simulate({"data": 2}, lambda m: torch.is_grad_enabled()) == [False, False]
    assert simulate({"data": 2}, lambda m: torch.is_grad_enabled()) == [True, True]


def test_backwards_meet_also_through_functions_that_are_differentiable_once():
    """Several graphs at once, each with meetings inside its backward, one inside another function's."""

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return ctx.group.all_reduce(2 * x * grad), None

    def run(m):
        x = torch.full((2,), 1.0 + m.rank, dtype=torch.float64, requires_grad=True)
        y = x
        for _ in range(20):
            y = spmd.all_reduce(y, m["tensor"], src=P, dst=R) / m.size("tensor")
        Squared.apply(y, m["tensor"]).sum().backward()
        return x.grad

    # y = mean(1 .. 4) = 2.5 on all ranks; 4 ranks sum 2 * 2.5 each; each of the 20 steps keeps a sum of equal gradients.
    for grad in simulate({"tensor": 4}, run):
        assert torch.equal(grad, torch.full((2,), 4 * 2 * 2.5, dtype=torch.float64))


def test_gradients_of_weights_are_summed_in_fp32():
    """Ones beside 256 are lost in bf16, which has 8 bits. What is no weight is summed in its own dtype."""

    def rank(mesh):
        found = []
        for kind in (torch.nn.Parameter, lambda x: x.requires_grad_()):
            x = kind(torch.zeros(2, dtype=torch.bfloat16))
            whole = spmd.all_gather(x, mesh["a"], src=S(0), dst=R)
            whole.backward(torch.full((16,), 256.0 if mesh.rank == 0 else 1.0, dtype=torch.bfloat16))
            assert x.grad is not None and x.grad.dtype == torch.bfloat16
            found.append(x.grad)
        return found

    for weight, other in simulate({"a": 8}, rank):
        assert weight.tolist() == [264.0, 264.0]  # 263, rounded to even
        assert other.tolist() == [256.0, 256.0]


def test_weights_that_are_gathered_along_several_axes_are_weights_all_the_way():
    def rank(mesh):
        mesh.record = []
        x = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        whole = spmd.all_gather(x, mesh["b"], src=S(0), dst=R)
        whole = spmd.all_gather(whole, mesh["a"], src=S(0), dst=R)
        whole.sum().backward()
        return [r.bytes for r in mesh.record if r.kind == "reduce_scatter"]

    assert set(map(tuple, simulate({"a": 2, "b": 2}, rank))) == {(8 * 4, 4 * 4)}
