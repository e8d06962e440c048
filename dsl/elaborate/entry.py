"""The way in: from a file and the name of a model to an elaborated program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import program as pg
from .. import syntax as sx
from ..arithmetic import kind, whole
from ..checkpoint.static import CallValue
from ..diagnostics import Collector, Diagnostic, SpecError, did_you_mean, fail
from ..load import File, Found, standard_index
from ..source import NOWHERE, Span
from .block_calls import BlockCalls
from .bodies import Elaborated, Given, inputs_of
from .builder import Builder
from .calls import Calls
from .environment import Environment
from .experts import Experts
from .expressions import Expressions
from .op_calls import OpCalls
from .reshaping import Reshaping
from .rewriting import Rewrites, Rewriting
from .statements import Statements
from .values import Cell, Dim, Tensor, Waiting

DEFAULT = "next_token"
"""The objective of a model for which none is asked."""

Lent = tuple[File, str | None, Mapping[str, Any]]
"""Another model for an objective: a file, the name of a model of it (or None), other values of its parameters."""


@dataclass(frozen=True)
class Asked:
    """What trains a model: an objective, its settings, and the other models that it takes."""

    objective: str | None
    settings: Mapping[str, Any]
    lent: Mapping[str, Lent]
    models: Mapping[str, tuple[Found, Waiting]] = field(default_factory=dict)


class Elaborator(Expressions, Calls, OpCalls, BlockCalls, Experts, Reshaping, Rewriting, Statements):
    """One elaboration: the op table comes from the floor above, as data."""

    def __init__(
        self, ops: Mapping[str, Any], required: Any, op_call: Any, owned: type,
        followers: Mapping[str, pg.Clock] | None = None,
    ):  # fmt: skip
        self.ops, self.required, self.followers = ops, required, dict(followers or {})
        self._op_call, self._owned = op_call, owned
        self.collector = Collector()
        self.memo: dict[Any, Elaborated] = {}
        self.finished: dict[str, Any] = {}
        self.bodies: dict[str, pg.Body] = {}
        self.loops: dict[str, Builder] = {}
        self.ends: list[Callable[[], None]] = []
        self.running: list[str] = []
        self.resolving: list[Found] = []
        self.sheets: dict[int, Rewrites] = {}
        self.segments: set[str] = set()
        self.coordinates: dict[tuple[int, str], tuple[Dim, sx.Expr | None]] = {}
        self.lent: dict[str, Elaborated] = {}
        self.standard = frozenset(standard_index())
        self.slower: dict[tuple[int, pg.Clock | None], tuple[Dim, Dim]] = {}
        self._names: set[str] = set()

    def new_op_call(self, op: Any, tensors: Any, settings: Any, span: Span, spans: Any, made: dict[Any, Dim]) -> Any:
        def new_dim(name: str, size: int | None, along: Dim | None = None, clock: pg.Clock | None = None) -> Dim:
            if along is not None:  # grouped twice in one way, a sequence has the same groups
                slower = Dim(name, size, True, along.lead, span, clock=clock)
                return self.slower.setdefault((id(along), clock), (along, slower))[1]
            return made.setdefault((name, size), Dim(name, size, span=span))

        return self._op_call(op, tensors, settings, span, spans, new_dim)

    def is_owned(self, value: Any) -> bool:
        return isinstance(value, self._owned)

    def fresh_body(self, base: str) -> str:
        name, n = base, 1
        while name in self._names:
            n += 1
            name = f"{base}_{n}"
        self._names.add(name)
        return name

    def finish_later(self, name: str, builder: Builder, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.loops[name] = builder
        self.ends.append(lambda: self.bodies.update({name: builder.finish(name, inputs, outputs)}))

    def finish(self) -> None:
        """Make all bodies, when nothing more can be asked of any."""
        for made in self.finished.values():
            made.settle()
        for end in self.ends:
            end()
        for made in self.finished.values():
            self.bodies[made.name] = made.builder.finish(made.name, made.inputs, made.outputs, len(made.asked))


def entries(file: File, keyword: str = "model") -> list[str]:
    """The names of the models of a file, in order."""
    return [name for name, d in file.declared.items() if getattr(d, "keyword", None) == keyword]


def elaborate(
    file: File,
    ops: Mapping[str, Any],
    hooks: Any,
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    objective: str | None = DEFAULT,
    settings: Mapping[str, Any] | None = None,
    lent: Mapping[str, Lent] | None = None,
) -> pg.Program:
    """Elaborate one model of a file, and the objective that trains it.

    `ops` is the op table, `hooks` has its `REQUIRED`, `OpCall` and `OwnedWeight`. Without `model`, the last model of
    the file whose parameters are all known. `settings` are parameters of the objective, `lent` those that are other
    models (a teacher): each a file, a model of it, and overrides. Raises `SpecError` with every independent diagnostic.
    """
    found = _choose(file, model)
    asked = Asked(objective, settings or {}, lent or {})
    followers: dict[str, pg.Clock] = {}
    while True:
        machine = Elaborator(ops, hooks.REQUIRED, hooks.OpCall, hooks.OwnedWeight, followers)
        try:
            program = _run(machine, found, overrides or {}, asked)
        except SpecError:
            if machine.followers == followers:
                raise
        else:
            if machine.followers == followers:
                return program
        # A coordinate of the body said that a dim of the inputs follows the stream: they are built again, so.
        followers = machine.followers


def _run(machine: Elaborator, found: Found, overrides: Mapping[str, Any], asked: Asked) -> pg.Program:
    try:
        waiting = _waiting(machine, found)
        arguments = {**waiting.settings, **overrides}
        _check_overrides(waiting, overrides, found)
        models = {name: _lent_model(machine, name, *given) for name, given in asked.lent.items()}
        program = _elaborate(machine, found, replace(waiting, settings=arguments), replace(asked, models=models))
        unused = [d for p in (program, *program.lent.values()) for d in _unused_inits(machine, p)]
        for diagnostic in (*machine.unused_rules(), *unused):
            machine.collector.add(diagnostic)
    except SpecError as error:
        machine.collector.add(error)
        machine.collector.finish()
        raise
    machine.collector.finish()
    return program


def _lent_model(
    machine: Elaborator, name: str, file: File, model: str | None, overrides: Mapping[str, Any]
) -> tuple[Found, Waiting]:
    """Another model, as a parameter of an objective."""
    found = _choose(file, model)
    waiting = _waiting(machine, found)
    _check_overrides(waiting, overrides, found)
    return found, replace(waiting, settings={**waiting.settings, **overrides}, model=name, lent=True)


def _waiting(machine: Elaborator, found: Found) -> Waiting:
    """A model as a function that waits for its inputs, also where it has none."""
    if isinstance(found.declaration, sx.Function):
        return Waiting(found=found, span=found.declaration.name_span)
    return machine.variant(found, found.declaration.name_span)


def _elaborate(machine: Elaborator, found: Found, waiting: Waiting, asked: Asked) -> pg.Program:
    declaration = waiting.block
    span = found.declaration.name_span
    builder = Builder("entry")
    entry = _Entry(waiting, builder, machine)
    tensors = entry.inputs()
    names = [i.name for i in inputs_of(declaration)]
    waiting = replace(waiting, settings={n: v for n, v in waiting.settings.items() if n not in names})
    given = Given(dict(tensors), waiting.settings, waiting.spans)
    made = machine.body_of(waiting, given, Environment(found.file, builder), span)
    for value in made.returned:
        if not isinstance(value, Tensor):
            raise fail(
                "wrong-type",
                f"a model returns tensors, `{declaration.name}` returns {kind(value)}",
                declaration.name_span,
            )
    objectives: dict[str, str] = {}
    if asked.objective is not None:
        objectives.update(_objective(machine, found, waiting, asked, tensors, entry, made))
    machine.finish()
    program = replace(_program(machine, found, waiting, made), objectives=objectives)
    return _with_lent(machine, program, asked) if machine.lent else program


def _program(machine: Elaborator, found: Found, waiting: Waiting, made: Elaborated) -> pg.Program:
    """A model that is made: for one that is lent, its own bodies only."""
    arguments = {p.name: _plain(made.variables.get(p.name)) for p in waiting.block.parameters}
    bodies = machine.bodies
    if waiting.lent:
        bodies = {name: bodies[name] for name in _reached(bodies, [made.name])}
    name, span = found.declaration.name, found.declaration.name_span
    return pg.Program(name, waiting.block.name, made.name, bodies, {}, arguments, bool(machine.sheets), span=span)


def _with_lent(machine: Elaborator, program: pg.Program, asked: Asked) -> pg.Program:
    """A program beside the models that its objective is lent: these are programs of their own."""
    lent = {name: _program(machine, *asked.models[name], made) for name, made in machine.lent.items()}
    own = set(_reached(program.bodies, [program.root, *program.objectives.values()]))
    gone = {b for p in lent.values() for b in p.bodies} - own
    bodies = {name: body for name, body in program.bodies.items() if name not in gone}
    for name, body in bodies.items():
        deep = [i.name for i in body.instances if not i.bodies]
        if deep and name not in program.objectives.values():
            raise fail(
                "not-built-yet", f"`{deep[0]}`, which is lent, in a block of its own is not built yet", body.span
            )
    return replace(program, bodies=bodies, lent=lent)


def _reached(bodies: Mapping[str, pg.Body], roots: list[str]) -> list[str]:
    """Bodies that some reach, themselves among them, in order of elaboration."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(b for i in bodies[name].instances for b in i.bodies)
    return [name for name in bodies if name in found]


def _unused_inits(machine: Elaborator, program: pg.Program) -> Iterator[Diagnostic]:
    """A diagnostic for every selector of `init` that selects no weight: `selects-nothing`."""
    selected = program.selected()
    for body in program.bodies.values():
        for rule in body.rules:
            for selector in rule.selectors:
                if (id(rule), selector) not in selected and not machine.may_be_absent(selector):
                    yield machine.selects_nothing(selector, rule.span, f"`{body.block}`")


def _objective(
    machine: Elaborator, found: Found, waiting: Waiting, asked: Asked, tensors: dict[str, Any], entry: _Entry,
    model: Elaborated,
) -> dict[str, str]:  # fmt: skip
    """The objective's body. Inputs that the model does not have, as the labels of its data, it has for itself.

    None for the objective that is tried where none was asked for, if the model takes or gives something else.
    """
    objective = asked.objective or ""
    block = found.file.lookup(objective)
    if block is None:
        known = [*standard_index(), *found.file.declared]
        raise fail(
            "unknown-name",
            f"no objective is named `{objective}`",
            found.declaration.name_span or NOWHERE,
            help=did_you_mean(objective, known, "a block"),
        )
    inputs = inputs_of(Waiting(found=block).block)
    wanted = [i.name for i in inputs]
    if objective == DEFAULT and (tensors.get("tokens") is None or "logits" not in model.variables):
        return {}
    _check_objective(block, asked, found)
    tensors |= {i.name: entry.input(i) for i in inputs if tensors.get(i.name) is None}
    # What the objective does not name goes straight to the models.
    more = {n: t for n, t in tensors.items() if n not in wanted}
    net = replace(waiting, settings={**waiting.settings, **more}, model="net")
    models = {"net": net, **{name: other for name, (_, other) in asked.models.items()}}
    given = Given({n: tensors[n] for n in wanted}, {**asked.settings, **models}, {})
    made = machine.body_of(
        Waiting(found=block), given, Environment(found.file, entry.builder), found.declaration.name_span
    )
    return {objective: made.name}


def _check_objective(block: Found, asked: Asked, found: Found) -> None:
    """Raises `no-such-parameter` for a setting, or a model, that the objective does not take."""
    names = [p.name for p in Waiting(found=block).block.parameters]
    for name in (*asked.settings, *asked.lent):
        if name not in names or name == "net":
            raise fail(
                "no-such-parameter",
                f"the objective `{asked.objective}` has no parameter `{name}`",
                found.declaration.name_span or NOWHERE,
                help=did_you_mean(name, [n for n in names if n != "net"], "a parameter"),
            )


def _plain(value: Any) -> Any:
    """The value of a model's parameter as plain data: dims by their size, waiting functions as named calls."""
    if isinstance(value, Cell):
        return _plain(value.value)
    if isinstance(value, Dim):
        return value.size
    if isinstance(value, Waiting):
        return CallValue(value.name, tuple((n, _plain(v)) for n, v in value.settings.items()))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class _Entry:
    """The inputs of a model as the data give them: one dim for each name, the stream and what follows it."""

    def __init__(self, waiting: Waiting, builder: Builder, machine: Elaborator):
        self.waiting, self.builder, self.machine = waiting, builder, machine
        self.dims: dict[str, Dim] = {}
        self.stream: Dim | None = None
        self.env = Environment(waiting.file, Builder(waiting.name))
        self.sizes = dict(self._sizes())

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """The parameters that are whole numbers, as far as their defaults need no dims: sizes of dims of their name."""
        for parameter in self.waiting.block.parameters:
            value = self.waiting.settings.get(parameter.name)
            if value is None and parameter.default is not None:
                try:
                    value = self.machine.value(parameter.default, self.env)
                except SpecError:  # it needs a dim, or is wrong, which is said where the model runs
                    continue
            self.env.bind(parameter.name, value)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
                yield parameter.name, int(value)

    def inputs(self) -> dict[str, Tensor | None]:
        """A tensor for every input; one with a default, or that a variant leaves out (`images = none`), is absent."""
        return {statement.name: self.input(statement) for statement in inputs_of(self.waiting.block)}

    def input(self, statement: sx.Input) -> Tensor | None:
        """A tensor whose dims are those of other inputs by the same names, or None where it is absent."""
        settings = self.waiting.settings
        if statement.default is not None or statement.name in settings and settings[statement.name] is None:
            return None
        word = statement.kind.id if isinstance(statement.kind, sx.Name) else "real"
        if word not in ("real", "token", "index", "mask", "coordinate"):
            raise fail("not-built-yet", f"inputs of kind `{word}` are not built yet", statement.span)
        dims = tuple(self._dim(item) for item in statement.shape or ())
        if word == "token" and dims:
            last = dims[-1]
            last.sequence, last.lead = True, dims[:-1]
            if self.stream is None:
                self.stream, last.clock = last, pg.TOKENS
        return self.builder.add_input(statement.name, word, dims, statement.span)

    def _dim(self, item: sx.DimItem) -> Dim:
        """The dim of a name; a parameter of this name, or a number in the shape, is its size."""
        name = item.name or "dim"
        if name in self.dims:
            return self.dims[name]
        given = self.sizes.get(name)
        if item.size is not None:
            given = whole(self.machine.number(item.size, self.env), f"the size of `{name}`", item.span)
        made = Dim(name, given, span=item.span)
        clock = self.machine.followers.get(name)
        if clock is not None and self.stream is not None:
            made.sequence, made.lead, made.clock = True, self.stream.lead, clock
        if item.name:
            self.dims[name] = made
        return made


def _choose(file: File, model: str | None) -> Found:
    models = entries(file)
    if model is not None:
        found = file.lookup(model)
        if found is None or getattr(found.declaration, "keyword", None) != "model":
            raise fail(
                "unknown-name",
                f"`{file.source.name}` has no model named `{model}`",
                Span(file.source, 0, 0),
                help=did_you_mean(model, models, "a model"),
            )
        return found
    if not models:
        raise fail(
            "nothing-declared",
            f"`{file.source.name}` declares no model",
            Span(file.source, 0, 0),
            help="a model starts with `model NAME(...):`",
        )
    ready = [m for m in models if is_complete(Found(file.declared[m], file))]
    chosen = (ready or models)[-1]
    return Found(file.declared[chosen], file)


def is_complete(found: Found) -> bool:
    """Whether a model's parameters are all known: by default, or by the variants that it is made by."""
    given: set[str | None] = set()
    seen: list[sx.Declaration] = []
    while isinstance(found.declaration, sx.Variant) and found.declaration not in seen:
        seen.append(found.declaration)
        call = found.declaration.value
        if not isinstance(call, sx.Call) or not isinstance(call.function, sx.Name):
            return True
        base = found.file.lookup(call.function.id)
        if base is None:
            return True
        given.update(a.name for a in call.arguments)
        found = base
    declaration = found.declaration
    return not isinstance(declaration, sx.Function) or all(
        p.default is not None or p.name in given for p in declaration.parameters
    )


def _check_overrides(waiting: Waiting, overrides: Mapping[str, Any], found: Found) -> None:
    names = [p.name for p in waiting.block.parameters]
    optional = [i.name for i in inputs_of(waiting.block) if i.optional]
    for name, value in overrides.items():
        if name not in names and not (value is None and name in optional):
            raise fail(
                "no-such-parameter",
                f"`{found.declaration.name}` has no parameter `{name}`",
                found.declaration.name_span or NOWHERE,
                help=did_you_mean(name, names, "a parameter"),
            )
