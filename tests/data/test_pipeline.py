"""The pipeline: epochs, shards, exact restoring, errors before training."""

import collections
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from lcm.data import packing, pipeline, tokenizers
from lcm.errors import ConfigError, DataError

PACKERS = sorted(packing.PACKERS)
SMALL = {"length": 32, "batch_size": 4, "seed": 3}


def take(iterator, number):
    return list(itertools.islice(iterator, number))


def assert_same(left, right):
    assert len(left) == len(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def differ(left, right):
    return any((a.tokens_BL != b.tokens_BL).any() for a, b in zip(left, right, strict=True))


def pair_counts(batches):
    """How often each (token, target, countdown) was given."""
    counts = collections.Counter()
    for b in batches:
        real = b.loss_weight_BL > 0
        columns = (b.tokens_BL, b.targets_BL, b.context.remaining_BL)
        counts.update(zip(*(x[real].tolist() for x in columns), strict=True))
    return counts


def expected_counts(data, split="train"):
    tokenizer = tokenizers.load(data.tokenizer)
    rows = [packing.encode(d, tokenizer, True) for d in pipeline.documents(data, split)]
    return collections.Counter(map(tuple, np.concatenate(rows).tolist()))


@pytest.mark.parametrize("method", PACKERS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_epochs_give_each_pair_once_each(data, corpus, method, split):
    config = data(source="text", paths=corpus, packing=method, countdown=True, heldout=0.3)
    one = list(pipeline.batches(config, **SMALL, split=split, epochs=1))
    three = list(pipeline.batches(config, **SMALL, split=split, epochs=3))
    once = expected_counts(config, split)
    assert pair_counts(one) == once
    assert pair_counts(three) == collections.Counter({k: 3 * n for k, n in once.items()})


def test_splits_are_disjoint_and_complete(data, corpus):
    config = data(source="text", paths=corpus, heldout=0.3)
    train, held = ({d.name for d in pipeline.documents(config, s)} for s in ("train", "heldout"))
    assert not train & held and len(train | held) == 23


def test_epochs_have_their_own_order(data, corpus):
    config = data(source="text", paths=corpus, packing="first_fit", packing_bins=1)
    batches = list(pipeline.batches(config, length=4096, batch_size=1, seed=0, epochs=2))
    tokens = np.concatenate([b.tokens_BL[b.loss_weight_BL > 0] for b in batches])
    half = len(tokens) // 2
    assert sorted(tokens[:half]) == sorted(tokens[half:])
    assert (tokens[:half] != tokens[half:]).any()


@pytest.mark.parametrize("method", PACKERS)
def test_processes_share_an_epoch(data, corpus, method):
    config = data(source="text", paths=corpus, packing=method, countdown=True)
    shares = [
        list(pipeline.batches(config, **SMALL, epochs=1, process_index=i, process_count=3))
        for i in range(3)
    ]
    assert all(shares)
    assert sum((pair_counts(s) for s in shares), collections.Counter()) == expected_counts(config)


def test_seed_decides_the_order(data, corpus):
    config = data(source="text", paths=corpus)
    first, again = (take(pipeline.batches(config, **SMALL), 9) for _ in range(2))
    other = take(pipeline.batches(config, **SMALL | {"seed": 4}), 9)
    assert_same(first, again)
    assert differ(first, other)


@pytest.mark.quick("1-*", "41-*")
@pytest.mark.parametrize("method", PACKERS)
@pytest.mark.parametrize("before", [0, 1, 16, 41, 83])
def test_restores_exactly(data, corpus, method, before):
    """Through JSON, as a checkpoint keeps it, and past several windows, bins and epochs."""
    config = data(source="text", paths=corpus, packing=method, countdown=True)
    straight = pipeline.batches(config, **SMALL)
    passed = take(straight, before)
    state = json.dumps(straight.get_state())
    expected = take(straight, 60)
    restored = pipeline.batches(config, **SMALL)
    take(restored, 5)  # wherever it was
    restored.set_state(json.loads(state))
    assert json.loads(json.dumps(restored.get_state())) == json.loads(state)
    assert_same(take(restored, 60), expected)
    restored.set_state(json.loads(state))  # and once more, from a used iterator
    assert_same(take(restored, 20), expected[:20])
    assert not passed or differ(expected[:1], passed[:1])


def test_restores_where_rows_end_with_documents(data, tmp_path):
    """Documents of exactly one row: nothing is left over when the state is taken."""
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(str(number) * 15)
    config = data(source="text", paths=f"{tmp_path}/*", heldout=0.0)
    straight = pipeline.batches(config, length=16, batch_size=8, seed=0)
    for _ in range(2):
        restored = pipeline.batches(config, length=16, batch_size=8, seed=0)
        restored.set_state(json.loads(json.dumps(straight.get_state())))
        assert_same(take(restored, 8), take(straight, 8))  # a window of 64 rows


@pytest.mark.quick("first_fit")
@pytest.mark.parametrize("method", PACKERS)
def test_workers_give_the_same_batches_and_restore(data, corpus, method):
    config = data(source="text", paths=corpus, packing=method, countdown=True)
    threads = take(pipeline.batches(config, **SMALL), 60)
    config.workers = 2
    iterator = pipeline.batches(config, **SMALL)
    assert_same(take(iterator, 27), threads[:27])
    state = json.loads(json.dumps(iterator.get_state()))
    take(iterator, 9)
    if method == "concat":  # one new pair of processes is enough to wait for
        iterator.close()
        iterator = pipeline.batches(config, **SMALL)
    iterator.set_state(state)
    assert_same(take(iterator, 33), threads[27:])
    iterator.close()


def test_a_state_of_other_settings_is_refused(data, corpus, tmp_path):
    config = data(source="text", paths=corpus)
    state = pipeline.batches(config, **SMALL).get_state()
    with pytest.raises(DataError, match="made with length=32, this run has 64"):
        pipeline.batches(config, **SMALL | {"length": 64}).set_state(state)
    (tmp_path / "more.txt").write_text("more")
    with pytest.raises(DataError, match="made with documents="):
        pipeline.batches(config, **SMALL).set_state(state)


def test_long_documents_are_mixed(data):
    """A batch is not 16 rows of one long document: the library's modules fill 50 rows and more."""
    config = data(countdown=True, packing_bins=0)
    batch = next(pipeline.batches(config, length=256, batch_size=16, seed=0))
    # Rows cut from one document follow each other, so that countdowns differ by 256.
    starts = batch.context.remaining_BL[:, 0]
    neighbours = np.abs(starts[:, None] - starts[None, :]) == 256
    assert neighbours.sum() <= 2


def test_default_needs_nothing(data):
    config = data(packing_bins=0)
    pipeline.check(config)
    held = pipeline.documents(config)
    assert 20 <= len(held) <= 80
    assert any(d.name.startswith("topics/") for d in held) and any(
        d.name.endswith(".py") for d in held
    )
    batch = next(pipeline.batches(config, length=256, batch_size=16, seed=0))
    assert batch.tokens_BL.shape == (16, 256) and batch.loss_weight_BL.all()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"source": "texts"}, "data.source='texts' is unknown"),
        ({"paths": "no/such.txt"}, "no/such.txt does not exist"),
        ({"tokenizer": "no/such.json"}, "no/such.json does not exist"),
        ({"packing": "none"}, "data.packing='none' is unknown"),
        ({"packing_bins": -1}, "data.packing_bins=-1 is negative"),
        ({"workers": -1}, "data.workers=-1 is negative"),
        ({"heldout": 1.5}, "data.heldout=1.5 is not a share"),
        ({"heldout": 1e-9}, "the heldout split is empty"),
        ({"heldout": 1 - 1e-9}, "the train split is empty"),
    ],
)
def test_check_finds_what_is_wrong(data, corpus, change, match):
    with pytest.raises((ConfigError, DataError), match=match):
        pipeline.check(data(**{"source": "text", "paths": corpus} | change))


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0])
def test_check_allows_all_or_nothing_held_out(data, corpus, share):
    pipeline.check(data(source="text", paths=corpus, heldout=share))


def test_check_reads_documents(data, corpus, tmp_path):
    (tmp_path / "99.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"99\.txt is not UTF-8 at byte 0"):
        pipeline.check(data(source="text", paths=corpus))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_document_met_while_training(data, corpus, tmp_path, workers):
    (tmp_path / "99.txt").write_bytes(b"\xff")
    config = data(source="text", paths=corpus, workers=workers, heldout=0.0)
    iterator = pipeline.batches(config, **SMALL)
    with pytest.raises(DataError, match=r"99\.txt is not UTF-8 at byte 0"):
        take(iterator, 1000)
    iterator.close()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"length": 0}, "length 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"process_index": 1}, "process 1 of 1"),
    ],
)
def test_arguments_out_of_range(data, corpus, change, match):
    with pytest.raises(ConfigError, match=match):
        pipeline.batches(data(source="text", paths=corpus), **SMALL | change)


def test_an_iterator_left_open_says_nothing_at_exit(corpus):
    script = f"""
import types
from lcm.data import defaults, pipeline
data = types.SimpleNamespace(**{{key: value for key, (value, _) in defaults().items()}})
data.source, data.paths = "text", {corpus!r}
batches = pipeline.batches(data, length=32, batch_size=4, seed=0)
print(next(batches).tokens_BL.shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 32)\n", "")


def test_the_keys_are_listed_without_jax():
    script = "import sys; from lcm.data import defaults; defaults(); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
