"""The command line: what is wrong is said in one line, before anything is compiled or changed."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import pytest

from lcm import cli, config
from lcm.training import checkpoints, init_state, loop, optimizer, workdir

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"{ROOT}/configs/byte_lm.py:tiny"


class Compiled(Exception):
    """Training came as far as the step function."""


@pytest.fixture
def lcm(capsys, monkeypatch):
    """Runs a command in this process, where training ends before its step is made."""

    def stop(*arguments, **keywords):
        raise Compiled

    monkeypatch.setattr(loop, "make_step", stop)

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(lcm):
    """Runs a command that must fail with one line, which holds these texts."""

    def run(*argv: object, says: tuple[str, ...]) -> None:
        code, out, err = lcm(*argv)
        assert code == 2
        assert out == ""
        assert err.startswith("lcm: error: ") and err.count("\n") == 1, err
        for text in says:
            assert text in err

    return run


@pytest.fixture
def run_folder(tmp_path):
    """A workdir that somebody cares about; nothing in it may change."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "10").mkdir(parents=True)
    (folder / "checkpoints" / "10" / "array").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n')
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# Overrides of a valid config, and what the line must say: key, value, remedy.
OVERRIDES = {
    "unknown key": (["model.widht=64"], ["config.model.widht", "did you mean config.model.width?"]),
    "unknown group": (["modle.width=64"], ["config.modle.width", "config.model.width?"]),
    "unrelated key": (["qqq=1"], ["config.qqq", "lcm train --help"]),
    "key of a kind": (["model.kinds.a.haeds=2"], ["kinds.a.haeds", "config.model.kinds.a.heads?"]),
    "no key": (["=3"], ["config. is unknown"]),
    "wrong type": (["model.width=wide"], ["config.model.width='wide'", "int is wanted", "=32"]),
    "fraction": (["train.steps=2.5"], ["config.train.steps=2.5", "int is wanted"]),
    "truth": (["model.tied=1"], ["config.model.tied=1", "bool is wanted", "=True"]),
    "empty value": (["train.lr="], ["config.train.lr=''", "float is wanted"]),
    "no value": (["model.width"], ["--config.model.width assigns nothing", "=VALUE"]),
    "group": (["mesh=2"], ["mesh is a group", "mesh.fsdp"]),
    "tuple": (["eval.multiples=1,2.5"], ["config.eval.multiples=(1, 2.5)", "int", "1,2,4,8"]),
    "nested": (["eval.multiples=" + "(" * 5000], ["config.eval.multiples="]),
    "nan": (["train.lr=nan"], ["config.train.lr='nan'", "float is wanted"]),
    "infinite": (["train.lr=1e999"], ["config.train.lr=inf", "finite", "0.003"]),
    "negative rate": (["train.lr=-1e-3"], ["config.train.lr=-0.001", "at least 0", "0.003"]),
    "huge": (["train.steps=1e30"], ["config.train.steps=1000", "below 2147483648"]),
    "huge width": (["model.width=99999999999999999999"], ["model.width=99999999999999999999"]),
    "prime width": (["model.width=2147483647"], ["model.heads=2", "1, 2147483647"]),
    "negative": (["data.length=-1"], ["config.data.length=-1", "at least 1"]),
    "eps": (["model.norm_eps=-1"], ["config.model.norm_eps=-1.0", "at least 0", "1e-06"]),
    "multiples": (["eval.multiples=0"], ["config.eval.multiples=0", "at least 1", "1,2,4,8"]),
    "no multiples": (["eval.multiples="], ["config.eval.multiples is empty", "1,2,4,8"]),
    "beta": (["train.b1=1"], ["config.train.b1=1.0", "below 1"]),
    "seed": (["seed=-1"], ["config.seed=-1", "at least 0"]),
    "heads": (["model.heads=3"], ["model.heads=3", "model.width=32", "1, 2, 4, 8, 16, 32"]),
    "kv heads": (["model.heads=4", "model.kv_heads=3"], ["kv_heads=3", "1, 2, 4"]),
    "odd head": (["model.head_size=7"], ["model.head_size=7", "even"]),
    "learned table": (
        ["model.positions=learned", "model.positions.length=8"],
        ["model.positions.length=8", "data.length=32", "set it to 32 or more"],
    ),
    "positions": (["model.positions=ropee"], ["'ropee'", "nope, learned, sinusoidal"]),
    "chain": (["model.positions=rope+rope"], ["RoPE acts in attention", "put it last"]),
    "field": (["model.positions.bas=5"], ["model.positions.bas", "config.model.positions.base?"]),
    "pattern": (["model.pattern=attention,nope"], ["'nope'", "config.model.kinds.nope"]),
    "empty pattern": (["model.pattern="], ["config.model.pattern is empty"]),
    "long pattern": (["model.pattern=" + "attention," * 2 + "attention"], ["depth=2", "shorten"]),
    "kind": (["model.kinds.x=3"], ["config.model.kinds.x is unknown"]),
    "mixer": (["model.mixer=mamba9"], ["model.mixer='mamba9'", "attention"]),
    "mixer of no layer": (["model.mixer=gla"], ["model.mixer=gla", "--config.model.pattern=gla"]),
    "mesh": (["mesh.fsdp=3"], ["fsdp 3", f"{jax.device_count()} devices", "-1"]),
    "mesh of nothing": (["mesh.data=0"], ["data 0", "positive"]),
    "microbatch": (["train.accumulate=3"], ["train.batch=8", "train.accumulate=3", "batch of 9"]),
    "warm-up": (["train.warmup=21"], ["train.warmup=21", "train.steps=20"]),
    "optimiser": (["train.optimizer=sgd"], ["'sgd'", "adamw, muon"]),
    "dtype": (["model.dtype=int8"], ["model.dtype='int8'", "float32, bfloat16"]),
    "vocabulary": (["model.vocab=100"], ["model.vocab=100", "257", "--config.model.vocab=320"]),
    "packing": (["data.packing=tight"], ["data.packing='tight'", "concat, first_fit, best_fit"]),
    "source": (["data.source=web"], ["data.source='web'", "stdlib, text, jsonl"]),
    "tokenizer": (["data.tokenizer=gone.json"], ["gone.json does not exist", "'bytes'"]),
    "no files": (["data.source=text"], ["data.paths is empty", "name a file or a glob"]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_override_that_cannot_work(name, refused, run_folder):
    assignments, says = OVERRIDES[name]
    words = [f"--config.{assignment}" for assignment in assignments]
    refused("train", "--config", TINY, "--workdir", run_folder, *words, says=tuple(says))


def test_batch_that_two_devices_cannot_share(run_folder):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    words = ["train", "--config", TINY, "--workdir", run_folder, "--config.train.batch=7"]
    done = python_m_lcm(*words, **flags)
    assert done.returncode == 2 and done.stdout == ""
    assert "train.batch=7 is not divisible by 2 (mesh.data 2" in done.stderr
    assert "take 8" in done.stderr and done.stderr.count("\n") == 1


# Files of a corpus, the source that reads them, and what the line must say.
CORPORA = {
    "empty": ("a.txt", b"", "text", ["the corpus is empty", "a.txt", "name files"]),
    "not UTF-8": ("a.txt", b"caf\xe9 " * 9, "text", ["a.txt is not UTF-8 at byte 3", "iconv"]),
    "no field": ("a.jsonl", b'{"body": "x"}\n' * 99, "jsonl", ["line 1", "'text'", "'body'"]),
    "not JSON": ("a.jsonl", b'{"text": "x"}\n' * 99 + b"{oops", "jsonl", ["line 100", "not JSON"]),
    "no object": ("a.jsonl", b"[1]\n", "jsonl", ["line 1", "a list"]),
    "number": ("a.jsonl", b'{"text": 3}\n', "jsonl", ["line 1", "not a string but a number"]),
    "one text": ("a.txt", b"short", "text", ["heldout split is empty", "data.heldout=0"]),
    "parquet": ("a.parquet", b"PAR1", "parquet", ["a.parquet cannot be read as Parquet"]),
}


@pytest.mark.parametrize("name", CORPORA)
def test_corpus_that_cannot_be_read(name, refused, run_folder, tmp_path):
    file, raw, source, says = CORPORA[name]
    (tmp_path / file).write_bytes(raw)
    words = [f"--config.data.source={source}", f"--config.data.paths={tmp_path / file}"]
    refused("train", "--config", TINY, "--workdir", run_folder, *words, says=tuple(says))


def test_corpus_that_is_not_there(refused, run_folder, tmp_path):
    words = ["--config.data.source=text", f"--config.data.paths={tmp_path}/*.txt"]
    says = ("no file matches", "check the pattern")
    refused("train", "--config", TINY, "--workdir", run_folder, *words, says=says)


# Config files, and what the line must say.
BASE = "from lcm import config\ndef get_config(arg=''):\n    c = config.base()\n"
CONFIGS = {
    "syntax": ("def get_config(:\n", ["is not Python", "line 1"]),
    "zeros": ("\0", ["is not Python"]),
    "no function": ("", ["defines no get_config(arg)"]),
    "no argument": (BASE.replace("arg=''", ""), ["fails", "TypeError"]),
    "raises": (
        BASE + "    raise ValueError('first\\nsecond')",
        ["line 4", "ValueError: first sec"],
    ),
    "import": ("import nothing_of_this_name", ["line 1", "ModuleNotFoundError"]),
    "none": (BASE, ["returns NoneType", "lcm.config.base()"]),
    "dictionary": ("def get_config(arg): return {'a': 1}", ["returns dict", "lcm.config.base()"]),
    "type": (BASE + "    c.model.width = 'wide'", ["line 4", "width", "wide"]),
    "key": (
        BASE + "    c.model.wdth = 3\n    return c",
        ["config.model.wdth", "did you mean config.model.width?"],
    ),
    "missing": (BASE + "    del c.model.width\n    return c", ["config.model.width is missing"]),
    "name of an encoding": (
        BASE + "    with c.ignore_type(): c.model.positions = 'alibi'\n    return c",
        ["config.model.positions='alibi'", "lcm.positions.config('rope')"],
    ),
    "nan": (BASE + "    c.train.lr = float('nan')\n    return c", ["config.train.lr=nan", "0.003"]),
    "kind": (
        BASE + "    c.model.kinds = {'a': 3}\n    return c",
        ["config.model.kinds.a=3", "--config.model.kinds.a.KEY=VALUE"],
    ),
    "key of a kind": (
        BASE
        + "    c.model.kinds = {'a': {'width': 3}}\n    c.model.pattern = ('a',)\n    return c",
        ["model.kinds.a.width is not a key of a layer", "heads"],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_that_cannot_work(name, refused, run_folder, tmp_path):
    text, says = CONFIGS[name]
    (tmp_path / "mine.py").write_text(text)
    refused("train", "--config", tmp_path / "mine.py", "--workdir", run_folder, says=tuple(says))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (f"{ROOT}/configs/byte.py", ["configs/byte.py does not exist", "configs/byte_lm.py"]),
        (f"{ROOT}/configs", ["configs does not exist"]),
        ("x" * 300, ["does not exist"]),
        (f"{TINY}x", ["'tinyx' is unknown", "use tiny"]),
        (f"{ROOT}/configs/quickstart.py:rope,small", ["'small' is unknown", "use tiny"]),
        ("", ["needs --config FILE.py[:ARG]", "configs/byte_lm.py:tiny"]),
    ],
)
def test_config_that_is_not_there(spec, says, refused, run_folder):
    refused("train", "--config", spec, "--workdir", run_folder, says=tuple(says))


def test_workdir_that_cannot_be_one(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        says = (f"workdir {folder} cannot be written", "choose another --workdir")
        refused("train", "--config", TINY, "--workdir", folder, says=says)
    assert (tmp_path / "file").read_text() == "mine"
    refused("train", "--config", TINY, "--workdir", "", says=("--workdir: the path is empty",))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tarin"], ["'tarin'", "train", "lcm --help"]),
        (["train", "--confg", "x"], ["--confg"]),
        (["train", "--config"], ["--config: expected one argument", "lcm train --help"]),
        (["train"], ["needs --config"]),
        (["evaluate"], ["WORKDIR", "lcm evaluate --help"]),
        (["evaluate", "gone"], ["'gone' is no path, and no model is called so", "lcm train"]),
        (["analyse"], ["WORKDIR", "lcm analyse --help"]),
        (["analyse", "gone"], ["'gone' is no path, and no model is called so", "lcm train"]),
        (["report"], ["WORKDIR", "lcm report --help"]),
        (["report", "gone"], ["gone does not exist"]),
        (["report", "gone", "--config.seed=1"], ["lcm report takes no --config.KEY=VALUE"]),
        (["reproduce"], ["name"]),
        (["reproduce", "warp"], ["'warp' is unknown", "quickstart"]),
        (["reproduce", "../warp"], ["'../warp' is unknown", "quickstart"]),
        (["reproduce", "quickstart", "--scale", "pod"], ["--scale=pod", "cpu or tiny"]),
    ],
)
def test_command_that_cannot_work(words, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*words, says=tuple(says))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", ["holds no readable config.json"]),
        ("[]", ["holds no readable config.json"]),
        ("{}", ["config.json: config.name is missing"]),
        ('{"model": 3}', ["config.json: config.model is unknown"]),
    ],
)
def test_folder_of_another_program(text, says, refused, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(text)
    refused("evaluate", tmp_path / "other", says=tuple(says))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run with a table of 32 positions, as if trained for no step."""
    folder = tmp_path_factory.mktemp("learned")
    cfg = config.override(config.load(TINY), ["model.positions=learned", "train.clip=0"])
    state = init_state(loop.models.spec(cfg), optimizer(cfg.train), jax.random.key(0), 0.0)
    workdir.write_config(folder, cfg)
    writer = checkpoints.Writer(folder, keep=1)
    writer.save(state, {}, workdir.to_dict(cfg))
    writer.finish()
    writer.close()
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("eval.multiples=1,2", ["length 64", "table of 32 positions", "positions.length=64"]),
        ("eval.multiples=0", ["config.eval.multiples=0", "at least 1"]),
        ("eval.multiples=1 eval.tokens=10", ["tokens 10", "longest length, 32", "to 32 or more"]),
        ("model.width=64", ["embedding/table is (320, 32)", "(320, 64)", "positions or window"]),
        ("model.depth=4", ["layers/0", "(2, ", "(4, "]),
        ("model.tied=False", ["head/kernel is absent"]),
        ("model.wdith=3", ["config.model.wdith", "config.model.width?"]),
    ],
)
def test_evaluation_that_does_not_fit_the_run(overrides, says, refused, learned):
    words = [f"--config.{override}" for override in overrides.split()]
    refused("evaluate", learned, *words, says=tuple(says))


def test_what_is_told_of_an_evaluation_is_what_it_measured(learned, tmp_path, capsys):
    """With overrides as well, whose result stands beside that of the run as it was trained."""
    run, told = shutil.copytree(learned, tmp_path / "run"), []
    for words in ([], ["--config.model.window=1"]):
        few = ["--config.eval.multiples=1", "--config.eval.tokens=256"]
        assert cli.main(["evaluate", str(run), *few, *words]) == 0
        told.append(capsys.readouterr().out)
    result = json.loads((run / "eval" / "step-0-model.window=1.json").read_text())
    loss = f"{result['lengths'][0]['loss']['value']:.3f}"
    assert loss in told[1] and loss not in told[0]


def test_valid_configs_reach_the_step(lcm, tmp_path):
    """So the errors above came before it; and overrides are taken, the later ones over earlier."""
    words = ["--config.model.width", "48", "--config.model.heads=6", "--config.model.heads", "3"]
    words += ["--config.train.lr=1", "--config.train.steps=1e3", "--config.name", "a=b"]
    with pytest.raises(Compiled):
        lcm("train", "--config", TINY, "--workdir", tmp_path / "run", *words)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["model"]["width"] == 48 and written["model"]["heads"] == 3
    assert written["train"]["lr"] == 1.0 and written["train"]["steps"] == 1000
    assert written["name"] == "a=b"


def test_help_lists_every_key_with_its_meaning(lcm):
    code, out, err = lcm("train", "--help")
    assert code == 0 and err == ""
    lines = out.splitlines()
    for key, meaning, _ in config.describe(config.base()):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"  --config.{key}="))
        assert lines[place + 1].strip() == meaning
    assert "nope, learned, sinusoidal" in out


def test_help_shows_the_config_and_its_overrides(lcm):
    words = ["--config.model.positions=learned", "--config.train.lr=0.5"]
    _, out, _ = lcm("train", "--help", "--config", TINY, *words)
    assert "--config.data.length=32\n" in out and "--config.train.lr=0.5\n" in out
    assert "--config.model.positions=learned\n" in out
    assert "--config.model.positions.std=0.02\n      field of learned\n" in out


def test_no_command_shows_the_help(lcm):
    code, out, _ = lcm()
    assert code == 2
    assert all(name in out for name in ("train", "evaluate", "analyse", "report", "reproduce"))


def python_m_lcm(*words: object, **environment: str) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "lcm", *map(str, words)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(run, cwd=ROOT, env=settings, capture_output=True, text=True)


def test_error_as_a_process(tmp_path):
    words = ["train", "--config", "gone.py", "--workdir", tmp_path / "run"]
    done = python_m_lcm(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "lcm: error: config gone.py does not exist: check the path\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "lcm"], [str(pathlib.Path(sys.executable).with_name("lcm"))]]
)
def test_help_answers_at_once(command):
    if not shutil.which(command[0]):
        pytest.skip("lcm is not installed beside this Python")
    taken = []
    for _ in range(3):
        begun = time.monotonic()
        done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
        taken.append(time.monotonic() - begun)
        assert done.returncode == 0 and "reproduce" in done.stdout
    assert min(taken) < 1


def test_help_imports_no_jax():
    code = (
        "import sys; from lcm.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'jax', 'flax', 'numpy', 'ml_collections'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
