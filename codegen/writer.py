"""The statements of one graph as lines of Python, each with the line of the spec that asked for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from ..dsl import syntax as sx
from ..dsl.diagnostics import fail
from ..dsl.format import print_expr
from ..dsl.program import TOKENS, Clock, Instance, Node, Weight
from ..dsl.source import NOWHERE, Span
from ..lowering.afterwards import parts
from ..lowering.chains.fused import Fused, structure
from ..lowering.chains.tiles import tuned
from ..lowering.clocks import widest
from ..lowering.constants import constants
from ..lowering.graph import STRUCTURE, Graph, GraphProgram, State, op_of
from ..lowering.masks import hull
from ..lowering.ops import has_part, part, room_of
from ..lowering.passes.find_epilogues import Epilogue
from . import names
from .chains import inputs, source
from .facts import Use, owner_of, slot_name
from .kernels import render
from .products import key
from .products import source as product
from .shared import Shared
from .tiles import Values, constants_of

_COMMENT = re.compile(r'^((?:[^"#]|"[^"]*")*)#.*$')
NAMED_MASKS = {"key.position <= query.position": "CAUSAL", "true": "FULL"}


@dataclass
class Line:
    """A line of a method, with the line of the spec that asked for it, and why it is as it is, where it could be
    otherwise."""

    text: str
    spec: str = ""
    depth: int = 0
    why: str = ""


@dataclass
class Class:
    """Plain facts of one generated class, for the template."""

    name: str
    doc: str
    construct: list[Line]
    slots: list[str]
    inputs: list[str]
    lent: list[str]
    body: list[Line]
    result: str
    is_model: bool = False
    input_names: str = ""
    follows: str = ""
    stages: list[StageLines] = field(default_factory=list)
    more: bool = False
    headed: bool = False
    around: str | None = None
    after: list[Line] = field(default_factory=list)
    losses: list[Line] = field(default_factory=list)
    loss_result: str = ""
    counts: list[Line] = field(default_factory=list)
    count_result: str = ""
    scored_names: str = ""
    vocab: int | None = None
    longest: int | None = None
    shape: tuple[int | None, ...] = ()
    objective_inputs: list[str] = field(default_factory=list)
    beside: str = ""
    gives: str = ""
    is_beside: bool = False
    shapes: list[str] = field(default_factory=list)
    keep: tuple[str, ...] = ()


@dataclass
class StageLines:
    """Plain facts of one stage: its arguments, statements, what it returns, and the shapes of what it takes."""

    inputs: list[str]
    body: list[Line]
    result: str
    shapes: list[str]


class Writer:
    """Writes the statements of one graph; `inlined` are nodes whose expression stands in their only reader's."""

    owner = "self"
    """What owns the graph's weights and blocks, where its statements stand."""

    def __init__(self, graph: Graph, program: GraphProgram, shared: Shared, inline: bool = True):
        self.graph, self.program, self.shared, self.masks = graph, program, shared, shared.masks
        self.states: dict[str, list[State]] = {}
        for state in program.states.get(graph.name, ()):
            self.states.setdefault(state.node, []).append(state)
        self.parts = parts(graph, program.emitting)
        self.classes = names.class_names(program.graphs)
        self._when = {
            n.name: i for i, part_ in enumerate((self.parts.result, self.parts.stated, self.parts.after)) for n in part_
        }
        self.constants = constants(graph, program)
        self.kept = self._kept_constants()
        self._inline = inline
        self.fused = {name: fused for fused in program.fused.get(graph.name, ()) for name in fused.nodes}
        pipe = None if program.laid is None or graph.name != program.program.root else program.laid.pipe
        self.pipe = pipe
        self.borders = {v for s in pipe.stages for v in s.takes} if pipe is not None else set()
        self.ended = self._ended()
        self.ends = {name: e for e, _ in self.ended.values() for name in e.nodes}
        self._names = self._variables()

    def owner_of(self, node: Node) -> str | None:
        """The module that owns a node's weights and computes it. On a mesh none does: weights are where they are
        stored, which need not be where they are read, so each use names them."""
        return None if self.program.laid is not None else owner_of(self.graph, node)

    # --- names ------------------------------------------------------------------------------------

    def _variables(self) -> dict[str, str]:
        """Python names: a value takes its variable's plain name again where the older one is dead."""
        last: dict[str, int] = {}
        order = self.parts.result + self.parts.stated + self.parts.after
        place = {node.name: i for i, node in enumerate(order)}
        for node in order:
            reader = node
            while self.is_inlined(reader):  # what it reads is read where its own reader stands
                (reader,) = self.graph.users[reader.name]
            at = self.ended[reader.name][0].nodes[-1] if reader.name in self.ended else reader.name
            for operand in node.operands:
                if operand is not None:
                    last[operand] = max(last.get(operand, -1), place[at])
        last.update({name: len(order) for name in (*self.graph.results, *self.parts.sums)})
        taken: dict[str, str] = {}
        found: dict[str, str] = {}
        own = self._own_variables()

        def is_free(name: str, place: int) -> bool:
            return name not in own and (name not in taken or last.get(taken[name], -1) <= place)

        def take(value: str, place: int, *wanted: str) -> None:
            name = next((w for w in wanted if is_free(w, place)), wanted[-1])
            while not is_free(name, place):
                name += "_"
            found[value] = name
            taken[name] = value

        for value in self.graph.body.inputs:
            take(value.name, len(order), names.variable(value.name))
        last.update({v.name: len(order) for v in self.graph.body.inputs if v.name not in last})
        for i, node in enumerate(order):
            for result in node.results:
                take(result.name, i, names.variable(_base(result.name, self.graph)), names.variable(result.name))
        return found

    def call_value(self, value: str, name: str) -> None:
        """Give a value the variable of another name."""
        self._names[value] = names.variable(name)

    def _own_variables(self) -> set[str]:
        """Variables of a method that are no values: modules of loops and shared ones, what a loop keeps, arguments."""
        found = {names.variable(i.name) for i in self.graph.body.instances if not i.owned}
        for node in (n for n in self.graph.nodes if n.op == "loop"):
            found |= {_module_variable(node.attr("instance")), "kept"}
        found |= {"more"} if self.graph.body.asked else set()
        found |= {"head"} if self.head is not None else set()
        return found | ({"sums"} if self.parts.sums else set())

    def expression(self, name: str) -> str:
        """A Python expression for a value."""
        weights = {w.name for w in self.graph.body.weights}
        if name in weights:
            return f"{self.owner}." + ".".join(names.attribute(p) for p in name.split("."))
        node = self.graph.producers.get(name)
        if node is not None and node.name in self.kept:
            return f"self.{self._buffer(name)}"
        if node is not None and self.is_inlined(node):
            return self.call(node)
        return self._names[name]

    def is_inlined(self, node: Node) -> bool:
        """A pointwise node with one reader, itself pointwise: both are one expression."""
        if not self._inline or node.op in STRUCTURE or not _pointwise(node) or node.name in self.kept:
            return False
        if node.name in self.fused or node.name in self.ends:
            return False
        users = self.graph.users.get(node.name, ())
        if len(users) != 1 or node.name in self.graph.results or users[0].operands.count(node.name) != 1:
            return False
        if node.name in self.borders:
            return False
        user = users[0]
        if self._when[node.name] != self._when[user.name]:
            return False
        return user.op not in STRUCTURE and _pointwise(user)

    def mask(self, mask: sx.Expr) -> str:
        """The name of a mask constant of the module."""
        text = print_expr(mask)
        if text not in self.masks:
            bounds = hull(mask)
            number = sum(name.startswith("MASK") for name, _ in self.masks.values()) + 1
            name = NAMED_MASKS.get(text, f"MASK_{number}")
            made = f"lib.Mask(lambda query, key: {_python_mask(mask)}, behind={bounds.behind}, ahead={bounds.ahead})"
            self.masks[text] = (name, made)
        return self.masks[text][0]

    def clock(self, clock: Clock) -> str:
        """The name of a clock constant of the module."""
        text = f"{print_expr(clock.value)} {clock.begins}"
        if text not in self.masks:
            number = sum(name.startswith("CLOCK") for name, _ in self.masks.values()) + 1
            value = print_expr(_of_token(clock.value))
            begins = ", begins=True" if clock.begins else ""
            made = f"lib.Clock(lambda token: {value}, width={widest(clock)}{begins})"
            self.masks[text] = (f"CLOCK_{number}", made)
        return self.masks[text][0]

    def kernel(self, use: Use) -> str | None:
        """The name of the kernel of one use of an op, where its room has one for this target."""
        if not self.program.target.kernels or not has_part(use.op, "triton"):
            return None
        room = part(use.op, "triton")
        facts = room.kernel(use, self.program.target)
        span = place_of(use.node.spans)
        if facts is None:
            callers = self.program.callers_of(self.graph.name)
            self.shared.lacks_kernel(room_of(use.op), room.why_not(use), self.program.target.name, span, callers)
            return None
        return self.shared.kernel(
            use.op, facts, lambda name: render(use.op, {"name": name, **facts.rendered()}), lambda _: room.TUNED, span
        )

    def _ended(self) -> dict[str, tuple[Epilogue, str]]:
        """The products that are one kernel with what is behind them, by name, each with that kernel's."""
        found = {}
        for e in self.program.epilogues.get(self.graph.name, ()):
            node, stages = self.graph.producers[e.product], self.pipe.stages if self.pipe is not None else ()
            if any(0 < len({e.product, *e.nodes} & set(s.nodes)) <= len(e.nodes) for s in stages):
                continue  # a border of stages lies between
            if e.facts is not None and self.shared.offer(key(node.op, e.facts), f"{node.op}_{e.facts.said}"):
                tuned: Values = part(node.op, "cute").TUNED
                name = self.shared.kernel(
                    f"{node.op}_{e.facts.said}", e.facts, partial(product, node.op, e.facts),
                    partial(_always, tuned), place_of(node.spans),
                )  # fmt: skip
                found[e.product] = e, name
        return found

    def epilogue_of(self, node: Node) -> str:
        """The arguments of a product that is one kernel with what is behind it: that kernel, and what is done where it
        does not take the tensors."""
        if node.name not in self.ended:
            return ""
        e, name = self.ended[node.name]
        last = self.graph.producers[e.nodes[-1]]
        fused = self.fused.get(last.name)
        behind = self._chain_call(fused) if fused is not None else self._call(last)
        given = "" if e.residual is None else f", residual={self.expression(e.residual)}"
        return f", kernel={name}, epilogue=lambda {self._names[node.name]}: {behind}{given}"

    # --- statements -------------------------------------------------------------------------------

    def _kept_constants(self) -> set[str]:
        """Those that a run reads: the others are only on the way to them."""
        return {
            name
            for name in self.constants
            if name in self.graph.results
            or any(user.name not in self.constants for user in self.graph.users.get(name, ()))
        }

    @property
    def head(self) -> Node | None:
        """The node that a loss makes by itself, where it stands in this graph."""
        heads = self.program.heads.values() if self.graph.name == self.program.program.root else ()
        return next((head.node for head in heads), None)

    def head_of(self, node: Node) -> tuple[str, str, str | None] | None:
        """What the map reads whose result a node makes by itself, its weight and its bias."""
        head = self.program.heads.get(self.graph.name)
        if head is None or head.loss != node.name:
            return None
        x, weight, bias = (None if o is None else self.expression(o) for o in head.node.operands)
        assert x is not None and weight is not None
        return x, weight, bias

    def is_made_inside(self, node: Node) -> bool:
        """Whether another node of this graph makes a node's result by itself."""
        head = self.program.heads.get(self.graph.name)
        return head is not None and head.node == node

    def call(self, node: Node) -> str:
        """The right side of a node's statement."""
        text = self.again(node, self._call(node))
        if self.head is not None and node.name == self.head.name:
            text += f" if head else {self.expression(node.operands[0] or '')}"
        return text

    def again(self, node: Node, text: str) -> str:
        """A call, in a form that the backward pass can make again where it was asked to: of what it is given now, which
        is what is kept, not of what later statements give the same names to."""
        if not node.attr("recompute"):
            return text
        given = list(dict.fromkeys(v for o in node.operands if o is not None for v in self._read(o)))
        return f"lib.recompute(lambda {', '.join(given)}: {text}, {', '.join(['at', *given])})"

    def _read(self, name: str) -> list[str]:
        """The variables that the expression of a value reads."""
        node = self.graph.producers.get(name)
        if node is not None and node.name not in self.kept and self.is_inlined(node):
            return [v for o in node.operands if o is not None for v in self._read(o)]
        return [] if self.expression(name).startswith(f"{self.owner}.") else [self.expression(name)]

    def _call(self, node: Node) -> str:
        if node.op == "call":
            inputs = ", ".join(self.expression(o) for o in node.operands if o is not None)
            instance = self.graph.instance(node.attr("instance"))
            return f"{self._module(instance)}({inputs}, at, state.{self._slot_of(node)}{self._lent(instance)})"
        if node.op == "route":
            x, routing, *more = [self.expression(o) for o in node.operands if o is not None]
            instance = self.graph.instance(node.attr("instance"))
            return f"lib.route({', '.join([x, routing, self._module(instance), 'at', *more])}{self._lent(instance)})"
        text = part(node.op, "cpu").emit(Use(self.graph, node, self))
        if not self.program.named or node.op == "convert":
            return text
        read = "".join(f"{'None' if o is None else self.expression(o)}, " for o in node.operands)
        return f'spmd.use("{self.graph.name}", "{node.name}", lambda: {text}, lambda: ({read}))'

    def _module(self, instance: Instance) -> str:
        """The module that an instance is: an attribute, or an argument where it is lent."""
        return f"{self.owner}.{names.attribute(instance.name)}" if instance.owned else names.variable(instance.name)

    def _lent(self, instance: Instance) -> str:
        """Further arguments: the shared modules that an instance is lent."""
        return "".join(f", {self._module(self.graph.instance(name))}" for name in instance.lends)

    def _slot_of(self, node: Node) -> str:
        """The name of what a call keeps: a shared block keeps something for each of its calls."""
        name = node.attr("instance")
        calls = [n.name for n in self.graph.nodes if n.op in STRUCTURE and n.attr("instance") == name]
        place = calls.index(node.name)
        return names.attribute(f"{name}_{place + 1}" if place else name)

    def statements(self, nodes: Iterable[Node]) -> list[Line]:
        lines: list[Line] = []
        nodes = list(nodes)
        here = {n.name for n in nodes}
        for node in nodes:
            if node.name in self.ended:
                continue
            ends = self.ends.get(node.name)
            if ends is not None:
                if node.name == ends.nodes[-1]:
                    lines.append(self._end(ends))
                continue
            fused = self.fused.get(node.name)
            if fused is not None and here.issuperset(fused.nodes):
                if node.name == fused.nodes[-1]:
                    lines.append(self._chain(fused))
                continue
            if node.name in self.constants or node.op not in STRUCTURE and self.is_inlined(node):
                continue
            if self.is_made_inside(node):
                continue
            targets = ", ".join(self._names[r.name] for r in node.results)
            spec = spec_line(node.spans)
            if node.op == "loop":
                lines.extend(self._loop(node, spec))
            else:
                lines.append(Line(f"{targets} = {self.call(node)}", spec, why=node.attr("why", "")))
        return lines

    def _end(self, ends: Epilogue) -> Line:
        """The statement of a product and what is behind it, below the line of the last."""
        nodes = [self.graph.producers[n] for n in (ends.product, *ends.nodes)]
        why = f"one kernel: {', '.join(n.op for n in nodes)}; else PyTorch's product, and what is behind it"
        return Line(f"{self._names[nodes[-1].name]} = {self._call(nodes[0])}", spec_line(nodes[-1].spans), why=why)

    def _chain_call(self, fused: Fused) -> str:
        chain = fused.chain
        name = self.shared.kernel(
            chain.name, structure(chain), lambda name: source(chain, self.program.target, name),
            lambda text: tuned(constants_of(text)), place_of(self.graph.producers[fused.nodes[-1]].spans),
        )  # fmt: skip
        return f"{name}({', '.join(self._given(fused, n) for n in inputs(chain))})"

    def _chain(self, fused: Fused) -> Line:
        """The statement of a kernel that is several nodes, below the line of the last."""
        targets = ", ".join(self._names[v] for v in fused.outputs)
        nodes = [self.graph.producers[n] for n in fused.nodes]
        why = f"one kernel: {', '.join(n.op for n in nodes)}" if len(nodes) > 1 else ""
        text = self._chain_call(fused)
        if self.program.named:
            text = f'spmd.use_chain("{self.graph.name}", {fused.outputs!r}, lambda: {text})'
        return Line(f"{targets} = {text}", spec_line(nodes[-1].spans), why=why)

    def _given(self, fused: Fused, name: str) -> str:
        """A tensor of a kernel: a value, or what a node that drops places draws for its rows."""
        node = dict(fused.drawn).get(name)
        if node is None:
            return self.expression(fused.value_of[name])
        use = Use(self.graph, self.graph.producers[node], self)
        text: str = part(use.op, "cpu").drawn(use, self.expression(fused.like))
        return text

    def _loop(self, node: Node, spec: str) -> list[Line]:
        name, variable = names.attribute(node.attr("instance")), _module_variable(node.attr("instance"))
        operands = [self.expression(o) for o in node.operands if o is not None]
        results = [self._names[r.name] for r in node.results]
        lines = [Line(f"{r} = {o}", spec) for r, o in zip(results, operands, strict=False) if r != o]
        given = results + operands[len(results) :]
        lent, me = self._lent(self.graph.instance(node.attr("instance"))), f"{self.owner}.{name}"
        part_ = node.attr("part")
        if part_ is not None and part_[1] - part_[0] == 1:  # what it gives may be more than what it is given
            one, kept = f"{me}[{part_[0]}]", f"state.{name}[{part_[0]}]"
            return [Line(f"{', '.join(results)} = {self._iteration(node, one, operands, lent, kept)}", spec)]
        if part_ is not None:
            some = f"[{part_[0]}:{part_[1]}]"
            lines.append(Line(f"for {variable}, kept in zip({me}{some}, state.{name}{some}):", spec))
            lines.append(Line(f"    {', '.join(results)} = {self._iteration(node, variable, given, lent)}", spec))
            return lines
        lines.append(Line(f"for {variable}, kept in zip({me}, state.{name}):", spec))
        lines.append(Line(f"    {', '.join(results)} = {self._iteration(node, variable, given, lent)}", spec))
        return lines

    def _iteration(self, node: Node, variable: str, given: list[str], lent: str, kept: str = "kept") -> str:
        """The call of one iteration; what is made again remembers what it was given, not the variables that held it,
        which hold the results next."""
        if not node.attr("recompute"):
            return f"{variable}({', '.join(given)}, at, {kept}{lent})"
        return f"lib.recompute({variable}, at, {', '.join(given)}, at, {kept}{lent})"

    def construct(self) -> list[Line]:
        """Submodules in order of first use. Raises `SpecError` `not-built-yet` for a name that no module can have."""
        self._check_names()
        lines: list[Line] = []
        done: set[str] = set()
        for node in self.graph.nodes:
            spec = spec_line(node.spans)
            if node.op in STRUCTURE:
                name = node.attr("instance")
                if self._is_part(self.graph.instance(name)) and name not in done:
                    lines.append(Line(f"self.{names.attribute(name)} = {self._instance(name)}", spec))
                done.add(name)
                continue
            owner = self.owner_of(node)
            if owner is not None and owner not in done:
                done.add(owner)
                made = part(node.op, "cpu").construct(Use(self.graph, node, self))
                lines.append(Line(f"self.{names.attribute(owner)} = {made}", spec))
        for instance in self.graph.body.instances:
            if self._is_part(instance) and instance.name not in done:  # only called inside a loop
                lines.append(Line(f"self.{names.attribute(instance.name)} = {self._instance(instance.name)}"))
        for weight in self.graph.body.weights:
            if "." not in weight.name:
                lines.append(Line(self._bare(weight), spec_line((weight.span,))))
        for owner, weights in self._unread().items():
            shapes = (f"{w.name.rpartition('.')[2]}={tuple(self.graph.size(d) for d in w.dims)}" for w in weights)
            made = f"self.{names.attribute(owner)} = lib.Weights({', '.join(shapes)})"
            lines.append(Line(made, spec_line((weights[0].span,))))
        for node in (n for n in self.constants.values() if not self.is_inlined(n)):
            text = part(node.op, "cpu").emit(Use(self.graph, node, self))
            name = self._buffer(node.name) if node.name in self.kept else self._names[node.name]
            made = (
                f'self.register_buffer("{name}", {text}, persistent=False)'
                if node.name in self.kept
                else f"{name} = {text}"
            )
            lines.append(Line(made, spec_line(node.spans)))
        return lines

    def _is_part(self, instance: Instance) -> bool:
        """Whether a module is made here for an instance: not for a shared one, nor for the model that an objective
        runs."""
        return instance.owned and self.program.program.root not in instance.bodies

    def _check_names(self) -> None:
        spans = {w.name.split(".")[0]: w.span for w in self.graph.body.weights}
        for node in (n for n in self.graph.nodes if n.op in STRUCTURE):
            spans.setdefault(node.attr("instance"), node.spans[0])
        for name, span in spans.items():
            if names.is_taken(name):
                raise fail(
                    "not-built-yet",
                    f"weights under the name `{name}` are not built yet",
                    span,
                    "Python, or every module of PyTorch, has something else of this name",
                    help="any other name will do",
                )

    def _unread(self) -> dict[str, list[Weight]]:
        """Weights whose own op went because nobody reads its result, by owner: they still belong to the checkpoint."""
        own = [n for n in self.graph.nodes if n.op not in STRUCTURE and self.owner_of(n) is not None]
        made = {operand for node in own for operand in node.operands}
        found: dict[str, list[Weight]] = {}
        for weight in self.graph.body.weights:
            if "." in weight.name and weight.name not in made:
                found.setdefault(weight.name.rpartition(".")[0], []).append(weight)
        return found

    def _buffer(self, name: str) -> str:
        """The attribute that holds a constant: no weight and no part of a module is named so."""
        owned = {w.name.split(".")[0] for w in self.graph.body.weights} | {i.name for i in self.graph.body.instances}
        plain = names.variable(name.lstrip("_") or "constant")
        while names.is_taken(plain) or plain in owned and plain != name:
            plain += "_"
        return plain

    def _bare(self, weight: Weight) -> str:
        """A `param`, which must still get its values, or a `buffer`, which starts as one number."""
        name, sizes = names.attribute(weight.name), tuple(self.graph.size(d) for d in weight.dims)
        if weight.trained:
            return f"self.{name} = lib.empty({', '.join(map(str, sizes))})"
        start = {"zeros": 0.0, "ones": 1.0}.get(weight.init.kind, *weight.init.values)
        return f'self.register_buffer("{name}", torch.full({sizes}, {start!r}))'

    def _instance(self, name: str) -> str:
        instance = self.graph.instance(name)
        classes = [self.classes[b] for b in instance.bodies]
        if instance.schedule is None:
            return f"{classes[0]}()"
        if len(classes) == 1:
            return f"nn.ModuleList({classes[0]}() for _ in range({len(instance.schedule)}))"
        return f"nn.ModuleList(kind() for kind in {_schedule(classes, instance.schedule)})"

    def slots(self) -> list[str]:
        """Arguments of `lib.Slots`: what the stream pass derived, and the blocks inside."""
        found = []
        for node in self.graph.nodes:
            if node.name in self.states:
                slot, use = part(node.op, "cpu").slot, Use(self.graph, node, self)
                each = [slot(use, state) for state in self.states[node.name]]
                made = each[0] if len(each) == 1 else f"({', '.join(each)})"
                found.append(f"{names.attribute(slot_name(self.graph, node))}={made}")
        for node in (n for n in self.graph.nodes if n.op in ("call", "loop")):
            if (node.attr("part") or (0,))[0]:
                continue  # its first part says it for all
            instance = self.graph.instance(node.attr("instance"))
            made, lent = self._module(instance), self._lent(instance)
            if instance.schedule is None:
                found.append(f"{self._slot_of(node)}={made}.slots(stream{lent})")
            else:
                name, variable = names.attribute(instance.name), names.variable(instance.name)
                found.append(f"{name}=[{variable}.slots(stream{lent}) for {variable} in {made}]")
        return found

    def as_class(self) -> Class:
        body = self.statements(self.parts.result)
        result = ", ".join(self.expression(o) for o in self.graph.body.outputs)
        if self.graph.name == self.program.program.root and self.graph.body.asked:
            own = self.graph.body.outputs[: -self.graph.body.asked]
            result = f"({result}) if more else {', '.join(self.expression(o) for o in own)}"
        stated = self.stated()
        if stated:
            body += [Line("if at.gathered is not None:"), *(replace(line, depth=line.depth + 1) for line in stated)]
        elif body and len(self.graph.body.outputs) == 1 and body[-1].text.startswith(f"{result} = "):
            last = body.pop()
            body.append(replace(last, text=f"return {last.text.split(' = ', 1)[1]}"))
            result = ""
        return Class(
            self.classes[self.graph.name],
            first_line(self.graph.body.doc),
            self.construct(),
            self.slots(),
            [self._names[v.name] for v in self.graph.body.inputs],
            [names.variable(i.name) for i in self.graph.body.instances if not i.owned],
            body,
            result,
            around=self.graph.body.block if self.graph.body.is_around else None,
            after=self.after(),
            stages=self.stages(),
        )

    def stages(self) -> list[StageLines]:
        """A method for each stage of the model."""
        found = []
        nodes = {n.name: n for n in self.graph.nodes}
        for i, stage in enumerate(self.pipe.stages if self.pipe is not None else ()):
            last = self.pipe is not None and i == len(self.pipe.stages) - 1
            inputs = [self._names[v.name] for v in self.graph.body.inputs] + [self._names[v] for v in stage.takes]
            body = [Line("state = lib.STATELESS"), *self.statements(nodes[n] for n in stage.nodes)]
            given = ", ".join(self.expression(v) for v in (self.graph.body.outputs if last else stage.gives))
            single = last and not self.graph.body.asked
            shapes = [self.shape(v) for v in stage.takes]
            found.append(StageLines([*inputs, "at"], body, given if single else f"({given},)", shapes))
        return found

    def shape(self, value: str) -> str:
        """The shape of a value, from the coordinates of its rows. Raises `SpecError`."""
        sizes = []
        first = self.graph.body.inputs[0].type.dims[0]
        for name in self.graph.values[value].type.dims:
            dim = self.graph.dims[name]
            if dim.size is not None:
                sizes.append(str(dim.size))
            elif name == first:
                sizes.append("at.batch")
            elif dim.clock is not None:
                rows = "at" if dim.clock == TOKENS else f"lib.on(at, {self.clock(dim.clock)}, {dim.clock.times})"
                parts_of = ", ".join(f'"{a}"' for a in dim.axes)
                sizes.append(f"{rows}.seq // at.mesh.size({parts_of})" if dim.axes else f"{rows}.seq")
            else:
                node = self.graph.producers[value]
                raise fail("not-built-yet", f"a border of stages that `{name}` crosses is not built yet", node.spans[0])
        return f"({', '.join(sizes)},)"

    def stated(self) -> list[Line]:
        """What runs only where losses are asked for: losses, metrics and sums for the end of the step."""
        lines = self.statements(self.parts.stated)
        for label, value in self.parts.losses:
            lines.append(Line(f'at.lose("{label}", {self.expression(value)})'))
        for label, value in self.parts.means:
            axes = self._partial(f"mean:{label}")
            more = f", {axes}" if axes else ""
            mean = f"{self.expression(value)}, {self.count_of(value)[0]}{more}"
            lines.append(Line(f'at.gathered.mean("{label}", {mean})'))
        if self.parts.sums:
            given = [f"{self._names[v]}={self._names[v]}" for v in self.parts.sums]
            partial = {self._names[v]: axes for v in self.parts.sums if (axes := self._partial(f"sum:{v}"))}
            lines.append(Line(f"at.gathered.add({', '.join(['self', *[repr(partial)] * bool(partial), *given])})"))
        return lines

    def _partial(self, name: str) -> tuple[str, ...]:
        """The axes of the mesh over which what this block states is a sum of parts."""
        laid = self.program.laid
        return () if laid is None else laid.sums.get(self.graph.name, {}).get(name, ())

    def after(self) -> list[Line]:
        """The method that runs behind a step: updates of buffers, then the metrics that it gives."""
        if not self.parts.sums:
            return []
        lines = [Line(f'{self._names[v]} = sums["{self._names[v]}"]') for v in self.parts.sums]
        lines += self.statements(self.parts.after)
        for label, value in self.parts.updates:
            lines.append(Line(f"self.{names.attribute(label)}.copy_({self.expression(value)})"))
        given = ", ".join(f'"{label}": {self.expression(value)}' for label, value in self.parts.metrics)
        return [*lines, Line(f"return {{{given}}}")]

    def count_of(self, loss: str) -> tuple[str, tuple[Node, ...]]:
        """The number of places that a loss is a sum over, and the nodes that must run for it."""
        node = self.graph.producers[loss]
        while node.op == "convert" or _pointwise(node):  # the same loss in another place, or times a number
            node = self.graph.producers[next(o for o in node.operands if o is not None)]
        wanted = {node.operands[1]} if len(node.operands) > 1 else set()
        needed: list[Node] = []
        for before in reversed(self.graph.nodes):
            if any(r.name in wanted for r in before.results):
                needed.insert(0, before)
                wanted.update(o for o in before.operands if o is not None)
        return part(node.op, "cpu").count(Use(self.graph, node, self)), tuple(needed)


def _always(values: Values, text: str) -> Values:
    return values


def _pointwise(node: Node) -> bool:
    op = op_of(node)
    return bool(op.inputs) and all(not o.leading for o in op.inputs)


def _module_variable(name: str) -> str:
    """The variable of a loop: a layer after the other, beside what each keeps."""
    return "kept_" if name == "kept" else names.variable(name)


def _base(name: str, graph: Graph) -> str:
    stem, _, tail = name.rpartition("_")
    return stem if stem and tail.isdigit() and (stem in graph.values) else name


def _python_mask(mask: sx.Expr) -> str:
    """A mask in Python: `and`, `or`, `not` of tensors are `&`, `|`, `~`, which bind tighter than comparisons."""
    match mask:
        case sx.Binary(operator="and" | "or" as op, left=left, right=right):
            return f"({_python_mask(left)}) {'&' if op == 'and' else '|'} ({_python_mask(right)})"
        case sx.Unary(operator="not", value=value):
            return f"~({_python_mask(value)})"
        case sx.Constant(value=value):
            return repr(value)
    return print_expr(mask)


def _of_token(expr: sx.Expr) -> sx.Expr:
    """The coordinate of a query as that of a token."""
    match expr:
        case sx.Name(id="query"):
            return sx.Name("token")
        case sx.Member(value=value, name=name):
            return sx.Member(_of_token(value), name)
        case sx.Unary(operator=op, value=value):
            return sx.Unary(op, _of_token(value))
        case sx.Binary(operator=op, left=left, right=right):
            return sx.Binary(op, _of_token(left), _of_token(right))
    return expr


def place_of(spans: tuple[Span, ...]) -> Span:
    """What a user wrote that asked for a node."""
    return next((s for s in spans if s.source.text), NOWHERE)


def spec_line(spans: tuple[Span, ...]) -> str:
    """`model.spec:18  x = x + layer(rms_norm(x))`: the file's name without its folder, and the whole line."""
    span = place_of(spans)
    if span is NOWHERE:
        return ""
    file = span.source.name.replace("\\", "/").rsplit("/", 1)[-1]
    text = _COMMENT.sub(r"\1", span.source.line(span.line)).strip()
    return f"{file}:{span.line}  {text}"


def first_line(doc: str) -> str:
    return " ".join(doc.split())


def _schedule(classes: list[str], schedule: tuple[int, ...]) -> str:
    """The kinds of a loop's iterations as a tuple, wrapped."""
    text, line = "(\n", " " * 12
    for which in schedule:
        word = f"{classes[which]}, "
        if len(line) + len(word) > 116:
            text += line.rstrip() + "\n"
            line = " " * 12
        line += word
    return text + line.rstrip() + "\n        )"
