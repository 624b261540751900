"""A prefix store: how soon a first token comes after a restart and in another server, and whether anything is lost by kills."""
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from comparing.process import Process, die_with_parent, free_port

from . import parts

N_TOKENS = 1500
N_PROMPTS = 5
KILLS = 1000
S3 = parts.ROOT / ".tools" / "s3"


def server(store):
    return Process.ours("-t", 2, "--ctx", 2048, "--kv-cells", 8192, "--prefix-store", store, log=[])


def prompts():
    """Token ids, drawn anew for each prompt and the same in each run."""
    draw = random.Random(1)
    return [[draw.randrange(1000, 40_000) for _ in range(N_TOKENS)] for _ in range(N_PROMPTS)]


def first_tokens(url):
    """Seconds to the first token of each prompt, and tokens that came from the store."""
    seconds, stored = [], []
    for prompt in prompts():
        began = time.monotonic()
        usage = parts.post_json(url + "/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0})["usage"]
        seconds.append(time.monotonic() - began)
        stored.append(usage["prompt_tokens_details"].get("restored_tokens", {}).get("store", 0))
    return seconds, stored


def texts(url):
    bodies = [{"prompt": prompt, "max_tokens": 32, "temperature": temperature, "seed": 7} for prompt in prompts() for temperature in (0, 0.9)]
    return [parts.post_json(url + "/v1/completions", body)["choices"][0]["text"] for body in bodies]


def compare(report, place, store):
    with server(store) as one:
        computed, none = first_tokens(one.url)
        said = texts(one.url)
    with server(store) as other:
        restored, stored = first_tokens(other.url)
        same = texts(other.url) == said
    ratio = statistics.median(computed) / statistics.median(restored)
    report.line(f"a {N_TOKENS}-token prompt's first token after a restart, from {place}, at least 5 times sooner", ratio >= 5 and not any(none) and all(stored),
                computed_s=statistics.median(computed), restored_s=statistics.median(restored), times=ratio, tokens_from_store=min(stored))
    report.line(f"the same texts after it, greedy and seeded, from {place}", same, texts=2 * N_PROMPTS)


@contextlib.contextmanager
def s3():
    """moto's stub with a bucket."""
    (S3 / "moto").is_dir() or sys.exit("fleet: error: moto is missing: scripts/setup s3")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], env={**os.environ, "PYTHONPATH": str(S3)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    try:
        made = urllib.request.Request(url + "/prefixes", method="PUT")
        parts.wait_for(lambda: urllib.request.urlopen(made, timeout=5), 60) is not None or sys.exit("fleet: error: moto does not answer")
        os.environ.update(AWS_ENDPOINT=url, AWS_ALLOW_HTTP="true", AWS_REGION="us-east-1", AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any")
        yield "s3://prefixes/fleet"
    finally:
        process.kill()
        process.wait()


def kills(report):
    """The test's long form."""
    command = ["cargo", "test", "--release", "--locked", "--test", "prefixes", "--", "killed", "--nocapture"]
    done = subprocess.run(command, cwd=parts.ROOT, env={**os.environ, "PREFIX_KILLS": str(KILLS)}, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if "all whole" in line]
    report.line(f"{KILLS} kills in the middle of writing lose no block that was whole", done.returncode == 0 and said, said=said and said[0])


def check(report):
    with tempfile.TemporaryDirectory() as folder:
        compare(report, "a folder", folder)
    with s3() as store:
        compare(report, "a stub of S3", store)
    kills(report)
