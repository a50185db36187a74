"""Exact match without generation is exact match with it; studies are run once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import lcm
from lcm import config, positions
from lcm.data import tasks
from lcm.errors import ConfigError
from lcm.evaluation import curves, exact_match, generalization
from lcm.evaluation.statistics import wilson
from lcm.training import seeds

SPEC = "copy_rsc,train=2-4,test=5-8,symbols=4"
TASK = tasks.make(SPEC)


def settings(*overrides):
    small = ("model.width=32", "model.depth=2", "model.heads=2", "model.vocab=32")
    steps = ("train.steps=300", "train.warmup=10", "train.batch=8", "train.lr=0.01")
    data = (f"data.source=task:{SPEC}", f"data.tokenizer=task:{SPEC}", "data.length=32")
    return config.override(config.base(), [*small, *steps, *data, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that copies short strings and sometimes longer ones."""
    cfg = settings("model.positions=nope")
    return cfg, seeds.one_seed(generalization.trained(cfg, tmp_path_factory.mktemp("run"), 1), 0)


def greedy(cfg, params, example, limit):
    """The answer of decoding token by token with a state, until EOS or the limit."""
    words = TASK.vocabulary
    prompt = [words.bos, *words.encode(example.prompt).tolist()]
    state, answer = lcm.init_state(cfg, 1, 64), []
    while len(answer) < limit:
        token = prompt.pop(0) if prompt else answer[-1]
        logits, state = lcm.apply(cfg, params, jnp.full((1, 1), token, jnp.int32), state=state)
        if prompt:
            continue
        answer.append(int(jnp.argmax(logits[0, -1])))
        if answer[-1] == words.eos:
            return words.decode(answer)
    return words.decode(answer)


def test_matches_are_those_of_greedy_decoding(trained):
    cfg, params = trained
    examples = [e for n in range(2, 9) for e in TASK.draw([n], 2, 0, "test")]
    right = exact_match.matches(cfg, params, examples, TASK.vocabulary)
    answers = [greedy(cfg, params, e, 2 * e.length + 2) for e in examples]
    by_decoding = [TASK.check(e.prompt, a) for e, a in zip(examples, answers, strict=True)]
    assert right.tolist() == by_decoding
    assert 0 < right.sum() < len(right)  # or the comparison says little


def test_accuracy_by_length_has_wilson_intervals(trained):
    cfg, params = trained
    scores = exact_match.exact_match(cfg, params, TASK, [3, 8], 70)
    for length, score in scores.items():
        examples = TASK.draw([length], 70, 0, "test")
        right = exact_match.matches(cfg, params, list(examples), TASK.vocabulary)
        assert score == wilson(int(right.sum()), 70)
    assert scores[3].value > 0.9 > scores[8].value


def test_other_positions_are_taken(trained):
    """Without an encoding nothing changes, with one it does."""
    cfg, params = trained
    examples = list(TASK.draw([3, 4], 64, 0, "test"))
    apart = positions.Randomised(range=4096)
    score = lambda cfg, **more: exact_match.matches(  # noqa: E731
        cfg, params, examples, TASK.vocabulary, **more
    )
    assert (score(cfg) == score(cfg, placement=apart)).all()
    rotated = config.override(cfg, ["model.positions=rope"])
    assert (score(rotated) != score(rotated, placement=apart)).any()


def test_a_table_that_is_too_short_is_refused():
    cfg = settings("model.positions=learned", "data.length=16")
    params = lcm.init(cfg, jax.random.key(0))
    with pytest.raises(ConfigError, match="does not fit the learned table of 16"):
        exact_match.exact_match(cfg, params, TASK, [8], 4)


def test_mean_reciprocal_rank_by_hand():
    ranks = curves.mean_reciprocal_rank({"a": [1.0, 0.0], "b": [0.5, 0.0], "c": [0.0, 0.0]})
    tied = (1 + 1 / 2 + 1 / 3) / 3
    assert ranks == pytest.approx(
        {"a": (1 + tied) / 2, "b": (1 / 2 + tied) / 2, "c": (1 / 3 + tied) / 2}
    )


def test_a_study_is_run_once_and_seeds_differ(tmp_path, monkeypatch):
    cfg = settings("train.steps=4", "train.warmup=1")
    arguments = {"seeds": 2, "tested": TASK, "lengths": [4, 5], "count": 6}
    first = generalization.study(cfg, tmp_path, **arguments)
    assert [point["length"] for point in first] == [4, 5]
    assert all(len(point["by_seed"]) == 2 for point in first)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss_0"] != line["loss_1"]
    monkeypatch.setattr(generalization, "train_seeds", None)
    assert generalization.study(cfg, tmp_path, **arguments) == first


@pytest.mark.slow
def test_rows_are_long_enough():
    long = dataclasses.replace(TASK, train=(2, 14), test=(15, 20))
    assert generalization.row_length(TASK, tasks.span(TASK.train)) == 32
    assert generalization.row_length(long, tasks.span(long.train)) == 32
    assert generalization.row_length(long, [15]) == 64
