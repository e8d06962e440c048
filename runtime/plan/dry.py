"""Whether a generated module comes to its end at all: one step without numbers, as a plan takes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...dsl.diagnostics import InternalError
from ..compile import Artifact
from ..distributed import spec_line
from ..lib import STATELESS
from ..lib.mesh import Axes
from .staged import measure_ranks
from .step import Feed, inputs, measure, opened


@dataclass(frozen=True)
class DryRun:
    """`ends` is None where it depends on numbers that only a real run has. `why` says what the step ended with, `line`
    which line of the spec was running."""

    ends: bool | None
    why: str = ""
    line: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def dry_run(artifact: Artifact, feed: Feed, over: Axes = ()) -> DryRun:
    """One step of rank 0, forward, backward and the optimizer (divided along `over`), or of each rank along the axis of
    a pipeline; forward and backward alone where no objective trains the model.

    Of all that are alike two run. Nothing but PyTorch works out shapes here, so an error is the module's, and none of a
    checker that reads it.
    """
    laid = artifact.lowered.laid
    try:
        if not artifact.program.objectives:
            _there_and_back(artifact, feed)
        elif laid is not None and laid.pipe is not None:
            measure_ranks(artifact, feed, over=over)
        else:
            measure(artifact, feed, over=over, short=True)
    except (InternalError, NotImplementedError) as unknown:  # a number is asked for, or PyTorch has no shape of an op
        return _ended(None, unknown, artifact)
    except Exception as error:
        return _ended(False, error, artifact)
    return DryRun(True)


def _ended(ends: bool | None, error: Exception, artifact: Artifact) -> DryRun:
    said = str(error).strip().split("\n")[0]
    kind = "" if isinstance(error, InternalError) else f"{type(error).__name__}: "
    return DryRun(ends, kind + said, spec_line(error, [artifact]) or "")


def _there_and_back(artifact: Artifact, feed: Feed) -> None:
    """The model's results, and gradients of them."""
    with opened(artifact, "fp32", short=True) as (model, _):
        tokens, document, given = inputs(model, artifact.lowered, feed)
        at = model._rows(tokens, None, document, None)
        out = model.run(tokens, *model._more(given, at), at, STATELESS)
        made = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        torch.autograd.backward(made, [torch.empty_like(x) for x in made])
