"""Weights that are gathered again for the backward pass: the same numbers, one more message each, nothing whole between
the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from heddle.runtime import lib
from heddle.runtime.lib.later import Later, later
from heddle.runtime.lib.regather import gathering_again, gone
from heddle.runtime.lib.simulated import simulate
from heddle.runtime.lib.spmd import R, S, all_gather

MESH = {"data": 2, "more": 2}


class Part(nn.Module):
    """Two maps, the second weight stored over two axes and read twice, and a norm; `seen` are the whole weights."""

    def __init__(self, mesh: Any, seed: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        shapes = [(8, 4), (4, 4), (4,)]
        whole = [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
        self.mesh = mesh
        self.a = nn.Parameter(whole[0].chunk(2, 1)[mesh.place("data")].clone())
        self.b = nn.Parameter(whole[1].chunk(4, 0)[mesh.place("data", "more")].clone())
        self.g = nn.Parameter(whole[2].chunk(2)[mesh.place("data")].clone())
        self.seen: list[Any] = []
        self.again = False

    def body(self, x: Tensor) -> Tensor:
        a = all_gather(self.a, self.mesh["data"], src=S(1), dst=R)
        b = all_gather(self.b, self.mesh["more"], src=S(0), dst=R)
        b = all_gather(b, self.mesh["data"], src=S(0), dst=R)
        g = all_gather(self.g, self.mesh["data"], src=S(0), dst=R)
        self.seen = [StorageWeakRef(w.untyped_storage()) for w in (a, b, g)]
        y = torch.tanh(lib.linear(x, a)[..., :4])
        return lib.rms_norm(lib.linear(lib.linear(y, b), b), g, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return lib.recompute(self.body, lib.At(x.shape[:2], x.device), x) if self.again else self.body(x)


def run(mesh: Any, axes: tuple[str, ...], seed: int, again: bool = False, apart: bool = False) -> Any:
    mesh.record = []
    model, store = Part(mesh, seed), Later()
    model.again = again
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    with gathering_again(axes), later(store if apart else None):
        y = model(x)
    there, before = [not w.expired() for w in model.seen], len(mesh.record)
    y.square().sum().backward()
    if apart:
        store.run()
    gathers = [r for r in mesh.record[before:] if r.kind == "all_gather"]
    return [x.grad, *(p.grad for p in model.parameters())], there, gathers


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 99), again=st.booleans(), apart=st.booleans())
def test_gradients_are_the_same_and_nothing_stays_whole(seed: int, again: bool, apart: bool) -> None:
    plain = simulate(MESH, lambda mesh: run(mesh, (), seed))
    parts = simulate(MESH, lambda mesh: run(mesh, ("data", "more"), seed, again, apart))
    for (wanted, kept, _), (found, there, gathers) in zip(plain, parts, strict=True):
        assert kept == [True] * 3 and there == [False] * 3
        assert len(gathers) == 4  # a, g and the two steps of b, which is read twice: as often as in the forward pass
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_only_along_the_axes_that_are_named() -> None:
    """The last step of `b` is along another axis than its first, which is kept then."""
    for _, there, gathers in simulate(MESH, lambda mesh: run(mesh, ("more",), 1)):
        assert there == [True, True, True] and not gathers
    for _, there, gathers in simulate(MESH, lambda mesh: run(mesh, ("data",), 1)):
        assert there == [False, True, False] and {r.axes for r in gathers} == {("data",)}


def test_hooks_around_see_all_but_the_whole_weights() -> None:
    def rank(mesh: Any) -> Any:
        seen: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            seen.append(x)
            return x + 0

        counts = []
        for axes in ((), ("data", "more")):
            model = Part(mesh, 3)
            seen.clear()
            x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            with saved_tensors_hooks(pack, lambda packed: packed), gathering_again(axes):
                y = model(x)
            y.sum().backward()
            counts.append((sorted(tuple(s.shape) for s in seen), x.grad))
        return counts

    for (every, a), (most, b) in simulate(MESH, rank):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        left = list(every)
        for shape in most:
            left.remove(shape)
        assert sorted(left) == [(4,), (4, 4), (4, 4), (4, 8)]


def test_a_weight_that_changed_is_said() -> None:
    def rank(mesh: Any) -> None:
        model = Part(mesh, 0)
        with gathering_again(("data", "more")):
            y = model(torch.zeros(1, 1, 4, dtype=torch.float64))
        with torch.no_grad():
            model.a.add_(1)
            model.b.add_(1)
        y.sum().backward()

    with pytest.raises(RuntimeError, match="changed behind the forward pass"):
        simulate(MESH, rank)


def test_another_tensor_in_the_same_place_is_not_the_weight() -> None:
    def rank(mesh: Any) -> bool:
        with gathering_again(("data",)):
            part = nn.Parameter(torch.rand(1024))
            whole = all_gather(part, mesh["data"], src=S(0), dst=R)
            view = whole.view(2, 1024)[1:, 3::2]
            found = gone(view)
            assert found is not None and torch.equal(found.again(), view) and gone(part) is None
            del whole, view
            return all(gone(torch.zeros(2048)) is None for _ in range(50))

    assert all(simulate(MESH, rank))
