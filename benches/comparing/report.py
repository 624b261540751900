"""From the raw lines of runs to ratios with their spread: a table, a JSON file, a plot."""
import json
import statistics
from pathlib import Path

from . import servers

OURS, PEERS = "best", "peer-"


def spread(values):
    """Median, lowest and highest."""
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def written(s):
    return f"{s['median']:.2f} ({s['low']:.2f} to {s['high']:.2f})" if s else "-"


class Runs:
    """The runs at one number of parallel requests."""

    def __init__(self, lines, parallel):
        self.parallel = parallel
        self.lines = [line for line in lines if line["parallel"] == parallel]
        self.modes = sorted({line["mode"] for line in self.lines})

    def of(self, mode, key):
        """By round."""
        return {line["round"]: line[key] for line in self.lines if line["mode"] == mode and line.get(key) is not None}

    def median(self, mode, key):
        values = list(self.of(mode, key).values())
        return statistics.median(values) if values else None

    def ratio(self, mode, other, key="tok_per_s"):
        """Round by round, so that each is of runs next to each other; None without a common round."""
        a, b = self.of(mode, key), self.of(other, key)
        return spread([a[r] / b[r] for r in a if r in b]) if a.keys() & b.keys() else None

    def best_peer(self):
        """The peer's fastest mode here."""
        peers = [m for m in self.modes if m.startswith(PEERS)]
        return max(peers, key=lambda m: self.median(m, "tok_per_s"), default=None)

    def category_ratios(self, mode, other):
        a, b = self.of(mode, "categories"), self.of(other, "categories")
        names = sorted({name for line in a.values() for name in line})
        ratio = lambda name: spread([a[r][name] / b[r][name] for r in a if r in b])
        return {name: ratio(name) for name in names} if a.keys() & b.keys() else {}


def summary(lines):
    """All ratios."""
    out = []
    for parallel in sorted({line["parallel"] for line in lines}):
        runs = Runs(lines, parallel)
        peer = runs.best_peer()
        of_mode = lambda m: {key: runs.median(m, key) for key in
                             ("tok_per_s", "ttft_p50", "ttft_p95", "gap_p50", "gap_p95", "gap_max", "peak_mib")}
        entry = {"parallel": parallel, "rounds": len({l["round"] for l in runs.lines}), "peer_best": peer,
                 "modes": {m: of_mode(m) for m in runs.modes},
                 "ratios": {f"{a} / {b}": runs.ratio(a, b) for a in runs.modes for b in runs.modes
                            if a != b and not a.startswith(PEERS)},
                 "ttft_p95": peer and runs.ratio(OURS, peer, "ttft_p95"), "gap_p95": peer and runs.ratio(OURS, peer, "gap_p95")}
        if parallel == 1 and peer:
            entry["categories"] = {f"{OURS} / {b}": runs.category_ratios(OURS, b) for b in runs.modes if b != OURS}
        out.append(entry)
    return out


def markdown(entries):
    """Tables to paste into a page."""
    rows = ["| parallel | ours, plain / peer, plain | ours, best / peer, best | ours, best / plain | peer's best mode |", "|---|---|---|---|---|"]
    for e in entries:
        r = e["ratios"]
        rows.append(f"| {e['parallel']} | {written(r.get('plain / peer-plain'))} | {written(r.get(f'{OURS} / ' + str(e['peer_best'])))} "
                    f"| {written(r.get(f'{OURS} / plain'))} | {(e['peer_best'] or '-').removeprefix(PEERS)} |")
    rows += ["", "| parallel | mode | tokens/s | first token s, p50 / p95 | gap ms, p50 / p95 / longest | peak MiB |", "|---|---|---|---|---|---|"]
    ms = lambda s: "-" if s is None else f"{s * 1e3:.1f}"
    for e in entries:
        for mode, m in e["modes"].items():
            rows.append(f"| {e['parallel']} | {mode} | {m['tok_per_s']:.1f} | {m['ttft_p50']:.2f} / {m['ttft_p95']:.2f} "
                        f"| {ms(m['gap_p50'])} / {ms(m['gap_p95'])} / {ms(m['gap_max'])} | {m['peak_mib']:.0f} |")
    for e in entries:
        columns = e.get("categories") or {}
        names = sorted({name for column in columns.values() for name in column})
        if names:
            rows += ["", "| one stream | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
            rows += [f"| {name} | " + " | ".join(written(c.get(name)) for c in columns.values()) + " |" for name in names]
    return "\n".join(rows) + "\n"


def report(folder):
    """Writes compare.json, compare.md and compare.svg beside compare.jsonl; returns the table."""
    folder = Path(folder)
    lines = [json.loads(line) for line in open(folder / "compare.jsonl")]
    entries = summary([line for line in lines if "mode" in line])
    (folder / "compare.json").write_text(json.dumps(entries, indent=1) + "\n")
    table = markdown(entries)
    (folder / "compare.md").write_text(table)
    servers.plot("compare", folder / "compare.json", folder / "compare.svg")
    return table
