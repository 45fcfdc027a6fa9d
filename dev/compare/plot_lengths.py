#!/usr/bin/env python3
"""Time against length, from what `build/cuda/bench lengths` (a training step) or `build/cuda/bench decode` (a token of one text) printed:

plot_lengths.py OUT.png TABLE   (needs matplotlib)"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    curves, decode, columns = {}, False, {}
    for line in open(sys.argv[2]):
        cells = [c.strip() for c in line.split("|")]
        if "attention" in cells:  # the head of a table
            columns = {name.split(" [")[0]: i for i, name in enumerate(cells)}
            decode = decode or "tokens behind" in columns
        if len(cells) < 8 or not cells[4].isdigit() or "ms a step" not in columns:
            continue
        if decode and (cells[columns["texts"]] != "1" or cells[columns["model"]] != "gpt2-124M" or int(cells[columns["tokens behind"]]) < 1024):
            continue
        x = cells[columns["tokens behind" if decode else "T"]]
        curves.setdefault(cells[columns["attention"]], []).append((int(x), float(cells[columns["ms a step"]].split()[0])))
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), "o-", label=name, linewidth=1.4, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({T for points in curves.values() for T, _ in points})
    axes.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
    ticks = [t for t in (0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 100, 200, 300, 500, 1000, 2000, 3000, 5000) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens behind the one being written" if decode else "tokens a sequence")
    axes.set_ylabel("ms a token" if decode else "ms a step of 131072 tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
