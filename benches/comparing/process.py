"""Starts and stops a server for a bench. Standard library only."""
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "target" / "release" / "medusa-llama"


def die_with_parent():
    """Linux sends the child this signal when its parent ends, however that comes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """A server, on a free port unless one is given: ready inside `with`, or from start() to stop(). `log` collects the lines of its log."""

    def __init__(self, *command, ready="/ready", log=None, port=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [str(a) for a in (*command, "--port", self.port)]
        self.ready, self.log, self.process = ready, log, None

    @classmethod
    def ours(cls, *args, **more):
        return cls(OURS, "serve", "--host", "127.0.0.1", *args, **more)

    def start(self, poll_s=0.1):
        """Starts it, and waits until it takes work; returns the seconds that took."""
        began = time.monotonic()
        stderr = subprocess.DEVNULL if self.log is None else subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=stderr, text=True, cwd=ROOT,
                                        preexec_fn=die_with_parent)
        if self.log is not None:
            threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        while time.monotonic() < began + 300:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended at once: {' '.join(self.command)}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                with urllib.request.urlopen(self.url + self.ready, timeout=5) as answer:
                    if answer.status == 200:
                        return time.monotonic() - began
            time.sleep(poll_s)
        self.stop()
        raise SystemExit(f"no answer within five minutes from {' '.join(self.command)}")

    def stop(self):
        """Returns the exit status after SIGTERM; a server that does not end is killed."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def status(self, field):
        """A number of /proc/PID/status, for example `VmHWM` in KiB."""
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)

    def count(self, what):
        """Entries of /proc/PID/`what`: threads of `task`, open files of `fd`."""
        return len(os.listdir(f"/proc/{self.process.pid}/{what}"))
