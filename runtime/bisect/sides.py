"""One way to run a model, as a user says it: `triton,bf16` or `layout=grid`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ...dsl.layout import Layout, layout_of
from ...dsl.load import File
from ...lowering.target import TARGETS
from ..errors import UserError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Side:
    """`dtype` is that of weights and values, None where it was not said; `weights` is a model folder, None for weights
    that are drawn. `said` is how the user said it."""

    said: str
    target: str = "cpu"
    dtype: str | None = None
    layout: Layout | None = None
    weights: Path | None = None

    @property
    def kind(self) -> torch.dtype:
        """The dtype in torch."""
        return DTYPES[self.dtype or "fp64"]


def sides_of(first: str, second: str, file: File) -> tuple[Side, Side]:
    """Both sides. Where neither says a dtype both are fp64, or fp32 where one has kernels; where one does, the other
    has the same, but for kernels, which compute in fp32 at most.

    Raises UserError `unknown-side`; `SpecError` for a layout that is not there.
    """
    a, b = _side(first, file), _side(second, file)
    usual = "fp32" if any(TARGETS[s.target].kernels for s in (a, b)) else "fp64"
    a, b = (replace(s, dtype=s.dtype or _like(s, other.dtype or usual)) for s, other in ((a, b), (b, a)))
    for side in (a, b):
        if TARGETS[side.target].kernels and side.dtype == "fp64":
            raise UserError(
                "unknown-side",
                f"`{side.said}` cannot be run in fp64: kernels compute in fp32 at most",
                help=f"{side.target},fp32",
            )
    return a, b


def _like(side: Side, dtype: str) -> str:
    return "fp32" if dtype == "fp64" and TARGETS[side.target].kernels else dtype


def _side(text: str, file: File) -> Side:
    said: dict[str, Any] = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        found: dict[str, Any]
        if not equals and name in TARGETS:
            found = {"target": name}
        elif not equals and name in DTYPES:
            found = {"dtype": name}
        elif name == "layout" and value:
            found = {"layout": layout_of(file, value)}
        elif name == "weights" and value:
            found = {"weights": Path(value)}
        else:
            raise _unknown(text, name if equals else word.strip())
        if twice := set(found) & set(said):
            raise UserError("unknown-side", f"`{text}` says two things for its {twice.pop()}")
        said |= found
    return Side(text, **said)


def _unknown(text: str, word: str) -> UserError:
    known = [*TARGETS, *DTYPES, "layout=NAME", "weights=FOLDER"]
    near = get_close_matches(word, [k.partition("=")[0] for k in known], 1)
    what = f"`{word}`" if word == text else f"`{word}` in `{text}`"
    hint = f"`{near[0]}` is one; " if near else ""
    return UserError(
        "unknown-side", f"{what} says nothing of a side", help=f"{hint}words of a side: {', '.join(known)}"
    )
