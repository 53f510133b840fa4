"""Draw the README's picture of a step: python -m docs.step_timeline

The step times are measured, with a prototype of captured steps: torchvision's ResNet-50 at 224 pixels, 4 images,
bfloat16, one CUDA graph a step, one NVIDIA H200, torch 2.11 (2026-11-26). Where one pass ends and the next begins
within a step was not measured: DisAdv's attack is drawn as what is left of its step before a pass of vanilla's length.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"clean": "#0072B2", "adversarial": "#D55E00", "attack": "#E69F00"}
VANILLA, DISADV, CONADV = 3.83, 8.43, 5.64
"""Milliseconds a step."""

Pass = tuple[str, str, float, float]
"""Kind, label, start and end in ms."""

STEPS: dict[str, list[Pass]] = {
    "vanilla": [("clean", "train on batch t", 0, VANILLA)],
    "DisAdv": [
        ("clean", "train on batch t", 0, DISADV - VANILLA),
        ("attack", "attack batch t", 0, DISADV - VANILLA),
        ("adversarial", "train on it", DISADV - VANILLA, DISADV),
    ],
    "ConAdv": [
        ("clean", "train on batch t", 0, CONADV),
        ("adversarial", "train on batch t as attacked a step ago", 0, CONADV),
        ("attack", "attack batch t + 1", 0, CONADV),
    ],
}
LANES = {"clean": 0, "adversarial": 1, "attack": 2}


def drawn(axes: Any) -> None:
    """All steps below one another, one lane a CUDA stream."""
    bottom = 0.0
    ticks, names = [], []
    for name, passes in STEPS.items():
        lanes = sorted({LANES[kind] for kind, *_ in passes}) if name != "DisAdv" else [0, 2]
        for kind, label, start, end in passes:
            lane = 1 if (name, kind) == ("DisAdv", "adversarial") else lanes.index(LANES[kind])
            y = bottom + lane
            axes.barh(y, end - start, left=start, height=0.86, color=COLOURS[kind], edgecolor="white")
            dark = kind != "attack"
            axes.text(
                (start + end) / 2,
                y,
                label,
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
            )
        end = max(end for *_, end in passes)
        axes.text(
            end + 0.12,
            bottom + (len(lanes) - 1) / 2,
            f"{end:.2f} ms",
            va="center",
            fontsize=10,
            weight="bold",
        )
        ticks.append(bottom + (len(lanes) - 1) / 2)
        names.append(name)
        bottom += len(lanes) + 0.6
    axes.set_yticks(ticks, names, fontsize=11)
    axes.set_ylim(bottom - 0.9, -0.7)
    axes.set_xlim(0, 9.6)
    axes.set_xlabel("time of one step (ms): ResNet-50, 4 images, one CUDA graph a step, one NVIDIA H200")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    figure, axes = plt.subplots(figsize=(8.4, 3.1), layout="constrained")
    drawn(axes)
    figure.savefig(HERE / "figures" / "step_timeline.png", dpi=160)


if __name__ == "__main__":
    main()
