"""Many prompts from a file of JSON lines to another, which can be left off and gone on with.

A line holds a `prompt` or `messages`, an `id` if one likes, and any setting of `Sampling` or `stop`
for it alone; what comes out is a line for each, in the order in which they are ready.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

from lcm import models
from lcm.decoding import context
from lcm.decoding.engine import Engine, check
from lcm.decoding.requests import Request
from lcm.decoding.texts import requests_of, settings_of
from lcm.errors import UserError
from lcm.progress import Report

BEGINS = b'{"line": '  # what every line that is written begins with


class Line(NamedTuple):
    """A line that can be worked on: its number, what it held, what names it in the output."""

    number: int
    record: dict[str, Any]
    key: str


class Outcome(NamedTuple):
    """How many lines were done now, were there already, and what the matter is with the others."""

    done: int
    before: int
    broken: list[str]


def run(
    model: Any,
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    stop: Sequence[str] = (),
    full: str = "refuse",
    rows: int = 8,
    engine: dict[str, Any] | None = None,
    report: Report | None = None,
    complain: Callable[[str], None] = lambda message: None,
    **sampling: Any,
) -> Outcome:
    """Writes a line to `target` for each line of `source` that is not there yet.

    A line there names the line, its settings and the model's config and step here by a hash, so a
    changed one is done anew. A last line that a crash has cut off is taken away. Arguments as of
    `generate`; `complain` is told of each broken line as it is found.

    Raises:
        UserError: if a file cannot be read or written, or settings for all lines cannot be.
    """
    settings_of(model, sampling)
    context.check(model, 0, full)
    defaults = {**sampling, "stop": [stop] if isinstance(stop, str) else list(stop)}
    numbers = {name: (engine or {}).get(name, "") for name in ("weights", "cache_dtype")}
    own = sorted(map(str, {**defaults, **numbers}.items())), full, model.step
    lines, broken = _read(source, [*own, model.cfg.to_json_best_effort()])
    work: list[tuple[Line, Request]] = []
    for line in lines:
        try:
            work.append((line, _request(model, line.record, defaults, full)))
        except UserError as error:
            broken.append(f"{source}:{line.number}: {error}")
    for message in broken:
        complain(message)
    done = _done(target)
    todo = [(line, request) for line, request in work if line.key not in done]
    if todo:
        longest = max(request.tokens for _, request in work)  # of all, whatever is done already
        machine = Engine(context.fitted(model, longest, full), rows=rows, **(engine or {}))
        _work(machine, todo, target, report)
    return Outcome(len(todo), len(work) - len(todo), broken)


def _work(
    engine: Engine, todo: list[tuple[Line, Request]], target: pathlib.Path, report: Report | None
) -> None:
    """Every request's line, written as soon as it is whole."""
    events: list[list] = [[] for _ in todo]
    total, written, finished = sum(r.sampling.max_new_tokens for _, r in todo), 0, 0
    with _appended(target) as file:
        for event in engine.run([request for _, request in todo]):
            own = events[event.request]
            own.append(event)
            written += 1
            if event.finish:
                line, request = todo[event.request]
                total -= request.sampling.max_new_tokens - len(own)
                finished += 1
                file.write(json.dumps(_record(line, own), ensure_ascii=False) + "\n")
                file.flush()
                own.clear()
            if report is not None:
                report(written, total, f"{finished} of {len(todo)} prompts")
        os.fsync(file.fileno())


def _appended(target: pathlib.Path) -> TextIO:
    try:
        return target.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None


def _record(line: Line, events: list) -> dict[str, Any]:
    named = {"id": line.record["id"]} if "id" in line.record else {}
    return {
        "line": line.number,
        **named,
        "text": "".join(event.text for event in events),
        "tokens": len(events),
        "logprob": sum(event.raw_logprob for event in events),
        "finish_reason": events[-1].finish,
        "key": line.key,
    }


def _read(source: pathlib.Path, common: Any) -> tuple[list[Line], list[str]]:
    """Lines that hold a record, and what is wrong with the others; empty lines are nothing."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None
    lines, broken = [], []
    for number, raw in enumerate(content.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            broken.append(f"{source}:{number}: no UTF-8 at byte {error.start}")
            continue
        except (ValueError, RecursionError) as error:
            broken.append(f"{source}:{number}: no JSON: {error}")
            continue
        if not isinstance(record, dict):
            broken.append(f"{source}:{number}: no object with a prompt, but {str(record)[:40]}")
            continue
        if not _is_text(record):
            broken.append(f"{source}:{number}: has half of a surrogate pair, which is no text")
            continue
        text = json.dumps([number, record, common], sort_keys=True)
        lines.append(Line(number, record, hashlib.sha256(text.encode()).hexdigest()[:16]))
    return lines, broken


def _is_text(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _request(model: Any, record: dict[str, Any], defaults: dict[str, Any], full: str) -> Request:
    own = {key: value for key, value in record.items() if key not in ("id", "prompt", "messages")}
    fields = {**defaults, **own}
    stop = fields.pop("stop")
    if not isinstance(stop, str) and not _strings(stop):
        raise UserError(f"stop={stop!r} must be a string or a list of strings")
    if ("prompt" in record) == ("messages" in record):
        raise UserError("holds neither prompt nor messages, or both: give one of them")
    prompt = record.get("prompt", record.get("messages"))
    request = requests_of(model, [prompt], settings_of(model, fields), stop)[0]
    context.check(model, request.tokens, full)
    check(models.spec(model.cfg), model.tokenizer, request)
    return request


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _done(target: pathlib.Path) -> set[str]:
    """What the lines that are there name; a last one that is not whole is cut off."""
    try:
        content = target.read_bytes()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{target} cannot be read: {error.strerror}: give another --out") from None
    end = content.rfind(b"\n") + 1
    whole, rest = content[:end], content[end:]
    try:
        keys = {json.loads(line)["key"] for line in whole.splitlines()}
        if not rest.startswith(BEGINS[: len(rest)]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{target} holds other lines than lcm generate writes: give a new file by --out"
        ) from None
    if rest:
        os.truncate(target, end)
    return keys
