"""Gradients that lie where they are sent: what autograd adds there is what it would add elsewhere."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heddle.runtime.train import side_by_side
from heddle.runtime.train.side_by_side import SideBySide

AXES = [("data",), ("data", "tensor")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
weight = st.tuples(
    st.lists(st.integers(1, 4), max_size=2), st.sampled_from(AXES), st.sampled_from(DTYPES), st.booleans()
)


@settings(max_examples=40)
@given(
    drawn=st.lists(weight, min_size=1, max_size=6), passes=st.integers(1, 3), steps=st.integers(1, 2),
    most=st.integers(1, 20), elsewhere=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_gradients_are_those_of_autograd(drawn, passes, steps, most, elsewhere, seed):
    """Whole numbers, so that no sum is rounded: of some passes, then again behind `clear`. Those that no pass reaches
    have none. `elsewhere`: somebody takes the places away first, as `zero_grad` does."""
    source = torch.Generator().manual_seed(seed)

    def numbers(shape, kind):
        return torch.randint(-4, 5, tuple(shape), generator=source).to(kind)

    weights = {str(i): (nn.Parameter(numbers(s, kind)), axes) for i, (s, axes, kind, _) in enumerate(drawn)}
    before, side_by_side.BUCKET = side_by_side.BUCKET, most
    try:
        made = SideBySide(weights)
    finally:
        side_by_side.BUCKET = before
    reached = [str(i) for i, (*_, is_reached) in enumerate(drawn) if is_reached]
    for _ in range(steps):
        wanted: dict[str, torch.Tensor] = {}
        for p, _ in weights.values() if elsewhere else ():
            p.grad = None
        for _ in range(passes):
            factors = {n: numbers(weights[n][0].shape, weights[n][0].dtype) for n in reached}
            for name, factor in factors.items():
                (weights[name][0] * factor).sum().backward()
                wide = torch.promote_types(factor.dtype, torch.float32)
                wanted[name] = wanted.get(name, 0) + factor.to(wide)
        made.gather()
        for name, (p, _) in weights.items():
            found = made.get(name)
            assert (found is None) == (name not in wanted)
            assert found is None or found.dtype == wanted[name].dtype and torch.equal(found, wanted[name])
            assert p.grad is None or p.grad is made.places[name]
        flat = torch.cat([b.flat.double() for b in made.buckets])
        places = [made.places[n].double().reshape(-1) for b in made.buckets for n in b.names]
        assert torch.equal(flat, torch.cat(places))
        made.clear()
        assert not any(b.flat.any() for b in made.buckets) and made.get("0") is None
    for bucket in made.buckets:
        assert len(bucket.names) == 1 or bucket.flat.numel() <= most
        assert {weights[n][1] for n in bucket.names} == {bucket.axes}
    assert sorted(n for b in made.buckets for n in b.names) == sorted(weights)


def test_autograd_adds_where_they_lie():
    p = nn.Parameter(torch.ones(3))
    made = SideBySide({"p": (p, ("data",))})
    (p * 2).sum().backward()
    assert p.grad is made.places["p"] and p.grad.data_ptr() == made.buckets[0].flat.data_ptr()
    assert torch.equal(made.buckets[0].flat, torch.full((3,), 2.0))
