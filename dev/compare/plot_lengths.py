#!/usr/bin/env python3
"""Time a step against sequence length, from what `build/cuda/bench lengths` printed:  plot_lengths.py OUT.png TABLE   (needs matplotlib)"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    curves = {}
    for line in open(sys.argv[2]):
        cells = [c.strip() for c in line.split("|")]
        if len(cells) > 7 and cells[4].isdigit():
            curves.setdefault(cells[2], []).append((int(cells[4]), float(cells[6].split()[0])))
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), "o-", label=name, linewidth=1.4, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({T for points in curves.values() for T, _ in points})
    axes.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
    ticks = [t for t in (100, 200, 300, 500, 1000, 2000, 3000, 5000) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens a sequence")
    axes.set_ylabel("ms a step of 131072 tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
