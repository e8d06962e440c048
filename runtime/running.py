"""`heddle train` and `heddle generate`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ..dsl.elaborate import DEFAULT
from ..dsl.layout import Layout, layout_of
from ..dsl.load import File, load
from ..dsl.program import Program
from ..lowering.passes.stream import require_causal
from ..lowering.pipeline import lower
from .check import program_of
from .compile import Artifact, build, class_of, instantiate, lock_of, tell
from .data import Packed, open_corpus, open_tokenizer, split
from .errors import UserError
from .folder import lend as lend_folders
from .folder import load as load_folder
from .folder import read_spec, take_weights, weights_identity, write_spec
from .lib import Model
from .lib.mesh import Mesh
from .lib.pipeline import keep_stages
from .paths import split_entry
from .place import place, world
from .retrieval import Asked, Feed, Index, Looked
from .retrieval.index import tokenizer_identity
from .train import Report, TrainConfig, train
from .train.checkpoint import latest
from .train.piped import check_pipe
from .train.rows import Ranks, check_length, check_rows


def train_model(
    spec: str, overrides: dict[str, Any], data: list[Path], out: Path, tokenizer: str, held_out: float,
    resume: bool | Literal["auto"],
    give: list[str] | None = None, objective: str = DEFAULT, option: dict[str, Any] | None = None,
    lend: list[str] | None = None, start: Path | None = None, layout: str | None = None, timeout: float = 600.0,
    device: str = "auto", target: str = "cpu", **settings: Any,
) -> Report:  # fmt: skip
    """Compile a model, train it on text, and leave in `out` all that `heddle generate` and `--resume` need.

    `objective` is the block that trains it, `option` values of its parameters, `lend` those that are models
    (`["teacher=FOLDER"]`); the held-out loss is that of next tokens whatever trains. `start` is a folder with the
    weights to begin with. `layout` is one of the file's, for the processes that torchrun started; a rank waits
    `timeout` seconds for others. `device` as in `place`; `target` as of `heddle.compile`.
    """
    where = place(device)
    path, name = split_entry(spec)
    file = load(path)
    laid = layout_of(file, layout) if layout is not None else None
    folders = lent_folders(lend, tokenizer)
    lent = {n: read_spec(folder) for n, folder in folders.items()}
    program = program_of(file, name, overrides, objective, option, lent)
    if not program.objectives:
        raise UserError(
            "no-objective", f"`{program.name}` has no `tokens` and `logits`, so next tokens cannot train it"
        )
    _check_text(program)
    config = TrainConfig(**settings)
    words = open_tokenizer(tokenizer)
    corpus = open_corpus(data, words, vocab=_vocab(program))
    kept, held = split(corpus, held_out) if held_out > 0 else (corpus, None)
    lock = lock_of(path, target)
    artifact = build(program, target, laid, lock)
    tell(artifact, lock)
    plain = program_of(file, name, overrides) if objective != DEFAULT else program
    judged = build(plain, layout=laid) if plain is not program and plain.objectives else None
    rows = Packed(kept, config.seq, config.seed)
    others = Packed(held, config.seq) if held is not None and len(held.tokens) >= config.seq else None
    about: dict[str, Any] = {"objective": [objective, option or {}]} if objective != DEFAULT else {}
    about |= {n: weights_identity(folder) for n, folder in folders.items()}
    with ranks_of([a for a in (artifact, judged) if a is not None], laid, config, timeout, where) as (mesh, ranks):
        model = instantiate(artifact, seed=config.seed, mesh=mesh)
        if model.pipe is not None:
            keep_stages(model)
        if start is not None:
            take_weights(model, start)
        lend_folders(model, folders)
        for one in (model, *model.lent.values()):
            one.to(where)
        judge = instantiate(judged, seed=None, mesh=mesh) if judged is not None else None
        if judge is not None and judge.pipe is not None:
            keep_stages(judge)
        feeds = feeds_of(model, give, tokenizer)
        _check_inputs(model, feeds)
        check_length(model, rows)
        # What one rank writes for all is there before the others look for it.
        for first in (True, False):
            if (mesh is None or mesh.rank == 0) == first:
                if first:
                    _write_run(out, file, program.name, overrides, tokenizer)
                for name, feed in feeds.items():
                    rows.given[name] = Looked(feed, rows, out / "retrieved" / name)
                    if others is not None:
                        others.given[name] = Looked(feed, others, out / "retrieved" / f"{name}-held-out")
            if mesh is not None:
                mesh[tuple(mesh.axes)].barrier()
        return train(model, rows, config, out, others, resume, judge=judge, about=about, ranks=ranks)


@contextmanager
def ranks_of(
    artifacts: list[Artifact], layout: Layout | None, config: TrainConfig, timeout: float,
    where: torch.device,
) -> Iterator[tuple[Mesh | None, Ranks | None]]:
    """The mesh of the processes that torchrun started, (None, None) for one process.

    Raises UserError: mesh-does-not-fit, uneven-batch, rank-failed; `SpecError` not-built-yet.
    """
    from .distributed import check_fits, check_stored, connected

    if layout is not None:
        check_stored(layout)
        kind = class_of(artifacts[0])
        check_rows(kind, config)
        check_pipe(kind, config)
    here = world()
    check_fits(layout, here)
    if layout is None or here.size == 1:
        yield None, None
        return
    with connected(artifacts, layout, here, timeout, where) as found:
        yield found


def _write_run(out: Path, file: File, model: str, overrides: dict[str, Any], tokenizer: str) -> None:
    """What `heddle generate` needs beside checkpoints. A run that is there keeps its spec, also where `train` refuses
    to go on with it."""
    if latest(out / "checkpoints") is not None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_spec(out, file, model, overrides)
        (out / "tokenizer.txt").write_text(tokenizer + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError("cannot-write", f"cannot write to `{out}`: {error.strerror}") from None


def _check_text(program: Program) -> None:
    """Text has one sequence of tokens a row, and no labels. Raises UserError: not-built-yet."""
    (objective,) = program.objectives.values()
    labels = [v.name for v in program.bodies[objective].inputs if v.type.kind in ("index", "mask", "coordinate")]
    tokens = program.model.inputs[0]
    if labels or len(tokens.type.dims) != 2:
        what = f"labels (`{labels[0]}`)" if labels else f"tokens [{', '.join(tokens.type.dims)}]"
        raise UserError(
            "not-built-yet",
            f"training `{program.name}` from the command line is not built yet: it takes {what}, and text has none",
            help="`heddle.compile` gives a module whose `losses` takes them",
        )


def lent_folders(lend: list[str] | None, tokenizer: str) -> dict[str, Path]:
    """`["teacher=FOLDER"]` as folders. Raises UserError: bad-override, no-such-file, bad-tokenizer."""
    found = {}
    for pair in lend or []:
        name, equals, text = pair.partition("=")
        folder = Path(text.strip())
        if not equals or not text.strip():
            example = "for example --lend teacher=runs/big"
            raise UserError("bad-override", f"`--lend {pair}` is not NAME=FOLDER", help=example)
        if not folder.is_dir():
            raise UserError("no-such-file", f"there is no folder `{folder}`")
        mine, theirs = (tokenizer_identity(t) for t in (tokenizer, tokenizer_name(folder)))
        if mine != theirs:
            raise UserError("bad-tokenizer", f"`{folder}` reads tokens of {theirs}, this run has {mine}")
        found[name.strip()] = folder
    return found


def feeds_of(model: Model, give: list[str] | None, tokenizer: str) -> dict[str, Feed]:
    """`["neighbors=index"]` as what gives these inputs. Raises UserError: bad-override, and what opening an index
    raises."""
    found = {}
    for pair in give or []:
        name, equals, folder = pair.partition("=")
        if not equals or not folder.strip():
            raise UserError("bad-override", f"`--give {pair}` is not NAME=INDEX", help="for example --give near=index")
        index = Index(Path(folder.strip()))
        found[name.strip()] = Feed(model, name.strip(), index, tokenizer, open_tokenizer(tokenizer))
    return found


def _check_inputs(model: Model, feeds: dict[str, Feed]) -> None:
    """Raises UserError `no-data` for an input that nothing gives."""
    missing = [n for n in model.inputs if n != "tokens" and n not in feeds]
    if missing:
        raise UserError(
            "no-data",
            f"nothing gives the input `{missing[0]}` of {type(model).__name__}",
            help=f"an index of text does: --give {missing[0]}=INDEX; without it: --set {missing[0]}=none",
        )


def _vocab(program: Any) -> int | None:
    value = program.arguments.get("vocab")
    return value if isinstance(value, int) else None


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    return open_tokenizer(tokenizer_name(folder))


def tokenizer_name(folder: Path) -> str:
    """The word for the tokenizer of a model folder: the one it was trained with, its tokenizer.json, else bytes."""
    if (folder / "tokenizer.txt").is_file():
        return (folder / "tokenizer.txt").read_text(encoding="utf-8").strip()
    return str(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else "bytes"


def generate_text(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int | None, give: list[str] | None = None, passages: int = 0, settings: dict[str, Any] | None = None,
    device: str = "auto", target: str = "cpu", graph: bool = True,
) -> str:  # fmt: skip
    """Continue a prompt, printing as it goes; gives the whole text. `passages` as in `Asked`, `settings` and `target`
    as of `heddle.load`, `device` as in `place`, `graph` as of `generate`. Raises `SpecError` `not-causal`, UserError
    `bad-prompt`, `unknown-setting`."""
    where = place(device)
    model = load_folder(folder, settings=settings, target=target).to(where)
    if model.late:
        require_causal(lower(program_of(*read_spec(folder))))
    words = tokenizer_of(folder)
    feeds = feeds_of(model, give, tokenizer_name(folder))
    _check_inputs(model, feeds)
    ids = torch.from_numpy(words.encode(prompt).astype("int64"))[None]
    given: dict[str, Any] = dict(feeds)
    padding = 0
    if passages:
        if len(feeds) != 1:
            raise UserError("unknown-setting", f"--passages needs one --give, there are {len(feeds)}")
        name, feed = next(iter(feeds.items()))
        given[name] = asked = Asked(feed, ids[0].numpy(), passages)
        ids, padding = asked.prompt, asked.padding
    shown = _Printer(words, ids[0, padding:].tolist())
    ids = ids.to(where)
    sampling = temperature, top_k, top_p, seed
    try:
        with warnings.catch_warnings(record=True) as told:
            made = model.generate(ids, max_new_tokens, *sampling, on_token=shown, given=given, graph=graph)
    except ValueError as error:
        raise UserError("bad-prompt", str(error)) from None
    shown.finish()
    for one in told:
        print(f"note: {one.message}", file=sys.stderr)
    text: str = words.decode(made[0, padding:].tolist())
    return text


class _Printer:
    """Prints text as tokens come; characters that are not whole yet wait for their rest."""

    def __init__(self, tokenizer: Any, ids: list[int]):
        self.tokenizer, self.ids, self.done = tokenizer, list(ids), ""
        self._print()

    def __call__(self, new: torch.Tensor) -> None:
        self.ids.append(int(new[0]))
        self._print()

    def _print(self, last: bool = False) -> None:
        text = self.tokenizer.decode(self.ids)
        whole = text if last else text.rstrip("\ufffd")
        if whole.startswith(self.done):
            sys.stdout.write(whole[len(self.done) :])
            sys.stdout.flush()
            self.done = whole

    def finish(self) -> None:
        self._print(last=True)
        sys.stdout.write("\n")
