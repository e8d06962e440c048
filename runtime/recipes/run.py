"""Running a recipe: each step fills its folder once; what is there and of the same arguments is used again.

A folder is known by its key: a hash of the step, its arguments, the keys of what it reads, the models' source and the
data. A changed argument changes the keys of that step and of all behind it, and of no other. Training goes on where it
was stopped; every other step appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...dsl.diagnostics import fail
from ...dsl.elaborate import DEFAULT
from ...dsl.load import File
from ..compile import build, instantiate
from ..compress import Scores, prune
from ..compress.command import measured
from ..data import Packed, open_corpus, open_tokenizer, split
from ..folder import lend, take_weights, write_spec
from ..folder import load as load_folder
from ..huggingface import import_folder
from ..place import place
from ..train import evaluate, train
from ..train.checkpoint import latest
from .checking import config_of, objective_of, trained_program
from .plan import Plan, planned
from .values import Data, Made, Objective, Schedule, Spec, Step

VERSION = "1"
"""Of the steps: a step that does something else than before gets another one, so that folders are made again."""
DONE = "step.json"
Say = Callable[[str], None]


def run_recipe(
    file: File, recipe: str | None, data: Sequence[Path], out: Path, settings: Mapping[str, Any] | None = None,
    tokenizer: str = "bytes", held_out: float = 0.05, say: Say = print, device: str = "auto",
) -> Plan:  # fmt: skip
    """Run what is not there yet of a recipe, into folders of `out`; `device` as in `place`.

    Raises `SpecError`, UserError: what planning and the steps raise; nothing is written for a plan that is wrong.
    """
    plan = planned(file, recipe, settings)
    runner = Runner(plan, data, out, tokenizer, held_out, say, place(device))
    for step in plan.steps:
        runner.run(step)
    return plan


class Runner:
    """The folders of a plan."""

    def __init__(
        self, plan: Plan, data: Sequence[Path], out: Path, tokenizer: str, held_out: float, say: Say,
        where: torch.device,
    ) -> None:  # fmt: skip
        self.plan, self.out, self.tokenizer, self.say, self.where = plan, out, tokenizer, say, where
        self.data = [Path(p) for p in data]
        self.words = open_tokenizer(tokenizer)
        self.held_out = held_out
        sizes = [spec.program.arguments.get("vocab") for s in plan.steps for spec in s.made.specs]
        vocab = min((v for v in sizes if isinstance(v, int)), default=None)
        self.kept, self.held = split(open_corpus(self.data, self.words, vocab=vocab), held_out)
        for step in plan.steps:
            self._check(step)
        self.keys: dict[str, str] = {}
        for step in plan.steps:
            self.keys[step.name] = self._key(step)

    def folder(self, made: Made | Step) -> Path:
        return self.out / (made.step if isinstance(made, Made) else made.name)

    def is_done(self, step: Step) -> bool:
        """Whether the folder of a step is there, whole, and of these arguments."""
        try:
            known = json.loads((self.folder(step) / DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(known, dict) and known.get("key") == self.keys[step.name]

    def _check(self, step: Step) -> None:
        """What a step reads is there, and long enough. Raises `SpecError`: no-such-file, no-data."""
        if step.kind == "load" and not Path(step.arguments["folder"]).is_dir():
            raise fail("no-such-file", f"there is no folder `{step.arguments['folder']}`",
                       step.spans.get("folder", step.span))  # fmt: skip
        name = {"train": "seq", "report": "seq", "search": "seq", "importance": "length"}.get(step.kind)
        if name is None:
            return
        held = step.kind in ("report", "search")
        have, row = len((self.held if held else self.kept).tokens), step.arguments[name]
        if have < row:
            what = f"the data that are held out ({self.held_out:g} of the files)" if held else "the data"
            raise fail("no-data", f"{what} have {have} tokens, too few for one row of {row}",
                       step.spans.get(name, step.span), help="shorter rows, more text"
                       + (", or a larger share held out: --held-out 0.2" if held else ""))  # fmt: skip

    # --- keys -------------------------------------------------------------------------------------

    def _key(self, step: Step) -> str:
        about = {"version": VERSION, "kind": step.kind, "tokenizer": self.tokenizer,
                 "arguments": {k: self._mark(v) for k, v in step.arguments.items()}}  # fmt: skip
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _mark(self, value: Any) -> Any:
        """An argument as data that say what it is of."""
        match value:
            case Made(step=name):
                return ["made", self.keys[name]]
            case Spec(program=program):
                return ["spec", hashlib.sha256(build(program).source.encode()).hexdigest()]
            case Data():
                text = hashlib.sha256(self.kept.tokens.tobytes() + self.kept.ends.tobytes())
                text.update(self.held.tokens.tobytes())
                return ["data", text.hexdigest()]
            case Schedule():
                return ["schedule", value.kind, value.lr, value.min_lr, value.warmup]
            case Objective():
                return ["objective", value.name, {k: self._mark(v) for k, v in {**value.options, **value.lent}.items()}]
            case list() | tuple():
                return [self._mark(v) for v in value]
            case dict():
                return {str(k): self._mark(v) for k, v in value.items()}
        return value

    # --- steps ------------------------------------------------------------------------------------

    def run(self, step: Step) -> None:
        """Fill the folder of a step, if it is not there."""
        if self.is_done(step):
            self.say(f"{step.name}: there already")
            return
        self.say(f"{step.name}: {step.kind}")
        folder = self.folder(step)
        if step.kind == "train":
            self._train(step, folder)
        else:
            partial = folder.with_name(folder.name + ".part")
            for old in (partial, folder):
                shutil.rmtree(old, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            getattr(self, f"_{step.kind}")(step, partial)
            self._mark_done(step, partial)
            os.replace(partial, folder)

    def _mark_done(self, step: Step, folder: Path) -> None:
        record = {"step": step.kind, "key": self.keys[step.name]}
        part = folder / f"{DONE}.part"
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder / DONE)

    def _load(self, step: Step, folder: Path) -> None:
        """A model folder, a run, or a folder of Hugging Face, as weights of the spec."""
        spec, source = step.arguments["model"], Path(step.arguments["folder"])
        model = instantiate(build(spec.program), seed=None)
        if (source / "config.json").is_file() and not (source / "model.json").is_file():
            import_folder(source, folder)
            take_weights(model, folder)
        else:
            take_weights(model, source)
            folder.mkdir()
            self._write_model(folder, spec, model.state_dict())

    def _write_model(self, folder: Path, spec: Spec, weights: Mapping[str, Any]) -> None:
        write_spec(folder, spec.file, spec.name, dict(spec.overrides))
        (folder / "tokenizer.txt").write_text(self.tokenizer + "\n", encoding="utf-8")
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    def _importance(self, step: Step, folder: Path) -> None:
        a = step.arguments
        model = load_folder(self.folder(a["model"])).to(self.where)
        rows = Packed(self.kept, int(a["length"]))
        found = measured(model, rows, int(a["samples"]), int(a["rows"]), a["depth"], batch=a["batch"], seq=a["seq"])
        folder.mkdir()
        found.save(folder / "scores.safetensors")

    def _prune(self, step: Step, folder: Path) -> None:
        a = step.arguments
        teacher = load_folder(self.folder(a["model"]))
        by = None if a["by"] is None else Scores.load(self.folder(a["by"]) / "scores.safetensors")
        merge, to = a["merge_heads"], a["to"].program
        weights = prune(teacher.program, teacher.state_dict(), to, by, a["keep"], merge_heads=merge)
        folder.mkdir()
        self._write_model(folder, a["to"], weights)

    def _train(self, step: Step, folder: Path) -> None:
        """A run folder; one that was stopped goes on, if it is of these arguments."""
        a, begun = step.arguments, folder / "begun.json"
        objective = objective_of(a)
        lent = {n: self.spec_of(m) for n, m in objective.lent.items()}
        spec = self.spec_of(a["model"])
        key = {"key": self.keys[step.name]}
        if not begun.is_file() or json.loads(begun.read_text(encoding="utf-8")) != key:
            shutil.rmtree(folder, ignore_errors=True)
        model = instantiate(build(trained_program(spec, objective, lent)), seed=int(a["seed"]))
        if isinstance(a["model"], Made):
            take_weights(model, self.folder(a["model"]))
        lend(model, {n: self.folder(m) for n, m in objective.lent.items()})
        for one in (model, *model.lent.values()):
            one.to(self.where)
        config = config_of(a)
        folder.mkdir(parents=True, exist_ok=True)
        write_spec(folder, spec.file, spec.name, dict(spec.overrides))
        (folder / "tokenizer.txt").write_text(self.tokenizer + "\n", encoding="utf-8")
        begun.write_text(json.dumps(key) + "\n", encoding="utf-8")
        rows = Packed(self.kept, config.seq, config.seed)
        held = Packed(self.held, config.seq) if len(self.held.tokens) >= config.seq else None
        judge = instantiate(build(spec.program), seed=None) if objective.name != DEFAULT else None
        resume = latest(folder / "checkpoints") is not None
        report = train(model, rows, config, folder, held, resume, judge=judge)
        if report.stopped:
            raise KeyboardInterrupt
        self._mark_done(step, folder)

    def spec_of(self, value: Spec | Made) -> Spec:
        """The spec of a model, chosen by a search that has run where it is one of several."""
        if isinstance(value, Spec):
            return value
        if value.chosen_by is None:
            return value.specs[0]
        ranking = json.loads((self.out / value.chosen_by / "ranking.json").read_text(encoding="utf-8"))
        return value.choices[ranking[0]["candidate"]]

    def _search(self, step: Step, folder: Path) -> None:
        """Candidates by held-out loss, of equal ones the earlier, as a table and as JSON; the best as it was cut."""
        a, held = step.arguments, Packed(self.held, int(step.arguments["seq"]))
        found: list[dict[str, Any]] = []
        for i, (made, spec) in enumerate(zip(a["models"], step.made.choices, strict=True)):
            loss = evaluate(load_folder(self.folder(made)).to(self.where), held, 4, rows=int(a["rows"]))
            found.append({"candidate": i, "settings": dict(spec.overrides),
                          "parameters": spec.program.num_parameters(), "held_out": loss})  # fmt: skip
        found.sort(key=lambda row: row["held_out"] if math.isfinite(row["held_out"]) else math.inf)
        best = int(found[0]["candidate"])
        cut = load_folder(self.folder(a["cuts"][best]))
        folder.mkdir()
        self._write_model(folder, step.made.choices[best], cut.state_dict())
        (folder / "ranking.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for row in found:
            settings = ", ".join(f"{k} = {v}" for k, v in row["settings"].items())
            self.say(f"{row['candidate']:4}{row['parameters']:>16,}{row['held_out']:>12.4f}  {settings}")

    def _report(self, step: Step, folder: Path) -> None:
        """Parameters and held-out loss of models, as a table and as JSON."""
        a = step.arguments
        models = a["models"] if isinstance(a["models"], list) else [a["models"]]
        held = Packed(self.held, int(a["seq"]))
        rows = []
        for made in models:
            model = load_folder(self.folder(made)).to(self.where)
            loss = evaluate(model, held, 4, rows=int(a["rows"]))
            count = self.spec_of(made).program.num_parameters()
            rows.append({"model": made.step, "parameters": count, "held_out": loss})
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        lines = [f"{'model':24}{'parameters':>16}{'held-out loss':>16}"]
        lines += [f"{r['model']:24}{r['parameters']:>16,}{r['held_out']:>16.4f}" for r in rows]
        (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines:
            self.say(line)
