#!/usr/bin/env python3
"""Renders every chat template of a folder with Jinja2, in the environment that transformers gives templates.

usage: render.py TEMPLATES    (PYTHONPATH has jinja2)

Prints JSON: `cases`, the variables of each case; `rendered`, a list of {"template", "case", "text"}; `snippets`, a list of
{"source", "text"}, rendered with `variables`. A text is null where Jinja2 has an error.
"""
import datetime
import json
import sys
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2024, 7, 6, 18, 9, 5)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said; it prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("printed"), [], [], body).set_lineno(line)

    @staticmethod
    def printed(caller):
        return caller()


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def said(role, content, **more):
    return {"role": role, "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather <at> a \"place\" & time.\nIn °C.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town"},
                "days": {"type": "integer", "default": 1, "minimum": 0, "enum": [1, 2.5, None, True]},
                "options": {"type": ["object", "null"], "properties": {"unit": {"type": "string", "enum": ["C", "F"]}}},
                "list": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["place"],
        },
        "return": {"type": "string"},
    },
}
PLAIN = {"type": "function", "function": {"name": "stop", "description": "", "parameters": {"type": "object", "properties": {}}}}


def call(arguments, name="get_weather", identifier="call12345", **more):
    function = {"name": name, "arguments": arguments}
    return said("assistant", more.pop("content", ""), tool_calls=[{"id": identifier, "type": "function", "function": function}], **more)


ARGUMENTS = {"place": "Zürich", "days": 3, "options": {"unit": None, "deep": [1, 2.0, True, "x\"y"]}, "list": []}
ASKED = [said("system", "Be brief."), said("user", "What is the weather?")]
RESULT = said("tool", '{"temperature": 21.5}', tool_call_id="call12345", name="get_weather")
IMAGE = {"type": "image", "image": "x.png"}

CONVERSATIONS = {
    "user": [said("user", "Hello!")],
    "system": ASKED,
    "spaces": [said("system", "  Be brief.\n"), said("user", "\n Hello \n\n"), said("assistant", " Hi \n"), said("user", " x ")],
    "turns": [*ASKED, said("assistant", "Sunny."), said("user", "And tomorrow?"), said("assistant", "Rain."), said("user", "Oh.")],
    "unicode": [said("system", "Sprich Deutsch. é漢😀"), said("user", "Größe\t'x' \"y\" \\ <b>&amp;</b> \u00a0\u200b {{ x }}")],
    "prefill": [said("user", "Count."), said("assistant", "One, two,")],
    "thought": [said("user", "2+2?"), said("assistant", "4", reasoning_content="Add them."), said("user", "3+3?")],
    "thought_last": [said("user", "2+2?"), said("assistant", "4", reasoning_content="Add them.", thinking="Add.")],
    "think_tags": [said("user", "2+2?"), said("assistant", "<think>\nAdd.\n</think>\n\n4"), said("user", "3+3?")],
    "call": [*ASKED, call(ARGUMENTS), RESULT],
    "call_text": [*ASKED, call(json.dumps(ARGUMENTS)), RESULT],
    "call_null": [*ASKED, call(ARGUMENTS, content=None), RESULT, said("assistant", "Fine."), said("user", "Thanks.")],
    "call_open": [*ASKED, call({}, name="stop")],
    "calls": [
        said("user", "Compare."),
        said("assistant", "Let me see.", reasoning_content="Two calls.", tool_calls=[
            *call({"place": "A"})["tool_calls"], *call({"place": "B"}, identifier="call67890")["tool_calls"],
        ]),
        RESULT,
        said("tool", "20", tool_call_id="call67890", name="get_weather"),
        said("assistant", "A is warmer."),
        said("user", "Good."),
    ],
    "parts": [said("system", [{"type": "text", "text": "Be brief."}]), said("user", [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}])],
    "image": [said("user", [IMAGE, {"type": "text", "text": "What is this?"}])],
    "developer": [said("developer", "Be brief."), said("user", "Hello!")],
    "only_system": [said("system", "Be brief.")],
    "two_users": [said("user", "A"), said("user", "B")],
    "empty": [],
    "odd_role": [said("narrator", "Once."), said("user", "Go on.")],
    "extra": [said("user", "Hello!", name="ann", weight=1, flags=[True, None, 0.1, 1e20, {"k": "v"}])],
}
OPTIONS = {
    "": {},
    "tools": {"tools": [WEATHER, PLAIN]},
    "one_tool": {"tools": [PLAIN]},
    "no_tools": {"tools": []},
    "closed": {"add_generation_prompt": False},
    "thinking": {"enable_thinking": True, "thinking": True},
    "no_thinking": {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"},
    "documents": {"documents": [{"title": "T", "text": "Text of it.", "id": 1}], "custom_tools": None},
    "effort": {"reasoning_effort": "high", "date_string": "1 Jan 2025", "builtin_tools": ["brave_search"], "tools": [WEATHER]},
    "model": {"model_identity": "You are Bot.", "clear_thinking": False, "preserve_thinking": True, "tools_in_user_message": False},
}

SNIPPET_VARIABLES = {
    "t": " Hello, Wörld! ",
    "n": 7,
    "x": 2.5,
    "l": [3, "b", None, 1.0, True, "a'c"],
    "words": ["banana", "Apple", "cherry", "apple"],
    "d": {"z": 1, "a": "two", "items": [1, 2], "m": {"k": "v"}, "empty": {}},
    "people": [{"name": "Ann", "age": 31}, {"name": "bob", "age": 25, "tags": ["x"]}, {"name": "Cy", "age": 31}],
    "tree": [{"v": 1, "c": [{"v": 2, "c": []}, {"v": 3, "c": [{"v": 4, "c": []}]}]}],
    "none_value": None,
    "long": "The quick brown fox\njumps over\n\nthe lazy dog",
}


def cases():
    for name, messages in CONVERSATIONS.items():
        for option, more in OPTIONS.items():
            yield f"{name}/{option}", {
                "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **more
            }


def main():
    env = environment()
    rendered = []
    for path in sorted(Path(sys.argv[1]).glob("*.jinja")):
        template = env.from_string(path.read_text(encoding="utf-8"))
        for case, variables in cases():
            try:
                text = template.render(bos_token="<s>", eos_token="</s>", **variables)
            except Exception:
                text = None
            rendered.append({"template": path.stem, "case": case, "text": text})
    snippets = []
    for source in (Path(__file__).parent / "snippets.txt").read_text(encoding="utf-8").split("\n----\n"):
        try:
            text = env.from_string(source).render(SNIPPET_VARIABLES)
        except Exception:
            text = None
        snippets.append({"source": source, "text": text})
    print(json.dumps({"cases": dict(cases()), "rendered": rendered, "variables": SNIPPET_VARIABLES, "snippets": snippets}))


if __name__ == "__main__":
    main()
