"""Streams: whether they pass as they come, and what happens when their clients leave."""
import socket
import time

from fleets.parts import ask, chat, connect, read_events, send, wait_for


def unbuffered(report, balancer, replicas):
    reply = ask(balancer.url, chat("Tell a long story.", max_tokens=200, min_tokens=200, stream=True, speculation="off"), "story")
    times = [at - reply.began for at, _ in reply.events]
    report.line(f"{balancer.name}: streams pass unbuffered", reply.is_whole and times[0] < times[-1] / 4 and len(set(times)) > 100,
                events=len(times), first_s=times[0], last_s=times[-1])


def leaving(report, balancer, replicas):
    """A client leaves in the middle: its tokens must stop within a second."""
    slowest, stopped = 0.0, 0
    for i in range(5):
        connection = connect(balancer.url)
        answer = send(connection, chat(f"Tell story {i}, a long one.", max_tokens=1500, min_tokens=1500, stream=True, speculation="off"), f"leaver-{i}")
        events = read_events(answer)
        [next(events) for _ in range(5)]
        connection.sock and connection.sock.shutdown(socket.SHUT_RDWR)
        left = time.monotonic()
        answer.close()
        connection.close()
        idle = wait_for(lambda: not any(replica.load()["num_total_reqs"] for replica in replicas), 10)
        slowest = max(slowest, time.monotonic() - left)
        stopped += idle is not None
    tokens = sum(replica.metric("generation_tokens_total") for replica in replicas)
    time.sleep(1)
    later = sum(replica.metric("generation_tokens_total") for replica in replicas)
    cancelled = sum(replica.metric("request_failures_total", 'reason="cancelled"') for replica in replicas)
    report.line(f"{balancer.name}: a client that leaves stops its tokens within a second",
                stopped == 5 and slowest < 1 and later == tokens and cancelled == 5, clients=5, slowest_s=slowest, cancelled=int(cancelled))
