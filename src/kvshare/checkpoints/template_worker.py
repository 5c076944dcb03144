"""The process that renders chat templates: says that it is ready, reads one JSON request a line, answers with one JSON line.

It runs as a script of its own, imports only Jinja, and gives up what it does not need (memory, files, output) before it
sees a template: the sandbox keeps a template from reaching Python, the limits keep what slips through from mattering.
"""

import contextlib
import datetime
import io
import json
import sys
import time

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training: its contents are rendered as they are."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    """Jinja as Hugging Face's templates expect it, without attributes that lead into Python and without changes to its arguments."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def render(jinja, request):
    """The text of one request, piece by piece so that an endless one is noticed. Raises what the template raises."""
    out, length = io.StringIO(), 0
    for piece in jinja.from_string(request["template"]).generate(**request["variables"]):
        length += len(piece)
        if length > request["most_characters"]:
            raise jinja2.TemplateError(f"it writes more than {request['most_characters']} characters")
        out.write(piece)
    return out.getvalue()


def warm_up(jinja):
    """Bring in what Jinja, Python and the C library otherwise load when first used, while files can still be opened."""
    time.localtime()
    for template in (
        "{{ '\\n' }}",
        "{{ missing.attribute }}",
        "{{ 'a b' | wordwrap(1) }}",
        "{{ [1] | pprint }}",
        "{{ [1] | tojson(indent=1) }}",
    ):
        with contextlib.suppress(jinja2.TemplateError):
            jinja.from_string(template).render()


def give_up_rights():
    """No more memory than needed, no file opened from here on, none written, no process started."""
    try:
        import resource
    except ImportError:  # not on Windows: the sandbox and the parent's clock remain
        return
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def main():
    jinja = environment()
    warm_up(jinja)
    give_up_rights()
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = {"text": render(jinja, json.loads(line))}
        except Exception as error:  # whatever a template raises is an answer, not the end of the worker
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
