"""The base of a generated model: what its users call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from .buffers import STATELESS, Slots
from .capture import CAPTURES, Steps
from .chance import name_sites
from .clocks import Clock, on
from .filled import Beside, Filled
from .gathered import Gathered
from .initial import initialise
from .linear import spec_paths
from .mesh import Mesh
from .pipeline import Pipe
from .regather import gathering_again
from .rows import At
from .sample import check_sampling, choose
from .spmd import I, P, S, all_gather, all_reduce
from .stream import Stream

# Prompts are fed in pieces, so that the logits of a long prompt never exist at once.
PREFILL_ROWS = 512


class NotCaptured(UserWarning):
    """Steps of decoding run op by op on a GPU, where a CUDA graph could replay them."""


class Model(Filled):
    """A generated class gives `slots`, `run`, `losses_of`, `counts_of`, INIT and keep_fp32; `inputs` names what it
    takes besides tokens, which callers give by name."""

    inputs: tuple[str, ...] = ("tokens",)
    # The dims of tokens, None for those of any size: a model may read several sequences for each batch row.
    shape: tuple[int | None, ...] = (None, None)
    # One more than the largest token, where a table of the model says it.
    vocab: int | None = None
    # How many tokens a document may have, where positions are rows of a table.
    longest: int | None = None
    # What its objective takes, where that is something else: labels, too.
    scored: tuple[str, ...] = ()
    # The inputs whose rows (their second dim) come with groups of tokens.
    follows: Mapping[str, Clock] = {}
    # The program and the artifact that it was made of, where it was compiled here.
    program: Any = None
    artifact: Any = None
    # The variables that `run` gives where it is asked for more.
    gives: tuple[str, ...] = ()
    # Models that the objective asks, by name; a dict, so that they are no modules of this one.
    lent: Mapping[str, Model] = MappingProxyType({})
    # Where this rank stands, in a module that was laid out over several; `axes` are those of its mesh, `stored` says
    # how each weight lies on it, `rows` over which axes a batch is split, `cuts` into how many equal parts the tokens
    # of a row are cut, `partial` over which axes a loss is a sum.
    mesh: Mesh | None = None
    axes: Mapping[str, int] = MappingProxyType({})
    stored: Mapping[str, Any] = MappingProxyType({})
    rows: tuple[str, ...] = ()
    cuts: int = 1
    # The axes along which weights are gathered again for the backward pass, in place of being kept whole.
    regathered: tuple[str, ...] = ()
    result: tuple[tuple[tuple[str, ...], ...], tuple[str, ...]] = ((), ())
    pipe: Pipe | None = None
    # Of a pipeline: weights that several stages have, and what they are like (on no device).
    tied: Mapping[str, Tensor] = MappingProxyType({})
    partial: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    # What the objective owns; none of the modules of this one, so that it is not saved with it.
    beside: Beside | None = None
    # What random numbers depend on, and how many rows of the whole batch stand before those of this rank's first.
    chance: int | Tensor | None = None
    before: int = 0
    # Why the model cannot be decoded token by token, where it cannot.
    late: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def slots(self, stream: Stream) -> Slots:
        """The buffers that decoding keeps."""
        raise NotImplementedError(f"{type(self).__name__} cannot be decoded: it has no slots")

    def run(self, tokens: Tensor, *rest: Any) -> Tensor:
        """tokens int64[batch, seq], the other inputs, at, state -> logits [batch, seq, vocab]."""
        raise NotImplementedError

    def losses_of(self, tokens: Tensor, *rest: Any) -> dict[str, Tensor]:
        """tokens, the other inputs, at -> {loss: sum over its scored tokens}."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def counts_of(self, tokens: Tensor, *rest: Any) -> dict[str, Tensor]:
        """tokens, the other inputs, at -> {loss: number of scored tokens}."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def _more(self, given: Mapping[str, Tensor], at: At, names: tuple[str, ...] = ()) -> list[Tensor]:
        """The inputs besides tokens, in order. Raises ValueError for one that is missing, not known, or that does not
        have the rows that come with these tokens."""
        wanted = (names or self.inputs)[1:]
        wrong = [name for name in (*wanted, *given) if (name in given) != (name in wanted)]
        if wrong:
            problem = "is not given" if wrong[0] in wanted else "is no input"
            raise ValueError(
                f"{type(self).__name__}: `{wrong[0]}` {problem}; its inputs are {', '.join(('tokens', *wanted))}"
            )
        for name, clock in self.follows.items():
            have, rows = tuple(given[name].shape[: len(at.lead) + 1]), on(at, clock).seq
            if have != (*at.lead, rows):
                raise ValueError(
                    f"{type(self).__name__}: `{name}` has {list(have)} rows, must be {[*at.lead, rows]}: one for each"
                    " group of tokens that comes"
                )
        return [given[name] for name in wanted]

    def _rows(self, tokens: Tensor, *coordinates: Tensor | None) -> At:
        """The coordinates of tokens. Raises ValueError where these do not have the dims that the model reads."""
        wanted = zip(self.shape, tokens.shape, strict=False)
        if tokens.dim() != len(self.shape) or any(size not in (None, found) for size, found in wanted):
            sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise ValueError(f"{type(self).__name__}: tokens are {list(tokens.shape)}, must be [{sizes}]")
        if len(self.axes) and self.mesh is None:  # torch.compile takes any mapping for true
            raise RuntimeError(f"{type(self).__name__} is one rank's part of a model: give it its `mesh` first")
        at = At(tokens.shape, tokens.device, *coordinates)
        self._check_length(at)
        if not hasattr(self, "site"):
            name_sites(self)
        at.mesh, at.chance = self.mesh, self.chance
        at.before = self.before
        if self.mesh is not None and self.rows:
            at.before += self.mesh.place(*self.rows) * at.lead[0]
        return at

    def _check_length(self, at: At) -> None:
        """Raises ValueError for a document that is longer than its positions are known. Rows that cannot be too long
        are not looked at: on a GPU that would wait for all that is under way."""
        if self.longest is None or not at.seq:
            return
        if at.in_stream and isinstance(at.step.uniform, int):
            last = at.step.uniform + at.seq - 1
        elif (at.step.stream.max_length if at.in_stream else at.seq) <= self.longest:
            return
        else:
            position = at.position if at.valid is None else torch.where(at.valid, at.position, 0)
            last = int(position.max())
        if last >= self.longest:
            raise ValueError(
                f"{type(self).__name__}: a document has {last + 1} tokens, positions are known up to {self.longest}"
            )

    # Whole documents.

    def forward(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        position: Tensor | None = None,
        valid: Tensor | None = None,
        **more: Tensor,
    ) -> Tensor:
        """tokens int64[batch, seq] -> logits [batch, seq, vocab]; document, position, valid as in `At`."""
        at = self._rows(tokens, position, document, valid)
        with gathering_again(self.regathered):
            return self._whole(self.run(tokens, *self._more(more, at), at, STATELESS))

    def _whole(self, logits: Tensor) -> Tensor:
        """What all ranks give together for this rank's rows of the batch."""
        if self.mesh is None:
            return logits
        splits, partial = self.result
        for axis in partial:
            logits = all_reduce(logits, self.mesh[axis], src=P, dst=I)
        for dim, axes in list(enumerate(splits))[1:]:
            if axes:
                logits = all_gather(logits, self.mesh[axes], src=S(dim), dst=I)
        return logits

    def losses(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        valid: Tensor | None = None,
        gathered: Gathered | None = None,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """{loss: 0-d sum over scored tokens}. The total is the sum of losses[name] / counts[name].

        With `gathered`, as a training step asks, the losses that blocks state beside the objective are there, too.
        """
        at = self._rows(tokens, None, document, valid)
        at.gathered = gathered
        with gathering_again(self.regathered):
            return self.losses_of(tokens, *self._more(more, at, self.scored), at)

    def counts(
        self, tokens: Tensor, document: Tensor | None = None, valid: Tensor | None = None, **more: Tensor
    ) -> dict[str, Tensor]:
        """{loss: number of scored tokens}: without weights, so that micro-batches can be added up first."""
        at = self._rows(tokens, None, document, valid)
        return self.counts_of(tokens, *self._more(more, at, self.scored), at)

    # Other models, which an objective asks.

    def lend(self, **models: Model) -> Model:
        """Give the objective the models that it asks, by the names of its parameters (`teacher`).

        They are frozen, and no part of this one: not trained, not saved with it, not moved or cast with it.
        """
        self.lent = {**self.lent, **{name: model.requires_grad_(False).eval() for name, model in models.items()}}
        return self

    def ask(self, name: str, *inputs: Any, more: tuple[str, ...] = ()) -> Any:
        """What a lent model gives for inputs and coordinates, and variables of it; it states no losses. Raises
        RuntimeError where it was not lent, or was not compiled to give these."""
        *tensors, at = inputs
        if name not in self.lent:
            raise RuntimeError(f"{type(self).__name__}: the objective asks `{name}`, give it by lend({name}=...)")
        asked: Callable[..., Any] = self.lent[name].run
        if more and self.lent[name].gives != more:
            raise RuntimeError(
                f"{type(self).__name__}: the objective asks `{name}` for {', '.join(more)}, which the one that was"
                f" lent does not give: build program.lent[{name!r}]"
            )
        return asked(*tensors, at.quiet(), STATELESS, more=True) if more else asked(*tensors, at.quiet(), STATELESS)

    # What the objective owns.

    def train_beside(self, modules: Beside) -> None:
        """Take what the objective owns: filled, moved, cast and trained with this model, and no part of it."""
        self.__dict__["beside"] = modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.beside is not None:
            self.beside._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """As every module; what the objective owns follows."""
        if self.beside is not None:
            self.beside.train(mode)
        return super().train(mode)

    # Token by token.

    def stream(self, batch: int, max_length: int, rollback: int = 0) -> Stream:
        """An empty decoding state for `batch` sequences of at most max_length tokens.

        Raises ValueError for a model whose logits wait for later tokens.
        """
        if self.late is not None:
            raise ValueError(f"{type(self).__name__} cannot be decoded: {self.late}")
        return Stream(self, batch, max_length, rollback, self.storage_dtype, self.device)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the weights that `cast` changes."""
        return next((parameter.dtype for parameter in self._castable()), torch.float32)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        stream: Stream,
        count: Tensor | None = None,
        start: Tensor | None = None,
        **more: Tensor,
    ) -> Tensor:
        """Feed tokens int64[batch, seq], and the rows of other inputs that come with them; -> logits
        [batch, seq, vocab].

        count int[batch]: how many tokens of each row are real; the rest change nothing and their logits mean nothing.
        start bool[batch, seq]: tokens that start a new document.
        """
        at, rest = self.begin(tokens, stream, count, start, **more)
        if at.valid is not None:
            tokens = torch.where(at.valid, tokens, 0)
        logits = self.run(tokens, *rest, at, stream.state)
        stream.commit(at)
        return logits

    def begin(
        self,
        tokens: Tensor,
        stream: Stream,
        count: Tensor | None = None,
        start: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[At, list[Tensor]]:
        """Check what a step is given, arguments as of `prefill`; -> its coordinates, for the stream's `commit`, and the
        inputs besides tokens."""
        if tokens.dim() != 2 or tokens.shape[0] != stream.batch or not tokens.shape[1]:
            raise ValueError(f"stream: tokens are {list(tokens.shape)}, must be [{stream.batch}, at least 1]")
        at = stream.begin(tokens.shape[1], count, start)
        try:
            self._check_length(at)
            return at, self._more(more, at)
        except ValueError:
            stream.running = False  # nothing was stored yet
            raise

    def steps(self, stream: Stream) -> Steps:
        """What takes steps of a stream as `decode` does, and replays those of one token from a CUDA graph where the
        model is on a GPU."""
        make = CAPTURES.get(stream.device.type)
        return Steps(self, stream, None if make is None else make(stream.device))

    def coming(
        self, stream: Stream, seq: int, count: Tensor | None = None, start: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What the next step needs of the inputs that follow the tokens, before it is taken: for each the groups whose
        rows come, int64 [batch, rows], and bool, which of them there are. Arguments as of `prefill`."""
        at = stream.begin(seq, count, start)
        stream.running = False
        rows = {name: on(at, clock) for name, clock in self.follows.items()}
        return {name: (r.position, r.validity) for name, r in rows.items()}

    # The same step: what was fed at once and what was fed token by token leave the same state.
    decode = prefill

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_token: Callable[[Tensor], Any] | None = None,
        given: Mapping[str, Callable[[Tensor, range], Tensor]] | None = None,
        graph: bool = True,
    ) -> Tensor:
        """Continue prompts int64[batch, seq]; -> int64[batch, seq + max_new_tokens].

        temperature 0 is greedy; a seed makes sampling repeatable. on_token is given each new column int64[batch];
        generation ends early where it returns True. given: for each input that follows the tokens what gives
        its rows [batch, groups, ..]: called with all tokens so far, int64 [batch, n], and the groups that come.
        graph: on a GPU, steps of one token are replayed from a CUDA graph; warns (`NotCaptured`) of what cannot be.
        Raises ValueError for settings out of range, an empty prompt and tokens outside the vocabulary.
        """
        check_sampling(temperature, top_k, top_p)
        self._check_prompt(tokens, max_new_tokens)
        length = tokens.shape[1] + max(0, max_new_tokens - 1)  # the last token is never read
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"generate: {tokens.shape[1]} tokens and {max_new_tokens} more are too long: positions are known up to"
                f" {self.longest}"
            )
        source = None
        if temperature > 0:
            source = torch.Generator(tokens.device)
            source.seed() if seed is None else source.manual_seed(seed)
        if not max_new_tokens:
            return tokens.clone()
        stream = self.stream(len(tokens), tokens.shape[1] + max_new_tokens)
        for fed in range(0, tokens.shape[1], PREFILL_ROWS):
            prefill = functools.partial(self.prefill, stream=stream)
            logits = self._feed(tokens[:, : fed + PREFILL_ROWS], fed, given, prefill)
        steps = self.steps(stream) if graph else Steps(self, stream, None)
        columns = [tokens]
        for left in reversed(range(max_new_tokens)):
            new = choose(logits[:, -1], temperature, top_k, top_p, source)
            columns.append(new[:, None])
            if (on_token is not None and on_token(new) is True) or not left:
                break
            # Only what follows the tokens asks for all of them.
            so_far, fed = (torch.cat(columns, 1), -1) if self.follows else (new[:, None], 0)
            logits = self._feed(so_far, fed, given, steps)
        if steps.why:
            said = f"{type(self).__name__}: not every step is captured in a CUDA graph: {steps.why}"
            warnings.warn(said, NotCaptured, stacklevel=2)
        return torch.cat(columns, 1)

    def _feed(
        self, tokens: Tensor, fed: int, given: Mapping[str, Callable[[Tensor, range], Tensor]] | None,
        step: Callable[..., Tensor],
    ) -> Tensor:  # fmt: skip
        """Feed tokens[:, fed:] to a step, with what comes with them."""
        more = {}
        for name, clock in self.follows.items():
            if name not in (given or {}):
                raise ValueError(f"generate: `{name}` is not given: a function of the tokens so far and of groups")
            groups = range(clock.groups(tokens[:, :fed].shape[1]), clock.groups(tokens.shape[1]))
            more[name] = (given or {})[name](tokens, groups)
        return step(tokens[:, fed:], **more)

    def _check_prompt(self, tokens: Tensor, max_new_tokens: int) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"generate: tokens are {tokens.dtype}{list(tokens.shape)}, must be int64[batch, seq]")
        if not tokens.numel():
            raise ValueError(f"generate: the prompt {list(tokens.shape)} is empty, it must hold at least one token")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, must be at least 0")
        low, high = int(tokens.min()), int(tokens.max())
        if self.vocab is not None and (low < 0 or high >= self.vocab):
            raise ValueError(f"generate: token {low if low < 0 else high} is outside the vocabulary of {self.vocab}")

    # Weights.

    def initialise(self, seed: int = 0, table: Mapping[str, tuple[Any, ...]] | None = None) -> Model:
        """Draw every parameter from `table`, by default the one generated from the spec."""
        initialise(self, self.INIT if table is None else table, seed)
        if self.beside is not None:
            initialise(self.beside, self.beside.INIT, seed)
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """As above; what the objective owns follows."""
        if self.beside is not None:
            self.beside.cast(dtype)
        return super().cast(dtype)


def _rename_saved(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Weights of a fused module are saved beside it, by their paths in the spec."""
    paths = spec_paths(module)
    state_dict.update({prefix + paths[key]: state_dict.pop(prefix + key) for key in list(paths)})


def _rename_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    paths = {prefix + path: prefix + key for key, path in spec_paths(module).items()}
    state_dict.update({paths[path]: state_dict.pop(path) for path in list(paths) if path in state_dict})
