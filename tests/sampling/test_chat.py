"""Chat templates: what they make of conversations, as transformers has it too, and what they may not do."""

import datetime
import time
from typing import Any

import pytest

from slmjax.data.tokenizers import ByteTokenizer, Tokenizer
from slmjax.sampling import encode_chat, render_chat

# In the manner of released models; each is written for these tests.
CHATML = """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' ~ message['content'] | trim ~ '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token ~ content %}
    {% endif %}
{{- content -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""  # noqa: E501 - a line of a template is a line of its text
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('there is no system role') }}{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""  # noqa: E501 - a line of a template is a line of its text
TOOLS = """{%- macro show(tool) -%}{{ tool | tojson }}{%- endmacro -%}
{%- set ns = namespace(asked=false, last=messages | length - 1) -%}
{%- if tools is not none and tools %}[TOOLS]
    {%- for tool in tools %}{{ show(tool) }}{% if not loop.last %}, {% endif %}{% endfor %}[/TOOLS]
{%- endif -%}
{%- for message in messages[::-1] -%}
    {%- if message.role == 'user' -%}{%- set ns.last = loop.revindex0 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        {% generation %}
        {{- message.content.split('</think>')[-1].lstrip('\n') if 'content' in message else 'nothing' }}{{ eos_token }}
        {% endgeneration %}
    {%- elif loop.index0 == ns.last -%}[LAST]{{ message['content'] }}[/LAST]
    {%- else -%}[{{ message.role | upper }}]{{ dict(a=message.content).items() | list }}
    {%- endif -%}
{%- endfor -%}
{%- for key, value in {'é': [1, 2.5, none, true], '<b>': "'"} | dictsort %}{{ key ~ ':' ~ value | tojson(indent=2) }}{% endfor %}
{{- '%s-%03d' % ('x', 7) }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 7 // 2 ** 1 }}{{ strftime_now('%Y') }}"""  # noqa: E501 - a line of a template is a line of its text

PLAIN = [{"role": "user", "content": "Hi <b>there</b> "}]
TURN_BY_TURN = [
    *PLAIN,
    {"role": "assistant", "content": "<think>\nwell</think>\n\nHello."},
    {"role": "user", "content": "naïve 'q'?\n"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *TURN_BY_TURN]
WITH_NONE = [*PLAIN, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
TOOL = {"type": "function", "function": {"name": "f", "description": "größer <&> 'x'"}}


def test_conversations_by_hand() -> None:
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    start = "<|im_start|>assistant\n"
    assert render_chat(CHATML, PLAIN) == system + "<|im_start|>user\nHi <b>there</b><|im_end|>\n" + start
    assert render_chat(CHATML, WITH_SYSTEM[:2], add_generation_prompt=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <b>there</b><|im_end|>\n"
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert render_chat(HEADERS, WITH_SYSTEM[:2], bos_token="<s>") == (
        f"<s>{header('system')}Be kind.<|eot_id|>{header('user')}Hi "
        f"<b>there</b><|eot_id|>{header('assistant')}"
    )
    assert render_chat(
        TURNS,
        [*PLAIN, {"role": "assistant", "content": "Yes"}],
        bos_token="<bos>",
        add_generation_prompt=False,
    ) == ("<bos><start_of_turn>user\nHi <b>there</b><end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n")
    assert render_chat("{{ tools is none }}{{ x }}{{ bos_token }}{{ missing }}", PLAIN, x=3) == "True3"
    assert render_chat("{{ strftime_now('%Y-%m') }}", PLAIN) == f"{datetime.datetime.now():%Y-%m}"


def test_the_error_of_a_template_is_reported() -> None:
    with pytest.raises(ValueError, match="chat template fails on this conversation: there is no system role"):
        render_chat(TURNS, WITH_SYSTEM, bos_token="<bos>")
    with pytest.raises(ValueError, match="fails .* roles must alternate"):
        render_chat(TURNS, [*PLAIN, *PLAIN], bos_token="<bos>")
    with pytest.raises(ValueError, match="needs a message"):
        render_chat(CHATML, [])
    with pytest.raises(ValueError, match="must be plain data.*PosixPath|must be plain data.*object"):
        render_chat(CHATML, [{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "it reads '__class__' of a str"),
        ("{{ ''.__class__ }}", "it reads '__class__' of a str"),
        ("{{ ''['__class__'] }}", "it reads '__class__' of a str"),
        ("{{ messages | map(attribute='__class__') | list }}", "it reads '__class__' of a dict"),
        ("{{ messages | attr('__init__') }}", "it reads '__init__' of a list"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "it reads '__init__'"),
        ("{{ raise_exception.__globals__ }}", "it reads '__globals__' of a function"),
        ("{{ self._TemplateReference__context }}", "it reads '_TemplateReference__context'"),
        ("{{ '{0.__class__}'.format(messages) }}", "it reads '__class__' of a list"),
        ("{{ messages.append(1) }}", "it reads 'append' of a list"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ open('/etc/hostname') }}", "'open' is undefined"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.role.x }}", "has no attribute 'role'"),
        ("{{ range(1000000) }}", "Range too big"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "more than 100,000 steps",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
            "more than 100,000 steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "parts",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "parts",
        ),
        ("{% for i in range(99) %}{{ 'ab' * 1000000 }}{% endfor %}", "more than 10,000,000 characters"),
        ("{{ 'a' * 10000000000 }}", "repeats something 10,000,000,000 times"),
        ("{{ 10000000000 * [1] }}", "repeats something"),
        ("{{ 10 ** 10000000000 }}", "too large"),
        ("{{ 'a'.center(10000000000) }}", "the number 10,000,000,000"),
        ("{{ 'a' | center(10000000000) }}", "the number 10,000,000,000"),
        ("{{ 'a' | tojson(indent=10000000000) }}", "the number 10,000,000,000"),
        ("{{ '{:10000000000}'.format(1) }}", "too wide"),
        ("{{ '%10000000000d' % 1 }}", "too wide"),
        ("{{ lipsum(10000) }}", "'lipsum' is undefined"),
    ],
)
def test_what_a_template_may_not_do(template: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="chat template fails on this conversation") as refused:
        render_chat(template, PLAIN)
    assert reason in str(refused.value) and time.monotonic() - started < 30


def test_a_template_gets_copies() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert render_chat("{% set _ = messages[0].content[0] %}{{ _.text }}", messages) == "a"
    for way in ("pop('text')", "update(text='b')", "clear()"):
        with pytest.raises(ValueError, match="it reads"):
            render_chat("{{ messages[0].content[0]." + way + " }}", messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def chatty(template: str | None) -> Tokenizer:
    backend = ByteTokenizer().build([]).add_tokens(["<|im_start|>", "<|im_end|>"], special=True)._backend
    return Tokenizer(backend, bos="<|bos|>", eos="<|im_end|>", ends=["<|eos|>"], chat_template=template)


def test_a_conversation_as_tokens() -> None:
    tokenizer = chatty(
        HEADERS.replace("<|start_header_id|>", "<|im_start|>").replace("<|eot_id|>", "<|im_end|>")
    )
    ids = encode_chat(tokenizer, [{"role": "user", "content": "a"}])
    assert (
        ids[:2] == [0, 258] and ids.count(258) == 2 and ids.count(259) == 1
    )  # BOS once: the template writes it
    assert tokenizer.decode(ids) == "user<|end_header_id|>\n\naassistant<|end_header_id|>\n\n"
    assert tokenizer.end_ids == (259, 1)
    assert encode_chat(chatty(""), PLAIN) == [0]
    assert encode_chat(chatty("{{ pad_token }}{{ eos_token }}"), PLAIN) == [259]
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        encode_chat(chatty(None), PLAIN)


# As transformers has it -------------------------------------------------------------------------------------
@pytest.mark.nightly
@pytest.mark.parametrize(
    "template", [CHATML, HEADERS, TURNS, TOOLS], ids=["chatml", "headers", "turns", "tools"]
)
def test_transformers_makes_the_same(template: str, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = chatty(template)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    compared = 0
    for messages in (PLAIN, TURN_BY_TURN, WITH_SYSTEM, WITH_NONE):
        for add_generation_prompt in (True, False):
            for extra in ({}, {"tools": [TOOL, TOOL]}):
                names = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
                try:
                    expected = theirs.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **extra
                    )
                except Exception:  # of jinja2
                    with pytest.raises(ValueError, match="fails on this conversation"):
                        render_chat(
                            template, messages, **names, add_generation_prompt=add_generation_prompt, **extra
                        )
                    continue
                assert (
                    render_chat(
                        template, messages, **names, add_generation_prompt=add_generation_prompt, **extra
                    )
                    == expected
                )
                ids = theirs.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, **extra
                )["input_ids"]
                assert (
                    encode_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt, **extra)
                    == ids
                )
                compared += 1
    assert compared >= 8
