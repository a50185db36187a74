"""The experiment on pods: what it compiles can be, and a tiny run is whole and compiles once."""

import importlib.util
import json

import pytest

from lcm import config, reproduce
from lcm.aot import gate
from tests.aot.test_program import needs_libtpu


@pytest.fixture(scope="module")
def experiment():
    file = reproduce.FOLDER / "pods" / "experiment.py"
    spec = importlib.util.spec_from_file_location("pods", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_libtpu
def test_steps_have_meshes_of_their_chips(experiment):
    steps = [*experiment.LONG, *experiment.GROWTH, *experiment.BESIDE, *experiment.OTHERS]
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        cfg = config.override(
            config.load(f"{experiment.CONFIGS / step.model}.py:{step.arg}"), step.overrides
        )
        cfg = gate.with_mesh(cfg, step.mesh)
        mesh = gate.mesh_of(cfg, step.topology)
        tokens = cfg.train.batch * cfg.data.length
        if step not in experiment.BESIDE:
            assert tokens == (8192 * mesh.size if step in experiment.GROWTH else 2**20)
    sizes = [gate.topology.devices(step.topology) for step in experiment.GROWTH]
    assert (len(sizes[0]), len(sizes[-1])) == (4, 1024)


@pytest.mark.slow
@needs_libtpu
def test_a_tiny_run_is_whole_and_nothing_is_compiled_twice(experiment, tmp_path, monkeypatch):
    experiment.run(tmp_path, "tiny")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [p["tokens"] // p["length"] for p in results["growth"]] == [4, 8]
    assert all(p["sent"] and p["memory"] > p["arguments"] > 0 for p in results["growth"])
    (long,) = results["long"]
    assert long["host"] > 0 and long["mesh"] == {"fsdp": 2, "context": 2}
    drawn = (tmp_path / "growth.png").read_bytes()
    monkeypatch.setattr(gate, "measure", lambda *_: pytest.fail("it was compiled"))
    experiment.run(tmp_path, "tiny")
    assert (tmp_path / "growth.png").read_bytes() == drawn


def test_a_peer_compiles_the_same_steps(experiment):
    """Its figures are those of other programs for as many tokens on the same chips."""
    peers = json.loads(experiment.PEERS.read_text())
    for step, peer in zip(experiment.BESIDE, peers, strict=True):
        batch = int(step.overrides[0].removeprefix("train.batch="))
        assert peer["tokens"] == batch * int(step.arg or 8192)
        assert (peer["topology"], peer["side"]) == (step.topology, "MaxText")
        assert ",".join(f"{axis}={size}" for axis, size in peer["mesh"].items()) == step.mesh


def test_the_readme_has_the_figures_that_were_measured(experiment):
    folder = reproduce.FOLDER / "pods"
    readme, results = (folder / "README.md").read_text(), (folder / "results.json").read_text()
    for name, points in json.loads(results).items():
        assert experiment.markdown(experiment.table(name, points)) in readme
