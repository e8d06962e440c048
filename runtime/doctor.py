"""What this machine has, and what works on it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "pydantic",
    "lark",
    "networkx",
    "jinja2",
    "typer",
    "rich",
    "safetensors",
    "tokenizers",
    "numpy",
)
EXTRAS = {
    "tensorboard": "curves beside the log",
    "transformers": "comparing with published classes",
    "nvidia-cutlass-dsl": "products with an epilogue in the CuTe DSL, where `heddle tune` chose them",
}


def examine() -> dict[str, Any]:
    """Versions, devices and a small model compiled, trained for a step and sampled from."""
    report: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    report["packages"] = {name: _version(name) for name in PACKAGES}
    report["extras"] = {name: _version(name) for name in EXTRAS}
    report["devices"] = _devices()
    report["works"] = _try_model()
    return report


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = [f"cpu, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        found += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


PROBE = """
model probe(vocab = 16, hidden = 16):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    mixed = embedding + mamba2(rms_norm(embedding), heads = 2, head_dim = 8, state = 8, groups = 1)
    x = mixed + attention(mixed, heads = 2)
    logits = linear(x, hidden -> vocab)
    return logits
"""


def _try_model() -> str:
    """`fine`, or what went wrong."""
    import torch

    from ..dsl.load import load_text
    from .check import program_of
    from .compile import build, instantiate

    try:
        model = instantiate(build(program_of(load_text(PROBE))))
        tokens = torch.arange(8)[None]
        losses = model.losses(tokens)
        torch.stack(list(losses.values())).sum().backward()
        model.generate(tokens, 2)
    except Exception as error:  # a doctor reports every illness
        return f"{type(error).__name__}: {error}"
    return "fine"


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    print(f"python {report['python']}, {report['cores']} cores")
    for name, version in report["packages"].items():
        print(f"  {name:20} {version or 'MISSING'}")
    for name, version in report["extras"].items():
        print(f"  {name:20} {version or f'not installed: {EXTRAS[name]}'}")
    for device in report["devices"]:
        print(f"device: {device}")
    print(f"a small model compiles, trains and generates: {report['works']}")
