#!/usr/bin/env python3
"""What drafts are worth where a grammar holds answers: JSON under schemas, and required calls of tools; and what a schema costs. Standard
library only.

    benches/structured.py [--rounds 3] [--seeds 20] [--temperature 0.7] [--output FILE.json] [--serve-arg=ARG ...]

Starts `target/release/medusa-llama serve`, warms it up, and asks for the same answers in turn, with drafts and without, and for free text
of as many tokens as the JSON has. Drafts must change no text. Prints tokens per second of decoding, and ratios by round.
"""
import argparse, json, statistics, sys, urllib.request

sys.dont_write_bytecode = True
from comparing.process import Process

TEXT, NUMBER = {"type": "string", "maxLength": 60}, {"type": "number"}


def fields(**properties):
    return {"type": "object", "additionalProperties": False, "required": list(properties), "properties": properties}


def several(items):
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 4}


SCHEMAS = [
    ("Invent a person. Answer in JSON with name, description, year and tags.", fields(
        name={"type": "string", "maxLength": 30}, description={"type": "string", "maxLength": 120},
        year={"type": "integer", "minimum": 1000, "maximum": 2030}, tags=several({"type": "string", "maxLength": 16}))),
    ("Write an order of two things from a bakery as JSON.", fields(
        customer_name=TEXT, order_date={"type": "string", "format": "date"}, currency={"enum": ["EUR", "USD", "GBP"]},
        order_lines=several(fields(product_name={"type": "string", "maxLength": 24}, quantity={"type": "integer"}, unit_price=NUMBER)))),
    ("Where does the river Thames begin and end? Answer in JSON.", fields(
        river=TEXT, source=fields(latitude=NUMBER, longitude=NUMBER, elevation_in_metres=NUMBER),
        mouth=fields(latitude=NUMBER, longitude=NUMBER, elevation_in_metres=NUMBER))),
    ("Is this review good or bad? 'The soup was cold, but the cake was wonderful.' Answer in JSON.", fields(
        sentiment={"enum": ["positive", "negative", "mixed"]}, confidence=NUMBER, aspects=several(fields(
            aspect={"enum": ["food", "service", "price", "atmosphere"]}, opinion={"type": "string", "maxLength": 40})))),
    ("Plan a meeting of the garden club as JSON.", fields(
        title=TEXT, starts_at={"type": "string", "format": "date-time"}, duration_in_minutes={"type": "integer"}, location=TEXT,
        attendees=several(fields(full_name={"type": "string", "maxLength": 24}, role={"enum": ["organizer", "required", "optional"]})))),
]


def tool(name, description, **properties):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": fields(**properties)}}


TOOLS = [
    tool("get_current_weather", "The weather at a place now.", location=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    tool("search_files", "Searches the files of a folder.", directory=TEXT, pattern=TEXT, case_sensitive={"type": "boolean"},
         max_results={"type": "integer"}),
    tool("create_calendar_event", "Adds an event to the calendar.", title=TEXT, starts_at={"type": "string", "format": "date-time"},
         duration_in_minutes={"type": "integer"}),
    tool("send_email", "Sends a message.", recipient=TEXT, subject=TEXT, body={"type": "string", "maxLength": 120}),
    tool("convert_currency", "Converts an amount of money.", amount=NUMBER, from_currency={"enum": ["EUR", "USD", "GBP"]},
         to_currency={"enum": ["EUR", "USD", "GBP"]}),
]
QUESTIONS = [
    "What is the weather in Oslo?", "Find all files in /var/log that mention a timeout.", "Remind me of the dentist on Tuesday at nine.",
    "Write to Anna that I will be late.", "How many euros are 250 dollars?",
]


def body(kind, seed):
    """A chat whose answer is of a kind."""
    prompt, schema = SCHEMAS[seed % len(SCHEMAS)]
    if kind == "calls":
        return {"messages": [{"role": "user", "content": QUESTIONS[seed % len(QUESTIONS)]}], "tools": TOOLS, "tool_choice": "required"}
    chat = {"messages": [{"role": "user", "content": prompt}]}
    if kind == "json":
        chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return chat


def said(message):
    """What must not change, and the JSON in it."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    texts = [arguments for _, arguments in calls] or [message["content"]]
    return calls or message["content"], texts


def ask(url, kind, seed, n, temperature, drafts):
    """Tokens and seconds of decoding, and the answer's message."""
    chat = {**body(kind, seed), "max_tokens": n, "temperature": temperature, "seed": seed, "speculation": "auto" if drafts else "off",
            "share_text": False, "ignore_eos": kind == "free"}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(chat).encode())
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    return answer["usage"]["completion_tokens"], answer["timings"]["predicted_ms"] / 1e3, answer["choices"][0]["message"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3); ap.add_argument("--seeds", type=int, default=20)
    ap.add_argument("--temperature", type=float, default=0.7); ap.add_argument("--output")
    ap.add_argument("--serve-arg", action="append", default=[])
    a = ap.parse_args()
    measured = {"json, drafts": ("json", True), "json": ("json", False), "free": ("free", False), "calls, drafts": ("calls", True), "calls": ("calls", False)}
    with Process.ours(*a.serve_arg) as server:
        lengths = {kind: [ask(server.url, kind, seed, 300, a.temperature, True)[0] for seed in range(a.seeds)] for kind in ["json", "calls"]}
        lengths["free"] = lengths["json"]
        rounds = []
        for i in range(a.rounds):
            totals = {name: [0, 0.0] for name in measured}
            for seed in range(a.seeds):
                messages = {}
                for name, (kind, drafts) in measured.items():
                    n = lengths["free"][seed] if kind == "free" else 300
                    tokens, seconds, messages[name] = ask(server.url, kind, seed, n, a.temperature, drafts)
                    totals[name][0] += max(tokens - 1, 0)
                    totals[name][1] += seconds
                for kind in ["json", "calls"]:
                    plain, texts = said(messages[kind])
                    assert plain == said(messages[f"{kind}, drafts"])[0], f"drafts changed a text: seed {seed}"
                    for text in texts:
                        json.loads(text)
            rounds.append({name: n / s for name, (n, s) in totals.items()})
            print(f"round {i + 1}: " + ", ".join(f"{name} {speed:.1f} tokens/s" for name, speed in rounds[-1].items()), flush=True)
    for what, over in [("json, drafts", "json"), ("calls, drafts", "calls"), ("json", "free")]:
        ratios = [r[what] / r[over] for r in rounds]
        print(f"{what} over {over}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if a.output:
        with open(a.output, "w") as f:
            json.dump({"temperature": a.temperature, "tokens": {kind: sum(n) for kind, n in lengths.items()}, "rounds": rounds}, f, indent=1)


if __name__ == "__main__":
    main()
