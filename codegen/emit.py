"""The module emitter: from lowered graphs to the text of `model.py`. Python decides, the template prints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from math import lcm
from typing import Any

import jinja2

from ..dsl.diagnostics import Diagnostic, fail
from ..dsl.program import TOKENS, Node, Parameter
from ..lowering.graph import STRUCTURE, Graph, GraphProgram, op_of
from ..lowering.passes.stream import streaming_errors
from . import layout, names
from .lock import Lock
from .shared import Shared
from .writer import Class, Line, Writer, first_line


@cache
def _template() -> jinja2.Template:
    text = files("heddle.codegen").joinpath("templates/module.py.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(text)


@dataclass(frozen=True)
class Files:
    """What is written of a model: the text of `model.py`, and of each file in `kernels/` by its name. `without`: the
    uses of ops that PyTorch computes though their room has kernels, a warning each; `keys`: what a lock knows each
    kernel by; `offered`: by key, the kernels that may stand in place of PyTorch's products, whether they do or not."""

    model: str
    kernels: dict[str, str]
    without: tuple[Diagnostic, ...]
    keys: dict[str, str]
    offered: dict[str, str]


def emit(program: GraphProgram, version: str, named: bool = False, lock: Lock | None = None) -> Files:
    """The files of a model for its target: one class a distinct block, callees first. `named`: each use of an op goes
    through `spmd.use` (several in one kernel through `spmd.use_chain`), which is told what it is, for those who look on
    while the module runs. `lock`: how kernels are cut, where not as untuned. Raises `SpecError` bad-lock."""
    shared = Shared(lock=lock)
    # Who looks on sees every value.
    if named:
        program = replace(program, named=True, heads={}, epilogues={})
    objectives = set(program.program.objectives.values())
    classes = []
    for graph in program.callees_first():
        if graph.name not in objectives:
            classes.append(Writer(graph, program, shared).as_class())
    model = next(c for c in classes if c.name == names.class_names(program.graphs)[program.program.root])
    model.is_model, model.more = True, program.model.body.asked > 0
    model.headed = bool(program.heads)
    model.gives = repr(program.program.gives) if model.more else ""
    inputs = tuple(v.name for v in program.model.body.inputs)
    model.input_names = "" if inputs == ("tokens",) else repr(inputs)
    model.follows = _follows(program, shared)
    model.vocab, model.longest, model.shape = _vocab(program), _longest(program), _shape(program.model)
    classes = [c for c in classes if c is not model]
    for name in program.program.objectives.values():
        _add_objective(model, program.graphs[name], program, shared)
        if program.program.beside():
            classes.append(_beside(program.graphs[name], program, shared))
            model.beside = classes[-1].name
    classes.append(model)
    errors = streaming_errors(program)
    text = _template().render(
        program=program.program,
        target=program.target.name,
        version=version,
        masks=sorted(shared.masks.values()),
        kernels=bool(shared.kernels),
        classes=classes,
        init=_init_table(program.program.parameters()),
        keep=_keep_patterns(program.program.parameters()),
        beside=program.program.beside(),
        init_table=_init_table,
        keep_patterns=_keep_patterns,
        late=errors[0].message if errors else None,
        source=_source_name(program),
        used=_grouped,
        layout=layout,
        mesh=_axes(program),
        pipe=_pipe(program),
        stored=_stored(program),
        partial=_partial(program),
        rows=_rows(program),
        cuts=_cuts(program),
        result=_result(program),
        regathered=_regathered(program),
    )
    return Files(text, shared.files, tuple(shared.without), shared.keys, shared.offered)


def emit_block(name: str, program: GraphProgram, version: str, lock: Lock | None = None) -> Files:
    """The files of one block by itself, without those that it calls: `Model` is an `nn.Module`. Its forward takes the
    block's inputs, coordinates and state; the class tells the shapes of the inputs from coordinates."""
    shared = Shared(lock=lock)
    writer = Writer(program.graphs[name], program, shared)
    block = writer.as_class()
    block.shapes = [writer.shape(v.name) for v in writer.graph.body.inputs]
    block.keep = tuple(w.name for w in writer.graph.body.weights if w.keep)
    nothing = dict.fromkeys(
        ("late", "mesh", "pipe", "init", "keep", "stored", "partial", "rows", "cuts", "result", "regathered")
    )
    text = _template().render(
        **nothing, program=program.program, target=program.target.name, version=version, classes=[block],
        masks=sorted(shared.masks.values()), kernels=bool(shared.kernels), beside=(), init_table=_init_table,
        keep_patterns=_keep_patterns, source=_source_name(program), used=_grouped, layout=layout,
    )  # fmt: skip
    return Files(text, shared.files, tuple(shared.without), shared.keys, shared.offered)


def _stored(program: GraphProgram) -> list[tuple[str, str]]:
    """How each weight lies on the mesh, by path; iterations are one line where all agree."""
    if program.laid is None:
        return []
    return _by_pattern(
        (p.path, p.name, repr((stored.splits, stored.sync)))
        for p in program.program.parameters()
        for stored in [program.laid.weights[p.body][p.weight.name]]
    )


def _axes(program: GraphProgram) -> dict[str, int] | None:
    """The axes of the mesh, the outermost first. What goes back through a pipeline goes over `back`, a group of its
    own: what is sent both ways between two ranks would wait for each other."""
    if program.laid is None or program.layout is None:
        return None
    found: dict[str, int] = {}
    pipe = program.laid.pipe
    for axis, _ in program.layout.mesh:
        if pipe is not None and axis == pipe.axis:
            found.update({axis: pipe.size, "back": 1})
        found.update({a.name: a.size for a in program.laid.mesh.atoms if a.axis == axis})
    return found


def _pipe(program: GraphProgram) -> str:
    """The pipeline as the library takes it, or nothing."""
    pipe = None if program.laid is None else program.laid.pipe
    if pipe is None:
        return ""
    owns = "".join(f"\n{' ' * 12}{stage.owns!r}," for stage in pipe.stages)
    numbers = f'"{pipe.axis}", {pipe.size}, {pipe.chunks}, {pipe.microbatches}'
    parts = f"\n        parts={pipe.parts}," if pipe.parts > 1 else ""
    return f"lib.Pipe(\n        {numbers},\n        ({owns}\n        ),{parts}\n    )"


def _regathered(program: GraphProgram) -> tuple[str, ...]:
    """The axes along which weights are gathered for each pass anew."""
    layout = program.layout
    if layout is None or program.laid is None or layout.apart != "blocks":
        return ()
    return tuple(a for axis in layout.stored_over("parameters") for a in program.laid.mesh.names(axis))


def _rows(program: GraphProgram) -> tuple[str, ...]:
    """The axes over which the rows of a batch are split."""
    inputs = program.model.body.inputs
    return program.model.dims[inputs[0].type.dims[0]].axes if inputs and inputs[0].type.dims else ()


def _cuts(program: GraphProgram) -> int:
    """Into how many equal parts the tokens of a row are cut: one a rank, or two where it has both ends of a fold."""
    if program.laid is None:
        return 1
    found = 1
    for graph in program.graphs.values():
        split = [d for d in graph.dims.values() if d.axes and d.clock == TOKENS]
        ranks = lcm(*(program.laid.mesh.size(d.axes) for d in split))
        found = lcm(found, ranks * (2 if any(n.attr("order") == "zigzag" for n in graph.nodes) else 1))
    return found


def _result(program: GraphProgram) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The axes that split each dim of what the model returns, and those over which it is a sum of parts."""
    if program.laid is None or not program.model.body.outputs:
        return (), ()
    place = program.laid.places[program.model.name][program.model.body.outputs[0]]
    return place.splits, tuple(atom for atom, letter in place.letters if letter == "P")


def _partial(program: GraphProgram) -> dict[str, tuple[str, ...]]:
    """The axes over which each loss is a sum of parts."""
    found: dict[str, tuple[str, ...]] = {}
    for sums in program.laid.sums.values() if program.laid is not None else ():
        for name, axes in sums.items():
            kind, _, label = name.partition(":")
            if kind == "loss":
                found[label] = axes
    return found


def _shape(graph: Graph) -> tuple[int | None, ...]:
    """The sizes of the dims of the tokens, where they are more than batch and sequence."""
    dims = next((d for d in graph.dims.values() if d.clock == TOKENS), None)
    if dims is None or len(dims.lead) < 2:
        return ()
    return tuple(graph.size(name) for name in (*dims.lead, dims.name))


def _vocab(program: GraphProgram) -> int | None:
    """How many tokens there are: the least of the dims that the first input names places of, on all ranks."""
    graph = program.model
    first = graph.body.inputs[0].name if graph.body.inputs else None
    found = [
        _whole_size(graph, node.bound(formal)[0], program)
        for node in graph.nodes
        if node.op not in STRUCTURE and first in node.operands
        for formal in op_of(node).index
        if len(node.bound(formal)) == 1
    ]
    return min((size for size in found if size is not None), default=None)


def _longest(program: GraphProgram) -> int | None:
    """How many tokens a document may have: the least of the dims that their positions name places of."""
    graph, found = program.model, []
    for node in graph.nodes:
        if node.op in STRUCTURE or not any(_is_position(graph, operand) for operand in node.operands):
            continue
        found += [_whole_size(graph, node.bound(f)[0], program) for f in op_of(node).index if len(node.bound(f)) == 1]
    return min((size for size in found if size is not None), default=None)


def _is_position(graph: Graph, name: str | None) -> bool:
    """Whether a value is the positions of the tokens, as they are."""
    made = graph.producers.get(name or "")
    if made is None or made.op in STRUCTURE or not op_of(made).coordinates or made.attr("which") != "position":
        return False
    return any(graph.dims[d].clock == TOKENS for ds in dict(made.bindings).values() for d in ds)


def _whole_size(graph: Graph, dim: str, program: GraphProgram) -> int | None:
    size, axes = graph.size(dim), graph.dims[dim].axes
    return size if size is None or not axes else size * program.laid.mesh.size(axes)


def _follows(program: GraphProgram, shared: Shared) -> str:
    """The inputs whose rows come with groups of tokens, each with its clock."""
    graph, found = program.model, []
    for value in graph.body.inputs:
        clock = next((graph.dims[d].clock for d in value.type.dims if graph.dims[d].clock is not None), None)
        if clock is not None and clock != TOKENS:
            found.append(f'"{value.name}": {Writer(graph, program, shared).clock(clock)}')
    return f"{{{', '.join(found)}}}" if found else ""


def _source_name(program: GraphProgram) -> str:
    return program.program.span.source.name.replace("\\", "/").rsplit("/", 1)[-1]


def _add_objective(model: Class, graph: Graph, program: GraphProgram, shared: Shared) -> None:
    """The objective as two methods: the sums, and the counts that they are divided by."""
    writer = _ObjectiveWriter(graph, program, shared)
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
    if any("state." in line.text for line in model.losses):
        model.losses.insert(0, Line("state = lib.STATELESS"))
    inner = _stated_counts(program, shared, {label for label, _ in emits})
    model.loss_result = ", ".join(f'"{label}": {writer.expression(value)}' for label, value in emits)
    model.loss_result += ", **at.losses" if inner else ""
    counts = {label: writer.count_of(value) for label, value in emits}
    needed = {n.name: n for _, nodes in counts.values() for n in nodes}
    model.counts = writer.statements(n for n in graph.nodes if n.name in needed)
    model.count_result = ", ".join(
        f'"{label}": {text}'
        for label, text in [*((label, text) for label, (text, _) in counts.items()), *inner.items()]
    )


def _beside(graph: Graph, program: GraphProgram, shared: Shared) -> Class:
    """What an objective owns, as a module that holds it. Raises `SpecError` `not-built-yet` for a buffer."""
    for weight in program.program.beside():
        if not weight.weight.trained:
            raise fail("not-built-yet", "a buffer of an objective is not built yet", weight.weight.span)
    writer = Writer(graph, program, shared)
    name = writer.classes[graph.name]
    return Class(name, first_line(graph.body.doc), writer.construct(), [], [], [], [], "", is_beside=True)


def _stated_counts(program: GraphProgram, shared: Shared, taken: set[str]) -> dict[str, str]:
    """The counts of the losses that blocks of the model state. Raises `SpecError` for one that two losses disagree
    on."""
    found: dict[str, str] = {}
    objectives = set(program.program.objectives.values())
    for graph in program.callees_first():
        if graph.name in objectives or not graph.body.emits:
            continue
        writer = Writer(graph, program, shared)
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
    """Statements of an objective: a call of the model is a full run; what the objective owns stands beside it."""

    owner = "self.beside"

    def head_of(self, node: Node) -> tuple[str, str, str | None] | None:
        head = self.program.heads.get(self.graph.name)
        if head is None or head.loss != node.name:
            return None
        model = Writer(self.program.model, self.program, self.shared)
        weight, bias = (None if o is None else model.expression(o) for o in head.node.operands[1:])
        assert weight is not None
        return self.expression(node.operands[0] or ""), weight, bias  # what a run without the map gives

    def call(self, node: Node) -> str:
        if node.op == "call":
            inputs = ", ".join(self.expression(o) for o in node.operands if o is not None)
            name = node.attr("instance")
            bodies = self.graph.instance(name).bodies
            if not bodies:  # another model, which the runtime lends
                gives = self.program.program.lent[name].gives
                more = f", more={gives!r}" if gives else ""
                return f'self.ask("{name}", {inputs}, at{more})'
            if self.program.program.root in bodies:
                if self.program.laid is not None and self.program.laid.pipe is not None:
                    return "ran"
                more = ", more=True" if self.program.model.body.asked else ""
                more += ", head=False" if self.graph.name in self.program.heads else ""
                return f"self.run({inputs}, at, lib.STATELESS{more})"
        return super().call(node)


def _grouped(lines: list[Line]) -> list[Line]:
    """Lines with the spec line, and the reason below it, only where they change."""
    out, last, why = [], "", ""
    for line in lines:
        is_new = line.spec != last
        out.append(replace(line, spec=line.spec if is_new else "", why=line.why if is_new or line.why != why else ""))
        last, why = line.spec or last, line.why
    return out


def _pattern(path: tuple[str | int, ...]) -> str:
    return ".".join("*" if isinstance(s, int) else s for s in path)


def _init_table(parameters: Iterable[Parameter]) -> list[tuple[str, str]]:
    """Initial values by path; iterations are one line where all agree."""
    return _by_pattern((p.path, p.name, _init_text(p.init)) for p in parameters)


def _by_pattern(entries: Iterable[tuple[tuple[str | int, ...], str, str]]) -> list[tuple[str, str]]:
    """(path, name, text) of every weight as (pattern, text)."""
    groups: dict[str, dict[str, list[str]]] = {}
    for path, name, text in entries:
        groups.setdefault(_pattern(path), {}).setdefault(text, []).append(name)
    table = []
    for pattern, by_text in groups.items():
        if len(by_text) == 1:
            table.append((pattern, next(iter(by_text))))
        else:
            table.extend((name, text) for text, members in by_text.items() for name in members)
    return table


def _init_text(init: Any) -> str:
    return repr((init.kind, *init.values))


def _keep_patterns(parameters: Sequence[Parameter]) -> list[str]:
    """Weights that stay in fp32, as patterns that match no other weight."""
    keep = dict.fromkeys(_pattern(p.path) for p in parameters if p.weight.keep)
    rest = [p.name for p in parameters if not p.weight.keep]
    for pattern in keep:
        clash = next((name for name in rest if fnmatchcase(name, pattern)), None)
        if clash:
            raise ValueError(f"{pattern} also matches {clash}")
    return list(keep)


def digest(*texts: str) -> str:
    """The name of an artifact: its content."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
