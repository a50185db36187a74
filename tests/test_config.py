"""Configs: every key known, typed and described; what is written comes back; what ships works."""

import pathlib

import hypothesis.strategies as st
import jax
import pytest
from hypothesis import given, settings
from ml_collections import ConfigDict

from lcm import config, models, positions, training
from lcm.errors import ConfigError
from lcm.training import workdir

ROOT = pathlib.Path(__file__).parents[1]
KEYS = {key: value for key, _, value in config.describe(config.base())}
DEFAULTS = {key: value for key, value in config._flat(config.base()) if key in KEYS}

# Every config that ships, with the arguments of its full and of its small variant.
SHIPPED = [("byte_lm.py", "", "tiny")]
SHIPPED += [("quickstart.py", "", "tiny")]
SHIPPED += [("task.py", "", "tiny"), ("task.py", "addition", "addition,train=1-4,tiny")]
PATTERNS = "irope", "rnope_swa", "smollm3"
SHIPPED += [("interleaved.py", name, f"{name},tiny") for name in PATTERNS]
MATRIX = "mamba2", "retnet", "gla", "gated_deltanet", "kda", "mlstm", "delta_hybrid"
MATRIX += "mamba3", "rwkv4", "rwkv6", "rwkv7", "zamba2", "mamba3_mimo"
SHIPPED += [("recurrent.py", name, f"{name},tiny") for name in MATRIX]
SHAPES = "llama3_1b", "llama3_8b", "llama3_70b", "mamba2_2p7b", "recurrentgemma_9b", "samba_1p3b"
SHIPPED += [(f"{name}.py", "", "tiny") for name in SHAPES]
VECTORS = "mamba1", "hawk", "griffin", "samba", "jamba", "jamba_experts", "lfm2"
SHIPPED += [("recurrent.py", name, f"{name},tiny") for name in VECTORS]
SHIPPED += [("quickstart.py", name, f"{name},tiny") for name in ("rope", "nope", "alibi")]


def shipped(file: str, argument: str) -> ConfigDict:
    return config.load(f"{ROOT}/configs/{file}:{argument}")


def test_every_shipped_config_is_tested():
    assert {file.name for file in (ROOT / "configs").glob("*.py")} == {name for name, *_ in SHIPPED}


@pytest.mark.parametrize(("file", "full", "tiny"), SHIPPED)
def test_shipped_config_is_valid(file, full, tiny):
    cfg = shipped(file, full)
    training.check(cfg)
    params = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
    assert models.parameter_count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(params))
    small = shipped(file, tiny)
    training.check(small)
    assert small.train.steps * small.train.batch * small.data.length < 10_000
    assert models.parameter_count(small) < 100_000
    assert small.model.positions.to_dict() == cfg.model.positions.to_dict()


@pytest.mark.parametrize(("file", "full", "_"), SHIPPED)
def test_docstring_of_a_shipped_config_tells_the_truth(file, full, _):
    """The parameters and tokens that it promises are those it has."""
    cfg, text = shipped(file, full), (ROOT / "configs" / file).read_text()
    tokens = cfg.train.steps * cfg.train.batch * cfg.data.length
    assert f"{models.parameter_count(cfg) / 1e6:.1f}M parameters" in text
    assert f"{tokens / 1e6:.1f}M tokens" in text


def test_one_layer_in_eight_of_jamba_is_attention():
    kinds = [layer.mixer for layer in models.spec(shipped("recurrent.py", "jamba")).layers]
    assert [n for n, mixer in enumerate(kinds) if mixer != "mamba1"] == [4] and len(kinds) == 8
    attention, mamba = (models.spec(shipped("recurrent.py", "jamba")).layers[n] for n in (4, 0))
    assert attention.mixer == "attention" and type(attention.positions).__name__ == "NoPE"
    assert mamba.option("normed") and not attention.window


def test_the_smaller_samba_has_the_parameters_of_its_name():
    """`Samba_421M` of the authors' configs: the same but for sizes."""
    small = ["model.depth=12", "model.width=1536", "model.heads=12", "model.hidden=4096"]
    cfg = config.override(shipped("samba_1p3b.py", ""), small)
    assert models.parameter_count(cfg) // 10**6 == 421


def test_base_is_valid_and_fresh():
    cfg = config.base()
    training.check(cfg)
    cfg.model.width = 64
    assert config.base().model.width != 64


def test_a_backend_of_another_platform_is_refused():
    cfg = config.override(config.base(), ["model.backend=pallas"])
    with pytest.raises(ConfigError, match=r"pallas runs on tpu, this is a cpu: set .*backend=auto"):
        training.check(cfg)


def test_described_are_all_keys_in_order():
    rows = config.describe(config.base())
    keys = [key for key, _, _ in rows]
    assert len(set(keys)) == len(keys)
    flat = [k.removesuffix(".name") for k, _ in config._flat(config.base())]
    assert sorted(keys) == sorted(flat)
    assert all(meaning and "\n" not in meaning for _, meaning, _ in rows)
    learned = config.override(config.base(), ["model.positions=learned"])
    described = {key: value for key, _, value in config.describe(learned)}
    assert described["model.positions"] == "learned"
    assert described["model.positions.length"] == 0 and "model.positions.base" not in described


def test_override_leaves_the_original_alone():
    cfg = config.base()
    before = cfg.to_dict()
    changed = config.override(cfg, ["model.width=64", "model.positions=alibi"])
    assert cfg.to_dict() == before
    assert changed.model.width == 64 and changed.model.positions.name == "alibi"


def test_overrides_count_in_their_order():
    cfg = config.override(config.base(), ["train.steps=5", "train.steps=7"])
    assert cfg.train.steps == 7
    words = ["model.positions.base=5e5", "model.positions=alibi", "model.positions=rope"]
    assert config.override(config.base(), words).model.positions.base == 10_000.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr=1", 1.0),
        ("train.steps=1e3", 1000),
        ("model.tied=false", False),
        ("model.tied=True", True),
        ("eval.multiples=1,2", (1, 2)),
        ("eval.multiples=3", (3,)),
        ("eval.multiples=(1, 2)", (1, 2)),
        ("eval.multiples=[1, 2]", (1, 2)),
        ("model.pattern=attention, attention", ("attention", "attention")),
        ("data.paths=", ""),
        ("data.paths=a=b,c", "a=b,c"),
        ("name=3", "3"),
    ],
)
def test_values_as_they_are_written(text, value):
    group, _, rest = text.partition(".")
    cfg = config.override(config.base(), [text])
    found = cfg[group][rest.partition("=")[0]] if rest else cfg.name
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("key", ["model.positions", "model.positions.name"])
def test_positions_by_name(key):
    for name in ("rope", "nope", "alibi", "learned", "sinusoidal", "countdown", "countdown+rope"):
        entry = config.override(config.base(), [f"{key}={name}"]).model.positions
        assert entry.to_dict() == positions.config(name)
        assert positions.make(entry) == positions.make(positions.config(name))


def test_every_fourth_layer_otherwise():
    """A pattern and its kinds from the command line alone: NoPE in layers 4 and 8, RoPE before."""
    words = [
        "model.depth=8",
        "model.pattern=attention,attention,attention,nope",
        "model.kinds.nope.mixer=attention",
        "model.kinds.nope.positions=nope",
    ]
    spec = models.spec(config.override(config.base(), words))
    names = [type(layer.positions).__name__ for layer in spec.layers]
    assert names == ["RoPE", "RoPE", "RoPE", "NoPE"]
    assert (spec.rounds, spec.rest) == (2, 0)
    assert {layer.heads for layer in spec.layers} == {4}


def test_kinds_have_fields_of_their_own():
    words = [
        "model.pattern=attention,local",
        "model.kinds.local.window=64",
        "model.kinds.local.positions=rope",
        "model.kinds.local.positions.base=500",
        "model.kinds.local.kv_heads=1",
    ]
    cfg = config.override(config.base(), words)
    everywhere, local = models.spec(cfg).layers
    assert (everywhere.window, everywhere.positions.base, everywhere.kv_heads) == (0, 10_000.0, 4)
    assert (local.window, local.positions.base, local.kv_heads) == (64, 500.0, 1)
    with pytest.raises(ConfigError, match=r"config\.model\.kinds\.local\.window='wide'.*int"):
        config.override(cfg, ["model.kinds.local.window=wide"])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.positions=countdown+rope", "model.positions.second.base=500000"],
        ["model.pattern=attention,a", "model.kinds.a.positions=nope", "model.kinds.a.window=8"],
        ["eval.multiples=1", "data.paths=a,b", "model.norm_eps=1e-05", "seed=4294967295"],
    ],
)
def test_config_comes_back_from_its_file(words, tmp_path):
    cfg = config.override(config.base(), words)
    assert workdir.write_config(tmp_path, cfg) == []
    back = workdir.read_config(tmp_path)
    assert back.to_dict() == cfg.to_dict()
    assert models.spec(back) == models.spec(cfg)
    for (key, value), (_, other) in zip(config._flat(cfg), config._flat(back), strict=True):
        assert type(value) is type(other), key
    # and it is then still a config whose keys have types
    assert config.override(back, ["train.lr=1"]).train.lr == 1.0


def test_python_that_spoils_a_config_is_refused_too():
    cfg = config.base()
    cfg.train.lr = float("inf")
    with pytest.raises(ConfigError, match=r"config\.train\.lr=inf must be .* such as .* 0\.003"):
        training.check(cfg)
    cfg = config.base()
    cfg.train.learning_rate = 1.0
    with pytest.raises(ConfigError, match=r"config\.train\.learning_rate is unknown"):
        training.check(cfg)


# Values that a key of each type takes, written as on a command line. The keys of a kind of values
# that only some numbers fit (shares, sizes) take those numbers alone.
COUNTS = st.integers(1, 2**31 - 1)
SHARES = st.floats(0, 1, exclude_max=True, allow_subnormal=False)
WORDS = st.text(st.characters(exclude_categories=["C"]), max_size=20)
FITTING = {bool: st.booleans(), int: COUNTS, float: SHARES, str: WORDS}
TYPED = sorted(key for key, value in DEFAULTS.items() if type(value) in FITTING)


def value_of(cfg: ConfigDict, key: str) -> object:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(TYPED), st.data())
def test_any_value_of_its_type_is_taken(key, data):
    value = data.draw(FITTING[type(DEFAULTS[key])])
    cfg = config.override(config.base(), [f"{key}={value}"])
    found = value_of(cfg, key)
    assert found == value and type(found) is type(value)
    others = {k: v for k, v in config._flat(cfg) if k != key}
    assert others == {k: v for k, v in config._flat(config.base()) if k != key}


# Texts that are no value of a type.
WRONG = {
    bool: st.sampled_from(["1", "0", "yes", "no", "", "None", "[]"]),
    int: st.one_of(
        st.floats(0.01, 0.99).map(str), WORDS.map(lambda s: f"x{s}"), st.sampled_from(["True", ""])
    ),
    float: st.one_of(
        WORDS.map(lambda s: f"x{s}"), st.sampled_from(["True", "nan", "1,2", "", "1e999"])
    ),
}
REFUSED = sorted(key for key, value in DEFAULTS.items() if type(value) in WRONG)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(REFUSED), st.data())
def test_any_value_of_another_type_is_refused_by_name(key, data):
    text = data.draw(WRONG[type(DEFAULTS[key])])
    with pytest.raises(ConfigError) as caught:
        config.override(config.base(), [f"{key}={text}"])
    assert f"config.{key}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_slip_of_the_pen_finds_its_key(key):
    """The last letter doubled: the error names the key that was meant."""
    slip = key + key[-1]
    with pytest.raises(ConfigError, match=rf"config\.{slip} is unknown: did you mean") as caught:
        config.override(config.base(), [f"{slip}=1"])
    assert f"did you mean config.{key}?" in str(caught.value)


def test_the_config_of_an_earlier_version_has_defaults_for_what_it_lacks():
    cfg = config.base()
    cfg.model.width = 64
    del cfg.model.norm, cfg.train.placement
    whole = config.with_defaults(cfg)
    config.check_keys(whole)
    assert (whole.model.width, whole.model.norm) == (64, "rms")
    assert whole.train.placement == config.base().train.placement
    assert not config.with_defaults(type(cfg)({}))
