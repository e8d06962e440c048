"""What users type behind a command, and how they are told what is wrong with it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..dsl.diagnostics import SpecError


def overrides(pairs: list[str] | None, dotted: bool = False) -> dict[str, Any]:
    """`["hidden=256", 'pattern="M*-"']` as values; `dotted` names have parts. Raises UserError `bad-override`."""
    from ..dsl.elaborate.constants import constant
    from .errors import UserError

    found = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        words = name.strip().replace(".", "_") if dotted else name.strip()
        if not equals or not words.isidentifier() or not text.strip():
            raise UserError("bad-override", f"`--set {pair}` is not NAME=VALUE", help="for example --set hidden=256")
        try:
            found[name.strip()] = constant(name.strip(), text.strip())
        except SpecError as error:
            raise UserError(
                "bad-override",
                f"`{text}` is no value: {error.diagnostics[0].message}",
                help="strings stand in quotes: --set 'pattern=\"M*-\"'",
            ) from None
    return found


@contextmanager
def reported(form: str = "text") -> Iterator[None]:
    """Print what is wrong and leave with the exit code of the kind of error."""
    from .errors import UserError

    try:
        with _warnings_as_errors_look():
            yield
    except (SpecError, UserError) as error:
        _print(error, form)
        raise typer.Exit(2) from None
    except Exception as error:  # what Triton raises for a kernel that is too large is no RuntimeError
        from .exhausted import diagnosed, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _print(diagnosed(error), form)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None


@contextmanager
def _warnings_as_errors_look() -> Iterator[None]:
    """Inside, warnings about a spec are printed as its errors are, once for all ranks."""
    from ..dsl.render import render_all
    from .errors import SpecWarning

    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, *where: Any, **more: Any) -> None:
            if not isinstance(message, SpecWarning):
                usual(message, *where, **more)
            elif not _rank():
                typer.echo(render_all(message.diagnostics, color=sys.stderr.isatty()), err=True)

        warnings.simplefilter("always", SpecWarning)
        warnings.showwarning = show
        yield


def _rank() -> int:
    """Which of the processes that torchrun started this is; 0 for one alone."""
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0


def _print(error: Any, form: str) -> None:
    if not isinstance(error, SpecError):
        _print_user_error(error, form)
    elif not _rank():  # what is wrong with a spec is wrong on every rank
        _print_diagnostics(error, form)


def _print_diagnostics(error: SpecError, form: str) -> None:
    from ..dsl.render import render_all

    if form == "json":
        typer.echo(json.dumps({"diagnostics": [d.to_json() for d in error.diagnostics]}, indent=1))
    else:
        typer.echo(render_all(error.diagnostics, color=sys.stderr.isatty()), err=True)


def _print_user_error(error: Any, form: str) -> None:
    if form == "json":
        typer.echo(
            json.dumps({"diagnostics": [{"code": error.code, "message": error.message, "help": error.help}]}, indent=1)
        )
        return
    rank = f"rank {_rank()}: " if _rank() else ""
    typer.echo(f"{rank}error[{error.code}]: {error.message}", err=True)
    if error.help:
        first, *more = error.help.split("\n")
        typer.echo("\n".join([f"  = help: {first}", *(f"          {line}" for line in more)]), err=True)
