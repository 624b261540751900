"""A load that jumps: plot_ramp.py DATA.json PICTURE.svg"""
import json
import statistics
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "ramp"
import matplotlib.pyplot as plt

data = json.load(open(sys.argv[1]))
figure, axes = plt.subplots(figsize=(8, 3.6))
for mode, runs in data["runs"].items():
    columns = list(zip(*runs))
    at = [data["window_s"] * (i + 0.5) for i in range(len(columns))]
    axes.plot(at, [statistics.median(c) for c in columns], marker=".", label=mode)
    axes.fill_between(at, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2)
for i, n in enumerate(data["plateaus"]):
    axes.text((i + 0.5) * data["phase_s"], 0, f"{n} parallel", ha="center", va="bottom")
axes.set(xlabel="s", ylabel="tokens/s", ylim=(0, None), title="A load that jumps: median and range of the rounds")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
figure.savefig(sys.argv[2], metadata={"Date": None}, bbox_inches="tight")
