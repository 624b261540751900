"""Replicas, balancers, requests, and the report. Standard library only."""
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comparing.process import OURS, Process, die_with_parent

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".tools" / "fleet"
PORTS = [8001, 8002, 8003]
FRONT = 8080
MODEL = "smollm2-135m-instruct-q4_1"  # smg asks for a name
SLOTS, PLACES = 8, 16
# A slot and a half for each of 16 conversations, with their answers; one thread, as three replicas share the machine.
SIZES = ["-t", 1, "--batch-size", SLOTS, "--max-concurrent-batches", PLACES // SLOTS, "--ctx", 2048, "--kv-cells", 24576]
ENDS = ["--drain-delay", 5, "--drain-timeout", 120]


class Report:
    """What was promised, and whether it was kept."""

    def __init__(self):
        self.lines = []

    def line(self, what, kept, **numbers):
        said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
                         for name, value in numbers.items())
        print(f"{'ok' if kept else 'FAILED':7} {what}" + (f": {said}" if said else ""), flush=True)
        self.lines.append({"what": what, "kept": bool(kept), **numbers})

    def end(self):
        broken = sum(not line["kept"] for line in self.lines)
        print(f"fleet: {len(self.lines)} promises, {broken} broken")
        sys.exit(bool(broken))


class Replica(Process):
    def __init__(self, port):
        super().__init__(OURS, "serve", "--host", "127.0.0.1", *SIZES, *ENDS, port=port, log=[])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def load(self):
        return get_json(self.url + "/v1/loads")["loads"][0]

    def metric(self, name, *labels):
        """The sum of a metric's series with all of these labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        known = [line for line in lines if line.startswith(f"medusa_llama:{name}{{") and all(label in line for label in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in known)

    def n_answers(self):
        return self.metric("http_requests_total", 'path="/v1/chat/completions"')


def replicas():
    return [Replica(port) for port in PORTS]


def get_json(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def post_json(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


class Balancer:
    """A balancer that is ready inside `with`. `session`: its clients name their session; `resends`: what had no answer when a replica was lost
    goes to another."""

    url = f"http://127.0.0.1:{FRONT}"

    def __init__(self, name, *command, session=False, resends=False, key=None, **environment):
        self.name, self.session, self.resends, self.key = name, session, resends, key
        self.command = [str(word) for word in command]
        self.environment = {**os.environ, "PLACES": str(PLACES), **environment}

    def __enter__(self):
        shutil.which(self.command[0]) or sys.exit(f"fleet: error: {self.command[0]} is missing: scripts/setup fleet")
        self.log = open(f"/tmp/fleet-{self.name}-{os.getpid()}.log", "w+")
        self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log,
                                        preexec_fn=die_with_parent)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if ask(self.url, chat("Hi", max_tokens=1), key=self.key).status == 200:
                    return self
            time.sleep(0.2)
        self.log.seek(0)
        sys.exit(f"fleet: error: {self.name} does not pass a request on; its log:\n{self.log.read()[-3000:]}")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()
        os.unlink(self.log.name)


def haproxy(key=None):
    return Balancer("HAProxy", "haproxy", "-db", "-f", DEPLOY / "haproxy.cfg", resends=True, key=key)


def smg():
    return Balancer("smg", DEPLOY / "smg", SMG=str(TOOLS / "bin" / "smg"), PYTHONPATH=str(TOOLS))


def envoy():
    return Balancer("Envoy", TOOLS / "envoy" / "_bin" / "envoy", "-c", DEPLOY / "envoy.yaml", "--log-level", "warn", session=True)


WORDS = """harbour glacier lantern orchard violin compass meadow canyon saddle ferry pepper cotton marble candle falcon timber anchor basil copper dune
ember fjord garnet heron island juniper kettle lagoon maple nectar olive prairie quartz raven saffron thistle umber valley walnut yarrow""".split()


def unlike(*seed):
    """A beginning that no other question has, as balancers send to the same replica what begins alike."""
    return " ".join(random.Random(str(seed)).choices(WORDS, k=12))


def chat(content, **fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32, **fields}


class Reply:
    """An answer: status, its JSON, and of a stream its events with the times at which they came."""

    def __init__(self, status, body=b"", events=(), began=0.0):
        self.status, self.body, self.events, self.began = status, body, list(events), began

    def json(self):
        return json.loads(self.body)

    @property
    def is_whole(self):
        """Whether nothing is missing. A balancer may end a broken stream with an error and `[DONE]`, so the model's own end counts."""
        if self.status != 200:
            return False
        if not self.events:
            return "usage" in self.json()
        ends = [json.loads(data).get("choices", [{}])[0].get("finish_reason") for _, data in self.events[-3:] if data != b"[DONE]"]
        return self.events[-1][1] == b"[DONE]" and any(ends)


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=300)


def send(connection, body, session=None, key=None):
    headers = {"Content-Type": "application/json", "x-session-id": session, "Authorization": key and f"Bearer {key}"}
    given = {name: value for name, value in headers.items() if value}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), given)
    return connection.getresponse()


def read_events(answer):
    """The events of a stream, each with the time at which it came."""
    for line in answer:
        if line.startswith(b"data: "):
            yield time.monotonic(), line[6:].strip()


def ask(url, body, session=None, key=None):
    """Asks on a connection of its own."""
    began, connection = time.monotonic(), connect(url)
    try:
        answer = send(connection, body, session, key)
        if body.get("stream") and answer.status == 200:
            return Reply(answer.status, events=read_events(answer), began=began)
        return Reply(answer.status, answer.read(), began=began)
    finally:
        connection.close()


def outcome(url, body, session=None):
    """The same, where a broken connection is an outcome, too: the reply, or None."""
    try:
        return ask(url, body, session)
    except (OSError, http.client.HTTPException, ValueError):
        return None


def at_once(n, work):
    """Runs work(0) to work(n - 1), each in a thread of its own."""
    with ThreadPoolExecutor(n) as threads:
        return list(threads.map(work, range(n)))


def wait_for(done, limit_s):
    """Seconds until `done`, or None."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        with contextlib.suppress(OSError):
            if done():
                return time.monotonic() - began
        time.sleep(0.05)
    return None


class Background:
    """Threads that ask until they are told to stop; `replies` has what came back."""

    def __init__(self, n, work):
        self.replies, self.goes_on = [], True
        self.threads = [threading.Thread(target=self.run, args=(i, work), daemon=True) for i in range(n)]
        [thread.start() for thread in self.threads]

    def run(self, client, work):
        turn = 0
        while self.goes_on:
            self.replies.append(work(client, turn))
            turn += 1

    def stop(self):
        self.goes_on = False
        [thread.join() for thread in self.threads]
        return self.replies
