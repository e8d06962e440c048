"""The four families against their `transformers` classes: logits, greedy tokens, bytes of the way back, and bad
folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from safetensors.torch import load_file, save_file  # noqa: E402

from heddle.dsl.diagnostics import SpecError  # noqa: E402
from heddle.runtime.errors import UserError  # noqa: E402
from heddle.runtime.folder import load  # noqa: E402
from heddle.runtime.huggingface import export_folder, import_folder  # noqa: E402

FAMILIES = ("NemotronH", "Nemotron", "Llama", "Mistral")


def random_config(family: str, seed: int) -> dict:
    """Odd sizes, GQA and MHA, head_dim * heads != hidden, tied and untied, every SSM group count, every layer kind."""
    r = random.Random(f"{family}{seed}")
    kv = r.choice([1, 2, 3])
    heads = kv * r.choice([1, 2, 4])
    config = dict(
        vocab_size=r.choice([31, 57, 96]), hidden_size=heads * r.choice([5, 9, 14]),  # the classes want a multiple
        intermediate_size=r.choice([20, 45, 72]), num_attention_heads=heads, num_key_value_heads=kv, head_dim=r.choice([8, 12, 20]),
        tie_word_embeddings=r.random() < 0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if family == "NemotronH":
        groups = [1, 2, 8][seed % 3]
        kinds = ["linear_attention", "full_attention", "mlp", "moe"]
        layers = kinds + [r.choice(kinds) for _ in range(r.randint(0, 3))]
        r.shuffle(layers)
        # No clamp of dt, as in the trainers: transformers clamps prefill at `time_step_min` and decoding not at all.
        config |= dict(
            layers_block_type=layers,
            n_groups=groups,
            mamba_num_heads=groups * r.choice([1, 2, 3]),
            mamba_head_dim=r.choice([4, 7, 8]),
            ssm_state_size=r.choice([5, 8, 16]),
            chunk_size=r.choice([4, 8, 128]),
            conv_kernel=r.choice([2, 3, 4]),
            time_step_min=1e-30,
            layer_norm_epsilon=r.choice([1e-5, 1e-6]),
        )
        experts = r.choice([3, 4, 7])
        return config | dict(
            n_routed_experts=experts,
            num_experts_per_tok=r.randint(1, experts),
            moe_intermediate_size=r.choice([6, 15]),
            moe_shared_expert_intermediate_size=r.choice([9, 16]),
            moe_latent_size=r.choice([None, 11]),
            routed_scaling_factor=r.choice([1.0, 2.5]),
        )
    config |= dict(num_hidden_layers=r.randint(1, 3), max_position_embeddings=256)
    rope = {"rope_type": "default", "rope_theta": r.choice([1000.0, 10000.0, 500000.0])}
    if family == "Nemotron":
        rope["partial_rotary_factor"] = 0.5
    if family == "Llama" and seed % 3 == 1:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    if family == "Llama" and seed % 3 == 2:
        rope |= {"rope_type": "linear", "factor": 4.0}
    if family in ("Llama", "Nemotron"):
        config |= dict(attention_bias=r.random() < 0.3, mlp_bias=r.random() < 0.3)
    if family == "Mistral":
        config["sliding_window"] = r.choice([None, 5, 64])
    return config | {"rope_parameters": rope}


def make(family: str, seed: int, folder) -> torch.nn.Module:
    """A model of the class with random weights, norms included, saved."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**random_config(family, seed))
    config._experts_implementation = "eager"  # their grouped product refuses odd widths
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p)) if p.dim() < 2 else p.mul_(4)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: (HF folder, model folder)} of one model each, for the tests of errors."""
    base = tmp_path_factory.mktemp("hf")
    made = {}
    for family in FAMILIES:
        make(family, 0, base / family)
        made[family] = (base / family, import_folder(base / family, base / f"{family}-ours"))
    return made


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_same_tokens_same_bytes(family, seed, tmp_path):
    theirs = make(family, seed, tmp_path / "in")
    ours = load(import_folder(tmp_path / "in", tmp_path / "ours"))
    vocab = theirs.config.vocab_size
    tokens = torch.randint(0, vocab, (2, 19), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert float((a - b).abs().max() / b.abs().max()) < 2e-5
    mine = ours.generate(tokens[:, :7], 64)
    other = theirs.generate(
        tokens[:, :7], attention_mask=torch.ones_like(tokens[:, :7]), max_new_tokens=64, do_sample=False
    )
    same = mine == other
    # A tie within rounding may fall either way; from there on the texts differ.
    for row in range(2):
        if not bool(same[row].all()):
            place = int((~same[row]).nonzero()[0])
            with torch.no_grad():
                gap = theirs(other[row : row + 1, :place]).logits[0, -1].topk(2).values
            assert float(gap[0] - gap[1]) < 2e-5 * float(gap[0].abs()), f"row {row} differs at {place}"
    export_folder(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "back"))
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    cls = type(theirs)
    again, info = cls.from_pretrained(tmp_path / "back", output_loading_info=True, experts_implementation="eager")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_keeps_its_bytes(family, tmp_path):
    theirs = make(family, 1, tmp_path / "in").to(torch.bfloat16)
    shutil.rmtree(tmp_path / "in")
    theirs.save_pretrained(tmp_path / "in")
    import_folder(tmp_path / "in", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "back"))
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
    assert load(tmp_path / "ours")(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


def test_sharded_folders_are_read(tmp_path):
    theirs = make("Llama", 3, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    whole, parts = (load(import_folder(tmp_path / n, tmp_path / f"{n}-ours")) for n in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))


def test_the_older_spelling_of_the_layer_list(folders, tmp_path):
    shutil.copytree(folders["NemotronH"][0], tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    config["hybrid_override_pattern"] = "".join(letters[k] for k in config.pop("layers_block_type"))
    path.write_text(json.dumps(config))
    ours, newer = load(import_folder(tmp_path / "old", tmp_path / "ours")), load(folders["NemotronH"][1])
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), newer.state_dict().values()))


# --- bad folders ---------------------------------------------------------------------------------


def broken(folders, tmp_path, change):
    """A copy of a good folder, changed; importing it must fail and leave nothing. Gives the error."""
    shutil.copytree(folders["Llama"][0], tmp_path / "bad")
    change(tmp_path / "bad")
    with pytest.raises((UserError, SpecError)) as caught:
        import_folder(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]
    return caught.value


def with_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def test_missing_extra_and_misshapen_are_named_together(folders, tmp_path):
    def change(t):
        del t["model.norm.weight"]
        t["model.stray.weight"] = torch.zeros(2)
        t["model.embed_tokens.weight"] = torch.zeros(3, 5)

    error = broken(folders, tmp_path, with_tensors(change))
    assert error.code == "missing-tensor"
    for said in (
        "missing: `model.norm.weight`",
        "extra: `model.stray.weight` [2]",
        "`model.embed_tokens.weight` is [3, 5]",
    ):
        assert said in str(error)


def test_truncated_file(folders, tmp_path):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])

    error = broken(folders, tmp_path, cut)
    assert error.code == "damaged-weights" and "is cut off" in str(error)


def test_garbage_file(folders, tmp_path):
    error = broken(
        folders, tmp_path, lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"x")
    )
    assert error.code == "damaged-weights"


@pytest.mark.parametrize(
    ("text", "code"),
    [('{"a": 1,}', "broken-config"), ("[]", "broken-config"), ("{}", "broken-config"),
     ('{"architectures": ["LlammaForCausalLM"]}', "unknown-architecture"), ("[" * 100_000, "broken-config")],
)  # fmt: skip
def test_broken_config(folders, tmp_path, text, code):
    error = broken(folders, tmp_path, lambda f: (f / "config.json").write_text(text))
    assert error.code == code
    if code == "unknown-architecture":
        assert "LlamaForCausalLM" in error.help


def test_config_that_the_map_does_not_hold_for(folders, tmp_path):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))

    error = broken(folders, tmp_path, change)
    assert error.diagnostics[0].code == "config-mismatch" and "gelu" in error.diagnostics[0].message


def test_pickles_are_not_read(folders, tmp_path):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    error = broken(folders, tmp_path, change)
    assert error.code == "no-weights" and "pickle" in str(error)


def test_disk_full_while_writing_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        import_folder(folders["Llama"][0], tmp_path / "out")
    assert caught.value.code == "cannot-write"
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for call, source in ((import_folder, folders["Llama"][0]), (export_folder, folders["Llama"][1])):
        with pytest.raises(UserError, match="exists already"):
            call(source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
