"""`lcm generate` and `lcm chat` on an exported model: what is printed, and the status."""

import io
import json

import pytest
import tokenizers as hf

from lcm import cli, decoding, pretrained
from lcm.decoding import console, programs, session

from . import tiny
from .test_texts import CHATML


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes with a chat template, as transformers would have it."""
    out = tmp_path_factory.mktemp("console") / "model"
    pretrained.save_folder(tiny.model("model.vocab=257", "data.length=64"), out)
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["</s>", *alphabet])}
    raw = hf.Tokenizer(hf.models.BPE(vocab, []))
    raw.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = hf.decoders.ByteLevel()
    raw.add_special_tokens(["</s>"])
    raw.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHATML)
    return out


@pytest.fixture
def lcm(folder, capsys):
    """Runs a command on the model."""

    def run(command: str, *words: object) -> tuple[int, str, str]:
        code = cli.main([command, "--model", str(folder), *map(str, words)])
        return code, *capsys.readouterr()

    return run


SHORT = ("--max-new-tokens", 8, "--temperature", 0)


def texts(folder, prompt, **options) -> list[decoding.Generation]:
    settings = {"max_new_tokens": 8, "temperature": 0.0, **options}
    return decoding.generate(pretrained.load(folder), prompt, **settings)


def test_a_prompt_goes_on(lcm, folder, monkeypatch):
    (wanted,) = texts(folder, "hello")
    assert lcm("generate", "--prompt", "hello", *SHORT) == (0, wanted.text + "\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert lcm("generate", "--prompt", "-", *SHORT) == (0, wanted.text + "\n", "")
    (wanted,) = texts(folder, [{"role": "user", "content": "hello"}])
    assert lcm("generate", "--chat", "--prompt", "hello", *SHORT) == (0, wanted.text + "\n", "")


def test_settings_are_those_of_the_words(lcm, folder):
    own = {"temperature": 1.5, "seed": 3, "banned": (1, 2), "top_k": 9, "no_repeat_ngram": 2}
    words = ["--temperature", 1.5, "--seed", 3, "--banned", "1,2", "--top-k", 9]
    words += ["--no-repeat-ngram", 2, "--max-new-tokens", 8]
    (wanted,) = texts(folder, "hello", **own)
    assert lcm("generate", "--prompt", "hello", *words)[1] == wanted.text + "\n"


def test_several_texts(lcm, folder):
    wanted = texts(folder, "hello", n=2, temperature=1.0)
    listed = [f"--- {i + 1}, log P = {g.score:.3f}\n{g.text}" for i, g in enumerate(wanted)]
    words = ("--prompt", "hello", "-n", 2, "--max-new-tokens", 8)
    assert lcm("generate", *words) == (0, "\n".join(listed) + "\n", "")
    code, out, _ = lcm("generate", "--chat", *words, "--beams", 3)
    assert code == 0 and out.startswith("--- 1, log P = -") and "--- 2, log P = -" in out


def test_a_file_of_prompts(lcm, tmp_path, folder):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": "yes", "max_new_tokens": 2}\n')
    code, out, _ = lcm("generate", "--batch", file, *SHORT)
    assert code == 0 and out == f"wrote 2 lines to {file}.out.jsonl\n"
    lines = (tmp_path / "in.jsonl.out.jsonl").read_text().splitlines()
    found = {r["line"]: r for r in map(json.loads, lines)}
    assert found[1]["text"] == texts(folder, "hello")[0].text and found[2]["tokens"] == 2
    file.write_text(file.read_text() + "oops\n")
    code, out, err = lcm("generate", "--batch", file, *SHORT)
    assert code == 1 and "wrote 0 lines" in out and "2 were there, 1 broken lines" in out
    assert f"lcm: {file}:3: no JSON" in err


def test_beyond_the_trained_length(lcm, folder):
    words = ("generate", "--prompt", "x" * 60, *SHORT)
    (wanted,) = texts(folder, "x" * 60, full="slide")
    assert lcm(*words, "--full", "slide")[:2] == (0, wanted.text + "\n")
    own = ("--config.model.positions=yarn", "--config.model.positions.factor=2")
    assert lcm(*words, *own)[0] == 0


REFUSED = {
    "long": (["--prompt", "x" * 60], "68 tokens of prompt and generation exceed the context of 64"),
    "n": (["--prompt", "x", "-n", 0], "give at least 1 text"),
    "beams": (["--prompt", "x", "--beams", -1], "0 beams"),
    "n of beams": (["--prompt", "x", "--beams", 2, "-n", 3, "--max-new-tokens", 2], "n=3 texts"),
    "out": (["--prompt", "x", "--out", "y"], "--out=y is of --batch"),
    "both": (["--prompt", "x", "--batch", "y"], "not allowed with argument"),
    "neither": ([], "one of the arguments --prompt --batch is required"),
    "no file": (["--batch", "gone.jsonl"], "gone.jsonl cannot be read"),
    "batch of n": (["--batch", "y", "-n", 2], "--batch takes neither -n"),
    "number": (["--prompt", "x", "--top-k", "many"], "invalid int value: 'many'"),
    "setting": (["--prompt", "x", "--top-p", 2], "top_p=2.0 must be above 0 and at most 1"),
    "ids": (["--prompt", "x", "--banned", "1,999"], "banned=999 must be below the 257"),
    "empty": (["--prompt", ""], "prompt 0 is empty"),
    "cache": (["--prompt", "x", "--cache", "book"], "cache='book' is unknown"),
    "rows": (["--prompt", "x", "-n", 2, "--rows", 0], "rows=0 must be at least 1"),
    "key": (["--prompt", "x", "--config.model.widht=3"], "did you mean config.model.width?"),
    "policy": (["--prompt", "x", "--full", "slid"], "full='slid' is unknown"),
    "draws": (["--prompt", "x", "--beams", 2, "--temperature", 1], "temperature=1.0 is for draws"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_words_that_cannot_work(name, lcm, monkeypatch):
    words, says = REFUSED[name]
    monkeypatch.setattr(programs, "prefill", None)
    monkeypatch.setattr(programs, "step", None)
    own = () if "--beams" in words or "--max-new-tokens" in words else ("--max-new-tokens", 8)
    code, out, err = lcm("generate", *words, *own)
    assert code == 2 and out == "" and says in err
    assert err.startswith("lcm: error: ") and err.count("\n") == 1


def test_beams_know_no_stop_strings(lcm):
    code, _, err = lcm("generate", "--prompt", "x", "--beams", 2, "--stop", "a", *SHORT[:2])
    assert code == 2 and "--beams searches for tokens and knows no --stop" in err


def test_standard_input_that_is_no_text(lcm, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    code, _, err = lcm("generate", "--prompt", "-", *SHORT)
    assert code == 2 and "standard input is not utf-8 at byte 3" in err


def said(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation(lcm, folder, monkeypatch):
    said(monkeypatch, "hi", "", "again", "/undo", "/clear", "hi", "/help", "/quit", "never")
    code, out, err = lcm("chat", "--system", "be", *SHORT)
    begin = {"role": "system", "content": "be"}
    talk = [begin, {"role": "user", "content": "hi"}]
    (one,) = texts(folder, talk)
    talk += [{"role": "assistant", "content": one.text}, {"role": "user", "content": "again"}]
    (two,) = texts(folder, talk)
    parts = [
        console.HELP, f"{one.text}\n{two.text}", "[3 messages are left]",
        "[1 messages are left]", one.text, console.HELP,
    ]  # fmt: skip
    assert (code, err) == (0, "") and out == "\n".join(parts) + "\n"


def test_a_conversation_that_is_too_long(lcm, monkeypatch):
    said(monkeypatch, "x" * 60, "hi")
    code, out, _ = lcm("chat", *SHORT)
    assert code == 0
    assert "[74 tokens with the answer exceed the context of 64: /clear, a smaller" in out
    said(monkeypatch, "x" * 60, "hi")
    assert "exceed" not in lcm("chat", *SHORT, "--full", "slide")[1]


def test_an_answer_that_is_stopped(lcm, monkeypatch):
    """What was said of it stays in the conversation, which goes on."""
    run, calls = session.Session.run, []

    def stopped(self, request):
        calls.append(request)
        for count, event in enumerate(run(self, request)):
            yield event
            if len(calls) == 1 and count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "run", stopped)
    said(monkeypatch, "hi", "go on")
    code, out, _ = lcm("chat", *SHORT)
    assert code == 0 and " [stopped]\n" in out and len(calls) == 2
    assert len(calls[1].prompt) > len(calls[0].prompt) + len("<assistant>")


@pytest.mark.parametrize("words", [["--cache", "paged"], ["--cache-dtype", "int8"]])
def test_a_conversation_in_other_caches(lcm, monkeypatch, words):
    said(monkeypatch, "hi", "again")
    plain = lcm("chat", *SHORT)
    said(monkeypatch, "hi", "again")
    assert (code := lcm("chat", *SHORT, *words))[0] == 0 and code[1].count("\n") >= 3
    assert "paged" not in words or code == plain
