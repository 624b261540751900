"""Loads that are not steady: one that jumps up and down, and one that goes on for long."""
import json
import statistics
import threading
import time

from . import load, servers

WINDOW = 2.0
PLATEAUS = [1, 32, 1]
# Streams that decode nearly all the time, so that a window's tokens tell what drafts do and not which prompts it met.
SHORT_PROMPT = 240
LONG_ANSWER = 400


class Stream:
    """Asks one prompt after the other until stop is set; notes when pieces arrive."""

    def __init__(self, server, asked, a, offset, times):
        self.stop = False
        self.thread = threading.Thread(target=self.work, args=(server, asked, a, offset, times), daemon=True)
        self.thread.start()

    def work(self, server, asked, a, offset, times):
        i = offset
        while not self.stop:
            prompt, category = asked[i % len(asked)]
            stopped = lambda: self.stop
            body = server.body | {"ignore_eos": True}
            answer = load.ask(server.kind, server.url, a.template.format(prompt), category, LONG_ANSWER, body, stopped)
            # A piece is a token, but for the few that hold back half a character; an answer cut off has no count.
            times.append((answer.pieces, answer.tokens or len(answer.pieces)))
            i += 7


def one_ramp(a, mode):
    """Tokens of each window of a run through the plateaus. A piece counts its share of its answer's tokens."""
    asked, times = [p for p in load.prompts(a.prompts, 0) if len(p[0]) < SHORT_PROMPT], []
    with servers.Server(mode, max(PLATEAUS), a.model, a.threads, a.context, None) as server:
        load.ask(server.kind, server.url, a.template.format("Say hi."), "", 8, server.body)
        started, streams = time.perf_counter(), []
        for n in PLATEAUS:
            while len(streams) > n:
                streams.pop().stop = True
            while len(streams) < n:
                streams.append(Stream(server, asked, a, 5 * len(streams), times))
            time.sleep(a.phase)
        for stream in streams:
            stream.stop = True
        for stream in streams:
            stream.thread.join()
    windows = [0.0] * int(len(PLATEAUS) * a.phase / WINDOW)
    for pieces, tokens in times:
        for at in pieces:
            i = int((at - started) / WINDOW)
            if i < len(windows):
                windows[i] += tokens / len(pieces) / WINDOW
    return windows


def ramp(a):
    """Windows of both modes, run in turn, and how long the best mode was behind the plain one's mean at the same load."""
    runs = {"plain": [], "best": []}
    for round in range(a.rounds):
        for mode in (["plain", "best"], ["best", "plain"])[round % 2]:
            runs[mode].append(one_ramp(a, mode))
            print(f"round {round + 1}, {mode}: " + " ".join(f"{w:.0f}" for w in runs[mode][-1]), flush=True)
    # The best mode's windows against what plain decoding does at that load in the mean, once it has begun.
    each, ratios = len(runs["plain"][0]) // len(PLATEAUS), []
    best = [statistics.median(column) for column in zip(*runs["best"])]
    for i in range(len(PLATEAUS)):
        mean = statistics.mean(w for run in runs["plain"] for w in run[i * each + 1:(i + 1) * each])
        ratios += [w / mean for w in best[i * each:(i + 1) * each]]
    behind = longest = 0
    for ratio in ratios:
        behind = behind + 1 if ratio < 0.95 else 0
        longest = max(longest, behind)
    out = {"window_s": WINDOW, "plateaus": PLATEAUS, "phase_s": a.phase, "runs": runs, "ratios": ratios,
           "lowest": min(ratios), "longest_below_095_s": longest * WINDOW}
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "ramp.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    servers.plot("ramp", path, a.out / "ramp.svg")
    print(f"lowest ratio of a window {min(ratios):.2f}; longest below 0.95 of plain: {longest * WINDOW:.0f} s")


def chunks(a):
    """How fixed prefill chunks compare with the adaptive one: the streams' gaps against the newcomers' first tokens."""
    parallel, asked = a.parallel[0], load.prompts(a.prompts, a.k[0])
    settings = {str(n): ["--prefill-chunk", str(n)] for n in a.chunks} | {"adaptive": []}
    runs = {name: [] for name in settings}
    for round in range(a.rounds):
        for name in list(settings)[:: 1 if round % 2 else -1]:
            with servers.Server("best", parallel, a.model, a.threads, a.context, None, settings[name]) as server:
                load.ask(server.kind, server.url, a.template.format("Say hi."), "", 8, server.body)
                answers = load.run(server.kind, server.url, asked, parallel, a.n, a.template, server.body)
            runs[name].append(load.figures(*answers, parallel))
            line = runs[name][-1]
            print(f"round {round + 1}, chunk {name}: {line['tok_per_s']:.0f} tok/s, first token p95 {line['ttft_p95']:.2f} s, "
                  f"gap p95 {line['gap_p95'] * 1e3:.0f} ms, longest {line['gap_max'] * 1e3:.0f} ms", flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "chunks.json"
    path.write_text(json.dumps({"parallel": parallel, "runs": runs}, indent=1) + "\n")
    servers.plot("chunks", path, a.out / "chunks.svg")


def soak(a):
    """Many short answers, 16 at a time; memory, threads and files on the way."""
    asked, parallel, every = load.prompts(a.prompts, 0), 16, max(1, a.soak // 100)
    samples, counter, lock = [], [0], threading.Lock()
    with servers.Server("best", parallel, a.model, a.threads, a.context, None, ["--max-concurrent-batches", "2"]) as server:

        def work():
            while True:
                with lock:
                    i = counter[0]
                    counter[0] += 1
                    if i % every == 0:
                        samples.append({"requests": i, "rss_kib": server.status("VmRSS"), "threads": server.status("Threads"),
                                        "files": server.count("fd")})
                if i >= a.soak:
                    return
                prompt, category = asked[i % len(asked)]
                text = f"{i}: {prompt}"[:40 + 5 * (i % 40)]
                load.ask(server.kind, server.url, a.template.format(text), category, 4 + i % 9, server.body)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(parallel)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - started
        samples.append({"requests": a.soak, "rss_kib": server.status("VmRSS"), "threads": server.status("Threads"),
                        "files": server.count("fd")})
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "soak.json").write_text(json.dumps({"requests": a.soak, "seconds": seconds, "samples": samples}, indent=1) + "\n")
    at = lambda share: samples[int(share * (len(samples) - 1))]
    shown = ", ".join(f"{at(s)['rss_kib'] / 1024:.1f} MiB at {s:.0%}" for s in (0, .1, .25, .5, .75, 1))
    servers.plot("soak", a.out / "soak.json", a.out / "soak.svg")
    print(f"{a.soak} requests in {seconds:.0f} s; resident {shown}; threads {at(.1)['threads']} to {at(1)['threads']}, "
          f"files {at(.1)['files']} to {at(1)['files']}")
