#!/usr/bin/env python3
"""How long running streams stall when a long prompt joins, or large bodies. Standard library only.

    benches/stall.py [--model GGUF] [--streams 8] [--stream-tokens 1800] [--prompt-tokens 1500] [--runs 5] [--bodies BYTES] [--serve-arg=ARG ...]

Starts `target/release/medusa-llama serve` with room for more sequences than streams, lets the streams run, then sends a
prompt of some 1,500 tokens, five times over. Prints, per run: the ordinary gap between two pieces (median before the
newcomer), the largest gap of any stream while the newcomer's prompt is read, and their ratio, which must stay under 4.

With --bodies it sends, instead of the prompt, two bodies of so many bytes at once, of one kind after another; and then again with small
requests beside them: `request_ratio` is how much longer those take than without the bodies (medians), `slowest_ratio` compares the
slowest ones.
"""
import argparse, json, statistics, sys, threading, time, urllib.error
from pathlib import Path

sys.dont_write_bytecode = True
from comparing.process import Process
from comparing.streams import Streams, post

def figures(streams, begin, end, ordinary):
    during = streams.gaps(begin, end)
    return {"ordinary_ms": round(1e3 * ordinary, 1), "largest_ms": round(1e3 * max(during), 1),
            "p95_ms": round(1e3 * sorted(during)[int(0.95 * len(during))], 1), "ratio": round(max(during) / ordinary, 2)}

def beside_a_prompt(url, n_streams, n_tokens, n_prompt, seed):
    with Streams(url, n_streams, seed, n_tokens) as streams:
        joined = time.perf_counter()
        with post(url, "/generate", {"prompt": f"{seed} " + "word " * (n_prompt - 4), "raw": True, "max_tokens": 1, "temperature": 0}) as answer:
            usage = json.load(answer)["usage"]
        read = time.perf_counter()
        time.sleep(0.5)
        return {"prompt_tokens": usage["prompt_tokens"], **figures(streams, joined, read + 0.2, streams.ordinary(joined)),
                "first_token_s": round(read - joined, 2)}

def kinds(n):
    """Bodies of about `n` bytes, each a path and its text."""
    def listed(item): return ",".join([item] * (n // (len(item) + 1)))
    def named(value): return ",".join(f'"k{i:06}":{value}' for i in range(n // (len(value) + 11)))
    def nested(opening, closing): depth = n // (len(opening) + len(closing)); return opening * depth + "1" + closing * depth
    own, text, chat = "/generate", "/v1/completions", "/v1/chat/completions"
    def prompt(value): return json.dumps({"prompt": value, "raw": True, "max_tokens": 1})
    def words(word): return (word * (n // len(word) + 1))[:n]
    def schema(value): return json.dumps({"prompt": "x", "max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"schema": value}}})
    def grammar(value): return json.dumps({"prompt": "x", "max_tokens": 1, "grammar": value})
    return {
        "control tokens": (own, prompt(words("<|im_end|>"))),
        "one letter": (own, prompt(words("a"))),
        "words": (own, prompt(words("word "))),
        "spaces": (own, prompt(words(" "))),
        "digits": (own, prompt(words("7"))),
        "emoji": (own, json.dumps({"prompt": "\U0001f600" * (n // 4), "max_tokens": 1}, ensure_ascii=False)),
        "punctuation": (own, prompt(words("!?.-"))),
        "a user's control tokens": (chat, json.dumps({"messages": [{"role": "user", "content": words("<|im_start|>")}]})),
        "token ids": (text, f'{{"prompt":[{listed("1")}]}}'),
        "messages": (chat, '{"messages":[' + listed('{"role":"user","content":"a"}') + "]}"),
        "parts": (chat, '{"messages":[{"role":"user","content":[' + listed('{"type":"text","text":"a "}') + "]}]}"),
        "nested lists": (own, f'{{"prompt":"x","stop":{nested("[", "]")}}}'),
        "fields": (text, f'{{"prompt":"x","max_tokens":1,{named("1")}}}'),
        "an ignored text": (text, f'{{"prompt":"x","max_tokens":1,"user":"{"a" * n}"}}'),
        "stop strings": (own, f'{{"prompt":"x","stop":[{listed(chr(34) + "a" + chr(34))}]}}'),
        "biases": (own, f'{{"prompt":"x","logit_bias":{{{named("1")}}}}}'),
        "not JSON": (own, "{" * n),
        "enum": (own, schema({"enum": [f"value {i}" for i in range(n // 16)]})),
        "properties": (own, schema({"type": "object", "properties": {f"p{i:06}": {"type": "integer"} for i in range(n // 33)}})),
        "a large grammar": (own, grammar("start: " + " | ".join(f'"w{i:06}"' for i in range(n // 14)))),
        "GBNF": (own, grammar("root ::= " + " | ".join(f'"w{i:06}"' for i in range(n // 14)))),
        "tokenize": ("/tokenize", json.dumps({"content": words("The old lighthouse. ")})),
        "a template's messages": ("/apply-template", '{"messages":[' + listed('{"role":"user","content":"a"}') + "]}"),
    }

def small_request(url):
    began = time.perf_counter()
    with post(url, "/generate", {"prompt": "One", "max_tokens": 1, "temperature": 0, "cache_prompt": False}): pass
    return time.perf_counter() - began

def send(url, path, body, statuses):
    try:
        with post(url, path, body) as answer: answer.read(); statuses.append(answer.status)
    except urllib.error.HTTPError as error:
        statuses.append(error.code)
    except urllib.error.URLError:
        statuses.append(0) # refused while it was sent: the rest was not read

def while_sent(url, path, body, do):
    """Sends a body twice at once, and does something over and over until both are answered; returns when, and the statuses."""
    statuses = []
    senders = [threading.Thread(target=send, args=(url, path, body, statuses)) for _ in range(2)]
    begin = time.perf_counter()
    for sender in senders: sender.start()
    while any(sender.is_alive() for sender in senders): do()
    return begin, time.perf_counter(), sorted(set(statuses))

def beside_bodies(url, n_streams, seed, kind, path, body):
    with Streams(url, n_streams, seed) as streams:
        time.sleep(1)
        begin, end, statuses = while_sent(url, path, body.encode(), lambda: time.sleep(0.01))
        time.sleep(0.2)
        found = {"kind": kind, "bytes": len(body), "statuses": statuses, "seconds": round(end - begin, 2),
                 **figures(streams, begin, end + 0.1, streams.ordinary(begin, 1))}
        time.sleep(0.5)
        alone, beside = [small_request(url) for _ in range(8)], []
        while_sent(url, path, body.encode(), lambda: beside.append(small_request(url)))
        return {**found, "request_ratio": round(statistics.median(beside) / statistics.median(alone), 2),
                "slowest_ratio": round(max(beside) / max(alone), 2)}

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model"); ap.add_argument("--streams", type=int, default=8)
    ap.add_argument("--stream-tokens", type=int, default=1800)
    ap.add_argument("--prompt-tokens", type=int, default=1500); ap.add_argument("--runs", type=int, default=5)
    ap.add_argument("--bodies", type=int, metavar="BYTES"); ap.add_argument("--kind", help="only this kind of body")
    ap.add_argument("--serve-arg", action="append", default=[])
    a = ap.parse_args()
    args = ["-b", a.streams + (4 if a.bodies else 1), "--log-level", "warn", *(["-m", Path(a.model).resolve()] if a.model else []), *a.serve_arg]
    with Process.ours(*args) as server:
        if a.bodies:
            for seed, (kind, (path, body)) in enumerate(kinds(a.bodies).items(), 1):
                if a.kind in (None, kind):
                    print(json.dumps(beside_bodies(server.url, a.streams, seed, kind, path, body)), flush=True)
            return
        for seed in range(1, a.runs + 1):
            print(json.dumps(beside_a_prompt(server.url, a.streams, a.stream_tokens, a.prompt_tokens, seed)), flush=True)

main()
