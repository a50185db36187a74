"""Examples on their way into batches: whole, in segments, with a loss on answers alone."""

import json

import numpy as np
import pytest

from lcm import config, training
from lcm.data import packing, pipeline, tasks, tokenizers
from lcm.data.documents import Document
from lcm.errors import ConfigError, DataError

SPEC = "addition,train=1-3,test=4-5,size=200"


def settings(**changes):
    cfg = config.base()
    tokenizer = f"task:{SPEC}"
    cfg.data.update(source=tokenizer, tokenizer=tokenizer, packing="first_fit", packing_bins=64)
    cfg.data.update(length=48, **changes)
    return cfg


def segments(batch):
    """Ids read and targets counted, of each segment of a batch, as tuples."""
    for row in range(len(batch.tokens_BL)):
        of = batch.context.segments_BL[row]
        for segment in range(1, of.max() + 1):
            here = of == segment
            positions = batch.context.positions_BL[row, here]
            assert positions.tolist() == list(range(here.sum()))
            weight = batch.loss_weight_BL[row, here]
            counted = batch.targets_BL[row, here][weight == 1]
            assert set(np.unique(weight)) <= {0.0, 1.0}
            yield tuple(batch.tokens_BL[row, here].tolist()), tuple(counted.tolist())


def framed(example, words):
    """What a segment of an example must be."""
    target = words.encode(example.target).tolist()
    prompt = words.encode(example.prompt).tolist()
    return (words.bos, *prompt, *target), (*target, words.eos)


def test_a_prompt_is_read_and_not_learned():
    document, tokenizer = Document("d", "bc", "a"), tokenizers.load("bytes")
    pairs = packing.encode(document, tokenizer, countdown=True)
    assert pairs.tolist() == [[256, 97, 3, 0], [97, 98, 2, 1], [98, 99, 1, 1], [99, 256, 0, 1]]
    plain = packing.encode(document, tokenizer)
    assert plain.tolist() == [[256, 97, -1, 0], [97, 98, -1, 1], [98, 99, -1, 1], [99, 256, -1, 1]]
    assert packing.encode(Document("d", "b", ""), tokenizer)[:, packing.WEIGHT].all()


@pytest.mark.parametrize("method", ["first_fit", "best_fit"])
@pytest.mark.parametrize("tokenizer", [f"task:{SPEC}", "bytes"])
def test_pipeline_gives_each_example_whole_and_once(method, tokenizer):
    cfg = settings(heldout=0.25)
    cfg.data.update(packing=method, tokenizer=tokenizer)
    words = tokenizers.load(tokenizer)
    found = []
    for split in ("train", "heldout"):
        stream = pipeline.batches(cfg.data, length=48, batch_size=4, seed=3, split=split, epochs=1)
        found.append([pair for batch in stream for pair in segments(batch)])
    examples = tasks.make(SPEC).draw([1, 2, 3], 200, 0, "train")
    assert sorted([*found[0], *found[1]]) == sorted(framed(e, words) for e in examples)
    assert 20 < len(found[1]) < 80


def test_pipeline_goes_on_where_it_was():
    cfg = settings()
    make = lambda: pipeline.batches(cfg.data, length=48, batch_size=4, seed=3)  # noqa: E731
    straight, resumed = make(), make()
    for _ in range(5):
        next(straight)
    resumed.set_state(json.loads(json.dumps(straight.get_state())))
    for _ in range(5):
        np.testing.assert_array_equal(next(straight).tokens_BL, next(resumed).tokens_BL)


def test_packed_rows_go_through_the_examples():
    task = tasks.make(SPEC)
    examples = list(task.draw([1, 2, 3], 200, 0, "train"))
    rows = tasks.PackedRows(examples, task.vocabulary, 4, 48)
    known = {framed(e, task.vocabulary) for e in examples}
    seen = set()
    for step in range(40):
        found = list(segments(rows(step)))
        assert len(found) >= 4 and set(found) <= known
        seen |= set(found)
    assert len(seen) > 0.9 * len(known)
    again = tasks.PackedRows(examples, task.vocabulary, 4, 48)(39)
    np.testing.assert_array_equal(rows(39).tokens_BL, again.tokens_BL)


def test_padded_rows_hold_one_example_each():
    task = tasks.make(SPEC)
    examples = list(task.draw([5], 8, 0, "test"))
    batch = tasks.batch(examples, task.vocabulary, tasks.longest(examples, task.vocabulary))
    assert list(segments(batch)) == [framed(e, task.vocabulary) for e in examples]
    assert (batch.context.segments_BL.max(axis=1) == 1).all()
    with pytest.raises(DataError, match=r"rows have 8: set data\.length="):
        tasks.batch(examples, task.vocabulary, 8)


def test_what_would_be_torn_is_refused():
    cfg = settings()
    with pytest.raises(ConfigError, match=r"packing=concat cuts .*data.packing=first_fit"):
        cfg.data.packing = "concat"
        pipeline.check(cfg.data)
    cfg.data.packing = "first_fit"
    with pytest.raises(DataError, match=r"does not fit a row of 16.*set data\.length="):
        next(pipeline.batches(cfg.data, length=16, batch_size=2, seed=0))
    cfg.data.tokenizer = "task:scan"
    with pytest.raises(DataError, match="is no word of this task"):
        pipeline.check(cfg.data)
    with pytest.raises(ConfigError, match="reads no files"):
        cfg.data.paths = "x.txt"
        pipeline.check(cfg.data)


def test_a_task_is_trained_by_its_name(tmp_path, tiny):
    spec = "task:copy_rsc,train=2-3,test=4-5"
    words = [f"data.source={spec}", f"data.tokenizer={spec}", "data.packing=first_fit"]
    cfg = tiny(*words, "data.packing_bins=64", "train.steps=12", "train.lr=0.01")
    assert training.train(cfg, tmp_path).step == 12
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
