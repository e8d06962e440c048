"""The module emitter: from lowered graphs to the text of `model.py`. Python decides, the template prints."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from ..dsl.diagnostics import fail
from ..dsl.program import TOKENS, Node
from ..lowering.graph import STRUCTURE, Graph, GraphProgram, op_of
from ..lowering.passes.stream import streaming_errors
from . import layout, names
from .writer import Class, Line, Writer


@cache
def _template() -> jinja2.Template:
    text = files("heddle.codegen").joinpath("templates/module.py.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(text)


def emit_module(program: GraphProgram, version: str) -> str:
    """The text of `model.py` for target `cpu`: one class a distinct block, callees first."""
    masks: dict[str, tuple[str, str]] = {}
    objectives = set(program.program.objectives.values())
    classes = []
    for graph in program.callees_first():
        if graph.name not in objectives:
            classes.append(Writer(graph, program, masks).as_class())
    model = next(c for c in classes if c.name == names.class_names(program.graphs)[program.program.root])
    model.is_model, model.more = True, program.model.body.asked > 0
    inputs = tuple(v.name for v in program.model.body.inputs)
    model.input_names = "" if inputs == ("tokens",) else repr(inputs)
    model.follows = _follows(program, masks)
    model.vocab, model.shape = _vocab(program.model), _shape(program.model)
    for name in program.program.objectives.values():
        _add_objective(model, program.graphs[name], program, masks)
    classes = [c for c in classes if c is not model] + [model]
    errors = streaming_errors(program)
    return _template().render(
        program=program.program,
        version=version,
        masks=sorted(masks.values()),
        classes=classes,
        init=_init_table(program),
        keep=_keep_patterns(program),
        late=errors[0].message if errors else None,
        source=_source_name(program),
        used=_grouped,
        layout=layout,
    )


def _shape(graph: Graph) -> tuple[int | None, ...]:
    """The sizes of the dims of the tokens, where they are more than batch and sequence."""
    dims = next((d for d in graph.dims.values() if d.clock == TOKENS), None)
    if dims is None or len(dims.lead) < 2:
        return ()
    return tuple(graph.size(name) for name in (*dims.lead, dims.name))


def _vocab(graph: Graph) -> int | None:
    """How many tokens there are: the least of the dims that the first input names places of."""
    first = graph.body.inputs[0].name if graph.body.inputs else None
    found = [
        graph.size(node.bound(formal)[0])
        for node in graph.nodes
        if node.op not in STRUCTURE and first in node.operands
        for formal in op_of(node).index
        if len(node.bound(formal)) == 1
    ]
    return min((size for size in found if size is not None), default=None)


def _follows(program: GraphProgram, masks: dict[str, tuple[str, str]]) -> str:
    """The inputs whose rows come with groups of tokens, each with its clock."""
    graph, found = program.model, []
    for value in graph.body.inputs:
        clock = next((graph.dims[d].clock for d in value.type.dims if graph.dims[d].clock is not None), None)
        if clock is not None and clock != TOKENS:
            found.append(f'"{value.name}": {Writer(graph, program, masks).clock(clock)}')
    return f"{{{', '.join(found)}}}" if found else ""


def _source_name(program: GraphProgram) -> str:
    return program.program.span.source.name.replace("\\", "/").rsplit("/", 1)[-1]


def _add_objective(model: Class, graph: Graph, program: GraphProgram, masks: dict[str, tuple[str, str]]) -> None:
    """The objective as two methods: the sums, and the counts that they are divided by."""
    writer = _ObjectiveWriter(graph, program, masks)
    # What the objective does not name itself stands behind the rest, and goes to the model under the model's names.
    named = [v.name for v in graph.body.inputs]
    rest = [v.name for v in program.model.body.inputs if v.name not in named]
    scored = (*named[: len(named) - len(rest)], *rest)
    for brought, name in zip(named, scored, strict=True):
        if brought != name:
            writer.call_value(brought, name)
    inputs = tuple(v.name for v in program.model.body.inputs)
    model.scored_names = "" if scored == inputs else repr(scored)
    model.objective_inputs = [writer.expression(v.name) for v in graph.body.inputs]
    emits = [(label, value) for keyword, label, value in graph.body.emits if keyword == "loss"]
    model.losses = writer.statements(graph.nodes)
    inner = _stated_counts(program, masks, {label for label, _ in emits})
    model.loss_result = ", ".join(f'"{label}": {writer.expression(value)}' for label, value in emits)
    model.loss_result += ", **at.losses" if inner else ""
    counts = {label: writer.count_of(value) for label, value in emits}
    needed = {n.name: n for _, nodes in counts.values() for n in nodes}
    model.counts = writer.statements(n for n in graph.nodes if n.name in needed)
    model.count_result = ", ".join(
        f'"{label}": {text}'
        for label, text in [*((label, text) for label, (text, _) in counts.items()), *inner.items()]
    )


def _stated_counts(program: GraphProgram, masks: dict[str, tuple[str, str]], taken: set[str]) -> dict[str, str]:
    """The counts of the losses that blocks of the model state. Raises `SpecError` for one that two losses disagree
    on."""
    found: dict[str, str] = {}
    objectives = set(program.program.objectives.values())
    for graph in program.callees_first():
        if graph.name in objectives or not graph.body.emits:
            continue
        writer = Writer(graph, program, masks)
        for label, value in writer.parts.losses:
            text, needed = writer.count_of(value)
            span = graph.producers[value].spans[0]
            if needed or "at." not in text:
                raise fail(
                    "not-built-yet",
                    f"the loss `{label}` of a block counts places by more than its input's rows, which "
                    "is not built yet",
                    span,
                )
            if label in taken or found.get(label, text) != text:
                raise fail("duplicate-name", f"two losses named `{label}` are means over different places", span)
            found[label] = text
    return found


class _ObjectiveWriter(Writer):
    """Statements of an objective: a call of the model is a full run."""

    def call(self, node: Node) -> str:
        if node.op == "call":
            inputs = ", ".join(self.expression(o) for o in node.operands if o is not None)
            name = node.attr("instance")
            if not self.graph.instance(name).bodies:  # another model, which the runtime lends
                more = ", more=True" if self.program.program.lent[name].model.asked else ""
                return f'self.ask("{name}", {inputs}, at{more})'
            more = ", more=True" if self.program.model.body.asked else ""
            return f"self.run({inputs}, at, lib.STATELESS{more})"
        return super().call(node)


def _grouped(lines: list[Line]) -> list[Line]:
    """Lines with the spec line only where it changes."""
    out, last = [], ""
    for line in lines:
        out.append(replace(line, spec=line.spec if line.spec != last else ""))
        last = line.spec or last
    return out


def _pattern(path: tuple[str | int, ...]) -> str:
    return ".".join("*" if isinstance(s, int) else s for s in path)


def _init_table(program: GraphProgram) -> list[tuple[str, str]]:
    """Initial values by path; iterations are one line where all agree."""
    groups: dict[str, dict[str, list[str]]] = {}
    for p in program.program.parameters():
        groups.setdefault(_pattern(p.path), {}).setdefault(_init_text(p.init), []).append(p.name)
    table = []
    for pattern, by_init in groups.items():
        if len(by_init) == 1:
            table.append((pattern, next(iter(by_init))))
        else:
            table.extend((name, text) for text, members in by_init.items() for name in members)
    return table


def _init_text(init: Any) -> str:
    return repr((init.kind, *init.values))


def _keep_patterns(program: GraphProgram) -> list[str]:
    """Weights that stay in fp32, as patterns that match no other weight."""
    keep = dict.fromkeys(_pattern(p.path) for p in program.program.parameters() if p.weight.keep)
    rest = [p.name for p in program.program.parameters() if not p.weight.keep]
    for pattern in keep:
        clash = next((name for name in rest if fnmatchcase(name, pattern)), None)
        if clash:
            raise ValueError(f"{pattern} also matches {clash}")
    return list(keep)


def digest(text: str) -> str:
    """The name of an artifact: its content."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
