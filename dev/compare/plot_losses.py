#!/usr/bin/env python3
"""Loss curves of runs, from their log.jsonl:  plot_losses.py OUT.png RUN_DIRECTORY...   (needs matplotlib)

The training loss is smoothed over 25 steps; dots are validation losses. A dashed line, if given by --bigram X, is a bigram model's loss.
"""
import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 25


def read_log(directory):
    with open(os.path.join(directory, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("runs", nargs="+")
    ap.add_argument("--bigram", type=float)
    ap.add_argument("--unit", default="byte", help="what the runs count: byte or token")
    a = ap.parse_args()
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for run in a.runs:
        log = read_log(run)
        loss = [row["loss"] for row in log]
        smooth = [sum(loss[max(0, i - WINDOW + 1) : i + 1]) / (i + 1 - max(0, i - WINDOW + 1)) for i in range(len(loss))]
        (line,) = axes.plot([row["tokens"] / 1e6 for row in log], smooth, label=os.path.basename(run.rstrip("/")), linewidth=1.4)
        validated = [row for row in log if "val_loss" in row]
        axes.plot([row["tokens"] / 1e6 for row in validated], [row["val_loss"] for row in validated], "o", color=line.get_color(), markersize=4)
    if a.bigram:
        axes.axhline(a.bigram, linestyle="--", color="gray", linewidth=1, label="bigram model")
    axes.set_yscale("log")
    axes.set_yticks(*zip(*[(t, f"{t:g}") for t in (0.2, 0.3, 0.5, 1, 2, 3, 4, 6, 10) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]))
    axes.minorticks_off()
    axes.set_xlabel(f"million {a.unit}s seen")
    axes.set_ylabel(f"loss, nats a {a.unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(a.out, dpi=110)


if __name__ == "__main__":
    main()
