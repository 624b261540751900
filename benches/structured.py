#!/usr/bin/env python3
"""What drafts are worth under a JSON schema, and what the schema costs. Standard library only.

    benches/structured.py [--rounds 3] [--seeds 20] [--output FILE.json] [--serve-arg=ARG ...]

Starts `target/release/medusa-llama serve`, warms it up, and asks for the same answers in turn: under a schema with drafts and without,
and free text of as many tokens without drafts. Prints tokens per second of decoding, and ratios by round.
"""
import argparse, json, statistics, sys, urllib.request

sys.dont_write_bytecode = True
from comparing.process import Process

TOPICS = ["a person", "a town", "a recipe", "a film", "a ship"]
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "description", "year", "tags"], "properties": {
    "name": {"type": "string", "maxLength": 30}, "description": {"type": "string", "maxLength": 120},
    "year": {"type": "integer", "minimum": 1000, "maximum": 2030},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 16}, "minItems": 2, "maxItems": 4}}}


def ask(url, seed, n, schema, speculation):
    """Tokens and seconds of decoding, and the text."""
    prompt = f"<|im_start|>user\nInvent {TOPICS[seed % len(TOPICS)]}. Answer in JSON with name, description, year and tags.<|im_end|>\n<|im_start|>assistant\n"
    body = {"prompt": prompt, "max_tokens": n, "temperature": 0.7, "seed": seed, "speculation": speculation, "share_text": False}
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    else:
        body["ignore_eos"] = True
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode())
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    return answer["usage"]["completion_tokens"], answer["timings"]["decode_s"], answer["generated_text"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3); ap.add_argument("--seeds", type=int, default=20); ap.add_argument("--output")
    ap.add_argument("--serve-arg", action="append", default=[])
    a = ap.parse_args()
    with Process.ours(*a.serve_arg) as server:
        url = server.url
        lengths = [ask(url, seed, 300, True, "auto")[0] for seed in range(a.seeds)]  # and a warm-up
        rounds = []
        for i in range(a.rounds):
            totals = {"schema, drafts": [0, 0.0], "schema": [0, 0.0], "free": [0, 0.0]}
            for seed, n in enumerate(lengths):
                texts = {}
                for name, total in totals.items():
                    tokens, seconds, texts[name] = ask(url, seed, 300 if "schema" in name else n, "schema" in name, "auto" if "drafts" in name else "off")
                    total[0] += tokens - 1
                    total[1] += seconds
                json.loads(texts["schema"])
                assert texts["schema"] == texts["schema, drafts"], "drafts change no text"
            rounds.append({name: n / s for name, (n, s) in totals.items()})
            print(f"round {i + 1}: " + ", ".join(f"{name} {speed:.1f} tokens/s" for name, speed in rounds[-1].items()), flush=True)
    for what, over in [("schema, drafts", "schema"), ("schema", "free")]:
        ratios = [r[what] / r[over] for r in rounds]
        print(f"{what} over {over}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if a.output:
        with open(a.output, "w") as f:
            json.dump({"tokens": sum(lengths), "rounds": rounds}, f, indent=1)


if __name__ == "__main__":
    main()
