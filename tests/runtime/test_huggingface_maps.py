"""Checkpoint maps against the `transformers` classes: every tensor, configs new and old, hostile folders."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from safetensors.torch import load_file, save_file  # noqa: E402

from heddle.dsl.checkpoint import Entry, Piece, evaluate, read_config, write_config  # noqa: E402
from heddle.dsl.diagnostics import SpecError  # noqa: E402
from heddle.dsl.format import format_source  # noqa: E402
from heddle.dsl.load import load as load_file_of_spec  # noqa: E402
from heddle.dsl.load import load_text, shipped_folder  # noqa: E402
from heddle.dsl.source import Source  # noqa: E402
from heddle.runtime.check import program_of  # noqa: E402
from heddle.runtime.compile import build, instantiate  # noqa: E402
from heddle.runtime.errors import UserError  # noqa: E402
from heddle.runtime.folder import load, write_spec  # noqa: E402
from heddle.runtime.huggingface import export_folder, import_folder, open_folder  # noqa: E402
from heddle.runtime.huggingface.importing import misfits, spec_text  # noqa: E402
from heddle.runtime.huggingface.maps import architectures, declared, for_architecture, map_of  # noqa: E402
from heddle.runtime.huggingface.moving import put_together, take_apart  # noqa: E402
from heddle.runtime.huggingface.tensors import Tensors, read_header, writing  # noqa: E402

FAMILIES = ("NemotronH", "Nemotron", "Llama", "Mistral")
odd = st.sampled_from([1, 2, 3, 5, 7, 8, 16, 31])


@st.composite
def configs(draw, family: str) -> dict:
    """Sizes 1 and odd, GQA and MHA, head_dim * heads unlike hidden, biases, tied and untied, every kind of layer."""
    kv, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    heads = kv * group
    hidden = draw(odd) * heads if family == "Llama" else draw(odd)  # this class alone wants a multiple
    config = {
        "vocab_size": draw(st.integers(1, 40)),
        "hidden_size": hidden,
        "intermediate_size": draw(odd),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 4 * draw(st.integers(1, 5)),
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.01, 0.02])),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "NemotronH":
        groups = draw(st.sampled_from([1, 2, 8]))
        words = ["linear_attention", "full_attention", "mlp", "moe"]
        config |= {
            "n_routed_experts": draw(st.integers(2, 4)),
            "num_experts_per_tok": draw(st.integers(1, 2)),
            "moe_intermediate_size": draw(st.integers(1, 5)),
            "moe_shared_expert_intermediate_size": draw(st.integers(1, 5)),
            "moe_latent_size": draw(st.sampled_from([None, 3])),
            "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        }
        return config | {
            "layers_block_type": draw(st.lists(st.sampled_from(words), min_size=1, max_size=5)),
            "n_groups": groups,
            "mamba_num_heads": groups * draw(st.sampled_from([1, 2, 3])),
            "mamba_head_dim": draw(odd),
            "conv_kernel": draw(st.integers(2, 5)),
            "ssm_state_size": draw(odd),
            "chunk_size": draw(odd),
            "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-6])),
            "time_step_min": draw(st.sampled_from([1e-30, 0.001])),
        }
    config["num_hidden_layers"] = draw(st.integers(1, 3))
    rope = {"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 10000.0, 5e5]))}
    if family == "Nemotron":
        rope["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
        config["norm_eps"] = draw(st.sampled_from([1e-5, 1e-6]))
    else:
        config["rms_norm_eps"] = draw(st.sampled_from([1e-5, 1e-6]))
    if family == "Llama":
        rope |= draw(
            st.sampled_from(
                [
                    {},
                    {"rope_type": "linear", "factor": 4.0},
                    {
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 32,
                    },
                ]
            )
        )
    if family == "Mistral":
        config["sliding_window"] = draw(st.sampled_from([None, 1, 64]))
    else:
        config |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return config | {"rope_parameters": rope}


def config_of(family: str, fields: dict):
    return getattr(transformers, f"{family}Config")(**fields)


def model_of(family: str, config):
    return getattr(transformers, f"{family}ForCausalLM")(config)


def map_for(family: str):
    """(file, map, parameters of the family)"""
    file, checkpoint = for_architecture(f"{family}ForCausalLM")
    return file, checkpoint, declared(file, checkpoint).parameters


def saved(config) -> dict:
    """The config as the class writes it."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def opened(family: str, fields: dict):
    """The config as the class reads it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        return getattr(transformers, f"{family}Config").from_pretrained(folder)


# --- every tensor, every field -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_the_map_gives_all_names_and_shapes_of_the_class(family, data) -> None:
    """What the class saves is exactly what the map expects; nothing is missing, left over or misshapen."""
    file, checkpoint, parameters = map_for(family)
    with tempfile.TemporaryDirectory() as folder:
        model_of(family, config_of(family, data.draw(configs(family)))).save_pretrained(folder)
        config, tensors = open_folder(folder)
        text = spec_text(file, checkpoint.model.id, read_config(checkpoint, config, parameters))
        assert format_source(Source("model.spec", text)) == text
        program = program_of(load_text(text, folder=Path(folder)))
        mapped = map_of(checkpoint, program)
        assert misfits(mapped, tensors) == []
        assert sorted(p.name for e in mapped.entries for p in e.pieces) == sorted(p.name for p in program.tensors())
        count = sum(int(torch.Size(tensors.shape(n)).numel()) for n in tensors.names())
        assert sum(p.count for p in program.tensors()) == count


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20)
@given(data=st.data())
def test_a_config_goes_there_and_back(family, data) -> None:
    """With the config that came along nothing changes for the class; without it, nothing that our map speaks of."""
    file, checkpoint, parameters = map_for(family)
    theirs = config_of(family, data.draw(configs(family)))
    config = saved(theirs)
    program = program_of(load_text(spec_text(file, checkpoint.model.id, read_config(checkpoint, config, parameters))))
    back = write_config(checkpoint, program.arguments, parameters, config)
    assert saved(opened(family, back)) == config
    fresh = write_config(checkpoint, program.arguments, parameters)
    again = read_config(checkpoint, saved(opened(family, fresh)), parameters)
    assert again == read_config(checkpoint, config, parameters)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_an_older_config_means_what_the_class_makes_of_it(family, data) -> None:
    """Fields left out, null, or in the spelling of earlier versions: we read what the class reads, or ask for more."""
    _, checkpoint, parameters = map_for(family)
    old = saved(config_of(family, data.draw(configs(family))))
    rope = old.pop("rope_parameters", None)
    if rope is not None and data.draw(st.booleans()):
        old["rope_theta"] = rope.pop("rope_theta")
        old |= {k: rope.pop(k) for k in ["partial_rotary_factor"] if k in rope}
        kind = rope.pop("rope_type")
        word = data.draw(st.sampled_from(["rope_type", "type"]))
        old["rope_scaling"] = None if kind == "default" else {word: kind, **rope}
    elif rope is not None:
        old["rope_parameters"] = rope
    if "layers_block_type" in old and data.draw(st.booleans()):
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        old["hybrid_override_pattern"] = "".join(letters[w] for w in old.pop("layers_block_type"))
    elif "layers_block_type" in old:
        words = {"linear_attention": ["mamba"], "full_attention": ["attention"]}
        old["layers_block_type"] = [
            data.draw(st.sampled_from([w, *words.get(w, [])])) for w in old["layers_block_type"]
        ]
    for field in data.draw(
        st.lists(st.sampled_from(sorted(set(old) - {"model_type", "intermediate_size"})), unique=True, max_size=6)
    ):
        was = old.pop(field)
        if data.draw(st.booleans()) and reads(family, old | {field: None}):
            old[field] = None
        elif not reads(family, old):
            old[field] = was
    try:
        ours = read_config(checkpoint, old, parameters)
    except SpecError as error:
        if any("has no value" not in d.message for d in error.diagnostics):
            raise
        return
    spoken = read_config(checkpoint, saved(opened(family, old)), parameters)
    assert every(parameters, ours) == every(parameters, spoken)


def reads(family: str, fields: dict) -> bool:
    """Whether the class takes a config, with a model of it."""
    try:
        with torch.device("meta"):
            model_of(family, opened(family, fields))
    except Exception:
        return False
    return True


def every(parameters, given: dict) -> dict:
    """All arguments, defaults included, as a spec would have them."""
    values = dict(given)
    for p in parameters:
        if p.name not in values and p.default is not None:
            values[p.name] = evaluate(p.default, values)
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_yarn_and_other_changes_of_rope_are_refused(family) -> None:
    if family == "NemotronH":
        pytest.skip("this class has no positions")
    _, checkpoint, parameters = map_for(family)
    config = saved(config_of(family, {}))
    scaled = {"factor": 4.0, "rope_theta": 10000.0}
    for kind in ("yarn", "dynamic", "longrope"):
        for change in (
            {"rope_parameters": {"rope_type": kind, **scaled}},
            {"rope_parameters": None, "rope_scaling": {"type": kind, **scaled}},
            {"rope_parameters": None, "rope_scaling": {"rope_type": kind, **scaled}},
        ):
            with pytest.raises(SpecError, match=kind):
                read_config(checkpoint, config | change, parameters)


# --- moving --------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    order=st.permutations(["parts", "a", "b", "c"]),
    parts=st.integers(1, 3),
)
def test_axes_in_any_order_move_as_written(sizes, order, parts) -> None:
    """theirs[..., part, ...] = ours of that part, each axis where the map says it is; and back, bit for bit."""
    dims = tuple(zip("abc", sizes, strict=False))
    count = dict(dims) | {"parts": parts}
    shape = (int(torch.Size(count[n] for n in order[:2]).numel()), int(torch.Size(count[n] for n in order[2:]).numel()))
    entry = Entry("x", shape, tuple(Piece(f"p{i}", tuple(sizes), ()) for i in range(parts)), 0, tuple(order), dims)
    theirs = torch.arange(shape[0] * shape[1]).reshape(shape)
    ours = {piece.name: tensor for piece, tensor in take_apart(entry, theirs)}
    full = theirs.reshape([count[n] for n in order])
    for part in range(parts):
        for a in range(sizes[0]):
            for b in range(sizes[1]):
                for c in range(sizes[2]):
                    at = {"parts": part, "a": a, "b": b, "c": c}
                    assert full[tuple(at[n] for n in order)] == ours[f"p{part}"][a, b, c]
    assert torch.equal(put_together(entry, lambda piece: ours[piece.name]), theirs)


def test_one_tensor_for_each_index_is_written_into_one_and_read_from_it(tmp_path) -> None:
    whole = torch.randn(3, 4, 5)
    with writing(tmp_path / "a.safetensors", {"w": (whole.dtype, (3, 4, 5)), "v": (torch.bfloat16, (2,))}) as put:
        for i in (2, 0, 1):
            put("w", whole[i], i)
        put("v", torch.ones(2, dtype=torch.bfloat16))
    tensors = Tensors([tmp_path / "a.safetensors"])
    assert all(torch.equal(tensors.get("w", i), whole[i]) for i in range(3))
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], whole)


# --- our own models go there ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron4", "llama", "mistral"])
def test_a_model_of_ours_is_one_of_theirs(name, tmp_path) -> None:
    """A model that never was theirs: the class loads it whole, and computes the same in prefill and in decoding."""
    file = load_file_of_spec(shipped_folder() / name / "tiny.spec")
    model = instantiate(build(program_of(file)), seed=1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.full_like(p, -9.0) if key.endswith("dt_bias") else p * 3)  # steps of 1e-4, under their least
    (tmp_path / "ours").mkdir()
    write_spec(tmp_path / "ours", file, "tiny")
    weights = {key: p.clone(memory_format=torch.contiguous_format) for key, p in model.state_dict().items()}
    save_file(weights, tmp_path / "ours" / "model.safetensors")
    export_folder(tmp_path / "ours", tmp_path / "theirs")
    cls = getattr(transformers, json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"][0])
    theirs, info = cls.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = torch.randint(0, 256, (2, 23), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = model(tokens)
        first = theirs.eval()(tokens[:, :9], use_cache=True)
        rows, past = [first.logits], first.past_key_values
        for i in range(9, 23):
            step = theirs(tokens[:, i : i + 1], past_key_values=past, use_cache=True)
            rows, past = [*rows, step.logits], step.past_key_values
        largest = full.abs().max()
        assert float((full - theirs(tokens).logits).abs().max() / largest) < 2e-5
        assert float((full - torch.cat(rows, 1)).abs().max() / largest) < 2e-5


def test_every_shipped_map_is_found() -> None:
    assert set(architectures()) == {f"{f}ForCausalLM" for f in FAMILIES}


# --- hostile folders -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of each family."""
    base = tmp_path_factory.mktemp("good")
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    for family in FAMILIES:
        more = (
            {
                "layers_block_type": ["linear_attention", "full_attention", "mlp"],
                "mamba_num_heads": 2,
                "mamba_head_dim": 3,
                "n_groups": 1,
                "ssm_state_size": 4,
            }
            if family == "NemotronH"
            else {"num_hidden_layers": 2}
        )
        model_of(family, config_of(family, sizes | more)).save_pretrained(base / family)
    return base


def refused(source, out) -> UserError | SpecError:
    """Importing must fail in the user's words, and leave nothing."""
    with pytest.raises((UserError, SpecError)) as caught:
        import_folder(source, out)
    assert not out.exists()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".partial")] == []
    return caught.value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(['"', "M", "\n"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor", "a"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30)
@given(data=st.data())
def test_any_config_is_imported_or_refused(family, good, data) -> None:
    """Whatever JSON stands in a field: a model, or an error in the user's words; never another exception."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        shutil.copytree(good / family, source)
        config = json.loads((source / "config.json").read_text())
        fields = sorted(set(config) - {"architectures"})
        for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True)):
            config[field] = data.draw(json_values)
        (source / "config.json").write_text(json.dumps(config))
        try:
            import_folder(source, out)
        except (UserError, SpecError):
            assert [p.name for p in Path(folder).iterdir()] == ["in"]
        else:
            load(out)


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(data, good) -> None:
    """A safetensors file with some bytes changed, cut or added is whole, or is refused."""
    whole = (good / "Llama" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    place = data.draw(st.integers(0, 8 + length) | st.integers(0, len(whole)))
    patch = data.draw(st.binary(max_size=8))
    changed = whole[:place] + patch + whole[place + data.draw(st.integers(0, 20)) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(changed)
        try:
            about = read_header(path)
        except UserError as error:
            assert error.code == "damaged-weights"
        else:
            tensors = Tensors([path])
            for name, (dtype, shape) in about.items():
                try:
                    assert (tensors.get(name).dtype, tuple(tensors.get(name).shape)) == (dtype, shape)
                except UserError as error:
                    assert error.code == "damaged-weights"


def edited(good, tmp_path, family="Llama", tensors=None, **fields) -> Path:
    """A copy of a good folder with other fields and tensors."""
    source = tmp_path / "in"
    shutil.copytree(good / family, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))
    if tensors is not None:
        state = load_file(source / "model.safetensors")
        tensors(state)
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("family", ["Nemotron", "Llama", "Mistral"])
def test_tied_in_the_config_and_untied_in_the_tensors(family, good, tmp_path) -> None:
    error = refused(edited(good, tmp_path, family, tie_word_embeddings=True), tmp_path / "out")
    assert "extra: `lm_head.weight` [11, 8]" in str(error)
    assert error.help.endswith(
        "the config says `tie_word_embeddings` = true, these are the tensors of a model where it is false"
    )


def test_untied_in_the_config_and_tied_in_the_tensors(good, tmp_path) -> None:
    error = refused(edited(good, tmp_path, tensors=lambda t: t.pop("lm_head.weight")), tmp_path / "out")
    assert "missing: `lm_head.weight` [11, 8]" in str(error)
    assert "where it is true" in error.help


def test_a_bias_that_the_tensors_do_not_have(good, tmp_path) -> None:
    error = refused(edited(good, tmp_path, attention_bias=True), tmp_path / "out")
    assert str(error).count("missing:") == 8
    assert "`attention_bias` = true" in error.help


def test_a_config_that_gives_no_model_names_its_fields(good, tmp_path) -> None:
    error = refused(edited(good, tmp_path, num_key_value_heads=0), tmp_path / "out")
    assert error.code == "broken-config"
    assert str(tmp_path / "in" / "config.json") in str(error)
    assert "`kv_heads` must be at least 1, this is 0" in str(error)
    assert "`kv_heads` is `num_key_value_heads` of the config" in error.help
    assert ".partial" not in str(error)


def test_every_misfit_is_listed_once(good, tmp_path) -> None:
    def change(t):
        for name in list(t)[:5]:
            t[f"other.{name}"] = t.pop(name)

    error = refused(edited(good, tmp_path, tensors=change), tmp_path / "out")
    assert (str(error).count("missing:"), str(error).count("extra:")) == (5, 5)


@pytest.mark.parametrize("name", ["../in/model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3])
def test_an_index_names_files_beside_it_only(name, good, tmp_path) -> None:
    source = edited(good, tmp_path)
    (source / "model.safetensors").rename(source / "whole.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert refused(source, tmp_path / "out").code == "broken-config"


def test_every_damaged_shard_is_named(good, tmp_path) -> None:
    source = edited(good, tmp_path)
    (source / "model.safetensors").unlink()
    names = {f"t{i}": f"model-{i}.safetensors" for i in range(3)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (source / "model-0.safetensors").write_bytes(b"xxxx")
    (source / "model-2.safetensors").write_bytes(struct.pack("<Q", 9) + b"{}")
    error = refused(source, tmp_path / "out")
    assert all(name in str(error) for name in names.values())


def test_what_lies_beside_the_weights_goes_along(good, tmp_path) -> None:
    source = edited(good, tmp_path)
    beside = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt", "chat_template.jinja"]
    for name in beside:
        (source / name).write_bytes(name.encode() + b"\x00\xff")
    export_folder(import_folder(source, tmp_path / "ours"), tmp_path / "back")
    assert all((tmp_path / "back" / name).read_bytes() == (source / name).read_bytes() for name in beside)


def test_tables_that_older_checkpoints_keep_are_dropped(good, tmp_path) -> None:
    def add(t):
        t["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    import_folder(edited(good, tmp_path, tensors=add), tmp_path / "ours")


def test_an_edited_spec_is_exported_with_its_own_config(good, tmp_path) -> None:
    """The config that came along is older; what the spec says now is what the class reads."""
    source = edited(
        good, tmp_path, rope_parameters=None, rope_theta=77.0, rope_scaling={"type": "linear", "factor": 2.0}
    )
    ours = import_folder(source, tmp_path / "ours")
    text = (ours / "model.spec").read_text()
    assert "theta = 77.0" in text
    assert "scaling = interpolate(factor = 2.0)" in text
    (ours / "model.spec").write_text(text.replace("77.0", "78.0").replace("interpolate(factor = 2.0)", "identity"))
    back = export_folder(ours, tmp_path / "back")
    rope = transformers.LlamaConfig.from_pretrained(back).rope_parameters
    assert (rope["rope_theta"], rope["rope_type"]) == (78.0, "default")


def test_a_value_that_the_map_cannot_say_is_not_exported(good, tmp_path) -> None:
    ours = import_folder(good / "NemotronH", tmp_path / "ours")
    text = (ours / "model.spec").read_text()
    (ours / "model.spec").write_text(re.sub(r'pattern = "(.)', r'pattern = "\1|', text))
    with pytest.raises(SpecError, match="for which `layers_block_type` has no word"):
        export_folder(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_parts_of_unlike_dtype_are_refused_on_the_way_out(good, tmp_path) -> None:
    ours = import_folder(good / "NemotronH", tmp_path / "ours")
    state = load_file(ours / "model.safetensors")
    state["layer.0.mamba2.dt.weight"] = state["layer.0.mamba2.dt.weight"].bfloat16()
    save_file(state, ours / "model.safetensors")
    with pytest.raises(UserError, match=r"mixed: `backbone.layers.0.mixer.in_proj.weight`.*bfloat16 and float32"):
        export_folder(ours, tmp_path / "back")


# --- disks and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_file_that_cannot_grow_leaves_nothing(limit, good, tmp_path) -> None:
    """The system itself refuses to write on: behind the spec's first bytes, or in the middle of the weights."""
    ours = import_folder(good / "Llama", tmp_path / "ours")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for call, source in ((import_folder, good / "Llama"), (export_folder, ours)):
            with pytest.raises(UserError) as caught:
                call(source, tmp_path / "out")
            assert caught.value.code == "cannot-write"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_where_nothing_can_be_written(good, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        import_folder(good / "Llama", tmp_path / "file" / "out")
    assert caught.value.code == "cannot-write"
    assert (tmp_path / "file").read_text() == "x"


WATCHED = """
import sys, threading
from pathlib import Path
import torch
from heddle.runtime.huggingface import export_folder, import_folder

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Anonymous")) * 1024

def peak(call, *args):
    done, most = threading.Event(), 0
    def watch():
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, anonymous())
    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    call(*args)
    done.set(); thread.join()
    return most - before

import_folder(sys.argv[2], sys.argv[3] + "/warm")
export_folder(sys.argv[3] + "/warm", sys.argv[3] + "/warm-back")
print(peak(import_folder, sys.argv[1], sys.argv[3] + "/ours"))
print(peak(export_folder, sys.argv[3] + "/ours", sys.argv[3] + "/back"))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_a_small_multiple_of_the_largest_tensor(good, tmp_path) -> None:
    """Less than 4 times the largest tensor, both ways, for 15 times as much; pages of files can go and do not count."""
    wide = {
        "vocab_size": 11,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "layers_block_type": ["linear_attention", "mlp"] * 7,
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 64,
    }
    model_of("NemotronH", config_of("NemotronH", wide)).save_pretrained(tmp_path / "in")
    tensors = Tensors([tmp_path / "in" / "model.safetensors"])
    sizes = [4 * int(torch.Size(tensors.shape(n)).numel()) for n in tensors.names()]
    assert sum(sizes) > 15 * max(sizes)
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path / "in"), str(good / "NemotronH"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    peaks = [int(line) for line in run.stdout.split()]
    assert max(peaks) < 4 * max(sizes), (peaks, max(sizes))
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
