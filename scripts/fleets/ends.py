"""Replicas that end: told to, and killed."""
import time

from fleets.parts import Background, at_once, chat, outcome, unlike, wait_for

CLIENTS = 12
# Answers under which a replica is killed.
STREAMS, WHOLE = 12, 4


def question(client, turn):
    """A short answer, every other one as a stream; 20 tokens of it are certain."""
    return chat(f"{unlike(client, turn)}: tell a journey of these.", max_tokens=40, stream=turn % 2 == 0, min_tokens=20)


def sigterm(report, balancer, replicas):
    """Ends one replica while at least 200 requests come."""
    leaving = replicas[1]
    traffic = Background(CLIENTS, lambda client, turn: outcome(balancer.url, question(client, turn), f"{client}-{turn}"))
    wait_for(lambda: len(traffic.replies) >= 60, 300)
    had = leaving.n_answers()
    began = time.monotonic()
    status = leaving.stop()
    took = time.monotonic() - began
    wait_for(lambda: len(traffic.replies) >= 200, 600)
    replies = traffic.stop()
    bad = [reply.status if reply else "broken" for reply in replies if not (reply and reply.is_whole)]
    report.line(f"{balancer.name}: SIGTERM to one replica fails no request", not bad and status == 0 and had > 0 and len(replies) >= 200,
                requests=len(replies), failed=len(bad), answered_by_it_before=int(had), exit_status=status, ended_after_s=took,
                **({"kinds": sorted(set(map(str, bad)))} if bad else {}))


def sigkill(report, balancer, replicas):
    """Kills one replica under answers that take longer than the time until then, starts it again, and waits for requests to reach it."""
    killed, own = replicas[1], []
    n = STREAMS + WHOLE

    def work(i):
        if i == n:  # the one that kills: when all run, and each has begun
            wait_for(lambda: sum(replica.load()["num_total_reqs"] for replica in replicas) >= n, 60)
            time.sleep(1)
            own.append(killed.load()["num_total_reqs"])
            killed.kill()
            return None
        body = chat(f"{unlike('story', i)}: tell a very long story of these.", max_tokens=600, min_tokens=600, stream=i < STREAMS)
        return outcome(balancer.url, body, f"story-{i}")

    replies = at_once(n + 1, work)[:n]
    streams, whole = ([not (reply and reply.is_whole) for reply in part].count(True) for part in (replies[:STREAMS], replies[STREAMS:]))
    report.line(f"{balancer.name}: SIGKILL of one replica fails its own streams alone",
                0 < own[0] < n and 0 < streams + whole <= own[0] and (whole == 0 or not balancer.resends), streams=STREAMS, whole_answers=WHOLE,
                its_own=own[0], failed_streams=streams, failed_whole_answers=whole)

    after = [outcome(balancer.url, question(i, 1), f"after-{i}") for i in range(6)]
    killed.start()
    traffic = Background(6, lambda client, turn: outcome(balancer.url, question(client, turn), f"again-{client}-{turn}"))
    took = wait_for(lambda: killed.n_answers() > 0, 60)
    bad = sum(not (reply and reply.is_whole) for reply in traffic.stop() + after)
    report.line(f"{balancer.name}: it is back in rotation after a restart", took is not None and bad == 0,
                first_request_s_after_ready=took, failed_meanwhile=bad)
