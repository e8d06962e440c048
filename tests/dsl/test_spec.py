"""Declarations as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heddle.dsl.load import load, load_text, shipped_folder, standard_file, standard_index
from heddle.dsl.spec import BlockSpec, FileSpec, ModelSpec, describe, schema

SHIPPED = sorted(p for p in shipped_folder().rglob("*.spec") if p.parent.name != "std")
STANDARD = sorted({p.stem: name for name, p in standard_index().items()}.values())


def _round_trips(spec: FileSpec) -> None:
    assert FileSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_specs_round_trip_through_json(path: Path) -> None:
    _round_trips(describe(load(path)))


@pytest.mark.parametrize("name", STANDARD)
def test_standard_specs_round_trip_through_json(name: str) -> None:
    file = standard_file(name)
    assert file is not None
    spec = describe(file)
    assert name in [d.name for d in spec.declarations]
    _round_trips(spec)


TEXT = """
## Two matrices.
block pair(ffn, act = relu2):
    x[hidden]
    mark[hidden = 4]: mask? = none
    if act:
        up = linear(x, hidden -> ffn)
    else:
        up = linear(x,
                    hidden -> ffn)
    return linear(act(up), ffn -> hidden)

model tiny(vocab = 11, hidden = 64):
    tokens[batch, seq]: token
    seq.valid: coordinate?
    x = embed(tokens, vocab -> hidden)
    for layer in 3:
        x = pair(x, 2 * hidden)
    return x

model tinier = tiny(hidden = 8) with:
    pair.up: lora(it, rank = 2)

pipeline ask(lm):
    question: text
    return generate(lm, prompt = "{question}")

recipe run(data): return train(tiny, data)

precision half:
    storage = bf16
    linear in pair: fp8

layout one:
    mesh data = 2
    in pair:
        mesh tensor = 2

checkpoint huggingface "Tiny" for tiny:
    hidden = config.hidden_size
    ignore "extra"
"""


def test_every_kind_of_declaration() -> None:
    spec = describe(load_text(TEXT, "tiny.spec"))
    _round_trips(spec)
    kinds = [d.keyword for d in spec.declarations]
    assert kinds == ["block", "model", "variant", "pipeline", "recipe", "precision", "layout", "checkpoint"]

    block, model, variant = spec.declarations[:3]
    assert isinstance(block, BlockSpec)
    assert (block.doc, block.place) == ("Two matrices.", "tiny.spec:3:7")
    assert [(p.name, p.default) for p in block.parameters] == [("ffn", None), ("act", "relu2")]
    mark = block.inputs[1]
    assert (mark.kind, mark.optional, mark.default) == ("mask", True, "none")
    assert mark.dims is not None
    assert (mark.dims[0].name, mark.dims[0].size) == ("hidden", "4")
    assert [s.kind for s in block.statements] == ["if", "return"]
    assert [s.kind for s in block.statements[0].body] == ["branch", "else"]

    assert isinstance(model, ModelSpec)
    assert [c.name for c in model.coordinates] == ["seq.valid"]
    assert model.statements[1].text == "for layer in 3"
    assert model.statements[1].body[0].text == "x = pair(x, 2 * hidden)"
    assert variant.keyword == "variant"
    assert variant.of == "model"
    assert variant.value == "tiny(hidden = 8)"


def test_schema_is_json_and_names_every_declaration() -> None:
    text = json.dumps(schema())
    for name in ("BlockSpec", "ModelSpec", "PipelineSpec", "RecipeSpec", "PrecisionSpec", "LayoutSpec", "VariantSpec",
                 "CheckpointSpec"):  # fmt: skip
        assert name in text
