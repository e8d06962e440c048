"""Checkpoints appear whole or not at all, whatever fails while they are written, and damage is seen."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from errno import ENOSPC

import pytest
import torch

from heddle.runtime.errors import UserError
from heddle.runtime.train import checkpoint

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


def save(folder, step, keep=2, shift=0.0):
    weights = {n: t + shift for n, t in TENSORS.items()}
    return checkpoint.save(folder, step, weights, {"exp_avg.a": torch.zeros(3), "step.a": torch.tensor(1.0)},
                           {"step": step, "row": 2 * step}, keep)  # fmt: skip


def is_as_saved(path, step, shift=0.0):
    weights, moments, state = checkpoint.load(path)
    same = weights.keys() == TENSORS.keys() and all(torch.equal(weights[n], t + shift) for n, t in TENSORS.items())
    return same and set(moments) == {"exp_avg.a", "step.a"} and state == {"step": step, "row": 2 * step}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = save(tmp_path / "new/checkpoints", 7)
    assert path.name == "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == sorted([*checkpoint.FILES, checkpoint.MANIFEST])
    assert is_as_saved(path, 7)
    assert checkpoint.latest(tmp_path / "new/checkpoints") == path
    assert checkpoint.latest(tmp_path / "none") is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    for step in (5, 9, 10, 100):
        save(tmp_path, step, keep)
    assert [p.name for p in checkpoint.whole(tmp_path)] == [f"step-{s:08d}" for s in (5, 9, 10, 100)][-keep:]
    assert len(list(tmp_path.iterdir())) == keep


class Failing:
    """Each of the calls that write counts; the one with the given number fails."""

    def __init__(self, patch, number, error):
        self.left, self.error, self.calls = number, error, 0
        for owner, name in ((os, "fsync"), (os, "replace"), (checkpoint, "save_file"), (checkpoint, "about"),
                            (checkpoint.Path, "write_text"), (checkpoint.Path, "mkdir")):  # fmt: skip
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.left:
                raise self.error
            return real(*args, **kwargs)

        return call


class Killed(BaseException):
    """The end of a process: nothing that follows in it runs but what unwinds."""


def number_of_calls(tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        counted = Failing(patch, -1, None)
        save(tmp_path, step)
    return counted.calls


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("killed", [False, True], ids=["disk-full", "killed"])
def test_a_failure_at_any_call_leaves_what_was_there(tmp_path, killed, same_step):
    """Also where the same step is saved again, as a finished run that is resumed does."""
    new = 4 if same_step else 5
    save(tmp_path / "count", 4)
    calls = number_of_calls(tmp_path / "count", new)
    assert calls >= 10
    for number in range(1, calls + 1):
        folder = tmp_path / f"{number}"
        save(folder, 4, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            if killed:  # a process that is gone tidies nothing
                patch.setattr(shutil, "rmtree", lambda *a, **k: None)
            Failing(patch, number, Killed() if killed else OSError(ENOSPC, "No space left on device"))
            with pytest.raises(Killed if killed else UserError) as caught:
                save(folder, new, keep=1, shift=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a partial folder is not even looked at
            found = checkpoint.latest(folder)
        assert found is not None, number
        assert is_as_saved(found, 4) or is_as_saved(found, new, 1.0), number
        if not killed:
            assert caught.value.code == "cannot-write"
            assert "No space left" in caught.value.message
            assert not list(folder.glob(".*")), number
        # The next attempt succeeds, and what was left over is gone.
        save(folder, new, keep=1, shift=2.0)
        assert is_as_saved(checkpoint.latest(folder), new, 2.0)
        assert len(list(folder.iterdir())) == 1, number


def test_safetensors_own_error_is_a_user_error_too(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left") as caught:
        save(tmp_path, 2)
    assert caught.value.code == "cannot-write"
    assert is_as_saved(checkpoint.latest(tmp_path), 1)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        save(tmp_path / "file" / "checkpoints", 1)
    assert caught.value.code == "cannot-write"


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3] if damage == "truncated" else b"")
    with pytest.warns(UserWarning, match="step-00000002"):
        assert is_as_saved(checkpoint.latest(tmp_path), 1)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"model.safetensors": 3}', "\x00", '"x"'])
def test_a_garbled_manifest_is_damage(tmp_path, text):
    path = save(tmp_path, 1)
    (path / checkpoint.MANIFEST).write_text(text)
    with pytest.warns(UserWarning, match="step-00000001"):
        assert checkpoint.latest(tmp_path) is None
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert caught.value.code == "damaged-weights"


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_seen(tmp_path, name, place):
    file = save(tmp_path, 1) / name
    raw = bytearray(file.read_bytes())
    raw[int(place * (len(raw) - 1))] ^= 4
    file.write_bytes(raw)
    with pytest.raises(UserError, match=name) as caught:
        checkpoint.load(file.parent)
    assert caught.value.code == "damaged-weights"


def test_damaged_weights_of_a_run_are_refused_by_generate_and_resume(tmp_path):
    from heddle.runtime.folder import load

    (tmp_path / "model.spec").write_text(
        "model m(vocab = 8, hidden = 4):\n    tokens[batch, seq]: token\n    x = embed(tokens, vocab -> hidden)\n"
        "    logits = linear(x, hidden -> vocab)\n    return logits\n"
    )
    from heddle.runtime.compile import compile as compile_spec

    weights = compile_spec(tmp_path / "model.spec").state_dict()
    path = checkpoint.save(tmp_path / "checkpoints", 1, weights, {"s": torch.zeros(1)}, {"step": 1}, 1)
    assert all(torch.equal(v, weights[n]) for n, v in load(tmp_path).state_dict().items())
    file = path / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:8] + b"}" + raw[9:])
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert caught.value.code == "damaged-weights"


def test_the_manifest_has_sizes_and_hashes(tmp_path):
    import hashlib

    path = save(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for name in checkpoint.FILES:
        raw = (path / name).read_bytes()
        assert manifest[name] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
