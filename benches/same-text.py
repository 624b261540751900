#!/usr/bin/env python3
"""Are a server's texts the same with drafts and without? Asks a server each seed in each mode, and counts texts that differ.

    benches/same-text.py [--url http://127.0.0.1:8000] [--seeds 30] [-n 64] [--temperature 1]

Without --url it starts `target/release/medusa-llama serve`. Prompts are not cached between requests, so that every text is computed whole. Exits 1 where texts differ.
"""
import argparse
import contextlib
import json
import sys
import urllib.request

sys.dont_write_bytecode = True
from comparing.process import Process

MODES = ["off", "heads", "text", "auto"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--url", help="a server that runs already")
    ap.add_argument("--prompt", default="Count: one, two,")
    ap.add_argument("--seeds", type=int, default=30)
    ap.add_argument("-n", type=int, default=64, help="tokens of a text (64)")
    ap.add_argument("--temperature", type=float, default=1)
    a = ap.parse_args()

    def text(seed, mode):
        body = {"prompt": a.prompt, "raw": True, "max_tokens": a.n, "temperature": a.temperature, "seed": seed, "cache_prompt": False}
        request = urllib.request.Request(f"{url}/generate", json.dumps({**body, "speculation": mode}).encode())
        return json.load(urllib.request.urlopen(request))["generated_text"]

    with contextlib.nullcontext() if a.url else Process.ours() as server:
        url = a.url or server.url
        plain = [text(seed, "off") for seed in range(a.seeds)]
        differ = {mode: sum(text(seed, mode) != plain[seed] for seed in range(a.seeds)) for mode in MODES}
    for mode, n in differ.items():
        print(f"{mode:6} {n} of {a.seeds} texts differ from those without drafts")
    sys.exit(any(differ.values()))


main()
