"""Streams that run while something else happens, and the gaps between their pieces. Standard library only."""
import json, statistics, threading, time, urllib.error, urllib.request


def post(url, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


class Streams:
    """`n` streams of a server, which run inside `with`: it begins when each has had 40 pieces, and they have `n_tokens` at most."""

    def __init__(self, url, n, seed, n_tokens=1800):
        self.n_tokens = n_tokens
        self.times, self.stop = [[] for _ in range(n)], threading.Event()
        run = lambda i: threading.Thread(target=self.read, args=(url, i, 100 * seed + i))
        self.threads = [run(i) for i in range(n)]

    def read(self, url, i, seed):
        body = {"prompt": f"Tell me tale number {seed}.", "max_tokens": self.n_tokens, "temperature": 0.8, "seed": seed, "ignore_eos": True, "stream": True}
        with post(url, "/generate", body) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    self.times[i].append(time.perf_counter())
                if self.stop.is_set():
                    return

    def __enter__(self):
        for thread in self.threads: thread.start()
        while min(map(len, self.times)) < 40 and all(t.is_alive() for t in self.threads): time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads: thread.join()

    def gaps(self, begin, end):
        """Seconds between two pieces of a stream, the second of which came between these moments. Pieces of one step, which
        come at once, count as one."""
        steps = [[t for i, t in enumerate(ts) if i == 0 or t - ts[i - 1] > 1e-3] for ts in map(list, self.times)]
        return [b - a for ts in steps for a, b in zip(ts, ts[1:]) if begin <= b <= end]

    def ordinary(self, before, seconds=1.5):
        """The median gap in the seconds before a moment."""
        return statistics.median(self.gaps(before - seconds, before))
