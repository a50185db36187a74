"""Generation on a terminal: `lcm generate` and `lcm chat`."""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import lcm.decoding.batch as batches
from lcm.decoding.beam import beam_search
from lcm.decoding.context import fitted
from lcm.decoding.engine import Engine
from lcm.decoding.session import Session
from lcm.decoding.settings import Sampling
from lcm.decoding.texts import Prompt, requests_of, settings_of, stream
from lcm.decoding.texts import generate as generate_texts
from lcm.errors import UserError
from lcm.pretrained import Model, changed, load
from lcm.progress import progress

HELP = "/clear forgets the conversation, /undo the last turn, /quit ends it (or Ctrl-D)."


def generate(args: argparse.Namespace, overrides: list[str]) -> int:
    """`lcm generate`: text on standard output, in pieces; 1 if a line of a batch was broken."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    model, options = _model(args, overrides), _options(args, overrides)
    if args.batch is not None:
        return _batch(args, model, options)
    if args.out is not None:
        raise UserError(f"--out={args.out} is of --batch: the text of a prompt is printed")
    if args.n < 1 or args.beams < 0:
        raise UserError(f"-n {args.n} --beams {args.beams}: give at least 1 text, and 0 beams")
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    given: Prompt = [{"role": "user", "content": prompt}] if args.chat else prompt
    if args.beams:
        if options.pop("stop"):
            raise UserError("--beams searches for tokens and knows no --stop: take --stop-ids")
        del options["rows"]
        found = beam_search(model, given, beams=args.beams, n=args.n, **options)
    elif args.n > 1:
        found = generate_texts(model, given, n=args.n, **options)
    else:
        del options["rows"]
        for text in stream(model, given, **options):
            print(text, end="", flush=True)
        print()
        return 0
    for number, text in enumerate(found):
        print(f"--- {number + 1}, log P = {text.score:.3f}\n{text.text}")
    return 0


def chat(args: argparse.Namespace, overrides: list[str]) -> None:
    """`lcm chat`: a conversation, line by line."""
    sys.stdout.reconfigure(errors="replace")
    model, options = _model(args, overrides), _options(args, overrides)
    sampling, stop, full = _sampling(options), options["stop"], options["full"]
    settings = settings_of(model, sampling)
    limit = model.cfg.data.length
    if full not in ("refuse", "config"):  # beyond the trained length from the beginning
        model, limit = fitted(model, 8 * limit, full), 8 * limit
    begins = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, str]] = list(begins)
    session = Session(Engine(model, rows=1, **options["engine"]))
    print(HELP)
    while (line := _line()) is not None:
        if line == "/help":
            print(HELP)
            continue
        if line in ("/clear", "/undo"):
            kept = len(begins) if line == "/clear" else max(len(begins), len(messages) - 2)
            del messages[kept:]
            print(f"[{len(messages)} messages are left]")
            continue
        request = requests_of(
            model, [[*messages, {"role": "user", "content": line}]], settings, stop
        )[0]
        if full != "config" and request.tokens > limit:
            print(
                f"[{request.tokens} tokens with the answer exceed the context of {limit}: /clear, "
                "a smaller --max-new-tokens, or --full=slide]"
            )
            continue
        answer = ""
        try:
            for event in session.run(request):
                answer += event.text
                print(event.text, end="", flush=True)
        except KeyboardInterrupt:  # of the answer, not of the conversation
            print(" [stopped]", end="")
        print()
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _line() -> str | None:
    """What the user says next; `None` at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if line == "/quit":
            return None
        if line:
            return line


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} at byte {error.start}") from None


def _model(args: argparse.Namespace, overrides: list[str]) -> Model:
    return changed(load(args.model), overrides)


def _options(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Arguments of `generate`: `engine`, `full`, `rows`, `stop` and the settings that are given."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    own = any(assignment.startswith("model.positions") for assignment in overrides)
    return {
        **{name: getattr(args, name) for name in names if name in args},
        "stop": args.stop,
        "full": args.full or ("config" if own else "refuse"),
        "rows": args.rows,
        "engine": {
            "cache": args.cache,
            "cache_dtype": args.cache_dtype,
            "weights": args.weights,
            "release": True,
        },
    }


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("stop", "full", "rows", "engine")}


def _batch(args: argparse.Namespace, model: Model, options: dict[str, Any]) -> int:
    if args.n > 1 or args.beams or args.chat:
        raise UserError("--batch takes neither -n, --beams nor --chat: give messages in its lines")
    target = args.out or pathlib.Path(f"{args.batch}.out.jsonl")
    complain = lambda message: print(f"lcm: {message}", file=sys.stderr)  # noqa: E731
    with progress("generate") as report:
        found = batches.run(model, args.batch, target, report=report, complain=complain, **options)
    had = f", {found.before} were there" if found.before else ""
    bad = f", {len(found.broken)} broken lines" if found.broken else ""
    print(f"wrote {found.done} lines to {target}{had}{bad}")
    return 1 if found.broken else 0
