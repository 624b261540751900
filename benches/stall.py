#!/usr/bin/env python3
"""How long running streams stall when a long prompt joins. Standard library only.

    benches/stall.py [--model GGUF] [--streams 8] [--prompt-tokens 1500] [--runs 5] [--serve-arg=ARG ...]

Starts `target/release/medusa-llama serve` with room for one more sequence than streams, lets the streams run, then sends a
prompt of some 1,500 tokens, five times over. Prints, per run: the ordinary gap between two pieces (median before the
newcomer), the largest gap of any stream while the newcomer's prompt is read, and their ratio, which must stay under 4.
"""
import argparse, json, statistics, sys, threading, time, urllib.request
from pathlib import Path

sys.dont_write_bytecode = True
from comparing.process import Process

def post(url, body):
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)

def stream(url, i, times, stop):
    """Notes when each piece arrives, until told to stop."""
    body = {"prompt": f"Tell me tale number {i}.", "max_tokens": 1800, "temperature": 0.8, "seed": i, "ignore_eos": True, "stream": True}
    with post(url, body) as answer:
        for line in answer:
            if line.startswith(b"data:"):
                times.append(time.perf_counter())
            if stop.is_set():
                return

def run(url, n_streams, n_prompt, seed):
    stop, times = threading.Event(), [[] for _ in range(n_streams)]
    threads = [threading.Thread(target=stream, args=(url, i + 100 * seed, times[i], stop)) for i in range(n_streams)]
    for t in threads: t.start()
    while min(map(len, times)) < 40 and all(t.is_alive() for t in threads): time.sleep(0.05)
    joined = time.perf_counter()
    with post(url, {"prompt": f"{seed} " + "word " * (n_prompt - 4), "raw": True, "max_tokens": 1, "temperature": 0}) as answer:
        usage = json.load(answer)["usage"]
    read = time.perf_counter()
    time.sleep(0.5)
    stop.set()
    for t in threads: t.join()
    gaps = [(b - a, b) for ts in times for a, b in zip(ts, ts[1:])]
    # The last 20 pieces before the newcomer: all streams ran by then.
    ordinary = statistics.median(b - a for ts in times for a, b in list(zip(ts, ts[1:])) if joined - 1.5 < a and b < joined)
    during = [g for g, at in gaps if joined <= at <= read + 0.2]
    return {"prompt_tokens": usage["prompt_tokens"], "ordinary_ms": round(1e3 * ordinary, 1), "largest_ms": round(1e3 * max(during), 1),
            "p95_ms": round(1e3 * sorted(during)[int(0.95 * len(during))], 1), "ratio": round(max(during) / ordinary, 2),
            "first_token_s": round(read - joined, 2)}

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model"); ap.add_argument("--streams", type=int, default=8)
    ap.add_argument("--prompt-tokens", type=int, default=1500); ap.add_argument("--runs", type=int, default=5)
    ap.add_argument("--serve-arg", action="append", default=[])
    a = ap.parse_args()
    args = ["-b", a.streams + 1, "--log-level", "warn", *(["-m", Path(a.model).resolve()] if a.model else []), *a.serve_arg]
    with Process.ours(*args) as server:
        for seed in range(1, a.runs + 1):
            print(json.dumps(run(server.url, a.streams, a.prompt_tokens, seed)), flush=True)

main()
