"""Layers on two workers: bytes of a step, tokens/s over a slow link, and stunnel with client certificates.

Each link is counted by a proxy or shaped by the kernel. Without reuse of graphs (LLAMA_GRAPH_REUSE_DISABLE, llama.cpp's own) each step sends the whole graph, as
it would without vendor/patches/0012.
"""
import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from comparing.process import OURS, Process, die_with_parent, free_port
from fleets.parts import ask, chat, wait_for

N_EMBD = 576  # of the default model
CELLS = 256  # a step attends to a multiple of it
TENSOR = 296  # bytes of a tensor's description
FRAME = 9  # of a command and its length
NEAR, FAR = "10.83.0.1", "10.83.0.2"
# A message of a link is cut into packets, each with headers of Ethernet, IP and TCP.
PAYLOAD = 1448 / 1514


class Worker:
    """One worker with one thread; `where` is a command that puts it elsewhere."""

    def __init__(self, host="127.0.0.1", where=()):
        command = [*where, OURS, "worker", "--listen", f"{host}:0", "--threads", "1"]
        self.process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        for line in self.process.stderr:
            if found := re.search(r"listening on (\S+),", line):
                self.address = found[1]
                break
        else:
            sys.exit("fleet: error: the worker did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


class Counted:
    """A proxy before a worker that counts what passes."""

    def __init__(self, worker):
        self.to, self.n_bytes = worker.address, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            client, _ = self.listener.accept()
            host, port = self.to.split(":")
            worker = socket.create_connection((host, int(port)))
            for a, b in [(client, worker), (worker, client)]:
                a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self.pass_on, args=(a, b), daemon=True).start()

    def pass_on(self, a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 20):
                self.n_bytes += len(data)
                b.sendall(data)
        for s in (a, b):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


class Head(Process):
    """A server without drafts and with one slot, so that a step has one row."""

    def __init__(self, addresses, *more):
        super().__init__(OURS, "serve", "--host", "127.0.0.1", "-t", 1, "--batch-size", 1, "--ctx", 512, "--text-drafts", "off", "--heads", "none",
                         "--rpc", ",".join(addresses), "--rpc-split", "1,1,1", *more, port=free_port(), log=[])

    def answer(self, n):
        """Seconds of the steps after the first token, of n tokens in all, and the text."""
        reply = ask(self.url, chat("Tell a story of a lantern.", max_tokens=n, ignore_eos=True, stream=True))
        times = [at for at, _ in reply.events]
        return times[-1] - times[0], reply.is_whole


@contextlib.contextmanager
def graphs_reused(reused):
    if not reused:
        os.environ["LLAMA_GRAPH_REUSE_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("LLAMA_GRAPH_REUSE_DISABLE", None)


def bytes_of_step(reused):
    """Bytes that pass in a step of one row, over both workers."""
    with Worker() as first, Worker() as second, graphs_reused(reused):
        proxies = [Counted(first), Counted(second)]
        with Head([proxy.address for proxy in proxies]) as head:
            head.answer(8)
            counts = []
            for n in (20, 120):
                before = sum(proxy.n_bytes for proxy in proxies)
                head.answer(n)
                counts.append(sum(proxy.n_bytes for proxy in proxies) - before)
    return (counts[1] - counts[0]) / 100


def formula():
    """The same on paper: hidden state in and out, mask, position, and an index for keys and one for values; each in a message with a tensor's description. The first
    worker gets the hidden state in two parts, as it adds up what the head's last layer ends with; the second also gets which rows have outputs."""
    hidden, written, read = 4 * N_EMBD, FRAME + TENSOR + 9, FRAME + TENSOR + 16 + 8
    both = 2 * hidden + 2 * CELLS + 4 + 8 + 8 + 6 * written + read + FRAME + 4
    return 2 * both + hidden + 4


class Link:
    """A pair of interfaces, of which the far one is in a namespace of its own."""

    def __enter__(self):
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], preexec_fn=die_with_parent)
        self.where = ["nsenter", "-t", str(self.holder.pid), "-n"]
        ours = os.readlink("/proc/self/ns/net")
        wait_for(lambda: os.readlink(f"/proc/{self.holder.pid}/ns/net") != ours, 10)
        run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(self.holder.pid))
        run("ip", "address", "add", f"{NEAR}/24", "dev", "near")
        run("ip", "link", "set", "near", "up")
        run(*self.where, "ip", "address", "add", f"{FAR}/24", "dev", "far")
        run(*self.where, "ip", "link", "set", "far", "up")
        return self

    def limit(self, mbit):
        """The same rate in both directions; None: no limit."""
        for where, name in [((), "near"), (self.where, "far")]:
            shape = ["tbf", "rate", f"{mbit}mbit", "burst", "4kb", "latency", "100ms"] if mbit else ["pfifo"]
            run(*where, "tc", "qdisc", "replace", "dev", name, "root", *shape)

    def __exit__(self, *_):
        subprocess.run(["ip", "link", "del", "near"], check=False)  # with its other end; the namespace would take it away later
        self.holder.kill()
        self.holder.wait()


def run(*command):
    subprocess.run(command, check=True)


def link_speed(report, bytes_by_reuse):
    """Tokens/s over a link of 1 Gbit/s and of 100 Mbit/s, and what the formula says of them from those over the same link without a limit."""
    n = 150
    for reused in (True, False):
        with Link() as link, Worker(FAR, link.where) as first, Worker(FAR, link.where) as second, graphs_reused(reused):
            with Head([first.address, second.address]) as head:
                head.answer(20)
                seconds = {None: math.inf, 1000: math.inf, 100: math.inf}
                for _ in range(4):  # in turn, as the machine's speed changes
                    for mbit in seconds:
                        link.limit(mbit)
                        seconds[mbit] = min(seconds[mbit], *(head.answer(n)[0] / (n - 1) for _ in range(2)))
                unlimited = seconds.pop(None)
                for mbit, measured in seconds.items():
                    expected = unlimited + bytes_by_reuse[reused] / (mbit * 1e6 / 8 * PAYLOAD)
                    report.line(f"workers: {mbit} Mbit/s, {'graphs reused' if reused else 'whole graphs'}: at least 0.85 of the tokens/s that the formula says",
                                measured < expected / 0.85, tokens_per_s=1 / measured, formula=1 / expected, without_limit=1 / unlimited)


def certificates(folder):
    """An authority, and a certificate of it for each side."""
    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=fleet")
    for name in ("worker", "head"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.pem", "-days", "2")


@contextlib.contextmanager
def stunnel(folder, name, accept, connect, client, certified=True):
    """deploy/README.md's configuration of one side."""
    lines = ["foreground = yes", "pid =", f"[{name}]", f"client = {'yes' if client else 'no'}", f"accept = {accept}", f"connect = {connect}",
             f"CAfile = {folder}/ca.pem", "verifyChain = yes", "socket = l:TCP_NODELAY=1", "socket = r:TCP_NODELAY=1"]
    if certified:
        side = "head" if client else "worker"
        lines += [f"cert = {folder}/{side}.pem", f"key = {folder}/{side}.key"]
    path = Path(folder) / f"{name}.conf"
    path.write_text("\n".join(lines) + "\n")
    program = shutil.which("stunnel4") or shutil.which("stunnel") or sys.exit("fleet: error: stunnel is missing: apt-get install stunnel4")
    process = subprocess.Popen([program, path], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)
    host, port = accept.split(":")
    wait_for(lambda: socket.create_connection((host, int(port)), 1).close() is None, 20)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def over_stunnel(report):
    """The same text through stunnel as without, and no way for a client that has no certificate."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        certificates(folder)
        workers = [stack.enter_context(Worker()) for _ in range(2)]
        ends, others = [], []
        for i, worker in enumerate(workers):
            outside, inside, other = (f"127.0.0.1:{free_port()}" for _ in range(3))
            stack.enter_context(stunnel(folder, f"worker-{i}", outside, worker.address, client=False))
            stack.enter_context(stunnel(folder, f"head-{i}", inside, outside, client=True))
            stack.enter_context(stunnel(folder, f"other-{i}", other, outside, client=True, certified=False))
            ends.append(inside)
            others.append(other)
        time.sleep(0.5)  # until the workers have let go of what looked whether stunnel listens
        body = chat("Tell a story of a lantern.", max_tokens=60, logprobs=True)
        texts = []
        for addresses in (ends, [worker.address for worker in workers]):
            with Head(addresses) as head:
                took, whole = head.answer(100)
                texts.append((ask(head.url, body).json()["choices"], 99 / took))
        (secret, secret_rate), (plain, plain_rate) = texts
        report.line("workers: stunnel with client certificates: the same text", secret == plain and whole, tokens_per_s=secret_rate, without=plain_rate)
        began = time.monotonic()
        refused = subprocess.run([OURS, "serve", "--port", "0", "--rpc", others[0]], capture_output=True, text=True)
        report.line("workers: stunnel refuses a client without a certificate", refused.returncode == 1 and "is no worker" in refused.stderr,
                    after_s=time.monotonic() - began, said=refused.stderr.strip())


def check(report):
    paper, measured = formula(), {reused: bytes_of_step(reused) for reused in (True, False)}
    report.line("workers: bytes of a step of one row, two workers, as the formula says, within 1%", abs(measured[True] / paper - 1) < 0.01,
                bytes=int(measured[True]), formula=paper, with_whole_graphs=int(measured[False]))
    link_speed(report, measured)
    over_stunnel(report)
