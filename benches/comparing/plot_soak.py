"""Memory over many requests: plot_soak.py DATA.json PICTURE.svg"""
import json
import sys

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "soak"
import matplotlib.pyplot as plt

samples = json.load(open(sys.argv[1]))["samples"]
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot([s["requests"] for s in samples], [s["rss_kib"] / 1024 for s in samples])
axes.set(xlabel="requests", ylabel="resident memory, MiB", ylim=(0, None))
axes.grid(alpha=0.3)
figure.savefig(sys.argv[2], metadata={"Date": None}, bbox_inches="tight")
