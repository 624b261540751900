"""Throughput by parallel requests: plot_compare.py DATA.json PICTURE.svg"""
import json
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "compare"
import matplotlib.pyplot as plt

entries = json.load(open(sys.argv[1]))
figure, axes = plt.subplots(figsize=(8, 4.4))
for mode in sorted({m for e in entries for m in e["modes"]}):
    points = [(e["parallel"], e["modes"][mode]["tok_per_s"]) for e in entries if mode in e["modes"]]
    axes.plot(*zip(*points), marker="o", linestyle="--" if mode.startswith("peer") else "-", label=mode if mode.startswith("peer") else "ours, " + mode)
axes.set(xscale="log", xlabel="parallel requests", ylabel="tokens/s", ylim=(0, None), title="Same GGUF, prompts and threads; greedy")
axes.set_xticks([e["parallel"] for e in entries], [str(e["parallel"]) for e in entries])
axes.minorticks_off()
axes.legend(frameon=False)
axes.grid(alpha=0.3)
figure.savefig(sys.argv[2], metadata={"Date": None}, bbox_inches="tight")
