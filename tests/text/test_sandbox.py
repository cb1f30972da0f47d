"""Templates that try to exhaust the process or to reach out of the sandbox are refused, fast."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from hayai.errors import ModelError, RequestError
from hayai.text.chat import MAX_TEMPLATE_CHARS, ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = SELF %}{% endfor %}{{ ns.x }}"
LISTS = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = SELF %}{% endfor %}{{ END }}"
HOSTILE = {
    "concat": DOUBLE.replace("SELF", "ns.x ~ ns.x"),
    "plus": DOUBLE.replace("SELF", "ns.x + ns.x"),
    "times": "{{ 'x' * 1000000000 }}",
    "times left": "{{ 1000000000 * 'x' }}",
    "list times": "{{ ([0] * 1000000000) | length }}",
    "replace method": DOUBLE.replace("SELF", "ns.x.replace('a', 'aaaa').replace('b', 'ab')"),
    "replace filter": DOUBLE.replace("SELF", "ns.x | replace('a', 'aaaaaaaa')"),
    "join method": DOUBLE.replace("SELF", "ns.x.join([ns.x, ns.x, ns.x])"),
    "join filter": DOUBLE.replace("SELF", "[ns.x, ns.x, ns.x] | join(ns.x)"),
    "percent": DOUBLE.replace("SELF", "'%s%s' % (ns.x, ns.x)"),
    "percent width": "{{ '%1000000000d' % 1 }}",
    "format filter": DOUBLE.replace("SELF", "'%s%s' | format(ns.x, ns.x)"),
    "format method": DOUBLE.replace("SELF", "'{0}{0}'.format(ns.x)"),
    "format width": "{{ '{:1000000000}'.format('x') }}",
    "format nested width": "{{ '{:{w}}'.format('x', w=1000000000) }}",
    "nested list": LISTS.replace("SELF", "[ns.x, ns.x]").replace("END", "ns.x"),
    "nested tuple": LISTS.replace("SELF", "(ns.x, ns.x)").replace("END", "ns.x"),
    "nested dict": LISTS.replace("SELF", "{'a': ns.x, 'b': ns.x}").replace("END", "ns.x | tojson"),
    "nested dict call": LISTS.replace("SELF", "dict(a=ns.x, b=ns.x)").replace("END", "ns.x"),
    "nested views": LISTS.replace("SELF", "[{'a': ns.x, 'b': ns.x}.values()]").replace("END", "ns.x"),
    "nested namespaces": "{% set ns = namespace() %}{% set ns.x = 1 %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "namespace as text": "{% set ns = namespace() %}{{ ns | string }}",
    "range": "{{ range(1000000000) | list | length }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filters": "{{ range(99999) " + "| map('string') " * 60 + "| list | length }}",
    "map of heavy": "{{ range(99999) | map('default', 'x' * 200000, true) | join | length }}",
    "macro": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else 'x' }}{% endmacro %}{{ m(60) }}",
    "macro deep": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro output": "{% macro m(s) %}" + "{{ s }}" * 100 + "{% endmacro %}{{ m(m(m(m(m('abcdef'))))) }}",
    "block set": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}{{ ns.x }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 200000 }}{% endfor %}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([i, i]) }}{% endfor %}",
    "power": "{{ 10 ** 1000000000 }}",
    "squares": DOUBLE.replace("'ab'", "7").replace("SELF", "ns.x * ns.x"),
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent filter": "{{ 'x' | indent(1000000000, true) }}",
    "json indent": "{{ messages | tojson(indent=1000000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'floor') }}",
    "many variables": "".join("{% set a" + str(i) + " = 'x' * 250000 %}" for i in range(6000)),
    "split": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + ['a' * 99 + ','] %}{% endfor %}",
    "strftime": "{{ strftime_now('%1000000000Y' * 10) }}",
    "include": "{% include 'x' %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class by attr": "{{ (''|attr('__class__')).__mro__ }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "mutation": "{{ messages.append(1) }}",
    "raise": "{{ raise_exception('no') }}",
    "none": "{{ none + 1 }}",
}
NOT_COMPILED = {
    "syntax": "{% if %}",
    "unknown filter": "{{ 'x' | center(100) }}",
    "lipsum": "{% for %}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "nested ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "long": " " * (MAX_TEMPLATE_CHARS + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(RequestError) as caught:
            template.render(MESSAGES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "chat_template_error"
    assert time.monotonic() - started < 30  # two seconds of budget, and a tracer on a busy machine
    assert peak < 128 << 20


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_template_that_does_not_compile(name: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(NOT_COMPILED[name])


def test_what_templates_use_works() -> None:
    source = """
    {%- macro show(x) -%}<{{ x }}>{%- endmacro -%}
    {%- set ns = namespace(n=0, last='') -%}
    {%- for m in messages -%}
      {%- if m.role == 'skip' %}{% continue %}{% endif -%}
      {%- set ns.n = ns.n + 1 -%}
      {%- set ns.last = m.content | trim -%}
      {%- generation -%}{{ show(m.content.strip().upper()) }}{%- endgeneration -%}
      {{- loop.index }}/{{ loop.length }}{% if not loop.last %},{% endif -%}
      {%- if loop.index == 3 %}{% break %}{% endif -%}
    {%- endfor -%}
    {{- '|%s|%.2f|' % ('a', 1.5) }}{{ '{}-{:>3}'.format('b', 7) }}|{{ 7 // 2 }}|{{ -7 % 3 }}|{{ 2 ** 5 -}}
    |{{ {'a': [1, '<é>'], 'b': none} | tojson }}|{{ [1, 2] | tojson(indent=1) -}}
    |{{ messages | selectattr('role', 'equalto', 'user') | list | length -}}
    |{{ messages | map(attribute='role') | join('+') }}|{{ ns.last.split('l') | last -}}
    |{{ 'a\nb' | indent(2) -}}
    |{{ 'aXbX'.replace('X', '', 1) | replace('X', '!') }}|{{ (messages[0].nothing | default('d')) ~ 1 -}}
    |{{ messages[::-1][0].content[1:3] }}|{{ 'l' in ns.last }}|{{ strftime_now('%Y') | length -}}
    |{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}|{{ {'b': 1, 'a': 2} | dictsort -}}
    |{%- set block %}in{{ 1 }}{% endset %}{{ block }}|{% for a in [[1], [2]] recursive %}{{ a if a is number
    else loop(a) }}{% endfor %}|{{ undefined_name }}|{{ bos_token }}{{ extra }}"""
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "w <b>"}]
    expected = (
        "<HELLO>1/2,<W <B>>2/2|a|1.50|b-  7|3|2|32|" '{"a": [1, "<é>"], "b": null}|[\n 1,\n 2\n]'
        "|1|user+assistant|w <b>|a\n  b|abX|d1| <|False|4|x1|[('a', 2), ('b', 1)]|in1|12||<s>more"
    )  # fmt: skip
    expected = expected.replace("|abX|", "|ab!|")
    assert ChatTemplate(source, "<s>").render(messages, extra="more") == expected
