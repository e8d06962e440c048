"""The command line. Each command imports what it needs when it runs, so that `heddle check` starts fast.

Exit codes: 0 fine, 2 the user's error (diagnostics on stderr), 1 ours, or two things differ that were compared.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..dsl.diagnostics import SpecError
from . import kernel_commands
from .asked import overrides, reported
from .index_commands import app as index_commands
from .options import Device, Format, Give, Json, Layout, Set, Spec, Target, echo_json, program_at

app = typer.Typer(
    name="heddle",
    help="A small language for models, and its compiler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

class Resuming(typer.core.TyperCommand):
    """A command whose `--resume` may be followed by `auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--resume auto` is one word."""
        words: list[str] = []
        for word in args:
            if word == "auto" and words and words[-1] == "--resume":
                words[-1] = "--resume-or-begin"
            else:
                words.append("--resume-or-begin" if word == "--resume=auto" else word)
        return super().parse_args(ctx, words)


def command_as(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose errors are reported; `--format json` prints them as data. `settings` are those of Typer."""

    def made(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with reported(kwargs.get("format", "text")):
                function(*args, **kwargs)

        return app.command(**settings)(run)

    return made


command = command_as()


@command
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="spec files")],
    format: Format = "text",  # noqa: A002
    json: Json = False,
) -> None:
    """Check names, sizes, dims and types of every model of the files."""
    from ..dsl.diagnostics import Diagnostic
    from ..dsl.load import load
    from .check import check_file

    found: list[Diagnostic] = []
    checked = []
    for path in files:
        try:
            checked.append(check_file(load(path)))
        except SpecError as error:
            found.extend(d for d in error.diagnostics if d not in found)
    if found:
        raise SpecError(found)
    if json or format == "json":
        echo_json(
            {
                "files": [
                    {
                        "file": c.file.source.name,
                        "models": {n: {"parameters": p.num_parameters()} for n, p in c.programs.items()},
                    }
                    for c in checked
                ]
            }
        )
        return
    for c in checked:
        models = ", ".join(f"{n} ({p.num_parameters():,} parameters)" for n, p in c.programs.items())
        typer.echo(f"{c.file.source.name}: fine{': ' + models if models else ''}")


@command
def fmt(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="spec files")],
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit code 2 if a file would change")] = False,
) -> None:
    """Format spec files in place; comments are kept."""
    from .formatting import format_files

    changed = format_files(files, write=not check)
    for path in changed:
        typer.echo(f"{path}: {'would change' if check else 'formatted'}")
    if check and changed:
        raise typer.Exit(2)


@command
def show(
    spec: Spec,
    set: Set = None,  # noqa: A002
    length: Annotated[int, typer.Option(help="tokens of a sequence, for operations and state", min=1)] = 4096,
    paths: Annotated[bool, typer.Option("--paths", help="every weight with its dims")] = False,
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Parameters by block, operations a token, bytes of state."""
    from .show import summary, weights

    program = program_at(spec, set)
    data = summary(program, length)
    if paths:
        data["weights"] = weights(program)
    if json:
        echo_json(data)
    else:
        from .tables import print_summary

        print_summary(data)


@command
def diff(
    first: Spec,
    second: Spec,
    set: Set = None,  # noqa: A002
    length: Annotated[int, typer.Option(help="tokens of a sequence, for operations and state", min=1)] = 4096,
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Two models side by side: sizes, settings, and whose weights fit whom. `--set` changes the second."""
    from .diff import difference
    from .tables import print_difference

    data = difference(program_at(first), program_at(second, set), length)
    if json:
        echo_json(data)
    else:
        print_difference(data)


@command
def explain(
    what: Annotated[str, typer.Argument(metavar="CODE | SPEC[:MODEL]", help="an error code, or a spec")],
    after: Annotated[str | None, typer.Option(metavar="PASS", help="print the graphs behind this pass")] = None,
    layout: Layout = None,
    target: Target = "cpu",
    set: Set = None,  # noqa: A002
    format: Format = "text",  # noqa: A002
) -> None:
    """The page of an error code, or a model's graphs behind a pass."""
    from .explain import explain_code, explain_graphs

    if ".spec" not in what and after is None:
        typer.echo(explain_code(what), nl=False)
        return
    from .compile import lock_of
    from .paths import split_entry

    laid, lock = None, lock_of(split_entry(what)[0], target)
    if layout is not None:
        from ..dsl.layout import layout_of
        from ..dsl.load import load

        laid = layout_of(load(split_entry(what)[0]), layout)
    typer.echo(explain_graphs(program_at(what, set), after, laid, target, lock), nl=False)


@command
def compile(  # noqa: A001
    spec: Spec,
    out: Annotated[Path, typer.Option("-o", "--out", help="where artifacts are kept")] = Path("build"),
    target: Target = "cpu",
    layout: Layout = None,
    lock: Annotated[
        Path | None, typer.Option(metavar="FILE", help="how kernels are cut (default: my.sm_90.lock of my.spec)")
    ] = None,
    build_kernels: Annotated[
        bool, typer.Option("--build", help="build its kernels, and show what each asks of a GPU; none is needed")
    ] = False,
    set: Set = None,  # noqa: A002
    format: Format = "text",  # noqa: A002
) -> None:
    """Write readable PyTorch source for a model; the same spec gives the same bytes."""
    from ..dsl.layout import layout_of
    from ..dsl.load import load
    from .check import proved
    from .compile import build, lock_of, tell, write
    from .paths import split_entry

    path, model = split_entry(spec)
    file = load(path)
    program = proved(file, model, overrides(set))
    laid = layout_of(file, layout) if layout is not None else None
    cut = lock_of(path, target, lock)
    made = build(program, target, laid, cut)
    tell(made, cut)
    typer.echo(str(write(made, out) / "model.py"))
    if build_kernels:
        kernel_commands.build(made, target, is_tuned=cut is not None, cache=out / ".builds")


@command
def plan(
    spec: Spec,
    layout: Annotated[str | None, typer.Option(help="a layout of the file (the last)")] = None,
    device: Annotated[str, typer.Option(help="what each rank runs on")] = "h100-80g",
    precision: Annotated[str, typer.Option(help="fp32, or bf16 with fp32 masters")] = "bf16",
    microbatch: Annotated[int, typer.Option(min=1, help="rows of a rank's micro-batch")] = 1,
    seq: Annotated[int, typer.Option(min=2, help="tokens of a row")] = 4096,
    batch: Annotated[int | None, typer.Option(min=1, help="rows of a step, of all ranks (a micro-batch each)")] = None,
    documents: Annotated[
        bool, typer.Option("--documents/--no-documents", help="rows may hold several documents, as `train` feeds them")
    ] = True,
    search: Annotated[int | None, typer.Option(metavar="N", min=1, help="rank the layout's meshes of N ranks")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page, too")] = None,
    set: Annotated[  # noqa: A002
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a parameter, or `layout.mesh.axis=N`")
    ] = None,
    format: Annotated[str, typer.Option(metavar="table|json", help="how it is printed")] = "table",  # noqa: A002
) -> None:
    """Memory, messages and time of each rank under a layout, before anything runs."""
    from .plan.command import plan_spec
    from .plan.show import print_candidates, print_plan
    from .plan.step import Feed

    feed = Feed(microbatch, seq, 1, documents)
    settings = overrides(set, dotted=True)
    data = plan_spec(spec, settings, layout, device, precision, feed, batch, search, html)
    if format == "json":
        echo_json(data)
    elif search is None:
        print_plan(data)
    else:
        print_candidates(data["candidates"])


@command
def certify(
    spec: Spec,
    layout: Annotated[str | None, typer.Option(metavar="NAME", help="a layout of the file (the last)")] = None,
    seq: Annotated[int, typer.Option(min=2, help="tokens of a row, where the numbers are run")] = 16,
    set: Set = None,  # noqa: A002
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Prove a layout, ask spmd_types about the generated module, and run it on simulated ranks against one device where
    the model is small; prints one card."""
    from ..dsl.layout import layout_of
    from ..dsl.load import load
    from .certify import certify as made
    from .check import proved
    from .paths import split_entry
    from .tables import print_card

    path, model = split_entry(spec)
    file = load(path)
    card = made(proved(file, model, overrides(set)), layout_of(file, layout), seq)
    if json:
        echo_json(card)
    else:
        print_card(card)
    if not card["holds"]:
        raise typer.Exit(1)


for one in (kernel_commands.verify, kernel_commands.tune, kernel_commands.bisect):
    command(one)


@command_as(cls=Resuming)
def train(
    spec: Spec,
    data: Annotated[list[Path], typer.Option(help="text files or folders, .jsonl, or Megatron .bin/.idx")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the run's folder: logs, checkpoints, the spec")],
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="rows of a step")] = 8,
    seq: Annotated[int, typer.Option(min=2, help="tokens of a row")] = 512,
    accumulate: Annotated[int, typer.Option(min=1, help="micro-batches a step")] = 1,
    lr: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    min_lr: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant")] = "cosine",
    warmup: Annotated[int, typer.Option(min=0, help="steps")] = 50,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.1,
    clip: Annotated[float, typer.Option(min=0.0, help="largest gradient norm")] = 1.0,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 with fp32 masters")] = "fp32",
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or a tokenizer.json")] = "bytes",
    held_out: Annotated[float, typer.Option(min=0.0, max=0.5, help="share of the files kept for evaluation")] = 0.05,
    seed: Annotated[int, typer.Option()] = 0,
    save_every: Annotated[int, typer.Option(min=1)] = 200,
    eval_every: Annotated[int, typer.Option(min=0)] = 0,
    give: Give = None,
    objective: Annotated[str, typer.Option(help="the block that trains it")] = "next_token",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="a parameter of the objective: temperature=2")
    ] = None,
    lend: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="a model that the objective asks: teacher=FOLDER")
    ] = None,
    start: Annotated[Path | None, typer.Option(metavar="FOLDER", help="the weights to begin with")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the latest checkpoint, bit for bit; `--resume auto`: or begin")
    ] = False,
    begin: Annotated[bool, typer.Option("--resume-or-begin", hidden=True)] = False,
    layout: Annotated[
        str | None, typer.Option(metavar="NAME", help="a layout of the file, for the processes that torchrun started")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that a rank waits for others")] = 600.0,
    device: Device = "auto",
    target: Target = "cpu",
    set: Set = None,  # noqa: A002
    format: Format = "text",  # noqa: A002
) -> None:
    """Train a model on text; Ctrl-C saves first, --resume goes on."""
    settings = {k: v for k, v in locals().items() if k not in ("spec", "set", "format", "option", "begin")}
    settings["resume"] = "auto" if begin else resume
    from pydantic import ValidationError

    from .running import train_model

    try:
        train_model(spec, overrides(set), option=overrides(option), **settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None


@command_as(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    spec: Spec,
    layout: Annotated[str, typer.Option(metavar="NAME", help="a layout of the file")],
    nnodes: Annotated[int, typer.Option(min=1, help="machines; the ranks are shared evenly among them")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="how often ranks that died are started again")] = 3,
    endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="where machines meet (more than one)")] = "",
    slurm: Annotated[Path | None, typer.Option(metavar="FILE", help="write a script for sbatch, start nothing")] = None,
    time: Annotated[str, typer.Option(help="the script's time limit")] = "04:00:00",
    show: Annotated[bool, typer.Option("--show", help="print the command, start nothing")] = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Train a layout's model on as many processes as its mesh has ranks; all else is as for `heddle train`."""
    from .launch import plan_launch, run_command, write_script

    words = plan_launch(spec, layout, nnodes, restarts, endpoint, context.args, slurm is not None)
    if slurm is not None:
        typer.echo(str(write_script(slurm, words, nnodes, time)))
    elif show:
        typer.echo(shlex.join(words))
    else:
        run_command(words)


@command
def generate(
    folder: Annotated[Path, typer.Argument(help="a model folder, or a run")],
    prompt: Annotated[str, typer.Option(help="the text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=0)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    give: Give = None,
    passages: Annotated[
        int, typer.Option(min=0, help="so many of the nearest chunks stand before the prompt, the next are given")
    ] = 0,
    device: Device = "auto",
    target: Target = "cpu",
    graph: Annotated[bool, typer.Option(help="on a GPU, replay steps of one token from a CUDA graph")] = True,
    set: Set = None,  # noqa: A002
    format: Format = "text",  # noqa: A002
) -> None:
    """Continue a prompt; the text is printed as it is produced."""
    from .running import generate_text

    sampling = temperature, top_k, top_p, seed
    generate_text(folder, prompt, max_new_tokens, *sampling, give, passages, overrides(set), device, target, graph)


@command
def run(
    recipe: Annotated[str, typer.Argument(metavar="FILE[:RECIPE]", help="a file, and one of its recipes (the last)")],
    out: Annotated[Path, typer.Option("-o", "--out", help="where each result gets a folder of its name")],
    data: Annotated[list[Path] | None, typer.Option(help="text: what the recipe calls `data`")] = None,
    set: Annotated[  # noqa: A002
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a parameter, or `step.argument=value`")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or a tokenizer.json")] = "bytes",
    held_out: Annotated[float, typer.Option(min=0.0, max=0.5, help="share of the files kept for evaluation")] = 0.05,
    device: Device = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="print the steps and run nothing")] = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Run a recipe: every result is a folder, made once; a stopped run goes on where it was."""
    from ..dsl.load import load
    from .errors import UserError
    from .paths import split_entry
    from .recipes import planned, run_recipe
    from .recipes.show import lines

    path, name = split_entry(recipe)
    file, settings = load(path), overrides(set, dotted=True)
    if plan:
        typer.echo("\n".join(lines(planned(file, name, settings))))
        return
    if not data:
        raise UserError("no-data", "a recipe reads `data`", help="--data names files or folders of text")
    run_recipe(file, name, data, out, settings, tokenizer, held_out, typer.echo, device)


@command
def prune(
    folder: Annotated[Path, typer.Argument(help="the teacher: a model folder, or a run")],
    spec: Spec,
    out: Annotated[Path, typer.Option("-o", "--out", help="the model folder to write")],
    data: Annotated[list[Path] | None, typer.Option(help="text on which the teacher shows what matters in it")] = None,
    samples: Annotated[int, typer.Option(min=1, help="rows of the data, at most")] = 1024,
    seq: Annotated[int, typer.Option(min=2, help="tokens of a row")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="rows at once")] = 8,
    depth: Annotated[str, typer.Option(help="bi, perplexity, kl, mse or hidden_mse, for layers")] = "bi",
    keep: Annotated[list[str] | None, typer.Option(metavar="NAME=PLACES", help="what stays: layer=0..14,31")] = None,
    scores: Annotated[Path | None, typer.Option(help="scores that were saved, in place of data")] = None,
    set: Set = None,  # noqa: A002
    format: Format = "text",  # noqa: A002
) -> None:
    """Make a smaller model of a model's weights: the spec says how small, scores or you what stays."""
    from .compress.command import kept, prune_folder

    made = prune_folder(folder, spec, overrides(set), out, data, samples, seq, batch, depth, kept(keep), scores)
    typer.echo(str(made))


app.add_typer(index_commands, name="index")


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="a folder with config.json and safetensors")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the model folder to write")],
    format: Format = "text",  # noqa: A002
) -> None:
    """Make a model folder (spec and weights) of a Hugging Face folder."""
    with reported(format):
        from .huggingface import import_folder

        typer.echo(str(import_folder(source, out)))


@command
def export(
    folder: Annotated[Path, typer.Argument(help="a model folder, or a run")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the Hugging Face folder to write")],
    format: Format = "text",  # noqa: A002
) -> None:
    """Write a model folder as a Hugging Face folder."""
    from .huggingface import export_folder

    typer.echo(str(export_folder(folder, out)))


@command
def bench(
    spec: Spec,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    seq: Annotated[int, typer.Option(min=1)] = 512,
    target: Annotated[
        str | None, typer.Option(help="time each kernel of this target by itself, against PyTorch; on a GPU")
    ] = None,
    estimate: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="with a target, what kernels would take at a device's rates")
    ] = None,
    set: Set = None,  # noqa: A002
    json: Json = False,
    format: Format = "text",  # noqa: A002
) -> None:
    """Measure forward, training step and decoding of a model on this machine, or each of its kernels."""
    from .bench import measure, print_measurements

    if target is not None:
        from .compile import lock_of
        from .kernel_bench import bench_spec
        from .paths import split_entry
        from .tables import print_measured

        lock = lock_of(split_entry(spec)[0], target)
        found = bench_spec(program_at(spec, set), target, (batch, seq), estimate, lock)
        echo_json([vars(row) for row in found]) if json else print_measured(found)
        return
    rows = measure(program_at(spec, set), batch, seq)
    if json:
        echo_json(rows)
    else:
        print_measurements(rows)


@command
def doctor(json: Json = False) -> None:
    """What this machine has, and what works on it."""
    from .doctor import examine, print_report

    report = examine()
    if json:
        echo_json(report)
    else:
        print_report(report)


def main() -> None:
    """The `heddle` command. A failure of ours is exit code 1 and names itself as ours."""
    try:
        app()
    except SystemExit as end:
        _leave(end.code)
        raise
    except Exception as error:
        typer.echo(f"internal error: {type(error).__name__}: {error}", err=True)
        for note in getattr(error, "__notes__", ()):
            typer.echo(f"  = note: {note}", err=True)
        typer.echo("  = help: this is a fault of Heddle, not of your spec; please report it with the spec", err=True)
        _leave(1)
        raise SystemExit(1) from error


def _leave(code: Any) -> None:
    """A rank that failed ends here: what still waits for other ranks would abort the process, with another code."""
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
