"""Chat templates: what they render, how the text is tokenized, and what they must not do."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest

from pykvq import template_sandbox
from pykvq.chat import CHATML, ChatTemplate, encode_chat, template_names
from pykvq.errors import ChatTemplateError, TokenizerError
from pykvq.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 1 < 2?"},
]

# A template in the manner of SmolLM2: ChatML with a system turn of its own.
SMOL_STYLE = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nYou are small.<|im_end|>\n' -}}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' -}}{% endif %}"""

# A template in the manner of Qwen2.5: tools as JSON in the system turn, blank lines trimmed.
QWEN_STYLE = """\
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n{"name": "' ~ call.name ~ '", "arguments": ' ~ call.arguments | tojson ~ '}' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def render(
    source: str, messages: Sequence[Mapping[str, object]] = CONVERSATION, **variables: Any
) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **variables)


def byte_tokenizer(**keys: object) -> Tokenizer:
    """An SPM vocabulary of bytes and a space; <s> is 1, </s> is 2, <|im_start|> is 260."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += ["\u2581", "<|im_start|>", "<|im_end|>"]
    meta: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 3, 3],
        "tokenizer.ggml.add_space_prefix": False,
    }
    return Tokenizer.from_metadata(meta | {f"tokenizer.ggml.{k}": v for k, v in keys.items()})


# ---- rendering ----


def test_a_smollm2_like_template_renders_chatml() -> None:
    assert render(SMOL_STYLE) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nIs 1 < 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(SMOL_STYLE, CONVERSATION[1:], add_generation_prompt=False) == (
        "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>user\nIs 1 < 2?<|im_end|>\n"
    )


def test_a_qwen_like_template_renders_tools_and_their_calls() -> None:
    call = {"function": {"name": "add", "arguments": {"a": "\u00e9<", "b": [1, 2]}}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert render(QWEN_STYLE, messages, tools=[{"name": "add"}]) == (
        '<|im_start|>system\n# Tools\n{"name": "add"}\n<|im_end|>\n'
        "<|im_start|>user\nAdd.<|im_end|>\n"
        '<|im_start|>assistant\n{"name": "add", "arguments": {"a": "\u00e9<", "b": [1, 2]}}'
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_variables_reach_the_template() -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ enable_thinking }}|{{ tools is none }}"
    assert render(source, enable_thinking=False) == "<s>|</s>|False|True"


def test_json_is_plain_and_can_be_indented() -> None:
    value = {"b": "<\u00e9'&>", "a": 1}
    assert render("{{ v | tojson }}", v=value) == '{"b": "<\u00e9\'&>", "a": 1}'
    assert render("{{ v | tojson(indent=2) }}", v=[1]) == "[\n  1\n]"
    assert render("{{ v | tojson(sort_keys=true, separators=(',', ':')) }}", v=value) == (
        '{"a":1,"b":"<\u00e9\'&>"}'
    )


def test_loops_can_be_left_and_their_variables_work() -> None:
    source = (
        "{% for x in items if x != 2 %}{% if x > 4 %}{% break %}{% endif %}"
        "{{ loop.index }}/{{ loop.length }}:{{ x }}{{ '' if loop.last else ',' }}{% endfor %}"
    )
    assert render(source, items=[1, 2, 3, 4, 5, 6]) == "1/5:1,2/5:3,3/5:4,"
    assert render("{% for a, b in v.items() %}{{ a }}{{ b }}{% endfor %}", v={"x": 1}) == "x1"
    assert render("{% for x in [] %}a{% else %}none{% endfor %}") == "none"


def test_values_made_by_a_template_are_what_jinja_makes() -> None:
    assert render("{{ ([1] + [2, messages | length]) | join('-') }}") == "1-2-2"
    assert render("{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}") == "a1Noneabab10243"
    assert render("{{ '%s in 2024: %3d' % ('x', 7) }}") == "x in 2024:   7"
    assert render("{{ '{:>3}|{}'.format(1, 'b') }}{{ '%03d' | format(5) }}") == "  1|b005"
    assert render("{{ 'a-b-c'.replace('-', '+', 1) }}{{ ', '.join(['x', 'y']) }}") == "a+b-cx, y"
    assert render("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}") == "1"
    assert render("{{ messages | map(attribute='role') | join(',') }}") == "system,user"
    assert render("{{ none | select | list }}{{ 'a\nb' | indent(2) }}") == "[]a\n  b"
    assert render("{% filter upper %}a{{ 'b' }}{% endfilter %}") == "AB"
    assert render("{% set a, b = (1, [2]) %}{{ a }}{{ b[0] }}") == "12"


def test_the_generation_tag_of_transformers_is_transparent() -> None:
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"


def test_strftime_now_gives_the_date() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    rendered = render("{{ strftime_now('%Y-%m-%d') }}")
    assert before <= rendered <= datetime.now().strftime("%Y-%m-%d")


def test_raise_exception_gives_its_message() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn!') }}{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match=r"refuses the conversation: No system turn!\.$"):
        render(source)
    assert render(source, CONVERSATION[1:]) == ""


# ---- choosing a template ----


def test_the_template_of_a_file_gets_the_spelling_of_its_tokens() -> None:
    meta = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    template = ChatTemplate.from_metadata(meta, byte_tokenizer())
    assert template.render(CONVERSATION) == "<s>Be brief.</s>"


def test_a_file_without_a_template_gets_chatml_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        template = ChatTemplate.from_metadata({}, byte_tokenizer())
    assert template.source == CHATML
    assert template.render(CONVERSATION) == render(SMOL_STYLE)


def test_named_templates_are_found_by_name_only() -> None:
    meta = {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_template.rag": "rag",
    }
    assert template_names(meta) == ["rag", "tool_use"]
    for name, text in ((None, "plain"), ("tool_use", "tools"), ("rag", "rag")):
        assert ChatTemplate.from_metadata(meta, byte_tokenizer(), name).render([]) == text
    with pytest.raises(ChatTemplateError, match=r"'other'.*rag, tool_use"):
        ChatTemplate.from_metadata(meta, byte_tokenizer(), "other")


def test_a_template_that_is_no_string_is_refused() -> None:
    with pytest.raises(TokenizerError, match="chat_template is of type int"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": 1}, byte_tokenizer())


# ---- tokens ----


def test_bos_is_there_once_whether_the_template_writes_it_or_not() -> None:
    tok = byte_tokenizer()
    bare, written = encode_chat(tok, "<|im_start|>a"), encode_chat(tok, "<s><|im_start|>a")
    assert bare == written == [1, 260, 3 + ord("a")]
    assert encode_chat(tok, "") == [1]
    assert encode_chat(byte_tokenizer(add_bos_token=False), "<|im_start|>") == [260]


def test_eos_is_not_put_after_a_generation_prompt() -> None:
    tok = byte_tokenizer(add_eos_token=True)
    assert tok.encode("a")[-1] == 2
    assert encode_chat(tok, "a") == [1, 3 + ord("a")]


# ---- what templates must not do ----


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__['os'].system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'user'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ (5).to_bytes(9, 'big') }}",
    ],
)
def test_escapes_from_the_sandbox_fail(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"cannot be rendered: .*\.$"):
        render(source)
    assert CONVERSATION[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x | no_such_filter }}", "{{", "{{ 'a' | center(9) }}"]
)
def test_a_template_that_is_not_valid_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        ChatTemplate(source, "", "")


def test_a_template_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="not UTF-8"):
        ChatTemplate(b"a\xff".decode("utf-8", "surrogateescape"), "", "")


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="1048577 characters, more than 1048576"):
        ChatTemplate("a" * (template_sandbox.MAX_SOURCE + 1), "", "")


@pytest.mark.parametrize("source", ["{{ " + "(" * 9999 + ")" * 9999 + " }}", "{% if 1 %}" * 9999])
def test_deep_nesting_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


def grown(step: str, start: str = "'aa'") -> str:
    """A template that applies a step 60 times to a value x of a namespace."""
    head = "{% set n = namespace(x=" + start + ") %}{% for i in range(60) %}"
    return head + step + "{% endfor %}{{ n.x }}"


SIZE_BOMBS = {
    "range": "{{ range(10**9) | list }}",
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat list": "{{ 10**9 * [1] }}",
    "power": "{{ 10**(10**10) }}",
    "integer": grown("{% set n.x = n.x * n.x %}", "10"),
    "hex": "{{ ('f' * 100000) | int(base=16) // 3 }}",
    "plus": grown("{% set n.x = n.x + n.x %}"),
    "tilde": grown("{% set n.x = n.x ~ n.x %}"),
    "block": grown("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + grown("{% set n.x = f(n.x) %}"),
    "list": grown("{% set n.x = n.x + n.x %}", "[1]"),
    "shared list": grown("{% set n.x = [n.x, n.x] %}", "[1]"),
    "shared dict": grown("{% set n.x = {'a': n.x, 'b': n.x} %}", "[1]"),
    "shared call": grown("{% set n.x = dict(a=n.x, b=n.x) %}", "[1]"),
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "star": "{{ '%*d' % (10**9, 1) }}",
    "precision": "{{ '%.1000000000f' | format(1) }}",
    "named": "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "computed width": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format many": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace empty": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ ('b' * 99999).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | join('b' * 99999) }}",
    "map": "{{ range(99999) | map('replace', '9', 'x' * 99999) | list | length }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "json indent": "{{ ([1] * 99999) | tojson(indent=9999) }}",
    "date": "{{ strftime_now('%Y' * 999999) }}",
}


@pytest.mark.parametrize("bomb", SIZE_BOMBS)
def test_a_template_cannot_grow_a_value_without_end(
    bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 1 << 20)
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=r"more than|too big|four digits"):
        render(SIZE_BOMBS[bomb])
    assert time.perf_counter() - start < template_sandbox.MAX_SECONDS


TIME_BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
    "filters": "{% for i in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "tests": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
}


@pytest.mark.parametrize("bomb", TIME_BOMBS)
def test_a_template_cannot_run_without_end(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=re.escape("longer than 0.2 seconds.")):
        render(TIME_BOMBS[bomb])
    assert time.perf_counter() - start < 5


def test_a_long_conversation_is_rendered_quickly() -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 50} for i in range(4000)]
    start = time.perf_counter()
    text = render(QWEN_STYLE, turns)
    assert time.perf_counter() - start < 2
    assert text.count("<|im_end|>") == 4000
