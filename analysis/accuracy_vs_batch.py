"""Does ConAdv keep its accuracy at large batch, at equal epochs, updates, arithmetic, and depth and devices?

Regime: digits (898 training, 899 test images), a six-conv network with batch norm, SGD with momentum, cosine, weights
(½, ½), ε = 0.1, 16 epochs unless the arm says otherwise. ConAdv's attack and training run serially here: nothing below
is about time. Each cell has its own learning rate out of (0.05, 0.1, 0.2, 0.4, 0.8), chosen with 3 runs per rate on
validation folds of the training set, with the same budget for all. The 10 reported seeds (3 at batches below 336) are
not used for tuning. ε comes from earlier trials on the test images, which favours the methods that use it. Intervals:
Student's t at 95 % over seeds, differences seed by seed.

    python -m analysis.accuracy_vs_batch --scale full       about an hour on one core; figure and table: --from-results

CIFAR-10 with ResNet-18: not measured; `python -m analysis.cifar` runs it.
"""

import sys
from typing import TYPE_CHECKING, Any

from analysis import batches
from analysis.estimates import Estimate, cell_mean, difference, ratio
from analysis.study import Options, Study
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("test_accuracy", "train_test_gap", "top_eigenvalue", "gradient_evaluations")
ARMS = {
    "equal-epochs": "equal epochs",
    "equal-steps": "equal cost and steps",
    "equal-updates": "equal updates (56 steps)",
}


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    return batches.measure(given, lambda cell: True, COLUMNS)


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.intervals import over_seeds
    from conadv_lab.plots import differences, figure_against_batch

    figure = plt.figure(figsize=(13, 8.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    upper, lower = parts
    for ax, (arm, title) in zip(upper.subplots(1, 3, sharey=True), ARMS.items(), strict=True):
        ax.set_title(title)
        if not (rows["arm"] == arm).any():
            ax.set_xlabel("not measured")
            continue
        own = over_seeds(rows[rows["arm"] == arm], "test_accuracy")
        figure_against_batch(own, "test_accuracy", "test accuracy (%)", spread="interval", ax=ax)
        ax.xaxis.label.set_size("small")
        ax.legend(frameon=False, fontsize="small", ncols=2)
    left, right = lower.subplots(1, 2)
    names = batches.labels(rows)
    for ax, compare, what, label in (
        (left, difference, "test_accuracy", "difference of test accuracy (points)"),
        (right, ratio, "top_eigenvalue", "ratio of top eigenvalues λ"),
    ):
        found = batches.comparisons(rows, compare, what)
        shown = {names[name]: estimate for name, estimate in found.items()}
        differences(shown, label, neutral=1.0 if compare is ratio else 0.0, log=compare is ratio, ax=ax)
    right.set_yticklabels([])
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``NAME`` differences of accuracy, ``NAME_eig`` ratios of top eigenvalues, and the tables of the documents."""
    accuracy = batches.comparisons(rows, difference, "test_accuracy")
    flatness = batches.comparisons(rows, ratio, "top_eigenvalue")
    found: dict[str, Any] = accuracy | {f"{name}_eig": estimate for name, estimate in flatness.items()}
    found["table"] = _table(rows)
    found["comparisons"] = markdown(["digits", *COMPARED], compared(rows, accuracy, flatness))
    return found


def _table(rows: "pd.DataFrame") -> str:
    """Accuracy of every method by batch, at equal epochs and at equal cost, as Markdown."""
    sizes = sorted(rows.loc[rows["arm"] == "equal-epochs", "global_batch"].unique())
    lines = []
    for arm in ("equal-epochs", "equal-steps"):
        own = rows[rows["arm"] == arm]
        for method in own["method"].unique():
            if (arm, method) == ("equal-steps", "vanilla"):
                continue
            lines.append([method, *(_cell(own, {"method": method, "global_batch": size}) for size in sizes)])
    largest = _cell(rows, {"arm": "equal-arithmetic", "method": "vanilla"})
    lines.append(["vanilla, 8/3 of the steps", *[""] * (len(sizes) - 1), largest])
    return markdown(["test accuracy (%)", *(f"batch {size}" for size in sizes)], lines)


def _cell(rows: "pd.DataFrame", cell: dict[str, Any]) -> str:
    try:
        return str(cell_mean(rows, cell, "test_accuracy"))
    except ValueError:
        return "not measured"


COMPARED = ("test accuracy (points)", "top eigenvalue λ, ratio", "n")


def compared(
    rows: "pd.DataFrame", accuracy: dict[str, Estimate], flatness: dict[str, Estimate]
) -> list[list[Any]]:
    """Each comparison's label and its figures as in `COMPARED`."""
    return [
        [label, accuracy[name], flatness[name], accuracy[name].n]
        for name, label in batches.labels(rows).items()
        if name in accuracy
    ]


CONCLUSION = """\
With the whole training set as one batch, at equal epochs, ConAdv beats vanilla by {conadv_vanilla} points and the
control copy by {conadv_copy}; it is level with DisAdv ({conadv_disadv}), and its lead over the control noise
({conadv_noise}) is not clear. If the attack runs on extra devices, ConAdv stays slightly ahead of vanilla at 8/3 of
the batch ({depth}), but if vanilla spends the attack's arithmetic on more steps instead, ConAdv falls behind
({arithmetic}). The recycled methods fall behind in sixteen steps: recycled ConAdv differs from ConAdv by
{recycled_conadv}, and recycled-equal from vanilla, at the same cost, by {requal_vanilla}; in 56 steps the latter
difference is {updates_requal}, not clear either way."""
CLAIMS: dict[str, Any] = {
    "ConAdv is ahead of vanilla and copy": lambda n: n["conadv_vanilla"].above and n["conadv_copy"].above,
    "ConAdv is level with DisAdv": lambda n: n["conadv_disadv"].open,
    "ConAdv's lead over noise is not clear": lambda n: n["conadv_noise"].value > 0 and n["conadv_noise"].open,
    "with devices of its own ConAdv is ahead": lambda n: n["depth"].above,
    "at equal arithmetic vanilla is ahead": lambda n: n["arithmetic"].below,
    "in 56 steps recycled-equal is level with vanilla": lambda n: n["updates_requal"].open,
    "the recycled forms lose": lambda n: n["recycled_conadv"].below and n["requal_vanilla"].below,
}

STUDY = Study("accuracy_vs_batch", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
