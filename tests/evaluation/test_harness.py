"""Figures of lm-eval are those of its own class for transformers, on the same folder."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from lcm import pretrained  # noqa: E402
from lcm.errors import UserError  # noqa: E402
from lcm.evaluation import harness, likelihood  # noqa: E402
from lcm.evaluation.harness import LCM  # noqa: E402

from . import harness_model  # noqa: E402

TASKS = pathlib.Path(__file__).parent / "harness_tasks"
NAMES = ("lcm_choices", "lcm_texts", "lcm_answers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return harness_model.write(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def model(folder):
    return pretrained.load(folder)


@pytest.fixture
def evaluate(monkeypatch):
    """A function from a model of lm-eval to its results and what it said of each sample."""
    monkeypatch.chdir(TASKS)  # data files of the tasks are beside them

    def run(model, tasks=NAMES, **options):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        quiet = {"bootstrap_iters": 0, "verbosity": "ERROR", "batch_size": 2}
        return lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, **quiet | options
        )

    return run


def requests(*args):
    return [types.SimpleNamespace(args=each) for each in args]


def answered(result, task):
    return [sample["filtered_resps"] for sample in result["samples"][task]]


@pytest.fixture
def theirs(folder, monkeypatch):
    """lm-eval's class for transformers, of one process: it imports accelerate for more of them."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("accelerate") is None:
        absent = mock.MagicMock()
        absent.Accelerator.return_value.num_processes = 1
        monkeypatch.setitem(sys.modules, "accelerate", absent)
        monkeypatch.setitem(sys.modules, "accelerate.utils", absent)
    from lm_eval.models.huggingface import HFLM

    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=network, tokenizer=tokenizer, device="cpu", batch_size=2)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_figures_are_those_of_transformers(evaluate, folder, theirs, chat):
    theirs = evaluate(theirs, apply_chat_template=chat)
    ours = evaluate("lcm", model_args=f"pretrained={folder}", apply_chat_template=chat)
    scores = {"lcm_choices": ("acc", "acc_norm"), "lcm_answers": ("exact_match",)}
    scores["lcm_texts"] = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    for task, metrics in scores.items():
        for metric in metrics:
            mine, other = (r["results"][task][f"{metric},none"] for r in (ours, theirs))
            assert mine == pytest.approx(other, rel=1e-4), (task, metric)
    assert answered(ours, "lcm_answers") == answered(theirs, "lcm_answers")
    for task in ("lcm_choices", "lcm_texts"):
        mine, other = (np.concatenate(answered(r, task)).astype(float) for r in (ours, theirs))
        np.testing.assert_allclose(mine, other, rtol=1e-4)


@pytest.mark.slow
def test_a_cache_answers_the_second_time(evaluate, model, tmp_path):
    once = LCM(model)
    first = evaluate(once, use_cache=str(tmp_path / "cache"))
    again = LCM(model)
    again._loglikelihood_tokens = again._machine = None  # nothing is computed
    second = evaluate(again, use_cache=str(tmp_path / "cache"))
    for task in NAMES:
        assert answered(first, task) == answered(second, task)


def test_answers_do_not_depend_on_what_is_asked_beside_them(model):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 300, n) for n in (5, 70, 90, 5, 66, 9)]
    texts += [np.append(texts[0][:-1], last) for last in (7, 8)]  # one row with texts[0]
    counts = (1, 30, 89, 4, 2, 0, 1, 1)
    asks = list(map(likelihood.Ask, texts, counts))
    together = dict(likelihood.answers(model, asks, rows=3))
    assert sorted(together) == list(range(len(asks)))
    for number, ask in enumerate(asks):
        ((_, alone),) = likelihood.answers(model, [ask])
        assert len(alone.logprobs) == ask.scored
        np.testing.assert_allclose(together[number].logprobs, alone.logprobs, atol=1e-5)
        assert (together[number].greedy == alone.greedy).all()


def test_slices_are_the_whole(model, monkeypatch):
    ask = likelihood.Ask(np.random.default_rng(1).integers(0, 300, 91), 90)
    ((_, whole),) = likelihood.answers(model, [ask])
    monkeypatch.setattr(likelihood, "LOGITS", 40 * 320)
    likelihood._asked.clear_cache()
    ((_, sliced),) = likelihood.answers(model, [ask])
    likelihood._asked.clear_cache()
    np.testing.assert_allclose(sliced.logprobs, whole.logprobs, atol=1e-5)
    assert (sliced.greedy == whole.greedy).all()


def test_a_long_context_loses_its_beginning_and_that_is_said_once(model, capsys):
    lm = LCM(model, max_length=40)
    long, end = "the dog " * 60, "over the lazy dog " * 20
    (one,) = lm.loglikelihood(requests((long + end, "blue")))
    (two,) = lm.loglikelihood(requests(("a fox " * 70 + end, "blue")))
    assert one == pytest.approx(two)
    assert capsys.readouterr().err.count("lose their beginning") == 1
    with pytest.raises(UserError, match=r"leaves no room for a prompt within 40"):
        lm.generate_until(requests(("a", {"max_gen_toks": 40})))
    with pytest.raises(UserError, match=r"a continuation has .* raise max_length"):
        lm.loglikelihood(requests(("a", long)))


def test_draws_differ_between_requests_and_not_between_runs(model):
    given = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    lm = LCM(model)
    first = lm.generate_until(requests(*[("the", given)] * 3))
    assert first == lm.generate_until(requests(*[("the", given)] * 3)) and len({*first}) > 1
    with pytest.raises(UserError, match=r"gen_kwargs num_beams cannot be"):
        lm.generate_until(requests(("a", {"num_beams": 2, "max_gen_toks": 4})))


def test_a_conversation_goes_on_within_its_last_message(model):
    lm = LCM(model)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is "}]
    assert lm.apply_chat_template(said[:1]) == "<|user|>Hi</s>\n<|assistant|>"
    assert lm.apply_chat_template(said, False) == "<|user|>Hi</s>\n<|assistant|>It is"
    assert lm.chat_template(True) == harness_model.TEMPLATE
    assert "/" not in lm.tokenizer_name and lm.tokenizer_name.endswith("model")


def test_arguments(folder):
    lm = LCM.create_from_arg_string(
        f"pretrained={folder},config.model.positions=yarn,config.model.positions.factor=2,"
        "max_length=192",
        {"batch_size": 3, "device": None},
    )
    assert lm.model.cfg.model.positions.name == "yarn" and (lm.max_length, lm.rows) == (192, 3)
    assert np.isfinite(lm.loglikelihood(requests(("", "blue"), ("the dog " * 90, " fox")))).all()
    for argument, message in (
        ("peft=x", "peft=x is no argument of lcm"),
        ("batch_size=no", 'batch_size=no must be 1 or more, or "auto"'),
        ("config.model.depht=2", "did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            LCM.create_from_arg_string(f"pretrained={folder},{argument}")


@pytest.mark.slow
def test_its_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "lcm.evaluation.harness", "run", "--model", "lcm"]
    command += ["--model_args", f"pretrained={folder}", "--tasks", "lcm_choices"]
    command += ["--include_path", str(TASKS), "--batch_size", "auto"]
    run = subprocess.run(command, cwd=TASKS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "acc_norm" in run.stdout
    assert harness.__doc__.split("\n")[2].strip().startswith("python -m lcm.evaluation.harness run")
