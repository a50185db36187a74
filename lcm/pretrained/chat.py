"""Conversations as the text a model was trained on, by the template that comes with it.

A template is a Jinja program, run in a sandbox: it sees what it is given and changes nothing. Its
text has special tokens written out, so it is read by `tokenizer.encode(text, special=True)`; those
written in a message are read alike, so messages of strangers are not for this function.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from lcm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
FILE = "chat_template.jinja"
_MISSING = "a chat template needs jinja2: pip install 'lcm[pretrained]'"


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The text of a conversation, `[{"role": "user", "content": "..."}, ...]`.

    bos, eos: the first and the last token of a text as written, which many templates put there.
    add_generation_prompt: whether the text goes on to where the assistant begins to speak.
    extra: what else a template asks for, such as `tools`.

    Raises:
        UserError: without a template, for messages that are none, and where the template fails or
            refuses the conversation.
    """
    if not template:
        raise UserError(
            "this model has no chat template: give a prompt of plain text, or a template of your "
            "own as model._replace(chat_template=...)"
        )
    given = {"tools": None, "documents": None} | extra
    try:
        return _compiled(template).render(
            messages=[_checked(index, message) for index, message in enumerate(_listed(messages))],
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=add_generation_prompt,
            **given,
        )
    except (UserError, RecursionError):
        raise
    except Exception as error:  # a template is a program and fails as any of them does
        raise UserError(
            f"the chat template refuses this conversation ({_line(error)}): change the messages, "
            "or give a template of your own as model._replace(chat_template=...)"
        ) from error


def template_of(folder: str | Path) -> str:
    """The chat template of a Hugging Face folder; empty if it has none.

    Raises:
        UserError: for a tokenizer_config.json that cannot be read.
    """
    folder = Path(folder)
    try:
        if (folder / FILE).is_file():
            return (folder / FILE).read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template of {folder} cannot be read: {_line(error)}") from None
    template = found.get("chat_template") or ""
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", "")
    return template


def _listed(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(
            f"{messages!r:.60} is no conversation: give a list of messages, "
            '[{"role": "user", "content": "..."}]'
        )
    return messages


def _checked(index: int, message: Any) -> dict[str, Any]:
    """A message as a plain dict, once it has a role and something to say."""
    if not isinstance(message, Mapping):
        raise UserError(
            f"message {index} is {message!r:.60}: give a mapping with 'role' and 'content'"
        )
    if message.get("role") not in ROLES:
        raise UserError(
            f"message {index} has role {message.get('role')!r}: choose from {', '.join(ROLES)}"
        )
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str | list) and not (content is None and calls):
        raise UserError(
            f"message {index} has content {content!r:.60}: give a text as 'content', empty "
            "if there is none"
        )
    return {key: value for key, value in message.items() if value is not None}


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError(_MISSING) from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _marked_generation()],
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template has an error in line {error.lineno} ({_line(error)}): give one of "
            "your own as model._replace(chat_template=...)"
        ) from error


def _marked_generation() -> Any:
    """`{% generation %}` around what the assistant says, a mark for training, as if it were not."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is written in text; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
