"""benches/soak.py's clients at HAProxy, with two replicas of which one after the other is restarted."""
import contextlib
import itertools
import threading

import soak as bench
from fleets.parts import ENDS, FRONT, PORTS, haproxy
from comparing.process import OURS

PAUSE_S = 20


class Replica(bench.Server):
    """As benches/soak.py starts it, and with a drain that HAProxy notices."""

    def __init__(self, port):
        super().__init__(OURS, "serve", "--host", "127.0.0.1", "--api-key", bench.KEY, "--max-body-bytes", bench.MAX_BODY, "--write-timeout", 5,
                         "--batch-size", 8, "--ctx", 512, "-t", 1, *ENDS, port=port, log=[])


class Front(bench.Server):
    """HAProxy's address, where clients expect a server."""

    def __init__(self):
        self.port = FRONT


def oversize_head(server, rng):
    """HAProxy's own answer: no head may be larger than its buffer."""
    reply = server.exchange(bench.request("POST", "/generate", b"{}", more="x-filler: " + "y" * 600_000 + "\r\n"))
    bench.must(reply.status == 400, reply.status, reply.body)


OTHERS = {bench.oversize_head: oversize_head}


def check(report, n_requests):
    bench.CLIENTS = [(OTHERS.get(client, client), weight) for client, weight in bench.CLIENTS]
    statuses, ended = [], []

    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(Replica(port)) for port in PORTS[:2]]
        stack.enter_context(haproxy(key=bench.KEY))
        traffic = threading.Thread(target=lambda: ended.extend(bench.traffic(Front(), n_requests, 16, 1)))
        traffic.start()
        # Here and not in a thread, with which the replicas that it started would end.
        for replica in itertools.cycle(replicas):
            traffic.join(PAUSE_S)
            if not traffic.is_alive():
                break
            statuses.append(replica.stop())
            replica.start()
        counts, broken = ended
        left = [bench.settle(replica) for replica in replicas]
        panics = sum("panicked" in line for replica in replicas for line in replica.log)
    for line in broken[:20]:
        print("broken:", line, flush=True)
    report.line(f"HAProxy: soak over two replicas, one restarted every {PAUSE_S} s", not broken and not any(left) and not panics and not any(statuses),
                requests=sum(counts.values()), broken=len(broken), restarts=len(statuses), left_running=sum(map(bool, left)), panics=panics,
                exit_statuses=sorted(set(statuses)))
