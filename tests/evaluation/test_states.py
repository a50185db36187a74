"""`lcm analyse` on runs with recurrent layers, from the checkpoint to the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import cli, evaluation, models
from lcm.evaluation import parts, states
from lcm.evaluation.results import STATES
from lcm.models import initial

from .runs import LENGTH, write_run


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A layer of attention, then one whose state is two arrays."""
    folder = tmp_path_factory.mktemp("runs") / "hybrid"
    return write_run(folder, "model.pattern=attention,s5", "data.length=16")


def test_a_hybrid_by_the_command_line_and_read_back(hybrid, capsys):
    assert cli.main(["analyse", str(hybrid), "--length", "40"]) == 0
    path = hybrid / "eval" / "states-step-0.json"
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrote {path}\n") and "Effective remembrance" in shown
    found = evaluation.load_analysis(path, STATES)
    assert found["settings"] == {"train_length": LENGTH, "length": 40, "rows": 8, "seed": 0}
    short, long = found["remembrance"]
    assert (short["length"], long["length"]) == (LENGTH, 40) and 40 - LENGTH in long["starts"]
    for entry in (short, long):
        assert entry["starts"] == sorted(entry["starts"]) and entry["starts"][0] == 0
        assert entry["distance"][0] == 0 and 0 < max(entry["distance"]) <= 1
    positions, lines = found["norms"]["positions"], found["norms"]["layers"]
    assert positions == list(range(1, 41))
    assert [(line["layer"], line["array"]) for line in lines] == [(1, "im"), (1, "re")]
    assert "layers of attention, s5 have no hidden" in found["distances"]["left_out"]

    model = evaluation.load(hybrid)
    documents = evaluation.heldout(model.cfg, model.tokenizer)
    rows = jnp.asarray(parts.text_rows(documents, 40, 8, 0).tokens_BL[:, :LENGTH])
    state = models.init_state(model.cfg, 8, LENGTH)
    _, state = models.apply(model.cfg, model.params, rows, state=state)
    for line, want_1BH in zip(lines, jax.tree.leaves(initial.norms(state)), strict=True):
        assert line["mean"][LENGTH - 1] == pytest.approx(float(want_1BH.mean()), abs=1e-5)
        largest = float(want_1BH[0].mean(0).max())
        assert line["largest"][LENGTH - 1] == pytest.approx(largest, abs=1e-5)


def test_distances_are_of_both_lengths(hybrid, monkeypatch):
    """Of layers by their place, as `lcm.models.distance` gives them."""
    given = {1: np.array([2.0, np.nan]), 3: np.array([0.5, 1.25])}
    monkeypatch.setattr(states, "mean_distances", lambda spec, params, tokens_BL: given)
    found = evaluation.analyse_model(evaluation.load(hybrid), 32)["distances"]
    layers = [{"layer": 1, "by_head": [2.0, None]}, {"layer": 3, "by_head": [0.5, 1.25]}]
    assert found == [{"length": length, "layers": layers} for length in (LENGTH, 32)]


def test_layers_without_a_state_leave_norms_out(tmp_path):
    model = evaluation.load(write_run(tmp_path / "conv", "model.pattern=gated_conv"))
    found = evaluation.analyse_model(model, LENGTH)
    assert found["kind"] == STATES and len(found["remembrance"]) == 1
    assert "no recurrent layer" in found["norms"]["left_out"]
    seen = 1 + model.cfg.model.depth * (model.cfg.model.conv - 1)
    distance = found["remembrance"][0]["distance"]
    assert 1 < seen < LENGTH and not any(distance[: LENGTH - seen + 1])
    assert distance[LENGTH - seen + 1] > 0


def test_states_are_looked_at_sixty_four_times_and_at_the_trained_length(hybrid, monkeypatch):
    def found(cfg, params, tokens_BL, every):
        asked.append((tokens_BL.shape[1], every))
        return [np.ones((tokens_BL.shape[1] // every, 1, 1, 1))] * 2

    asked, cfg = [], evaluation.load(hybrid).cfg
    monkeypatch.setattr(states, "state_norms", found)
    for length in (16, 100, 1000, 5000):
        states._norms(cfg, {}, np.zeros((1, length), np.int32))
    assert asked == [(16, 1), (100, 2), (992, 16), (4992, 16)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--length=8"], "--length=8 is shorter than the trained length 16"),
        (["--length=100000"], "no held-out document reaches --length=100000"),
        (["--config.model.pattern=s5"], "of another model: layers/0/"),
    ],
)
def test_what_cannot_be_analysed(words, says, hybrid, capsys):
    before = sorted(hybrid.rglob("*"))
    assert cli.main(["analyse", str(hybrid), *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert sorted(hybrid.rglob("*")) == before
