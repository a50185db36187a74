"""Texts beyond the trained length: what each policy makes of a model, layer by layer."""

import numpy as np
import pytest

from lcm import models
from lcm.decoding import Engine, fitted, generate
from lcm.decoding.context import extensions
from lcm.decoding.engine import Batch
from lcm.errors import UserError

from . import tiny

KINDS = [
    "model.pattern=full,local",
    "model.kinds.full.mixer=attention",
    "model.kinds.local.mixer=attention",
    "model.kinds.local.window=6",
]


def test_a_text_within_the_trained_length_is_left_alone():
    model = tiny.model()
    for policy in ("refuse", "slide", "config", "yarn"):
        assert fitted(model, tiny.TRAINED, policy) is model
    assert fitted(model, 99, "config") is model


def test_refusing_names_the_numbers():
    with pytest.raises(UserError) as error:
        fitted(tiny.model(), 33)
    assert str(error.value).startswith(
        "33 tokens of prompt and generation exceed the context of 32: lower max_new_tokens"
    )
    with pytest.raises(
        UserError, match="full='sliding' is unknown: choose from refuse, slide, con"
    ):
        fitted(tiny.model(), 3, "sliding")


WITHOUT = {
    "longrope": "longrope needs 4 positive ones",
    "reattention": "local=-4064 latest keys are fewer than the chunk=512",  # for more than 4096
}


@pytest.mark.quick(
    "linear",
    "dynamic_ntk",
    "yarn",
    "longrope",
    "self_extend",
    "dual_chunk",
    "lm_infinite",
    "reattention",
)
@pytest.mark.parametrize("name", extensions())
def test_extensions_by_name(name):
    """Each reads as it does when the config asks for it."""
    model = tiny.model()
    if name in WITHOUT:
        with pytest.raises(UserError, match=WITHOUT[name]) as error:
            fitted(model, 64, name)
        assert "\n" not in str(error.value)
        return
    longer = fitted(model, 64, name)
    (layer,) = models.spec(longer.cfg).layers
    assert layer.positions != models.spec(model.cfg).layers[0].positions
    assert layer.length == tiny.TRAINED
    tokens = tiny.tokens(64)[None]
    got, _ = models.apply(longer.cfg, longer.params, tokens)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("yarn", ["factor=2.0"]),
        ("linear", ["factor=2.0"]),
        ("dynamic_ntk", ["length=64"]),
        ("self_extend", ["window=16"]),
        ("streaming_llm", []),
    ],
)
def test_an_extension_is_what_the_config_says(name, fields):
    longer = fitted(tiny.model(), 64, name)
    own = [f"model.positions={name}", *(f"model.positions.{field}" for field in fields)]
    wanted = models.spec(tiny.model(*own).cfg).layers[0].positions
    assert models.spec(longer.cfg).layers[0].positions == wanted


def test_sliding_is_streaming_llm_with_a_ring():
    """Far beyond the context, with the memory of it."""
    model, prompt = tiny.model(), tiny.tokens(21, 3)
    options = {"max_new_tokens": 180, "temperature": 1.0, "seed": 2}
    (slid,) = generate(model, prompt, full="slide", engine={"chunk": 8}, **options)
    own = tiny.model("model.positions=streaming_llm")
    (asked,) = generate(own, prompt, full="config", engine={"chunk": 8}, **options)
    assert len(slid.tokens) == 180 and slid == asked
    (named,) = generate(model, prompt, full="streaming_llm", engine={"chunk": 8}, **options)
    assert named == slid
    request = tiny.request(21, 180, 3)
    machine = Engine(fitted(model, request.tokens, "slide"), chunk=8)
    batch = Batch(machine, [request])
    assert [layer.slots for kind in batch.state.layers for layer in kind] == [
        tiny.TRAINED - 1 + 8
    ] * 2


@pytest.mark.parametrize("policy", ["slide", "yarn", "self_extend"])
def test_layers_with_a_window_are_left_alone(policy):
    model = tiny.model(*KINDS)
    before, after = (models.spec(m.cfg).layers for m in (model, fitted(model, 64, policy)))
    assert after[1] == before[1] and after[0].positions != before[0].positions


def test_a_kind_without_the_window_of_the_model():
    model = tiny.model(
        "model.window=6", "model.pattern=attention,full",
        "model.kinds.full.mixer=attention", "model.kinds.full.window=0",
    )  # fmt: skip
    before, after = (models.spec(m.cfg).layers for m in (model, fitted(model, 64, "yarn")))
    assert after[0] == before[0] and type(after[1].positions).__name__ == "YaRN"


def test_layers_that_do_not_rotate_are_left_alone():
    model = tiny.model(*KINDS[:3], "model.kinds.local.positions=nope")
    before, after = (models.spec(m.cfg).layers for m in (model, fitted(model, 64, "yarn")))
    assert after[1] == before[1] and type(after[0].positions).__name__ == "YaRN"
    (text,) = generate(model, tiny.tokens(30), max_new_tokens=20, full="yarn")
    assert len(text.tokens) == 20


REFUSED = {
    "alibi": (["model.positions=alibi"], "full=yarn extends a rotary encoding .* has alibi"),
    "windows": (["model.window=6"], "full=yarn extends a rotary encoding in layers that see all"),
    "scaled": (
        ["model.positions=yarn"],
        "full=yarn scales a plain rotary encoding, this one is Ya",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_extended(name):
    assignments, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        fitted(tiny.model(*assignments), 64, "yarn")


def test_a_remap_of_a_scaled_rotation():
    model = tiny.model("model.positions=yarn", "model.positions.factor=2")
    (layer,) = models.spec(fitted(model, 64, "self_extend").cfg).layers
    assert type(layer.positions.rope).__name__ == "YaRN" and layer.positions.window == 16
