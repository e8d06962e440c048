"""The kernel of attention in Triton's interpreter, against fp64 and against its own laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime import lib

from . import harness
from .attention import FORMS, SMALL, Form, case, check, module, rows, text, tiles

from hypothesis import Phase
PH=[Phase.generate]
few = settings(max_examples=settings.get_profile("suite").max_examples // 5)


@settings(max_examples=40, phases=PH)
@given(st.data(), st.sampled_from(sorted(FORMS)), harness.dtypes(), harness.seeds())
def test_the_result_and_every_gradient_are_attention(data: st.DataObject, name: str, dtype: torch.dtype, seed: int) -> None:
    batch, kv = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    seq = data.draw(harness.sizes(8, 13, least=1))
    document, valid = data.draw(rows(batch, seq))
    layout, scale = data.draw(harness.layouts()), data.draw(harness.scales())
    one = case(FORMS[name], batch, seq, kv, dtype, seed, scale, layout, document, valid)
    up = harness.values((batch, seq, kv * FORMS[name].group, FORMS[name].value_width), dtype, seed + 99)
    check(one, module(FORMS[name]).attend, up)
