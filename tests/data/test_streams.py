"""Streams of keys and values: what they hold, and that a seed decides them."""

import numpy as np
import pytest

from lcm.data.streams import Mqar, OverwriteRecall
from lcm.errors import ConfigError


@pytest.mark.parametrize("window", [0, 6])
def test_the_last_value_is_always_the_answer(window):
    task = OverwriteRecall(8, window)
    rows = task.rows((3, 1), 5, 400)
    batch, right, asked = task.batch(rows), 0, 0
    assert (np.asarray(batch.loss_weight_BL) == task.asks(rows)).all()
    for row, target in zip(rows, batch.targets_BL, strict=True):
        last, at = {}, {}
        for pair in range(200):
            key, value = row[2 * pair : 2 * pair + 2]
            assert 16 <= value < 24 and key < 16
            if key >= 8:
                asked += 1
                right += last[key - 8] == value == target[2 * pair]
                assert not window or pair - at[key - 8] <= window
            else:
                last[key], at[key] = value, pair
    assert right == asked and 350 < asked < 650


def test_a_constant_answer_is_right_once_in_as_many_as_there_are_keys():
    task = OverwriteRecall(4)
    rows = task.rows((0,), 64, 200)
    answers = task.batch(rows).targets_BL[task.asks(rows)]
    assert abs((answers == 8).mean() - 1 / 4) < 0.03


def test_a_seed_decides_the_rows():
    for task in (OverwriteRecall(8), OverwriteRecall(8, 4)):
        assert (task.rows((1, 2), 3, 20) == task.rows((1, 2), 3, 20)).all()
        assert (task.rows((1, 2), 3, 20) != task.rows((1, 3), 3, 20)).any()
    one, other = (Mqar(4, 16).batch((seed,), 3, 32) for seed in (1, 2))
    assert (one.tokens_BL == Mqar(4, 16).batch((1,), 3, 32).tokens_BL).all()
    assert (one.tokens_BL != other.tokens_BL).any()


def test_associative_recall_asks_for_every_key_once():
    batch = Mqar(4, 16).batch((0,), 200, 20)
    for tokens, targets in zip(batch.tokens_BL, batch.targets_BL, strict=True):
        told = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert len(told) == 4 and all(1 <= k <= 16 < v <= 32 for k, v in told.items())
        asked = {tokens[at]: targets[at] for at in range(8, 20) if tokens[at]}
        assert asked == told
    weight = np.asarray(batch.loss_weight_BL)
    assert (weight.sum(1) == 4).all() and not weight[:, :8].any()
    share = weight[:, 8:].mean(0)  # early places more often, by about 1 / n
    assert share[0] > 0.85 > share[5] > share[11]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OverwriteRecall(0), "keys=0"),
        (lambda: OverwriteRecall(4).rows((0,), 1, 7), "length 7 cuts a pair"),
        (lambda: Mqar(9, 8), "from 1 to keys=8"),
        (lambda: Mqar(8, 8).batch((0,), 1, 23), "take 24"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
