# Copyright © 2026 The MetalLoRA authors.
# SPDX-License-Identifier: MIT
"""Our chat templates against PyPI `jinja2`, set up as `transformers` does.

METAL_LORA_BUILD: the build folder with `text_oracle`. METAL_LORA_LLAMA_VOCABS: the folder
vendor/llama.cpp/models of the llama-cpp-python 0.3.36 sdist, for its 70 real templates.
"""

import datetime
import json
import os
import pathlib
import subprocess

import pytest

jinja2 = pytest.importorskip("jinja2")
import jinja2.ext  # noqa: E402
import jinja2.sandbox  # noqa: E402

NOW = datetime.datetime(2026, 11, 23, 4, 5, 6)


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def environment():
    # Mutable, unlike transformers': some templates append to lists.
    env = jinja2.sandbox.SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env.filters["tojson"] = tojson
    env.filters["from_json"] = json.loads  # llama.cpp's; ours has it, too
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def expected(template, variables):
    try:
        return environment().from_string(template).render(**json.loads(json.dumps(variables)))
    except Exception as error:  # whatever the template provokes
        return error


def ask(requests):
    build = os.environ.get("METAL_LORA_BUILD")
    if not build:
        pytest.skip("METAL_LORA_BUILD does not name the build folder")
    text = "".join(json.dumps(r) + "\n" for r in requests)
    run = subprocess.run(
        [pathlib.Path(build) / "text_oracle", "render"], input=text, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.\nNow.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City, \"quoted\" & <b>"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function",
         "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2.5, None, True]}}}
    ],
}  # fmt: skip
USER = {"role": "user", "content": "  Grüezi, \"you\" <|im_end|>\n "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi!"}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "{\"t\": 7}"}
SYSTEM = {"role": "system", "content": "Be brief. "}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]}
CONVERSATIONS = [
    {"messages": [USER]},
    {"messages": [USER], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER, ANSWER, USER], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER, ANSWER]},
    {"messages": [SYSTEM, USER], "tools": [TOOL, TOOL], "add_generation_prompt": True},
    {"messages": [USER, CALL, RESULT, ANSWER, USER], "tools": [TOOL], "add_generation_prompt": True},
    {"messages": [SYSTEM, USER, CALL, RESULT], "tools": [TOOL], "add_generation_prompt": True},
    {"messages": [PARTS, ANSWER], "enable_thinking": False, "add_generation_prompt": True},
    {"messages": [USER], "enable_thinking": True, "reasoning_effort": "high", "add_generation_prompt": True},
    {"messages": []},
    {"messages": [USER, USER]},
    {"messages": [ANSWER, RESULT]},
]


def variables(conversation):
    base = {"tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "<s>", "eos_token": "</s>"}
    return {**base, **conversation}


def folder():
    path = os.environ.get("METAL_LORA_LLAMA_VOCABS")
    return pathlib.Path(path) / "templates" if path else None


# Jinja's `"a"|safe + b` escapes b as HTML even where autoescape is off; ours leaves it as it is.
ESCAPES_AFTER_SAFE = {"meetkai-functionary-medium-v3.1"}


def templates():
    if not folder():
        return [pytest.param(None, id="none")]
    known = pytest.mark.xfail(strict=True, reason="escapes after |safe")
    return [
        pytest.param(p, id=p.stem, marks=[known] if p.stem in ESCAPES_AFTER_SAFE else [])
        for p in sorted(folder().glob("*.jinja"))
    ]


@pytest.mark.parametrize("path", templates())
def test_real_template(path):
    if path is None:
        pytest.skip("METAL_LORA_LLAMA_VOCABS does not name the templates of llama.cpp")
    template = path.read_text(encoding="utf-8")
    cases = [variables(c) for c in CONVERSATIONS]
    answers = ask([{"template": template, "variables": c} for c in cases])
    assert len(answers) == len(cases)
    for case, answer in zip(cases, answers):
        want = expected(template, case)
        if isinstance(want, TypeError) and "generator" in str(want):
            continue  # our filters give lists, which tojson takes
        if isinstance(want, Exception):
            assert "error" in answer, f"{want!r}, but rendered {answer}"
        else:
            assert answer.get("text") == want, answer.get("error")


SNIPPETS = [
    "{{ 1 }} {{ 1.0 }} {{ 1e20 }} {{ 1.5e-7 }} {{ true }} {{ none }} {{ [1, 'a', \"it's\", none] }} {{ {'a': (1,)} }}",
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 7 / 2 }} {{ 1 + 2 * 3 - 4 }} {{ -2|abs }}",
    "{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' in 'abc' }} {{ 4 not in [1, 2] }} {{ not false and true or x }}",
    "{{ 'abc'[1] }} {{ 'abcdef'[1:-1:2] }} {{ 'äöü'[::-1] }} {{ [1,2,3][-1] }} {{ [1,2,3,4][:2] }} {{ 'ab'[9:] }}",
    "{% for i in [1,2,3] if i != 2 %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ i }},{% else %}none{% endfor %}",
    "{% for i in [] %}x{% else %}none{% endfor %}{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for a in 'xyz' %}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('o', 'e') }}{{ loop.changed(1) }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% set z = i %}{% endfor %}{{ ns.n }}{{ z }}",
    "{% macro m(a, b='B', c=none) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, c=3) }}{{ m('x', 'y') }}",
    "{% set x %}a\n  b{% endset %}{{ x|upper }}{% set y | trim %}  q  {% endset %}{{ y }}{% filter upper %}abc{% endfilter %}",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n  {%- if true -%}  d  {%- endif +%}\n e {#- c -#} f\n  {# g #}\nh {%+ if true %}i{% endif %}\n\n",
    "{% raw %}{{ x }}\n{% endraw %}\nk  {{- ' l ' -}}  m\r\nn\n",
    "{{ '\\n\\t\\x41\\u00e9\\'' }}{{ \"a\" 'b' }}{{ 'x' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ [1] + [2] }}",
    "{{ x is defined }} {{ x is undefined }} {{ 1 is number }} {{ 'a' is string }} {{ [] is iterable }} {{ {} is mapping }} {{ x is none }}",
    "{{ 3 is odd }} {{ 4 is divisibleby 2 }} {{ 1 is equalto 1 }} {{ 2 is in [1, 2] }} {{ true is boolean }} {{ 1.0 is float }} {{ 'a' is sequence }}",
    "{{ x | default('d') }} {{ '' | default('d', true) }} {{ [3,1,2]|sort|join('-') }} {{ ['b','A']|sort }} {{ 'a b'|title }} {{ 'aB c'|capitalize }}",
    "{{ [{'a':1},{'a':2}]|map(attribute='a')|list }} {{ [{'a':1},{'b':2}]|selectattr('a','defined')|list }} {{ [1,2,3]|reject('equalto',2)|list }}",
    "{{ {'b':1,'a':[1,{}]}|tojson }} {{ {'b':1,'a':[1,'é\\n']}|tojson(indent=2) }} {{ {'b':{'c':1},'a':2}|tojson(sort_keys=true) }} {{ []|tojson(indent=1) }}",
    "{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a-b-c'.split('-', 1) }} {{ 'abc'.startswith('ab') }} {{ '  x '.strip() }} {{ 'xxaxx'.strip('x') }}",
    "{{ 'abc'.upper() }} {{ 'abc def'.title() }} {{ 'aXbX'.replace('X', '-', 1) }} {{ '-'.join(['a','b']) }} {{ 'ab'.find('b') }} {{ '{} {1}'.format(1) if false }}",
    "{{ {'a':1}.get('a') }} {{ {'a':1}.get('b', 2) }} {{ {'a':1}.keys()|list }} {{ {'a':1}|dictsort }} {{ {'a':1}|items|list }} {{ {'items':1}['items'] }}",
    "{{ 'line\\nsecond\\n\\nthird'|indent(2) }}|{{ 'a\\nb'|indent(2, true) }}|{{ '%s-%d' % ('a', 3) }}|{{ '12'|int + 1 }}|{{ 'x'|int(7) }}|{{ '1.5'|float }}",
    "{{ [1,1,2]|unique|list }} {{ [1,2]|first }} {{ [1,2]|last }} {{ [1,2,3]|sum }} {{ [1,2]|max }} {{ 'abc'|length }} {{ 'aé'|length }} {{ [1,2]|reverse|list }} {{ 2.567|round(1) }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set a, b = 1, 'two' %}{{ a }}{{ b }}{{ 1 if x }}{{ 'y' if a == 1 else 'n' }}{{ (1, 2) }}{{ 1, 2 }}{{ strftime_now('%d %b %Y %B %A %j') }}",
    "{{ x }}{{ x|upper }}{{ x|list }}{{ x|length }}{{ x == y }}{{ x ~ 'a' }}{% for i in x %}{% endfor %}{{ x is iterable }}",
    "{{ none|map('upper')|list }}{{ none|selectattr('a')|list }}{{ '{\"b\": 1, \"a\": [2]}'|from_json }}",
    "{{ x.y }}", "{{ x + 'a' }}", "{{ 'a' + 1 }}", "{{ raise_exception('no') }}", "{{ none.x }}", "{{ none.x.y }}", "{{ [1] < 'a' }}", "{{ 1 / 0 }}",
    "{% if %}", "{% for %}", "{{ 'a }}", "{% endif %}", "{{ a b }}", "{% if a %}", "{{ 'a'|nofilter }}", "{{ a is notest }}", "{% include 'x' %}", "{{ ''.__class__ }}",
]  # fmt: skip


def test_snippets():
    answers = ask([{"template": s, "variables": {}} for s in SNIPPETS])
    bad = []
    for snippet, answer in zip(SNIPPETS, answers):
        want = expected(snippet, {})
        if isinstance(want, Exception):
            if "error" not in answer:
                bad.append((snippet, repr(want), answer))
        elif answer.get("text") != want:
            bad.append((snippet, want, answer))
    assert not bad, "\n".join(map(repr, bad))
