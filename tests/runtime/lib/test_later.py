"""Gradients of weights in a second part: the numbers of one backward pass, nothing kept that a product does not need."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from heddle.runtime import lib
from heddle.runtime.lib.later import Later, later, waiting
from heddle.runtime.lib.pipeline import pipelined
from heddle.runtime.lib.simulated import simulate


class Small(nn.Module):
    """A table whose rows are the classes again, maps with and without biases, alone and side by side, and a weight
    that is added as it is."""

    def __init__(self, width: int, biased: bool) -> None:
        super().__init__()
        self.table = lib.Embed(7, (width,))
        self.both = lib.Parallel({"a": ((2, 3), biased), "b": ((width,), False)}, (width,))
        self.out = lib.Linear((2, 3), (width,), biased)
        self.place = lib.Weights(weight=(2, 5, width))
        self.at: Any = SimpleNamespace(gathered=None, losses={}, uses={})
        self.again = False
        self.runs = 0

    def body(self, x: Tensor) -> Tensor:
        self.runs += 1
        a, b = self.both(x)
        return x + torch.tanh(b) + self.out(torch.softmax(a, -1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.place.weight
        x = lib.recompute(self.body, self.at, x) if self.again else self.body(x)
        return lib.linear(self.body(x), self.table.weight)


def made(width: int, biased: bool, seed: int = 0) -> tuple[Small, Any, Any]:
    source = torch.Generator().manual_seed(seed)
    model = Small(width, biased).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=source, dtype=torch.float64) * 0.5
    tokens = [torch.randint(0, 7, (2, 5), generator=source) for _ in range(3)]
    return model, tokens, [torch.randn(2, 5, 7, generator=source, dtype=torch.float64) for _ in range(3)]


@settings(deadline=None, max_examples=25)
@given(
    width=st.integers(1, 5), biased=st.booleans(), again=st.booleans(), seed=st.integers(0, 99),
    frozen=st.sets(st.sampled_from(["table.weight", "both.weight", "out.weight", "place.weight"]), max_size=3),
)  # fmt: skip
def test_two_parts_are_one(width: int, biased: bool, again: bool, seed: int, frozen: set[str]) -> None:
    model, tokens, grads = made(width, biased, seed)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    for x, g in zip(tokens, grads, strict=True):
        model(x).backward(g)
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.again, model.runs, stores = again, 0, []
    for x, g in zip(tokens, grads, strict=True):
        stores.append(Later())
        with later(stores[-1]):
            y = model(x)
        y.backward(g)
    # The weight that is added is no product's; all others wait.
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= {"place.weight"}
    assert model.runs == 3 * (3 if again else 2)  # made again once, for both parts
    for store in stores:
        store.run()
        assert not len(store)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (wanted[name] is None)
        if p.grad is not None and name != "place.weight":
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-10, atol=1e-10)


def test_each_weight_is_reached_once_a_part() -> None:
    """Uses of one weight are added first: what its gradient sends on the way is sent once."""
    model, tokens, grads = made(3, False)
    reached = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: reached.append(name))
    with later(store := Later()):
        y = model(tokens[0])
    y.backward(grads[0])
    reached.clear()
    store.run()
    assert sorted(reached) == sorted(n for n, _ in model.named_parameters() if n != "place.weight")


class _Marked(torch.autograd.Function):
    """x, and something that lives as long as the graph does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Any) -> Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_the_graph_is_let_go_behind_the_first_part() -> None:
    mark = nn.Module()
    seen = weakref.ref(mark)
    w, v = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    x = torch.randn(3, 4, requires_grad=True)
    with later(store := Later()):
        y = lib.linear(_Marked.apply(lib.linear(x, w), mark), v)
    del mark
    y.sum().backward()
    del y
    gc.collect()
    assert seen() is None and x.grad is not None and len(store) == 2


def test_what_was_changed_in_the_meantime_is_said() -> None:
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)
    with later(store := Later()):
        y = lib.linear(x, w)
    y.sum().backward()
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        store.run()


def test_nothing_waits_outside_or_without_gradients() -> None:
    assert waiting() is None
    with later(store := Later()):
        assert waiting() is store
        with torch.no_grad():
            assert waiting() is None
        with later(None):
            assert waiting() is None
    assert waiting() is None


class Staged(nn.Module):
    """Two stages by hand. The gradient of `place` is a view of that of a product, and is made before it."""

    storage_dtype, regathered = torch.float64, ()

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.pipe = lib.Pipe("pipe", 2, 1, 3, (("a",), ("b", "place")), parts)
        source = torch.Generator().manual_seed(0)
        self.a, self.b = (
            nn.Parameter(torch.randn(4, 4, generator=source, dtype=torch.float64)) for _ in range(2)
        )  # fmt: skip
        self.place = nn.Parameter(torch.randn(24, generator=source, dtype=torch.float64))

    def takes_1(self, at: Any) -> list[tuple[int, ...]]:
        return [(2, 3, 4)]

    def stage_0(self, x: Tensor, at: Any) -> tuple[Tensor]:
        return (lib.linear(x, self.a),)

    def stage_1(self, x: Tensor, h: Tensor, at: Any) -> Tensor:
        return lib.linear(torch.tanh(h), self.b) + self.place.view(2, 3, 4)

    def losses_of(self, x: Tensor, at: Any, ran: Tensor) -> dict[str, Tensor]:
        return {"lm": ran.square().sum()}


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_a_view_of_one_that_waits_leaves_it_alone(parts: int) -> None:
    source = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, 4, generator=source, dtype=torch.float64),) for _ in range(3)]
    one, at = Staged(parts), SimpleNamespace(losses={})
    for (x,) in batches:
        one.losses_of(x, at, one.stage_1(x, *one.stage_0(x, at), at))["lm"].backward()
    wanted = {n: p.grad for n, p in one.named_parameters()}

    def rank(mesh: Any) -> dict[str, Tensor | None]:
        model: Any = Staged(parts)
        model.mesh = mesh
        pipelined(model, batches, {"lm": torch.tensor(1)}, lambda _: SimpleNamespace(losses={}))
        return {n: p.grad for n, p in model.named_parameters()}

    for found in simulate({"pipe": 2, "back": 1}, rank):
        for name, grad in found.items():
            if grad is not None:
                torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-10)
