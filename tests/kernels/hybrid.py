"""A hybrid that is small enough for Triton's interpreter to run all of it, and to differentiate it, in a few seconds."""

from __future__ import annotations

from heddle.dsl.load import load, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import Artifact, build

VOCAB = 32
SIZES = {
    "pattern": "M*", "hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "ssm_heads": 2, "ssm_head_dim": 8,
    "state": 8, "groups": 1, "vocab": VOCAB,
}  # fmt: skip


def hybrid() -> Artifact:
    """A scan and attention between norms, an embedding and a cross entropy, all on kernels."""
    return build(program_of(load(shipped_folder() / "nemotron_h/tiny.spec"), overrides=SIZES), "triton")
