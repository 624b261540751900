"""What replicas say, and what balancers make of it."""
import subprocess
import time

from fleets.parts import PLACES, SLOTS, ask, at_once, chat, connect, get_json, outcome, send, unlike

# promtool would have no colon in a metric's name: that is for rules. We have vLLM's form.
EXPECTED_LINT = "metric names should not contain ':'"


def same_text(report, replicas):
    levels = {get_json(replica.url + "/")["cpu"] for replica in replicas}
    prompts = ["Describe a lighthouse.", "Name three rivers.", "Why is the sky blue?", "Write a line about rain.", "Invent a proverb."]

    def texts(replica):
        bodies = [chat(prompt, temperature=0.9, seed=7 + i, max_tokens=64) for i, prompt in enumerate(prompts)]
        return [ask(replica.url, body).json()["choices"][0]["message"]["content"] for body in bodies]

    known = [texts(replica) for replica in replicas]
    again = at_once(len(prompts), lambda i: ask(replicas[0].url, chat(prompts[i], temperature=0.9, seed=7 + i, max_tokens=64)))
    beside = [reply.json()["choices"][0]["message"]["content"] for reply in again]
    report.line("same seed, same text from each replica", len(levels) == 1 and all(known[0] == other for other in [*known, beside]),
                texts=len(prompts), replicas=len(replicas), different_texts=len(set(known[0])), level=levels.pop())


def metrics(report, replicas):
    done = subprocess.run(["curl", "-s", replicas[0].url + "/metrics"], capture_output=True, check=True)
    lint = subprocess.run(["promtool", "check", "metrics"], input=done.stdout, capture_output=True)
    lines = (lint.stdout + lint.stderr).decode().splitlines()
    unexpected = [line for line in lines if line and EXPECTED_LINT not in line]
    text = done.stdout.decode()
    report.line("promtool reads the raw /metrics", not unexpected and "medusa_llama:cache_config_info{" in text, lines=text.count("\n"),
                unexpected=len(unexpected))


def queue(report, balancer, replicas):
    """More requests at a time than replicas have places: alone one refuses some, behind the balancer none is refused."""
    n = 5 * PLACES
    body = chat("Count to ten.", max_tokens=16, min_tokens=16)
    direct = at_once(2 * PLACES, lambda i: ask(replicas[0].url, body).status)
    before = refused(replicas)
    through = at_once(n, lambda i: getattr(outcome(balancer.url, chat(f"{unlike(i)}: count these.", max_tokens=16, min_tokens=16)), "status", None))
    report.line(f"{balancer.name}: its queue absorbs what would be 429", through.count(200) == n and refused(replicas) == before
                and direct.count(429) > 0, requests=n, answered=through.count(200), refused_by_replicas=int(refused(replicas) - before),
                refused_without_it=f"{direct.count(429)} of {len(direct)}")


def refused(replicas):
    return sum(replica.metric("request_refusals_total", 'reason="queue_full"') for replica in replicas)


def loads(report, balancer, replicas):
    """smg polls /v1/loads, and tells what it read."""
    before = [replica.metric("http_requests_total", 'path="/v1/loads"', 'status="200"') for replica in replicas]
    time.sleep(4)
    polled = [replica.metric("http_requests_total", 'path="/v1/loads"', 'status="200"') - n for replica, n in zip(replicas, before)]
    told = {load["worker"]: load["max_running_requests"] for load in get_json(balancer.url + "/get_loads")["loads"]}
    slots = [told.get(replica.url) for replica in replicas]
    known = [replica.load()["max_running_requests"] for replica in replicas]
    report.line(f"{balancer.name}: reads /v1/loads", min(polled) >= 1 and slots == known, polls_in_4_s=[int(n) for n in polled], slots_it_tells=slots)


def orca(report, balancer, replicas):
    """One replica is kept busy by others than the balancer, with one slot left: from its reports the balancer sends it less."""
    idle = shares(balancer, replicas)
    long = chat("Tell a very long story.", max_tokens=1900, min_tokens=1900, stream=True)
    others = [connect(replicas[0].url) for _ in range(SLOTS - 1)]
    streams = [send(other, long) for other in others]
    shares(balancer, replicas)  # until the reports of the busy one have come
    busy = shares(balancer, replicas)
    for other, stream in zip(others, streams):
        stream.close()
        other.close()
    report.line(f"{balancer.name}: shifts load by ORCA away from a busy replica", 0 < min(idle) and busy[0] < min(idle[0], busy[1], busy[2]) / 2,
                idle=[round(share, 2) for share in idle], first_busy=[round(share, 2) for share in busy])


def shares(balancer, replicas):
    """Which part of 60 requests without a session each replica gets."""
    before = [replica.n_answers() for replica in replicas]
    at_once(3, lambda client: [ask(balancer.url, chat(f"Say {client} {i}.", max_tokens=4)) for i in range(20)])
    got = [replica.n_answers() - n for replica, n in zip(replicas, before)]
    return [n / sum(got) for n in got]
