"""The compile gate: what it reports of a small config, what it refuses, and what it notices."""

import json

import pytest

from lcm import cli, config, models
from lcm.aot import gate, kernels
from lcm.errors import CompileError, ConfigError, UserError
from tests.aot.test_program import needs_libtpu

SMALL = [
    "model.width=256",
    "model.depth=2",
    "model.heads=2",
    "model.dtype=bfloat16",
    "data.length=256",
    "train.batch=8",
]


@pytest.fixture
def cfg():
    return config.override(config.base(), SMALL)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "from lcm import config\n\n\ndef get_config(arg=''):\n"
        f"    return config.override(config.base(), {SMALL})\n"
    )
    return path


@needs_libtpu
def test_the_command_writes_what_it_measures_and_keeps_to_its_budget(file, tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ["compile", "--config", str(file), "--topology", "v5e:2x2", "--mesh", "fsdp=4"]
    assert cli.main([*command, "--json", str(out), "--record"]) == 0
    shown = capsys.readouterr().out
    reports = json.loads(out.read_text())
    assert [r["step"] for r in reports] == ["train", "prefill", "decode"]
    train, _, decode = reports
    assert all(r["fits"] and r["headroom"] == r["capacity"] - r["memory"] for r in reports)
    assert train["mesh"] == {"fsdp": 4} and train["tokens"] == 8 * 256 and decode["tokens"] == 8
    assert train["collectives"] and train["bound"]["bottleneck"] in train["bound"]
    # All parameters and two moments of each, in float32 over 4 devices.
    small = config.load(str(file))
    parameters = models.parameter_count(small)
    assert 3 * parameters <= train["arguments"] < 3.3 * parameters
    model = sum(train["parts"].values())
    assert model == pytest.approx(models.flops_per_token(small, 256) * 8 * 256)
    assert 0.8 * model < train["flops"] < 1.5 * model  # tiles of the mask that are half empty
    # Alone: the forward pass, and the gradients of queries and of keys; in a loop over 2 layers.
    forward, queries, keys = train["kernels"]
    assert (forward["name"], forward["runs"]) == ("attention_forward", 2)
    assert [each["runs"] for each in (queries, keys)] == [2, 2]
    alone = sum(each["runs"] * each["flops"] for each in train["kernels"])
    assert 0 < alone < train["flops"] / 4 and forward["schedule"] is None
    assert "fits" in shown and "a roofline, not a measurement" in shown

    assert cli.main([*command, "--steps=decode", "--check"]) == 0
    budget = gate.budget_file(str(file))
    known = json.loads(budget.read_text())
    key = next(key for key in known if key.endswith("decode"))
    known[key]["memory"] = round(known[key]["memory"] / 1.06)
    budget.write_text(json.dumps(known))
    capsys.readouterr()
    assert cli.main([*command, "--steps=decode", "--check"]) == 1
    assert "decode: memory" in capsys.readouterr().out


@needs_libtpu
def test_kernels_have_schedules(cfg):
    cfg = gate.with_mesh(cfg, "fsdp=4")
    (forward,) = kernels.scheduled(cfg, "prefill", "v5e:2x2")
    assert forward.runs == 2 and forward.schedule.matmuls and forward.schedule.bundles > 100
    cfg.model.backend = "blockwise"
    assert kernels.scheduled(cfg, "prefill", "v5e:2x2") == ()


@pytest.mark.slow
@needs_libtpu
def test_a_square_temporary_is_found(cfg):
    cfg = config.override(cfg, ["data.length=1024", "model.backend=reference", "train.batch=4"])
    cfg = gate.with_mesh(cfg, "fsdp=4")
    report = gate.measure(cfg, "train", "v5e:2x2", gate.mesh_of(cfg, "v5e:2x2"))
    assert any(found.startswith("square-array") for found in report.findings)


@needs_libtpu
def test_meshes_of_a_sweep_divide_the_sizes(cfg):
    tried = list(gate.candidates(cfg, "v5e:2x2", ("dots",)))
    meshes = [tuple(c.mesh[a] for a in ("data", "fsdp", "context", "tensor")) for c in tried]
    assert (1, 4, 1, 1) in meshes and (1, 2, 1, 2) in meshes
    assert all(tensor <= 2 for *_, tensor in meshes)  # two heads
    assert len(set(meshes)) == len(meshes)


def refused(*words, match):
    with pytest.raises((CompileError, ConfigError, UserError), match=match):
        args = cli._parser().parse_args(["compile", *words])
        gate.run(args, [])


@needs_libtpu
def test_what_cannot_be_is_refused_before_compilation(file, monkeypatch):
    monkeypatch.setattr(gate, "measure", lambda *_: pytest.fail("it was compiled"))
    given = "--config", str(file), "--topology"
    refused(*given, "v5e:3x5", match="v5e:3x5.*v5p:2x2x1")
    refused(*given, "v9:2x2", match="v9:2x2.*v5p")
    refused(*given, "v5e:2x2", "--mesh=fsdp=3", match="fsdp 3.*4 devices")
    refused(*given, "v5e:2x2", "--mesh=fspd=4", match="fspd=4.*data, fsdp, context, tensor")
    refused(*given, "v5e:2x2", "--mesh=fsdp=4", "--steps=tran", match="tran.*train, prefill")
    refused(*given, "v5e:4x4", "--mesh=fsdp=16", match="train.batch=8 is not divisible by 16")


@needs_libtpu
def test_a_budget_that_is_not_there_is_named(file, cfg):
    cfg = gate.with_mesh(cfg, "fsdp=4")
    report = gate.measure(cfg, "decode", "v5e:2x2", gate.mesh_of(cfg, "v5e:2x2"))
    with pytest.raises(UserError, match=r"no budget of '- v5e:2x2 fsdp=4 none decode'.*--record"):
        gate.drifts(str(file), report)


def test_without_libtpu_it_says_so(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("--config", str(file), "--topology", "v5e:2x2", match="libtpu.*pip install")
