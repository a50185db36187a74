"""Chat templates, against transformers' `apply_chat_template`."""

import json

import pytest
import tokenizers as hf
import transformers

from lcm.errors import UserError
from lcm.pretrained import chat

BOS, EOS = "<s>", "</s>"

# Templates as published models have them, written anew and shorter.
TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "inst": """
{% if messages[0]['role'] == 'system' %}
    {% set system, rest = messages[0]['content'], messages[1:] %}
{% else %}
    {% set system, rest = false, messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% else %}
{{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "headers": """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- if tools is not none %}
    {{- '<|start_header_id|>tools<|end_header_id|>\\n\\n' + tools | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'system' %}{{ 'Today is ' + date_string + '\\n' }}{% endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "turns": """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "phi": """
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}
{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}
{% else %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "marked": """
{%- set ns = namespace(turns=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}
    {%- else -%}{{ '[' ~ ns.turns ~ '] ' ~ {'text': message.content} | tojson }}{%- endif -%}
    {%- if ns.turns > 8 -%}{%- break -%}{%- endif -%}
{%- endfor -%}""",
}
TALK = [
    {"role": "user", "content": " Is 2 < 3 & 'ä' a letter?\n"},
    {"role": "assistant", "content": "Yes,\n both. "},
    {"role": "user", "content": "日本語 🎉"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def theirs():
    raw = hf.Tokenizer(hf.models.WordLevel({BOS: 0, EOS: 1}, unk_token=BOS))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS, eos_token=EOS)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [TALK, TALK[:1], [SYSTEM, *TALK]], ids=["3", "1", "system"])
def test_text_is_that_of_transformers(theirs, name, prompt, messages):
    def rendered(**extra):
        options = {"bos": BOS, "eos": EOS, "add_generation_prompt": prompt} | extra
        return chat.render(TEMPLATES[name], messages, **options)

    def wanted(**extra):
        options = {"tokenize": False, "add_generation_prompt": prompt} | extra
        return theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], **options)

    if name == "turns" and messages[0]["role"] == "system":
        with pytest.raises(UserError, match=r"refuses .*\(System role not supported\)"):
            rendered()
        return
    assert rendered() == wanted() and TALK[0]["content"].strip() in rendered().replace("\\'", "'")
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"a": "<b>"}}}]
    assert rendered(tools=tools, date_string="today") == wanted(tools=tools, date_string="today")


def test_by_hand():
    text = chat.render(TEMPLATES["chatml"], TALK[:1])
    assert text == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n Is 2 < 3 & 'ä' a letter?\n"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render("{{ strftime_now('%Y') }}", TALK).isdigit()


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "'hello' is no conversation"),
        ([], "is no conversation: give a list"),
        ({"role": "user", "content": "a"}, "is no conversation"),
        (["hello"], "message 0 is 'hello'"),
        ([TALK[0], {"content": "a"}], "message 1 has role None: choose from system"),
        ([{"role": "asistant", "content": "a"}], "message 0 has role 'asistant'"),
        ([{"role": "user"}], "message 0 has content None"),
        ([{"role": "user", "content": 3}], "message 0 has content 3"),
    ],
)
def test_malformed_messages(messages, match):
    with pytest.raises(UserError, match=match) as caught:
        chat.render(TEMPLATES["chatml"], messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("", "no chat template: give a prompt of plain text"),
        ("{% for %}", "error in line 1"),
        ("{{ raise_exception('no\nway') }}", r"refuses this conversation \(no way\)"),
        ("{{ messages[9].content.x }}", "refuses this conversation .*has no element 9"),
        ("{{ 1 / 0 }}", r"refuses this conversation \(division by zero\)"),
        ("{{ messages.append(1) }}", "refuses this conversation .*unsafe"),
        ("{{ messages.__class__.__mro__ }}", "refuses this conversation"),
        ("{{ 'a' + none }}", "refuses this conversation"),
    ],
)
def test_templates_that_fail(template, match):
    with pytest.raises(UserError, match=match) as caught:
        chat.render(template, TALK)
    assert "\n" not in str(caught.value)


def test_messages_are_left_alone():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    text = chat.render("{{ messages[0].tool_calls | tojson }}{{ messages[0].content }}", [call])
    assert text == '[{"name": "f"}]' and call["content"] is None


def test_template_of_a_folder(tmp_path):
    assert chat.template_of(tmp_path) == ""
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert chat.template_of(tmp_path) == "one"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert chat.template_of(tmp_path) == "b"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat.template_of(tmp_path) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        chat.template_of(tmp_path)
