"""Prefill chunks: plot_chunks.py DATA.json PICTURE.svg"""
import json
import statistics
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "chunks"
import matplotlib.pyplot as plt

data = json.load(open(sys.argv[1]))
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
for axes, key, title in zip(panels, ("gap_p95", "gap_max"), ("95th percentile", "longest")):
    for name, runs in data["runs"].items():
        x, y = (statistics.median(r[k] for r in runs) for k in ("ttft_p95", key))
        axes.plot(x, 1e3 * y, "s" if name == "adaptive" else "o", color="C1" if name == "adaptive" else "C0")
        axes.annotate(" " + name, (x, 1e3 * y), fontsize=9)
    axes.set(xlabel="first token, 95th percentile, s", ylabel="gap between pieces, ms", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
figure.suptitle(f"Rows of prompts in a step, {data['parallel']} parallel requests")
figure.tight_layout()
figure.savefig(sys.argv[2], metadata={"Date": None}, bbox_inches="tight")
