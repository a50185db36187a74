"""Files of prompts: broken lines among whole ones, and runs that go on where others ended."""

import json

import pytest

from lcm.decoding import batch, generate
from lcm.errors import UserError

from . import tiny
from .test_texts import writer

SETTINGS = {"max_new_tokens": 5, "temperature": 0.0}


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def work(files, model=None, **options):
    complaints = []
    outcome = batch.run(
        model or writer(), *files, complain=complaints.append, **{**SETTINGS, **options}
    )
    assert complaints == outcome.broken
    return outcome


def texts(content: bytes) -> list[tuple]:
    """Lines in their order, all but a log-probability, whose last digits are of the batch."""
    records = sorted((json.loads(line) for line in content.splitlines()), key=lambda r: r["line"])
    return [(r["line"], r["text"], r["finish_reason"], r["key"]) for r in records]


def written(files) -> dict[int, dict]:
    records = [json.loads(line) for line in files[1].read_text().splitlines()]
    return {record["line"]: record for record in records}


def test_settings_of_a_line_are_its_own(files):
    records = [
        {"prompt": "one", "id": "ä"},
        {"prompt": "one", "max_new_tokens": 3, "id": 7},
        {"messages": [{"role": "user", "content": "hi"}], "temperature": 1.5, "seed": 4},
        {"prompt": [1, 2, 3], "stop_ids": [], "id": None},
    ]
    files[0].write_text("\n\n".join(json.dumps(record) for record in records))
    assert work(files) == (4, 0, [])
    found = written(files)
    assert [found[n].get("id", "-") for n in (1, 3, 5, 7)] == ["ä", 7, "-", None]
    for number, record in zip((1, 3, 5, 7), records, strict=True):
        own = {k: v for k, v in record.items() if k not in ("prompt", "messages", "id")}
        prompt = record.get("prompt", record.get("messages"))
        (wanted,) = generate(writer(), prompt, **{**SETTINGS, **own})
        got = found[number]
        assert (got["text"], got["tokens"], got["finish_reason"]) == (
            wanted.text, len(wanted.tokens), wanted.finish_reason
        )  # fmt: skip
        assert got["logprob"] == pytest.approx(wanted.score, abs=1e-3)


BROKEN = {
    b'{"prompt": "caf\xe9"}': "no UTF-8 at byte 15",
    b"{oops": "no JSON: ",
    b"[" * 100_000: "no JSON: ",
    b"[1, 2]": "no object with a prompt, but [1, 2]",
    b'"text"': "no object with a prompt, but text",
    b'{"id": 3}': "neither prompt nor messages, or both: give one",
    b'{"prompt": "a", "messages": []}': "neither prompt nor messages, or both",
    b'{"prompt": []}': "prompt 0 is empty: give it a word",
    b'{"prompt": null}': "prompt 0 is object ()",
    b'{"prompt": 5}': "prompt 0 is int64 (): give a text or a list of ids",
    b'{"prompt": {"a": 1}}': "prompt 0 is object ()",
    b'{"prompt": [300]}': "prompt 0 has token 300: ids of this model are 0 to 256",
    b'{"prompt": [[1], [2, 3]]}': "prompt 0 is object",
    b'{"messages": "hi"}': "",
    b'{"messages": []}': "prompt 0 is empty",
    b'{"messages": [{"role": "me", "content": "a"}]}': "message 0 has role 'me'",
    b'{"prompt": "a", "temperature": "hot"}': "temperature='hot' must be a number",
    b'{"prompt": "a", "temperature": -1}': "temperature=-1 must be at least 0",
    b'{"prompt": "a", "temperature": NaN}': "temperature=nan must be at least 0",
    b'{"prompt": "a", "max_new_tokens": 2.5}': "max_new_tokens=2.5 must be a whole number",
    b'{"prompt": "a", "max_new_tokens": true}': "max_new_tokens=True must be a whole number",
    b'{"prompt": "a", "top_k": 1e999}': "top_k=inf must be a whole number",
    b'{"prompt": "a", "stop_ids": "12"}': "stop_ids='12' must be a list of token ids",
    b'{"prompt": "a", "stop_ids": [999]}': "stop_ids=999 must be below the 257",
    b'{"prompt": "a", "stop": 5}': "stop=5 must be a string or a list of strings",
    b'{"prompt": "a", "stop": [5]}': "stop=[5] must be a string or a list of strings",
    b'{"prompt": "a", "stop": [""]}': "a stop string is empty",
    b'{"prompt": "a", "temprature": 1}': "temprature=1 is no setting: those are banned",
    b'{"prompt": "a\\ud800"}': "half of a surrogate pair, which is no text",
    b'{"prompt": "a", "id": "\\ud800"}': "half of a surrogate pair, which is no text",
    b'{"prompt": "'
    + b"a" * 90
    + b'"}': "96 tokens of prompt and generation exceed the context of 64",
}
del BROKEN[b'{"messages": "hi"}']  # a text, as `prompt` would have it


def test_broken_lines_are_named_and_the_others_written(files):
    good = b'{"prompt": "fine"}'
    files[0].write_bytes(b"\n".join([good, *BROKEN, good, b"", b" "]))
    outcome = work(files)
    assert outcome[:2] == (2, 0) and len(outcome.broken) == len(BROKEN)
    told = {int(m.removeprefix(f"{files[0]}:").split(":")[0]): m for m in outcome.broken}
    for number, says in enumerate(BROKEN.values(), 2):
        assert says in told[number] and "\n" not in told[number]
    found = written(files)
    assert [*found] == [1, len(BROKEN) + 2] and found[1]["text"] == found[len(BROKEN) + 2]["text"]


def test_a_learned_table_too_short_for_one_line(files):
    model = writer("model.positions=learned", "model.positions.length=64")
    files[0].write_text('{"prompt": "a"}\n{"prompt": "a", "max_new_tokens": 64}')
    outcome = work(files, model, full="config")
    assert outcome.done == 1 and "does not fit the learned table of 64" in outcome.broken[0]


def test_going_on_after_a_kill(files):
    prompts = ["one", "two", "three", "four"]
    files[0].write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    assert work(files) == (4, 0, [])
    whole = files[1].read_bytes()
    assert work(files) == (0, 4, []) and files[1].read_bytes() == whole
    for cut in (len(whole) - 1, len(whole) - 30, whole.index(b"\n") + 1, 5, 0):
        files[1].write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert work(files) == (4 - kept, kept, [])
        assert texts(files[1].read_bytes()) == texts(whole)


def test_what_has_changed_is_done_anew(files):
    files[0].write_text('{"prompt": "one"}\n{"prompt": "two"}')
    work(files)
    assert work(files, max_new_tokens=4) == (2, 0, [])
    assert work(files, stop="zzz") == (2, 0, [])
    assert work(files, engine={"weights": "bfloat16"}) == (2, 0, [])
    assert work(files, writer()._replace(step=9)) == (2, 0, [])
    assert work(files, rows=1) == (0, 2, [])  # not what a text depends on
    files[0].write_text('{"prompt": "one"}\n{"prompt": "three"}')
    assert work(files) == (1, 1, [])


def test_an_extension_is_by_the_longest_of_all_lines(files):
    """However many of them are done already."""
    prompts = ["a" * 80, "b", "c" * 30]
    files[0].write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    work(files, full="yarn", temperature=1.0)
    whole = files[1].read_bytes()
    (first,) = [line for line in whole.splitlines() if json.loads(line)["line"] == 1]
    files[1].write_bytes(first + b"\n")
    assert work(files, full="yarn", temperature=1.0) == (2, 1, [])
    assert texts(files[1].read_bytes()) == texts(whole)


def test_files_that_cannot_be(files, tmp_path):
    with pytest.raises(UserError, match=r"in\.jsonl cannot be read: No such file"):
        work(files)
    files[0].write_text('{"prompt": "one"}')
    with pytest.raises(UserError, match=r"out\.jsonl cannot be written: No such file"):
        work((files[0], tmp_path / "gone" / "out.jsonl"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        work((files[0], tmp_path))
    for other in (b"notes\n", b'{"a": 1}\n', b'{"key": []}\n', b"\xff\n"):
        files[1].write_bytes(other)
        with pytest.raises(UserError, match="holds other lines than lcm generate writes"):
            work(files)
        assert files[1].read_bytes() == other
    for other in (files[0].read_bytes(), b"notes"):  # the prompts themselves; no whole line
        files[1].write_bytes(other)
        with pytest.raises(UserError, match="holds other lines"):
            work((files[0], files[1]))
        assert files[1].read_bytes() == other
    files[1].unlink()
    for options, says in (({"temperature": -1}, "at least 0"), ({"full": "x"}, "full='x'")):
        with pytest.raises(UserError, match=says):
            work(files, **options)
    assert not files[1].exists()
    assert work((files[0], files[1]), tiny.model()).broken == [
        f"{files[0]}:1: this model came without a tokenizer: give token ids, or put a "
        "tokenizer.json beside its weights"
    ]
