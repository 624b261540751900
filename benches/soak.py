#!/usr/bin/env python3
"""Ten thousand requests from clients of every kind, and what is left behind. Standard library only.

    benches/soak.py [--requests 10000] [--parallel 16] [--model GGUF] [--seed 1] [--output FILE.json] [--serve-arg=ARG ...]

Starts `target/release/medusa-llama serve` with an API key and lets clients at it: whole answers and streams in both dialects,
several choices, schemas, readers that dawdle, stall or hang up, oversize bodies and headers, nonsense, deadlines that cannot be
met, missing and wrong keys. Each is held to what it was promised. Memory, threads and open files are noted on the way; at the
end nothing may run, wait or hold a cell. Then SIGTERM in the middle of traffic (what was accepted must still be answered whole),
and SIGKILL in the middle of traffic and a new start, until it takes work. Prints a table; exits with 1 if anything was not as
promised.
"""
import argparse, collections, json, random, signal, socket, sys, threading, time

sys.dont_write_bytecode = True
from comparing.process import Process

KEY = "soak-key"
MAX_BODY = 1 << 20
SCHEMA = {"type": "object", "properties": {"sky": {"enum": ["clear", "cloudy"]}, "degrees": {"type": "integer", "minimum": -9, "maximum": 39}},
          "required": ["sky", "degrees"], "additionalProperties": False}


class Broken(Exception):
    """A promise that was not kept."""


def must(condition, *what):
    if not condition:
        raise Broken(" ".join(map(str, what)))


class Reply:
    """An answer read from a socket until the server closes it."""

    def __init__(self, data):
        head, _, body = data.partition(b"\r\n\r\n")
        must(head.startswith(b"HTTP/1.1 "), "no HTTP:", data[:80])
        self.status = int(head[9:12])
        self.head = head.decode("latin-1").lower()
        self.whole = True
        if "transfer-encoding: chunked" in self.head:
            body, self.whole = unchunk(body)
        elif "content-length: " in self.head:
            self.whole = len(body) == int(self.head.split("content-length: ")[1].split("\r\n")[0])
        self.body = body

    def json(self):
        return json.loads(self.body)

    def events(self):
        return [e[6:] for e in self.body.decode().split("\n\n") if e.startswith("data: ")]


def unchunk(data):
    body = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        n = int(size or b"0", 16)
        if n == 0:
            return body, size != b""
        if len(rest) < n + 2:
            return body + rest[:n], False
        body, data = body + rest[:n], rest[n + 2 :]
    return body, False


class Server(Process):
    @classmethod
    def with_key(cls, args):
        return cls.ours("--api-key", KEY, "--max-body-bytes", MAX_BODY, "--write-timeout", 5, *args, log=[])

    def connect(self):
        s = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        return s

    def exchange(self, data):
        with self.connect() as s:
            try:
                s.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # an answer may come before all is sent
            return Reply(read(s))

    def post(self, path, body, **more):
        return self.exchange(request("POST", path, json.dumps(body).encode(), **more))

    def load(self):
        return self.exchange(request("GET", "/")).json()["load"]

    def resident(self):
        return self.status("VmRSS") / 1024


def request(method, path, body=b"", key=KEY, more=""):
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{more}"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    return head.encode() + b"\r\n" + body


def read(s, n=1 << 16, pause=0.0):
    data = b""
    while True:
        try:
            part = s.recv(n)
        except ConnectionResetError:
            return data
        if not part:
            return data
        data += part
        if pause:
            time.sleep(pause)


def prompt(rng):
    return f"{rng.choice(['Tell me of', 'Why is there', 'List'])} {rng.choice(['rain', 'bread', 'ships', 'maths', 'cats'])} {rng.randrange(40)}:"


def body(rng, n=None, **more):
    return {"prompt": prompt(rng), "max_tokens": n or rng.randrange(1, 24), "ignore_eos": True, "seed": rng.randrange(1 << 30), **more}


# Each client takes a server and a generator of random numbers, and raises Broken.

def whole(server, rng):
    asked = body(rng)
    reply = server.post("/generate", asked)
    must(reply.status == 200 and reply.whole, reply.status, reply.body)
    must(reply.json()["usage"]["completion_tokens"] == asked["max_tokens"], reply.body)


def streamed(server, rng):
    asked = body(rng, stream=True, details=rng.random() < 0.3)
    reply = server.post("/generate", asked)
    must(reply.status == 200 and reply.whole, reply.status, reply.body)
    must(json.loads(reply.events()[-1])["usage"]["completion_tokens"] == asked["max_tokens"], reply.body[-300:])


def chat(server, rng):
    asked = {"messages": [{"role": "user", "content": prompt(rng)}], "max_tokens": rng.randrange(1, 16), "ignore_eos": True,
             "stream": True, "stream_options": {"include_usage": True}, "logprobs": rng.random() < 0.3}
    reply = server.post("/v1/chat/completions", asked)
    must(reply.status == 200 and reply.whole, reply.status, reply.body)
    events = reply.events()
    must(events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] == asked["max_tokens"], events[-3:])


def choices(server, rng):
    asked = {"prompt": [prompt(rng)], "n": 2, "max_tokens": rng.randrange(1, 8), "ignore_eos": True, "temperature": 1}
    reply = server.post("/v1/completions", asked)
    must(reply.status in (200, 429), reply.status, reply.body)
    if reply.status == 200:
        answer = reply.json()
        must(len(answer["choices"]) == 2 and answer["usage"]["completion_tokens"] == 2 * asked["max_tokens"], answer)


def schema(server, rng):
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    asked = {"messages": [{"role": "user", "content": "The weather, as JSON."}], "response_format": form, "max_tokens": 80, "seed": rng.randrange(1 << 30)}
    reply = server.post("/v1/chat/completions", asked)
    must(reply.status == 200, reply.status, reply.body)
    text = json.loads(reply.json()["choices"][0]["message"]["content"])
    must(text["sky"] in ("clear", "cloudy") and -9 <= text["degrees"] <= 39, text)


def hang_up(server, rng):
    with server.connect() as s:
        s.sendall(request("POST", "/generate", json.dumps(body(rng, 200, stream=rng.random() < 0.7)).encode()))
        s.settimeout(rng.random() * 0.2 + 0.001)
        try:
            s.recv(rng.randrange(1, 2000))
        except socket.timeout:
            pass
        if rng.random() < 0.3:
            s.shutdown(socket.SHUT_RDWR)


def hang_up_while_sending(server, rng):
    with server.connect() as s:
        data = request("POST", "/generate", json.dumps(body(rng)).encode())
        s.sendall(data[: rng.randrange(1, len(data))])


def slow_reader(server, rng):
    asked = body(rng, 40, stream=True)
    with server.connect() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.sendall(request("POST", "/generate", json.dumps(asked).encode()))
        reply = Reply(read(s, 512, 0.02))
    must(reply.status == 200 and reply.whole and json.loads(reply.events()[-1])["usage"]["completion_tokens"] == 40, reply.body[-300:])


def stalled_reader(server, rng):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        s.connect(("127.0.0.1", server.port))
        s.sendall(request("POST", "/generate", json.dumps(body(rng, 300, stream=True, details=True, logprobs=20)).encode()))
        time.sleep(rng.random() * 2)


def oversize_body(server, rng):
    reply = server.exchange(request("POST", "/generate", b" " * (MAX_BODY + rng.randrange(1, 1 << 16))))
    must(reply.status == 413, reply.status, reply.body)


def oversize_head(server, rng):
    reply = server.exchange(request("POST", "/generate", b"{}", more="x-filler: " + "y" * 600_000 + "\r\n"))
    must(reply.status == 431, reply.status, reply.body)


def bad_json(server, rng):
    data = json.dumps(body(rng)).encode()
    reply = server.exchange(request("POST", rng.choice(["/generate", "/v1/completions"]), data[: rng.randrange(len(data) - 1)]))
    must(reply.status == 400 and reply.json()["error"]["message"], reply.status, reply.body)


def bad_field(server, rng):
    name, value = rng.choice([("temperature", -1), ("top_p", "x"), ("stop", 3), ("nonsense", 1), ("grammar", "start: ("), ("max_tokens", 0)])
    reply = server.post("/generate", {"prompt": "x", name: value})
    must(reply.status == 422 and reply.json()["error"]["param"] == name, reply.status, reply.body)


def too_long(server, rng):
    reply = server.post("/v1/completions", {"prompt": "word " * 3000})
    must(reply.status == 400 and reply.json()["error"]["param"] == "prompt", reply.status, reply.body)


def late(server, rng):
    reply = server.post("/generate", body(rng, 200, timeout_s=rng.choice([0, 0.001, 0.05, 0.2]), stream=rng.random() < 0.3))
    if reply.status == 408:
        must(reply.json()["error"]["type"] == "deadline", reply.body)
    else:
        must(reply.status == 200 and reply.whole, reply.status, reply.body)
        end = json.loads(reply.events()[-1]) if "event-stream" in reply.head else reply.json()
        is_whole = end["usage"]["completion_tokens"] == 200
        must(end["finish_reason"] == "length" and (is_whole or end["stop_reason"] == "deadline"), end)


def keyless(server, rng):
    reply = server.post(rng.choice(["/generate", "/v1/completions"]), body(rng), key=rng.choice([None, "wrong", KEY + "x"]))
    must(reply.status == 401 and "www-authenticate: bearer" in reply.head, reply.status, reply.head)


def nowhere(server, rng):
    method, path, status = rng.choice([("GET", "/nowhere", 404), ("GET", "/generate", 405), ("DELETE", "/v1/models", 405)])
    must(server.exchange(request(method, path)).status == status, method, path)


CLIENTS = [(whole, 20), (streamed, 20), (chat, 15), (choices, 4), (schema, 4), (hang_up, 8), (hang_up_while_sending, 2), (slow_reader, 3),
           (stalled_reader, 2), (oversize_body, 2), (oversize_head, 1), (bad_json, 5), (bad_field, 4), (too_long, 2), (late, 5), (keyless, 5), (nowhere, 2)]


def traffic(server, n, parallel, seed, tick=lambda i: None, stop=lambda: False):
    """Lets clients at the server; returns how many came of each kind, and what was broken."""
    counts, broken, lock, next_one = collections.Counter(), [], threading.Lock(), iter(range(n))
    kinds, weights = zip(*CLIENTS)

    def work():
        while not stop():
            with lock:
                i = next(next_one, None)
            if i is None:
                return
            rng = random.Random(seed * 1_000_003 + i)
            kind = rng.choices(kinds, weights)[0]
            try:
                kind(server, rng)
            except (Broken, OSError, ValueError, KeyError, IndexError) as error:
                if stop():
                    return  # the server is going away
                broken.append(f"{kind.__name__} {i}: {error!r}"[:600])
            with lock:
                counts[kind.__name__] += 1
                tick(sum(counts.values()))

    threads = [threading.Thread(target=work) for _ in range(parallel)]
    for t in threads: t.start()
    for t in threads: t.join()
    return counts, broken


def settle(server):
    """Waits until nothing runs; what is left if that does not come."""
    names = ["in_flight", "running", "waiting", "kv_cells_running"]
    for _ in range(600):
        load = server.load()
        if all(load[name] == 0 for name in names):
            return None
        time.sleep(0.05)
    return {name: load[name] for name in names}


def soak(a, result):
    server = Server.with_key(a.serve)
    result["ready_s"] = server.start(poll_s=0.005)
    counts, broken = traffic(server, a.parallel * 20, a.parallel, a.seed + 1)  # warm-up
    must(not broken, *broken[:3])
    must(settle(server) is None, "not idle after the warm-up")
    before = {what: server.count(what) for what in ("task", "fd")}
    memory = [server.resident()]

    def tick(i):
        if i % max(1, a.requests // 20) == 0:
            memory.append(server.resident())
            print(f"  {i:6} requests, {memory[-1]:.1f} MiB", file=sys.stderr)

    began = time.monotonic()
    counts, broken = traffic(server, a.requests, a.parallel, a.seed, tick)
    result.update(requests=sum(counts.values()), seconds=time.monotonic() - began, by_kind=dict(counts), broken=broken)
    result["left"] = settle(server)
    time.sleep(6)  # stalled readers are let go after the write timeout
    after = {what: server.count(what) for what in ("task", "fd")}
    result.update(tasks=[before["task"], after["task"]], files=[before["fd"], after["fd"]], memory_mib=[round(m, 1) for m in memory])
    result["panics"] = sum("panicked" in line for line in server.log)
    server.process.terminate()
    result["exit"] = server.process.wait(60)


def drain(a, result):
    """SIGTERM in the middle: what was accepted is answered whole."""
    server = Server.with_key(a.serve)
    server.start(poll_s=0.005)
    outcomes, lock = collections.Counter(), threading.Lock()

    def work(i):
        rng = random.Random(i)
        while True:
            asked = body(rng, 30, stream=rng.random() < 0.5)
            try:
                with server.connect() as s:
                    s.sendall(request("POST", "/generate", json.dumps(asked).encode()))
                    data = read(s)
                if not data:
                    raise ConnectionResetError
                reply = Reply(data)
                end = reply.json() if reply.status != 200 or not asked["stream"] else json.loads(reply.events()[-1])
                answered = reply.status == 200 and reply.whole and end["usage"]["completion_tokens"] == 30
                outcome = "answered" if answered else "refused: 503" if reply.status == 503 else f"broken: {reply.status} {end}"
            except OSError:
                outcome = "no connection"
            with lock:
                outcomes[outcome] += 1
            if outcome != "answered":
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(a.parallel)]
    for t in threads: t.start()
    time.sleep(2)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for t in threads: t.join()
    result.update(exit=server.process.wait(60), drain_s=time.monotonic() - began, outcomes=dict(outcomes))


def restart(a, result):
    """SIGKILL in the middle, and a new start."""
    result["ready_s"] = []
    for i in range(3):
        server = Server.with_key(a.serve)
        server.start(poll_s=0.005)
        killed = threading.Event()
        thread = threading.Thread(target=traffic, args=(server, 10**6, a.parallel, a.seed + i), kwargs={"stop": killed.is_set})
        thread.start()
        time.sleep(1)
        killed.set()
        server.process.kill()
        server.process.wait()
        thread.join()
        server = Server.with_key(a.serve)
        result["ready_s"].append(round(server.start(poll_s=0.005), 2))
        whole(server, random.Random(0))
        server.process.kill()
        server.process.wait()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--requests", type=int, default=10_000); ap.add_argument("--parallel", type=int, default=16)
    ap.add_argument("--model"); ap.add_argument("--seed", type=int, default=1); ap.add_argument("--output")
    ap.add_argument("--serve-arg", action="append", default=[])
    a = ap.parse_args()
    a.serve = ["--batch-size", "8", "--ctx", "512", *(["--model", a.model] if a.model else []), *a.serve_arg]
    result = {"soak": {}, "drain": {}, "restart": {}}
    for name, part in [("soak", soak), ("drain", drain), ("restart", restart)]:
        print(f"{name} ...", file=sys.stderr)
        part(a, result[name])
    if a.output:
        with open(a.output, "w") as f:
            json.dump(result, f, indent=1)
    s, d, r = result["soak"], result["drain"], result["restart"]
    memory = s["memory_mib"]
    print(f"{s['requests']} requests in {s['seconds']:.0f} s, {a.parallel} at a time: {len(s['broken'])} promises broken, {s['panics']} panics")
    for kind, n in sorted(s["by_kind"].items(), key=lambda kv: -kv[1]):
        print(f"  {n:6} {kind}")
    print(f"memory after the warm-up {memory[0]} MiB, at half {memory[len(memory) // 2]}, at the end {memory[-1]}")
    print(f"threads {s['tasks'][0]} -> {s['tasks'][1]}, open files {s['files'][0]} -> {s['files'][1]}, left running: {s['left'] or 'nothing'}")
    print(f"SIGTERM: exit {d['exit']} after {d['drain_s']:.1f} s; {d['outcomes']}")
    print(f"SIGKILL and a new start: takes work after {r['ready_s']} s")
    for line in s["broken"][:20]:
        print("broken:", line)
    broken = s["broken"] or s["left"] or s["panics"] or s["exit"] or d["exit"] or any(k.startswith("broken") for k in d["outcomes"])
    leaks = s["tasks"][1] > s["tasks"][0] + 2 or s["files"][1] > s["files"][0] + 2
    sys.exit(1 if broken or leaks or max(r["ready_s"]) >= 3 else 0)


if __name__ == "__main__":
    main()
