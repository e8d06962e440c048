"""`heddle verify`, `heddle tune` and `heddle bisect`: whether what runs is right, and where not; how it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .asked import overrides
from .options import Device, Format, Json, Set, Spec, Target, echo_json, program_at

if TYPE_CHECKING:
    from .compile import Artifact


def verify(
    spec: Spec,
    target: Target = "triton",
    examples: Annotated[int, typer.Option(min=1, help="draws for each kernel: fp32, bf16 and fp16 in turn")] = 12,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    device: Device = "auto",
    set: Set = None,  # noqa: A002
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Test the kernels that a model needs, each on drawn inputs against its meaning in fp64, forward and backward."""
    from .compile import lock_of
    from .paths import split_entry
    from .place import place
    from .tables import print_verified
    from .verify import verify as found

    rows = []
    lock = lock_of(split_entry(spec)[0], target)
    for row in found(program_at(spec, set), target, examples, seed, place(device), lock):
        rows.append(row)
    if json:
        echo_json([row.plain() for row in rows])
    else:
        print_verified(rows)
    if not all(row.holds for row in rows):
        raise typer.Exit(1)


def build(artifact: Artifact, target: str, is_tuned: bool, cache: Path) -> None:
    """Build the kernels of a model, and print what each asks of the GPU. Raises UserError `unknown-target` for one that
    is no GPU's, `bad-lock` where a kernel as it was tuned cannot be used, and `InternalError` where one as it is by
    itself cannot."""
    from ..dsl.diagnostics import InternalError
    from ..lowering.target import TARGETS
    from .errors import UserError
    from .launched import built_for
    from .tables import print_builds

    gpus = [name for name, t in TARGETS.items() if t.capability]
    if target not in gpus:
        raise UserError("unknown-target", f"kernels are not built for `{target}`", help=f"targets: {', '.join(gpus)}")
    built = built_for(artifact, TARGETS[target], cache=cache)
    print_builds(built)
    wrong = next((one for one in built if one.problems), None)
    if wrong is not None:
        said = f"`{wrong.kernel}` cannot be used: {wrong.problems[0]}"
        if is_tuned:
            raise UserError("bad-lock", said, help="tune it again")
        raise InternalError(said)


def tune(
    spec: Spec,
    target: Annotated[str, typer.Option(help="the generation of GPU that this is: sm_80, sm_90, sm_100")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="the lock (default: my.sm_90.lock of my.spec)")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="rows that kernels are timed with")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="tokens of a row")] = 4096,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "bf16",
    budget: Annotated[float, typer.Option(min=1.0, help="seconds for all kernels together")] = 600.0,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="tune this one only")] = None,
    keep_bits: Annotated[
        bool, typer.Option("--keep-bits", help="try nothing that changes the last bits of a result")
    ] = False,
    device: Device = "cuda",
    set: Set = None,  # noqa: A002
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Measure how the kernels of a model are best cut on this GPU, and which products are one kernel with what is
    behind them, and write it to a lock that compiling reads."""
    from .paths import split_entry, write_text
    from .place import place
    from .tables import print_tuned
    from .tune import lock_of, made_with, one_of
    from .tune import tune as found

    where = place(device)
    dtype = one_of(precision)
    tuned = list(found(program_at(spec, set), target, where, (batch, seq), dtype, budget, keep_bits, kernel))
    lock = lock_of(tuned, target, made_with(where, (batch, seq), precision))
    path = out or split_entry(spec)[0].with_suffix(f".{target}.lock")
    write_text(path, lock.text())
    if json:
        echo_json([{"key": t.key, **vars(t.tuned)} for t in tuned])
    else:
        print_tuned(tuned)
        typer.echo(str(path))


def bisect(
    spec: Spec,
    a: Annotated[str, typer.Argument(metavar="A", help="a run, as words: TARGET, DTYPE, layout=NAME, weights=FOLDER")],
    b: Annotated[str, typer.Argument(metavar="B", help="another one: `cpu,fp32`, `triton`, `layout=grid`")],
    rows: Annotated[int | None, typer.Option(min=1, help="rows of tokens (2, or as many as ranks share)")] = None,
    seq: Annotated[int, typer.Option(min=2, help="tokens of a row")] = 32,
    data: Annotated[list[Path] | None, typer.Option(help="text to read, in place of tokens that are drawn")] = None,
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or a tokenizer.json")] = "bytes",
    seed: Annotated[int, typer.Option(help="of weights and tokens")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing; the exit code says it")] = False,
    set: Set = None,  # noqa: A002
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Run a model in two ways, and name the first op whose result, or gradient, differs by more than rounding explains.
    The exit code is 1 where one does."""
    from .bisect.command import bisect_spec
    from .bisect.show import print_found

    found = bisect_spec(spec, overrides(set), a, b, rows, seq, data or [], tokenizer, seed)
    if json:
        echo_json(found)
    elif not quiet:
        print_found(found)
    if not found["equal"]:
        raise typer.Exit(1)
