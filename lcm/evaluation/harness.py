"""The model class `lcm` of EleutherAI's lm-eval harness (Gao et al., 2023).

    python -m lcm.evaluation.harness run --model lcm --model_args pretrained=PATH_OR_NAME \\
        --tasks arc_easy --batch_size auto

is lm-eval's own command line, with all its options, after `lcm` was made known to it: lm-eval finds
no models outside of itself. In Python it is `lm_eval.simple_evaluate(model=LCM(lcm.load(...)))`.
Keys of the config are arguments too: `pretrained=X,config.model.positions=yarn,max_length=16384`.

Texts become tokens, and overlong ones are cut, as by lm-eval's class `hf`, so that figures agree.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lcm import models
from lcm.decoding.engine import Engine
from lcm.decoding.requests import Request
from lcm.decoding.texts import rendered, settings_of
from lcm.errors import UserError
from lcm.evaluation.likelihood import Ask, answers
from lcm.pretrained import Model, changed, load
from lcm.progress import progress

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError("the harness needs lm-eval: pip install 'lcm[harness]'") from error

OVERRIDE = "config."
ROWS = 8  # texts written at a time, if nobody says
# Settings of generation by lm-eval's names, which are those of transformers.
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"}


@register_model("lcm")
class LCM(TemplateLM):
    """A model of lcm as lm-eval sees it.

    pretrained: a model, or what `lcm.load` takes: a workdir, a folder, a .gguf file, a name.
    dtype: of the weights, float32 or bfloat16.
    max_length: tokens a text may have; the trained length by default. Beyond it the encoding of
        the config is taken at its word.
    max_gen_toks: tokens written where a task does not say.
    batch_size: texts at a time; "auto" goes by tokens.
    config.KEY: overrides of the config.
    """

    def __init__(
        self,
        pretrained: str | Model,
        *,
        dtype: str = "float32",
        max_length: int = 0,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        for name in overrides:
            if not name.startswith(OVERRIDE):
                raise UserError(
                    f"--model_args {name}={overrides[name]} is no argument of lcm: those are "
                    "pretrained, dtype, max_length, max_gen_toks, batch_size and config.KEY"
                )
        model = load(pretrained, dtype=dtype) if isinstance(pretrained, str) else pretrained
        assigned = [f"{k.removeprefix(OVERRIDE)}={v}" for k, v in overrides.items()]
        self.model = changed(model, assigned)
        if self.model.tokenizer is None:
            raise UserError("this model came without a tokenizer, and the harness gives it texts")
        self.max_length = int(max_length) or self.model.cfg.data.length
        models.check_limit(models.spec(self.model.cfg), self.max_length)
        self.max_gen_toks = int(max_gen_toks)
        self.rows = _rows(batch_size)
        self._engine: Engine | None = None
        self._truncated = False

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.model.tokenizer.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, special tokens written in it included; `bos` first where models have it,
        unless the text begins with it."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(string, special=True).tolist()
        wanted = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        there = add_special_tokens is None and ids[:1] == [tokenizer.bos]
        return [tokenizer.bos, *ids] if wanted and tokenizer.add_bos and not there else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding writes it."""
        asks = [self._ask(context, continuation) for _, context, continuation in requests]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(asks)
        total, done = sum(len(ask.tokens) for ask in asks), 0
        with progress("loglikelihood") as report:
            report(0, max(total, 1))
            for number, answer in answers(self.model, asks, rows=self.rows):
                scores[number] = answer.total, answer.certain
                if requests[number][0] is not None:  # not a window of a longer text
                    self.cache_hook.add_partial(
                        "loglikelihood", requests[number][0], scores[number]
                    )
                done += len(asks[number].tokens)
                report(done, total)
        return scores

    def loglikelihood_rolling(
        self, requests: Iterable[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, each token after as many as fit, up to `max_length`."""
        windows = []
        for number, request in enumerate(requests):
            windows += [(number, window) for window in self._windows(request.args[0])]
        scores = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        totals = np.zeros(len(requests))
        np.add.at(totals, [number for number, _ in windows], [score for score, _ in scores])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text, up to a stop string or a stop token."""
        todo = [self._request(number, *request.args) for number, request in enumerate(requests)]
        texts = [""] * len(todo)
        total, written = sum(request.sampling.max_new_tokens for request in todo), 0
        with progress("generate") as report:
            report(0, max(total, 1))
            for event in self._machine().run(todo):
                texts[event.request] += event.text
                written += 1
                report(written, total)
                if event.finish:
                    args = requests[event.request].args
                    self.cache_hook.add_partial("generate_until", args, texts[event.request])
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a prompt it ends where its last message does."""
        given = {"add_generation_prompt": add_generation_prompt}
        try:
            text = rendered(self.model, chat_history, **given)
        except UserError:  # some templates know no system message
            others = [message for message in chat_history if message["role"] != "system"]
            if not others or len(others) == len(chat_history):
                raise
            text = rendered(self.model, others, **given)
        if add_generation_prompt:
            return text
        said = chat_history[-1]["content"].strip()
        return text[: text.rindex(said) + len(said)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source; models here have one, whatever its name."""
        return self.model.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What requests are cached under."""
        return str(self.model.cfg.data.tokenizer).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What a result says of its model."""
        cfg = self.model.cfg
        return {
            "model_num_parameters": models.parameter_count(cfg),
            "model_name": cfg.name,
            "model_positions": cfg.model.positions.name,
            "max_length": self.max_length,
        }

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Windows of a text, each as what is read only and what is scored."""
        found = get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, 1
        )
        return [make_disjoint_window(window) for window in found]

    def _ask(self, context: list[int], continuation: list[int]) -> Ask:
        """The pair, its beginning cut off where it is longer than the model reads."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, the model reads "
                f"{self.max_length}: raise max_length"
            )
        tokens = self._fitting([*context, *continuation], self.max_length + 1)
        return Ask(np.array(tokens, np.int32), len(continuation))

    def _request(self, number: int, context: str, given: dict[str, Any]) -> Request:
        """A request for the engine; settings by the names that tasks use."""
        fields = normalize_gen_kwargs(given, self.max_gen_toks)
        count, until = fields.pop("max_gen_toks"), fields.pop("until")
        if count >= self.max_length:
            raise UserError(
                f"max_gen_toks={count} leaves no room for a prompt within {self.max_length} "
                "tokens: lower it, or raise max_length"
            )
        drawn = fields.pop("do_sample")
        fields.setdefault("temperature", 1.0 if drawn else 0.0)
        if unknown := fields.keys() - SAMPLING:
            raise UserError(
                f"gen_kwargs {', '.join(sorted(unknown))} cannot be: settings are until, "
                f"max_gen_toks, do_sample, {', '.join(sorted(SAMPLING))}"
            )
        tokens = self._fitting(self.tok_encode(context), self.max_length - count)
        settings = settings_of(self.model, {**fields, "max_new_tokens": count, "seed": number})
        stop = tuple(text for text in until if text)
        return Request(np.array(tokens or [self.prefix_token_id], np.int32), settings, stop)

    def _fitting(self, tokens: list[int], most: int) -> list[int]:
        if len(tokens) > most and not self._truncated:
            self._truncated = True  # said once
            print(
                f"lcm: a text of {len(tokens)} tokens exceeds the {most} that the model reads: it "
                "and others like it lose their beginning; raise max_length to keep it",
                file=sys.stderr,
            )
        return tokens[-most:]

    def _machine(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(self.model, rows=self.rows or ROWS)
        return self._engine


def _rows(batch_size: int | str) -> int:
    """Texts at a time; 0 for "auto"."""
    if str(batch_size).startswith("auto"):
        return 0
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f'batch_size={batch_size} must be 1 or more, or "auto"')
    return int(batch_size)


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"lcm: error: {error}")


if __name__ == "__main__":
    main()
