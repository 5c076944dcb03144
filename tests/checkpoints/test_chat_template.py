"""Chat templates render as transformers renders them, and a hostile one can neither run code, nor hang, nor fill the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kvshare.checkpoints import chat_template
from kvshare.checkpoints.chat_template import MOST_TEMPLATE_CHARACTERS, render_template
from kvshare.errors import RequestError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Wie geht's? 🙂\n"},
    {"role": "assistant", "content": "Gut.", "tool_calls": [{"name": "f", "arguments": {"x": 1.5, "é": [None, True]}}]},
]
TEMPLATES = {
    "white space of blocks": (
        "{% for m in messages %}\n    {% if loop.first %}\n  first\n    {% endif %}\n"
        "{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}\n"
    ),
    "json as it is": (
        "{{ messages[0] | tojson }}{{ messages[2].tool_calls | tojson(indent=2) }}"
        "{{ messages[1] | tojson(sort_keys=true, separators=(',', ':')) }}"
    ),
    "loop control": (
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}"
        "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}"
    ),
    "namespace and slices": (
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index %}{{ m.content[:3] }}"
        "{% endfor %}{{ ns.n }}"
    ),
    "generation marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "macros": ("{% macro turn(m, x='|') -%}\n  {{ x ~ m.role ~ x }}\n{%- endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"),
    "special tokens and arguments": (
        "{{ bos_token }}{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{{ 'x' if tools else 'y' }}{{ eos_token }}"
    ),
    "methods": (
        "{% for m in messages %}{{ m.get('name', 'none').upper() }}{{ m.content.strip().split(' ') | join(',') }}"
        "{% for k, v in m.items() %}{{ k }}{% endfor %}{% endfor %}"
    ),
    "generation prompt": "{{ messages | length }}{% if add_generation_prompt %}<start>{% endif %}",
}


@pytest.fixture(autouse=True, scope="module")
def _no_worker_left():
    yield
    chat_template.stop_worker()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_it_renders_as_transformers_does(template: str, add_generation_prompt: bool):
    more: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": True}
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=add_generation_prompt, **more)
    variables = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **more}
    assert render_template(template, variables) == theirs[0]


def test_todays_date_can_be_written():
    assert render_template("{{ strftime_now('%Y') | int > 2000 }}", {}) == "True"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ missing.attribute }}", "UndefinedError: 'missing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader|TypeError"),
    ],
)
def test_a_templates_own_complaint_reaches_the_user(template: str, complaint: str):
    with pytest.raises(RequestError, match=rf"the chat template failed on these messages: .*({complaint})"):
        render_template(template, {"messages": []})


def test_what_is_no_json_is_refused():
    with pytest.raises(RequestError, match="not plain JSON"):
        render_template("", {"messages": [object()]})


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__()[104].__init__.__globals__['sys'].modules['os'].popen('MARK').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('MARK').read() }}{% endif %}{% endfor %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('MARK').read() }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('MARK').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('MARK').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('MARK').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('MARK').read() }}",
    "{{ lipsum.__globals__['os'].popen('MARK').read() }}",
    "{{ range.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'].codecs.builtins.open('MARK', 'w') }}",
    "{{ strftime_now.__globals__.sys.modules.os.system('MARK') }}",
    "{{ messages.__class__ }}",
    "{{ (messages | attr('__class__')).__base__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__.__mro__}' | format(messages)) ~ ('%s' | format(messages.__class__)) }}",
    "{{ '{0.__globals__}'.format_map({'0': raise_exception}) }}",
    "{% set x = messages.append(1) %}",
    "{% set x = variables.update({'a': 1}) %}",
    "{{ messages.__getitem__.__self__.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ()|attr('_'*2 + 'class' + '_'*2)|attr('_'*2 + 'base' + '_'*2) }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__globals__ }}",
    "{{ caller.__globals__ }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop._iterable.__class__ }}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_reach_python(template: str, tmp_path: Path):
    """Known ways out of template engines: each is refused, or gives nothing; none runs a command."""
    mark = tmp_path / "mark"
    try:
        text = render_template(template.replace("MARK", f"touch {mark}"), {"messages": [{"role": "user", "content": "x"}], "variables": {}})
    except RequestError:
        text = ""
    assert not mark.exists()
    assert "<class" not in text
    assert "function" not in text
    assert "module" not in text


LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% for i in range(99999) %}{{ m(n + 1) }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{% set x = m(0) %}{% endfor %}",
    "{{ 9 ** (9 ** 9) > 1 }}",
    "{{ range(99999) | map('string') | map('length') | list | sum ** 999999999 }}",
]


@pytest.mark.parametrize("template", LOOPS)
def test_an_endless_template_is_stopped(template: str):
    with pytest.raises(RequestError, match=r"took longer than 0\.3 seconds|RecursionError|OverflowError|MemoryError|ValueError"):
        render_template(template, {"messages": []}, seconds=0.3)


GROWTH = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ [1] * 10 ** 12 }}",
    "{{ '%099999999999d' % 1 }}",
    "{{ '{:099999999999d}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 11) }}",
    "{{ 'a' | center(10 ** 11) }}",
    "{{ 'a' | indent(10 ** 11, true) }}",
    "{{ messages | tojson(indent=10 ** 11) }}",
    "{% set n = namespace(s='a' * 99) %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
]


@pytest.mark.parametrize("template", GROWTH)
def test_a_growing_template_is_stopped(template: str):
    with pytest.raises(
        RequestError, match=r"writes more than|MemoryError|OverflowError|used too much memory|took longer|TemplateError|Too many"
    ):
        render_template(template, {"messages": [1]}, seconds=3)


def test_a_worker_that_was_killed_is_replaced():
    with pytest.raises(RequestError, match="took longer"):
        render_template(LOOPS[0], {}, seconds=0.2)
    assert render_template("{{ 1 + 1 }}", {}) == "2"


def test_one_worker_serves_many_requests():
    render_template("a", {})
    first = chat_template._worker
    assert [render_template("{{ n }}", {"n": n}) for n in range(20)] == [str(n) for n in range(20)]
    assert chat_template._worker is first


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the worker's limits from /proc")
def test_the_worker_has_given_up_files_and_memory():
    render_template("a", {})
    assert chat_template._worker is not None
    limits = Path(f"/proc/{chat_template._worker.pid}/limits").read_text()
    for name, limit in (("Max open files", "3"), ("Max file size", "0"), ("Max address space", str(512 << 20))):
        assert any(line.startswith(name) and line.split()[3] == limit for line in limits.splitlines()), limits


def test_a_template_of_a_million_characters_is_refused_unread():
    with pytest.raises(RequestError, match="at most 1000000 are accepted"):
        render_template("a" * (MOST_TEMPLATE_CHARACTERS + 1), {})
