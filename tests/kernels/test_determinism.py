"""Same input, same bytes of source; same lock, same bits in every process; one numerics class, same bits."""

from __future__ import annotations

import ast
import functools
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle import __version__
from heddle.codegen.emit import emit_block
from heddle.codegen.lock import Lock, Tuned
from heddle.codegen.tiles import class_of, constants_of, with_constants
from heddle.dsl.load import load_text
from heddle.lowering import alone as parts
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime.check import program_of
from heddle.runtime.compile import build
from heddle.runtime.tune import grid_of
from heddle.runtime.verify import Draw, Expected, block_of
from tests.kernels import harness

# Every template, chains with sums along rows and over rows, one with neither.
SPEC = """
model made(vocab = 37, hidden = 16, ffn = 32):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = rms_norm(x)
    x = x + mamba2(y, heads = 2, head_dim = 8, state = 8, groups = 1, chunk = 32)
    q = linear(x, hidden -> [heads = 2, head_dim = 8])
    k = linear(x, hidden -> [heads, head_dim])
    o = linear(attend(q, (k, q, window(5))), [heads, head_dim] -> hidden)
    x = x + o
    gate = linear(x, hidden -> ffn)
    up = linear(x, hidden -> ffn)
    down = linear(silu(gate) * up, ffn -> hidden)
    x = x + down
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""


@functools.cache
def kernels():
    """Each kernel as a block by itself: its name, its text, and its block by PyTorch."""
    found = {}
    for one in parts.kernels(lower(program_of(load_text(SPEC)), target=TARGETS["triton"])):
        files = emit_block(one.name, one.program, __version__)
        plain = replace(one.program, target=TARGETS["cpu"], fused={}, heads={})
        ((name, _),) = files.kernels.items()
        found[f"{one.of}.{name}"] = one, files, block_of(one.name, emit_block(one.name, plain, __version__))
    return found


NAMES = list(kernels())


# --- what a class is made of ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_all_that_cuts_a_kernel_which_sums_is_in_its_class(name):
    """The interpreter sums in one order whatever the warps; hardware does not. How a tile is shared out among threads, and
    which instruction multiplies it, follow from its sizes and warps. Stages only move loads."""
    one, files, _ = kernels()[name]
    ((_, text),) = files.kernels.items()
    grid, numerics = grid_of(one, text)
    cuts = {c for c in cuts_of_sums(text) if c in grid and not c.endswith("STAGES")}
    assert cuts <= set(numerics)
    assert cuts or not numerics or name.endswith((".embed", ".parallel_conv"))  # these add one row after another


def cuts_of_sums(text):
    """The constants that reach a launch of a kernel which sums or multiplies tiles."""
    tree = ast.parse(text)
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    sums = {n for n, f in functions.items() if _calls(f) & {"sum", "dot", "cumsum", "reduce", "associative_scan"}}
    while more := {n for n, f in functions.items() if _calls(f) & sums} - sums:
        sums |= more
    known = {t.id: _names(a.value) for a in tree.body if isinstance(a, ast.Assign) for t in a.targets if isinstance(t, ast.Name)}
    found = set()
    for function in functions.values():
        local = dict(known)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                targets = [t.id for t in ast.walk(node.targets[0]) if isinstance(t, ast.Name)]
                local.update({t: local.get(t, set()) | _names(node.value) for t in targets})
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and _name(node.func) == "launch" and _name(node.args[0]) in sums:
                reach = set().union(*(_names(k.value) for k in node.keywords))
                while more := set().union(*(local.get(n, set()) for n in reach)) - reach:
                    reach |= more
                found |= reach
    return {name for name in found if name.isupper()}


def _calls(function):
    return {_name(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}


def _name(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def test_a_constant_that_was_forgotten_would_be_found():
    _, files, _ = kernels()["made.attend"]
    ((_, text),) = files.kernels.items()
    assert {"GRAD_KV_N", "GRAD_KV_WARPS", "FORWARD_M", "SPLIT_KEYS", "GRAD_Q_STAGES"} <= cuts_of_sums(text)


# --- tunings --------------------------------------------------------------------------------------


def run(name, changed, seed, dtype):
    """Results and gradients of a kernel cut in another way, and its draw."""
    one, files, _ = kernels()[name]
    ((kernel, text),) = files.kernels.items()
    kind = block_of(one.name, replace(files, kernels={kernel: with_constants(text, changed)}))
    draw = Draw(one, kind, dtype, random.Random(seed), torch.device("cpu"), (2, 11))
    return draw.run(kind, dtype), draw


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1)
@given(seed=st.integers(0, 10**6))
def test_one_class_has_the_same_bits_and_another_is_within_rounding(name, seed):
    one, files, _ = kernels()[name]
    ((_, text),) = files.kernels.items()
    grid, numerics = grid_of(one, text)
    there, chance = constants_of(text), random.Random(seed)
    free, other = ({n: chance.choice((*v, there[n])) for n, v in grid.items() if (n in numerics) == classed} for classed in (0, 1))
    assert class_of({**there, **free}, numerics) == class_of(there, numerics)
    usual, draw = run(name, {}, seed, torch.bfloat16)
    if free:
        again = run(name, free, seed, torch.bfloat16)[0]
        assert all(torch.equal(again[n], x) for n, x in usual.items()), free
    if other:
        differs = run(name, other, seed, torch.bfloat16)[0]
        for n, found in Expected.of(draw, kernels()[name][2]).judged(differs).items():
            assert found.worst <= 1, (other, n)


def test_the_gradient_of_a_weight_does_not_depend_on_how_many_rows_add_nothing():
    """A block of rows has its program whatever rows come behind it, so that padding changes no bit."""
    _, files, _ = kernels()["made.rms_norm"]
    ((_, text),) = files.kernels.items()
    module = harness.load(with_constants(text, {"FWD_BLOCK_R": 2, "BWD_BLOCK_R": 2, "BWD_PROGRAMS": 4}))
    x, slope = (harness.values((37, 16), torch.float32, seed) for seed in (1, 2))

    def gradient(rows):
        weight = harness.values((16,), torch.float32, 3).requires_grad_()
        y = module.rms_norm(x[:rows], weight)
        kept = slope[:rows] * (torch.arange(rows) < 7)[:, None]
        return torch.autograd.grad(y, weight, kept)[0]

    assert all(torch.equal(gradient(7), gradient(rows)) for rows in (8, 9, 16, 37))


# --- processes ------------------------------------------------------------------------------------

ATTENDING = """
model made(vocab = 37, hidden = 16):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    q = linear(rms_norm(x), hidden -> [heads = 2, head_dim = 8])
    o = linear(attend(q, (q, q, window(5))), [heads, head_dim] -> hidden)
    final = rms_norm(x + o)
    logits = linear(final, hidden -> vocab)
    return logits
"""
PROCESS = """
import hashlib, sys
import torch
import heddle
from heddle.runtime.compile import build, lock_of
from heddle.runtime.check import program_of
from heddle.dsl.load import load
from pathlib import Path
path = Path(sys.argv[1])
made = heddle.compile(path, target="triton", seed=3)
files = made.artifact.files
tokens = torch.arange(14).view(2, 7) * 5 % 37
loss = made.losses(tokens)["lm"]
loss.backward()
said = hashlib.sha256(repr(sorted({"model.py": files.model, **files.kernels}.items())).encode())
print(said.hexdigest(), "FWD_BLOCK_R = 8" in "".join(files.kernels.values()))
logits = made(tokens)
for name, x in [("loss", loss), ("logits", logits), *((n, p.grad) for n, p in made.named_parameters())]:
    print(name, hashlib.sha256(x.detach().float().numpy().tobytes()).hexdigest())
"""


def test_two_processes_with_one_lock_have_the_same_bytes_and_the_same_bits(tmp_path):
    """Whatever the seed of hashing, the folder, the number of threads that they begin with, and where programs are found."""
    import triton

    files = build(program_of(load_text(ATTENDING)), "triton").files
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "made.spec"
    path.write_text(ATTENDING)
    norm = {files.keys[n]: Tuned(n, {"FWD_BLOCK_R": 8}) for n, text in files.kernels.items() if "FWD_BLOCK_R = 32" in text}
    (tmp_path / "a" / "made.triton.lock").write_text(Lock("triton", triton.__version__, norm).text())
    here = [p for p in sys.path if p]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, where], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": programs, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(here), "HOME": str(tmp_path)},
        )
        for where, folder, seed, programs in ((str(path), tmp_path, "1", "/usr/bin:/bin"), ("made.spec", tmp_path / "a", "77", "/bin"))
    ]  # fmt: skip
    first, second = (p.communicate() for p in runs)
    assert first[0] == second[0] and len(first[0].splitlines()) == 9, first[1] + second[1]
    assert "True" in first[0].splitlines()[0]  # the lock was read
