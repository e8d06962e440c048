"""What several commands take and print alike."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .asked import overrides

Spec = Annotated[
    str, typer.Argument(metavar="SPEC[:MODEL]", help="a spec file, and one of its models (the last if not named)")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="another value for a parameter of the model")
]
Give = Annotated[
    list[str] | None, typer.Option("--give", metavar="INPUT=INDEX", help="what gives an input of the model its rows")
]
Layout = Annotated[
    str | None, typer.Option("--layout", metavar="NAME", help="a layout of the file: what one of its ranks runs")
]
Json = Annotated[bool, typer.Option("--json", help="plain data for tools")]
Target = Annotated[str, typer.Option(help="what code is for: cpu, or with kernels triton, sm_80, sm_90, sm_100")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one")]
Format = Annotated[str, typer.Option("--format", metavar="text|json", help="how diagnostics are printed")]


def program_at(spec: str, pairs: list[str] | None = None) -> Any:
    """The program of `SPEC[:MODEL]` with overrides."""
    from ..dsl.load import load
    from .check import program_of
    from .paths import split_entry

    path, model = split_entry(spec)
    return program_of(load(path), model, overrides(pairs))


def echo_json(data: Any) -> None:
    """Print plain data."""
    typer.echo(json.dumps(data, indent=1))
