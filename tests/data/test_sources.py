"""Every kind of source: what it reads, and one line for what it cannot."""

import json
import pickle
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lcm.data import sources
from lcm.errors import DataError

TEXTS = ["first", "zweites é", "", "日本語\nand a second line", "🎉"]


def contents(source):
    assert [source.name(i) for i in range(len(source))] == [
        source[i].name for i in range(len(source))
    ]
    return {source[i].name: source[i].text for i in range(len(source))}


def refused(match, *arguments):
    with pytest.raises(DataError, match=match) as caught:
        source = sources.load(*arguments)
        for index in range(len(source)):
            _ = source[index]
    assert "\n" not in str(caught.value)


def test_stdlib_is_code_and_topics():
    from pydoc_data.topics import topics

    found = contents(sources.load("stdlib"))
    assert found["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert {n for n in found if n.startswith("topics/")} == {f"topics/{t}" for t in topics}
    assert found["topics/assert"] == topics["assert"]
    assert all(found.values()) and sum(map(len, found.values())) > 5_000_000
    assert not any({"test", "tests", "site-packages"} & set(n.split("/")) for n in found)
    assert "pydoc_data/topics.py" not in found  # else the topics would be in both splits
    assert list(found) == list(contents(sources.load("stdlib")))


def test_stdlib_leaves_out_what_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    for name, raw in {
        "good.py": b"x = 1",
        "latin.py": b"# \xe9",
        "empty.py": b"",
        "test/test_good.py": b"assert True",
        "_sysconfigdata__linux.py": b"built = {}",
    }.items():
        (tmp_path / name).write_bytes(raw)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    names = contents(sources.load("stdlib"))
    assert [n for n in names if not n.startswith("topics/")] == ["good.py"]
    (tmp_path / "good.py").unlink()
    refused("no library sources.*data.source=text", "stdlib")


def test_stdlib_refuses_paths():
    refused("data.paths='a.txt'.*set data.source", "stdlib", "a.txt")


def write_text(folder):
    (folder / "deep/er").mkdir(parents=True)
    for index, text in enumerate(TEXTS):
        path = folder / ("deep/er" if index % 2 else ".") / f"{index}.txt"
        path.write_bytes(text.encode())


def test_text_globs_names_and_duplicates(tmp_path):
    write_text(tmp_path)
    found = contents(sources.load("text", f"{tmp_path}/**/*.txt, {tmp_path}/deep/er/1.txt"))
    assert found == {
        "0.txt": TEXTS[0],
        "2.txt": TEXTS[2],
        "4.txt": TEXTS[4],
        "deep/er/1.txt": TEXTS[1],
        "deep/er/3.txt": TEXTS[3],
    }


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path, monkeypatch):
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert contents(sources.load("text", "**/*.txt")) == contents(
        sources.load("text", f"{tmp_path}/**/*.txt")
    )


def test_text_keeps_line_ends_and_drops_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert contents(sources.load("text", f"{tmp_path}/a.txt")) == {"a.txt": "one\r\ntwo"}


def test_text_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9!")
    refused(r"bad\.txt is not UTF-8 at byte 3 \(0xe9\): convert", "text", f"{tmp_path}/bad.txt")


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "array_record"])
def test_paths_that_give_nothing(tmp_path, source):
    refused("no file matches .*check the pattern", source, f"{tmp_path}/*.none")
    refused("does not exist", source, f"{tmp_path}/none")
    refused(r"is a folder: write .*/\*\*/\*", source, str(tmp_path))
    refused("data.paths is empty", source, " ,")


@pytest.mark.parametrize("text", ["", "\n\n", "\r\n"])
def test_empty_corpus(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    refused("corpus is empty.*0 document", "jsonl", f"{tmp_path}/a.jsonl")
    (tmp_path / "b.txt").write_text("")
    refused("corpus is empty.*1 document", "text", f"{tmp_path}/b.txt")


def test_unknown_source():
    refused("'csv' is unknown: use one of stdlib, text, jsonl, parquet, array_record", "csv")


@pytest.mark.parametrize("newline, last", [("\n", "\n"), ("\r\n", ""), ("\n\n", "\n\n")])
def test_jsonl(tmp_path, newline, last):
    lines = [
        json.dumps({"id": 1, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "a.jsonl").write_bytes((newline.join(lines) + last).encode())
    found = contents(sources.load("jsonl", f"{tmp_path}/a.jsonl", "body"))
    step = newline.count("\n")
    assert found == {f"a.jsonl:{1 + step * i}": text for i, text in enumerate(TEXTS)}


def test_jsonl_index_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("lcm.data.records._CHUNK", 7)
    test_jsonl(tmp_path, "\r\n", "\r\n\r\n")


@pytest.mark.parametrize(
    "line, match",
    [
        (b"{oops", "line 2 is not JSON"),
        (b"[1]", "line 2 is not a JSON object but a list"),
        (b"5", "line 2 is not a JSON object but a number"),
        (b'{"body": "x"}', "line 2 has no field 'text'.*'body'"),
        (b'{"text": null}', "line 2: field 'text' is not a string but null"),
        (b'{"text": 3}', "line 2: field 'text' is not a string but a number"),
        (b'{"text": "\\ud800"}', "line 2: field 'text' has the lone surrogate"),
        (b'{"text": "\xe9"}', r"line 2 is not UTF-8 at byte 27 \(0xe9\)"),
    ],
)
def test_jsonl_bad_line(tmp_path, line, match):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    refused(match, "jsonl", f"{tmp_path}/a.jsonl")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_over_files_and_row_groups(tmp_path, kind):
    for name in "ab":
        table = pa.table({"id": range(5), "body": pa.array(TEXTS, kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    source = sources.load("parquet", f"{tmp_path}/*.parquet", "body")
    expected = {f"{n}.parquet:{i}": text for n in "ab" for i, text in enumerate(TEXTS)}
    assert contents(source) == expected
    assert contents(pickle.loads(pickle.dumps(source))) == expected


def test_parquet_errors(tmp_path):
    path = f"{tmp_path}/a.parquet"
    pq.write_table(pa.table({"body": ["x", None], "n": [1, 2]}), path)
    refused(r"column 'text' does not exist: .*\('body'\)", "parquet", path)
    refused(r"column 'n' is not of strings: .*\('body'\)", "parquet", path, "n")
    refused("row 1: column 'body' is null", "parquet", path, "body")
    Path(path).write_text("no parquet at all")
    refused("cannot be read as Parquet", "parquet", path)


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record(tmp_path):
    for name in "ab":
        write_records(tmp_path / f"{name}.array_record", [text.encode() for text in TEXTS])
    source = sources.load("array_record", f"{tmp_path}/*.array_record")
    expected = {f"{n}.array_record:{i}": text for n in "ab" for i, text in enumerate(TEXTS)}
    assert contents(source) == expected
    assert contents(pickle.loads(pickle.dumps(source))) == expected


def test_array_record_errors(tmp_path):
    write_records(tmp_path / "a.array_record", [b"good", b"b\xff"])
    refused(
        r"record 1 is not UTF-8 at byte 1 \(0xff\)", "array_record", f"{tmp_path}/a.array_record"
    )
    (tmp_path / "b.array_record").write_text("none")
    refused("cannot be read as ArrayRecord", "array_record", f"{tmp_path}/b.array_record")
