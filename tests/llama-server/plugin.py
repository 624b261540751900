"""Runs the suite in pytest: lends our servers to its cases, marks what is not applicable, notes results."""
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

import cases
from options import ROOT, WORK

# Servers that wait for a case with the same options: a start takes two seconds, most of it to measure what drafts cost.
MAX_IDLE = 3
DRAFTS = ["--heads", str(ROOT / "heads" / "smollm2-135m-instruct")]
NO_DRAFTS = ["--heads", "none", "--text-drafts", "off"]


class Server:
    """One of our servers, on a port of its choice."""

    def __init__(self, arguments, log):
        self.arguments, self.log = arguments, log
        command = [os.environ["LLAMA_SERVER_SUITE_BINARY"], "serve", "--host", "127.0.0.1", "--port", "0", "--drain-timeout", "1", *arguments]
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)

    def wait(self):
        """Its port, when it has loaded the model."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            text = Path(self.log).read_text()
            if " ready: " in text:
                return int(re.search(r"listening on http://[\d.]+:(\d+)", text)[1])
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"our server did not start: {Path(self.log).read_text()[-500:]}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Pool:
    """Lends servers to programs that connect to a socket, for as long as the connection lasts."""

    def __init__(self, path):
        self.lock, self.idle, self.lent, self.n_started = threading.Lock(), [], [], 0
        self.needs_fresh, self.drafts = False, DRAFTS
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(path)
        self.socket.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            connection, _ = self.socket.accept()
            threading.Thread(target=self.lend, args=(connection,), daemon=True).start()

    def lend(self, connection):
        with connection, connection.makefile("rw") as lines:
            try:
                server, port = self.take(json.loads(lines.readline()) + self.drafts)
            except RuntimeError as e:
                print(json.dumps({"error": str(e)}), file=lines, flush=True)
                return
            print(json.dumps({"port": port}), file=lines, flush=True)
            lines.read() # until the borrower ends
        with self.lock:
            self.lent.remove(server)
            self.idle.append(server)

    def take(self, arguments):
        with self.lock:
            same = [server for server in self.idle if server.arguments == arguments]
            for server in same:
                self.idle.remove(server)
            # Two with the same options would be one too many.
            reused = same.pop() if same and not self.needs_fresh else None
            surplus = same + [self.idle.pop(0) for _ in range(len(self.idle) - MAX_IDLE + 1)]
            if not reused:
                self.n_started += 1
            server = reused or Server(arguments, WORK / f"server-{self.n_started}.log")
            self.lent.append(server)
        for one in surplus:
            one.stop()
        try:
            return server, server.wait()
        except RuntimeError:
            self.lent.remove(server)
            raise

    def died(self):
        """Those that ended by themselves."""
        with self.lock:
            dead = [server for server in self.idle + self.lent if server.process.poll() is not None]
            self.idle = [server for server in self.idle if server not in dead]
        return dead

    def stop(self):
        for server in self.idle + self.lent:
            server.stop()


class Suite:
    def __init__(self, pool):
        self.pool, self.results = pool, {}

    def pytest_collection_modifyitems(self, items):
        import utils

        utils.ServerPreset.load_all = staticmethod(lambda: None) # it fetches models
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name not in ("skip", "slow")]
            reason = cases.reason(item.nodeid)
            if reason:
                # It runs nevertheless: one that passes is applicable.
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    def pytest_runtest_setup(self, item):
        self.pool.needs_fresh = cases.function(item.nodeid) in cases.NEEDS_FRESH_SERVER
        generates = not any(cases.matches(pattern, item.nodeid) for pattern in cases.GENERATES_NOTHING)
        self.pool.drafts = DRAFTS if generates else NO_DRAFTS

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if report.when == "call" and (dead := self.pool.died()):
            report.outcome, report.longrepr = "failed", f"our server ended by itself: see {dead[0].log}"
            report.__dict__.pop("wasxfail", None)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            is_expected = hasattr(report, "wasxfail") and report.outcome == "skipped"
            outcome = "not applicable" if is_expected else report.outcome
            seen = self.results.get(report.nodeid, {"outcome": "passed"})
            if seen["outcome"] != "failed":
                self.results[report.nodeid] = {"outcome": outcome, "seconds": round(report.duration, 2), "why": last_line(report)}

    def pytest_sessionfinish(self):
        self.pool.stop()
        Path(os.environ["LLAMA_SERVER_SUITE_RESULTS"]).write_text(json.dumps(self.results, indent=1))


def last_line(report):
    """What failed, in short."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr or "")).strip()[:400]


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler) # ends the session as Ctrl-C does, servers included
    config.pluginmanager.register(Suite(Pool(os.environ["LLAMA_SERVER_SUITE_POOL"])))
