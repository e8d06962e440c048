"""Kernels on the ranks of a mesh: any layout on target `triton` is no further from fp64 than PyTorch on one device."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from heddle.codegen.emit import emit
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text, shipped_folder
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime.check import program_of
from heddle.runtime.lib import kernels
from tests.kernels.harness import floor
from tests.runtime.laid_out import Outcome, alone, difference, on_mesh, start
from tests.runtime.test_layouts import AGAIN, LONG, MESHES, PARTS, TWINS, batch_of, layouts, text_of

STEPS = 256
"""Additions one behind another on the longest way through a twin, as in test_models.py."""
MORE = ["", AGAIN, PARTS, PARTS + AGAIN]
WAYS = [(), ("attend?: ring",), ("attend?: ring(order = zigzag)",)]


def loaded(file: str, drawn: Any, more: str, ways: tuple[str, ...] = ()) -> Any:
    mesh, dims, between = drawn
    path = shipped_folder() / file
    made = load_text(path.read_text(encoding="utf-8") + text_of(mesh, dims, between, ways) + more, folder=path.parent)
    return program_of(made), layout_of(made)


def far(a: Outcome, b: Outcome) -> dict[str, float]:
    """The largest difference of each thing from `b`, as `difference` has it for ranks."""
    pairs = {"loss": (a.loss, b.loss), "norm": (a.norm, b.norm)}
    pairs |= {f"gradient of {n}": (g, b.grads[n]) for n, g in a.grads.items()}
    return {k: float((x - y).abs().max() / (1 + y.abs().max())) if x.numel() else 0.0 for k, (x, y) in pairs.items()}


@settings(
    max_examples=60 if LONG else 2, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(
    file=st.sampled_from(TWINS), drawn=layouts([m for m in MESHES if LONG or prod(m.values()) <= 4]),
    seed=st.integers(0, 2**16), packed=st.booleans(), padded=st.booleans(), more=st.sampled_from(MORE),
    ways=st.sampled_from(WAYS),
)  # fmt: skip
def test_ranks_have_the_numbers_of_one_device(
    file: str, drawn: Any, seed: int, packed: bool, padded: bool, more: str, ways: tuple[str, ...]
) -> None:
    if file.startswith("retro") or drawn[0]["context"] == 1:
        ways = ()  # whose queries of several sequences are in no ring
    program, layout = loaded(file, drawn, more, ways)
    model = start(program, seed)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_of(drawn[0], 16, seed, model.vocab, file.startswith("retro"), packed, padded)
    exact, eager = alone(model, batch), alone(start(program, seed).float(), batch)
    with kernels.launches() as told:
        ranks, _ = on_mesh(program, layout, state, batch, target="triton", dtype=torch.float32)
    assert told
    known = far(eager, exact)
    one = torch.ones((), dtype=torch.float64)
    found = {k: v for k, v in difference(exact, ranks).items() if k in known}
    assert found.keys() == known.keys()
    bad = {k: (v, known[k]) for k, v in found.items() if not v <= 2 * known[k] + floor(one, torch.float32, STEPS)}
    assert not bad, f"{file} on {drawn} {more} {ways}: {bad}"


@pytest.mark.parametrize(
    ("drawn", "more", "joined"),
    [
        ((dict(data=2, context=2, tensor=1), [], False), "", True),
        ((dict(data=1, context=1, tensor=2), ["heads", "kv_heads", "ffn"], True), "", True),
        ((dict(data=1, context=1, tensor=2), ["vocab"], False), "", False),  # its parts meet in steps of their own
        ((dict(data=2, context=1, tensor=1), [], False), PARTS, False),  # the weight is brought together in the model
    ],
)
def test_a_loss_makes_its_logits_where_all_of_their_weight_is_there(drawn: Any, more: str, joined: bool) -> None:
    program, layout = loaded("llama/tiny.spec", drawn, more)
    text = emit(lower(program, layout=layout, target=TARGETS["triton"]), "test").model
    assert ("lib.linear_cross_entropy(" in text, " if head else " in text) == (joined, joined)
    # The last sum of a layer is in the kernel of the next.
    assert "kernels.add_rms_norm_2(" in text
