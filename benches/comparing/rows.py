"""What a step takes by its rows: `medusa-llama rows` and llama-bench on the same file, in turn."""
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from . import servers

REPEATS = 2  # of each number of rows, in each round


def ours(a):
    """Milliseconds by rows: the best of a run. The last row's logits only, as llama-bench has them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [servers.OURS, "rows", "-m", a.model, "-t", a.threads, "--rows", ",".join(map(str, a.rows)), "--cells", a.cells,
                   "--rounds", REPEATS, "--last", "--log-level", "error", "--json", out]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        return {row["rows"]: 1e3 * min(row["seconds"]) for row in json.loads(out.read_text())["rows"]}


def llama_bench(a, program):
    command = [program, "-m", a.model, "-t", a.threads, "-p", ",".join(map(str, a.rows)), "-n", 0, "-d", a.cells, "-r", REPEATS,
               "-o", "json"]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return {run["n_prompt"]: min(run["samples_ns"]) / 1e6 for run in json.loads(done.stdout)}


def compare(a):
    program = a.peer or servers.build_peer("llama-bench")
    measured = {"ours": [], "llama-bench": []}
    for i in range(a.rounds):
        order = list(measured) if i % 2 == 0 else list(measured)[::-1]
        for name in order:
            measured[name].append(ours(a) if name == "ours" else llama_bench(a, program))
    a.out.mkdir(parents=True, exist_ok=True)
    settings = {"model": a.model.name, "threads": a.threads, "cells": a.cells}
    (a.out / f"rows-{a.model.stem}.json").write_text(json.dumps(settings | measured) + "\n")
    print(f"{a.model.name}, {a.threads} threads, {a.cells} cells before: milliseconds of a step, medians of {a.rounds} rounds")
    print("| rows | ours | to the first | llama-bench | to the first | llama-bench / ours |\n|---|---|---|---|---|---|")
    medians = {name: {n: statistics.median(run[n] for run in runs) for n in a.rows} for name, runs in measured.items()}
    first = a.rows[0]
    for n in a.rows:
        mine, theirs = (medians[name][n] for name in measured)
        to_one = [f"{medians[name][n] / medians[name][first]:.2f}" for name in measured]
        ratios = [theirs[n] / mine[n] for mine, theirs in zip(*measured.values())]
        print(f"| {n} | {mine:.1f} | {to_one[0]} | {theirs:.1f} | {to_one[1]} | {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f}) |")
