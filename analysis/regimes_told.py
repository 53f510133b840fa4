"""What the map of regimes shows: ConAdv's lead over vanilla in every cell, as a figure, as numbers and in words."""

from typing import TYPE_CHECKING, Any

from analysis.arms import ATTACK_COST
from analysis.estimates import Estimate, cell_mean, difference, rows_of
from analysis.regime_cells import MAP
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

READINGS = {"epochs": "equal epochs", "arithmetic": "equal arithmetic", "depth": "equal depth"}
NONE = "not measured"
TOO_LARGE = "beyond the set"
"""Shown for equal depth where vanilla's batch would be larger than the training set."""
COLOURS = {"ahead": "#8ec9e8", "behind": "#f3b27a", "not clear": "#e4e4e4", NONE: "#ffffff"}
"""Light tints of Okabe and Ito's blue and vermilion, so that black text stays readable."""


def places(rows: "pd.DataFrame") -> list[tuple[int, float]]:
    """Every (global batch, epochs) of the map that these rows belong to."""
    scales = [MAP[name] for name in rows["scale"].unique()]
    return [(batch, epochs) for scale in scales for epochs in scale.epochs for batch in scale.batches]


def lead(
    rows: "pd.DataFrame",
    place: tuple[int, float],
    method: str = "conadv",
    equal: str = "epochs",
    figure: str = "test_accuracy",
) -> Estimate | None:
    """A method's value minus vanilla's in one comparison, seed by seed; None if either is missing."""
    here = {"global_batch": place[0], "epochs": place[1]}
    own, other = here | {"method": method, "equal": "epochs"}, here | {"method": "vanilla", "equal": equal}
    try:
        return difference(rows, own, other, figure)
    except ValueError:
        return None


def said(rows: "pd.DataFrame", place: tuple[int, float], equal: str) -> str:
    """ConAdv's lead in one comparison, or why there is none."""
    found = lead(rows, place, equal=equal)
    if found is not None:
        return str(found) if found.n > 1 else f"{found} (one seed)"
    too_large = equal == "depth" and place[0] * ATTACK_COST > MAP[rows["scale"].iloc[0]].images
    return TOO_LARGE if too_large else NONE


def standing(found: Estimate | None) -> str:
    """Whether a lead is clear: its whole interval on one side of zero."""
    if found is None:
        return NONE
    return "ahead" if found.above else "behind" if found.below else "not clear"


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    shown = [equal for equal in READINGS if any(lead(rows, place, equal=equal) for place in places(rows))]
    columns = max(len(shown), 1)
    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(max(3.6 * columns + 0.6, 7), 3.1),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, equal in zip(axes.flat, shown, strict=False):
        _panel(ax, rows, equal)
        ax.set_title(READINGS[equal], fontsize="medium")
    axes[0, 0].set_ylabel("epochs")
    figure.suptitle(
        "ConAdv − best-tuned vanilla: test accuracy (points, 95 % t interval over seeds)", fontsize="medium"
    )
    words = {"ahead": "ConAdv ahead", "behind": "ConAdv behind", "not clear": "not clear", NONE: NONE}
    marks = [Patch(facecolor=COLOURS[key], edgecolor="#777777", label=label) for key, label in words.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _panel(ax: Any, rows: "pd.DataFrame", equal: str) -> None:
    """The map of one comparison: one square per cell, coloured by where the interval lies, with its numbers."""
    batches, lengths = (sorted({place[i] for place in places(rows)}) for i in (0, 1))
    for place in places(rows):
        found = lead(rows, place, equal=equal)
        x, y = batches.index(place[0]), lengths.index(place[1])
        ax.fill(
            [x, x + 1, x + 1, x],
            [y, y, y + 1, y + 1],
            facecolor=COLOURS[standing(found)],
            edgecolor="#777777",
        )
        text = said(rows, place, equal).replace(" (", "\n(")
        ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize="small")
    ax.set_xticks([i + 0.5 for i in range(len(batches))], [f"{batch:,}" for batch in batches])
    ax.set_yticks([i + 0.5 for i in range(len(lengths))], [f"{length:g}" for length in lengths])
    ax.set(xlabel="global batch (images)", xlim=(0, len(batches)), ylim=(0, len(lengths)))
    ax.tick_params(length=0)


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """Leads at equal epochs as ``METHOD_BATCH_EPOCHS``, ConAdv's others as ``arithmetic_…``, ``depth_…``; tables."""
    found: dict[str, Any] = {
        "table": _table(rows),
        "others": _others(rows),
        "seeds": int(rows["seed"].nunique()),
    }
    for place in places(rows):
        name = f"{place[0]}_{place[1]:g}"
        leads = {f"{method.replace('-', '_')}_{name}": lead(rows, place, method) for method in _methods(rows)}
        leads |= {f"{equal}_{name}": lead(rows, place, equal=equal) for equal in ("arithmetic", "depth")}
        leads |= {f"gap_{name}": _gap(rows, place), f"fit_{name}": lead(rows, place, figure="train_loss")}
        found |= {key: value for key, value in leads.items() if value is not None}
    for equal in READINGS:
        stand = [standing(lead(rows, place, equal=equal)) for place in places(rows)]
        found |= {f"{equal}_{key.replace(' ', '_')}": stand.count(key) for key in COLOURS}
    return found


def _methods(rows: "pd.DataFrame") -> list[str]:
    return [method for method in rows["method"].unique() if method != "vanilla"]


def _gap(rows: "pd.DataFrame", place: tuple[int, float]) -> Estimate | None:
    """ConAdv's generalisation gap (train − test accuracy) minus vanilla's, at equal epochs."""
    gaps = rows.assign(gap=rows["train_accuracy"] - rows["test_accuracy"])
    return lead(gaps, place, figure="gap")


def _table(rows: "pd.DataFrame") -> str:
    """Markdown: vanilla's and ConAdv's results in every cell, and ConAdv's lead in the three comparisons."""
    heads = ["epochs", "batch", "steps", "vanilla (%)", "ConAdv (%)"]
    heads += [f"ConAdv − vanilla, {reading}" for reading in READINGS.values()]
    heads += ["training loss, vanilla", "training loss, ConAdv", "train − test accuracy, ConAdv − vanilla"]
    lines = []
    for place in places(rows):
        batch, epochs = place
        of = [
            {"global_batch": batch, "epochs": epochs, "equal": "epochs", "method": m}
            for m in ("vanilla", "conadv")
        ]
        figures: list[Any] = [_mean(rows, cell, "test_accuracy") for cell in of]
        figures += [said(rows, place, equal) for equal in READINGS]
        figures += [_mean(rows, cell, "train_loss") for cell in of] + [_gap(rows, place) or NONE]
        steps = round(epochs * MAP[rows["scale"].iloc[0]].images / batch)
        lines.append([f"{epochs:g}", f"{batch:,}", steps, *figures])
    return markdown(heads, lines)


def _others(rows: "pd.DataFrame") -> str:
    """Markdown: the other methods' leads over vanilla at equal epochs."""
    methods = [method for method in _methods(rows) if method != "conadv"]
    if not methods:
        return NONE
    heads = ["epochs", "batch", *(f"{method} − vanilla" for method in methods)]
    lines = []
    for batch, epochs in places(rows):
        leads = [lead(rows, (batch, epochs), method) or NONE for method in methods]
        lines.append([f"{epochs:g}", f"{batch:,}", *leads])
    return markdown(heads, lines)


def _mean(rows: "pd.DataFrame", cell: dict[str, Any], figure: str) -> str:
    try:
        rows_of(rows, **cell)
    except ValueError:
        return NONE
    return str(cell_mean(rows, cell, figure))


PLACES = [f"{batch}_{epochs}" for epochs in (6, 24) for batch in (80, 320, 1_280)]
CONCLUSION = """\
On this part of CIFAR-10 (JPEG) tuned ConAdv is clearly ahead of tuned vanilla in none of the six cells; at equal
epochs it is clearly behind in four, with differences from {conadv_320_6} points at batch 320 after 6 epochs to
{conadv_320_24} at the same batch after 24. At equal arithmetic it is clearly behind in every cell but batch 80
after 24 epochs ({arithmetic_80_24}), at worst with {arithmetic_320_6}; at equal depth it is clearly behind after 6
epochs ({depth_80_6} and {depth_320_6}) but not after 24 ({depth_80_24} and {depth_320_24}). Except at batch 80
after 24 epochs, its training loss is higher (at the largest batch by {fit_1280_24} after 24 epochs), and in four
cells its gap between training and test accuracy is clearly smaller: it overfits less, but it also fits less well,
and is no more accurate for it."""
CLAIMS: dict[str, Any] = {
    "it is clearly ahead nowhere": lambda n: (
        n["epochs_ahead"] == n["arithmetic_ahead"] == n["depth_ahead"] == 0
    ),
    "at equal epochs four of six cells are behind": lambda n: (
        (n["epochs_behind"], n["epochs_not_clear"]) == (4, 2)
    ),
    "the clear ones lie between the two at batch 320": lambda n: all(
        n["conadv_320_6"].value <= n[f"conadv_{place}"].value <= n["conadv_320_24"].value for place in PLACES
    ),
    "at equal arithmetic it is behind in all but batch 80 after 24 epochs": lambda n: all(
        n[f"arithmetic_{place}"].open if place == "80_24" else n[f"arithmetic_{place}"].below
        for place in PLACES
    ),
    "it is furthest behind at batch 320 after 6 epochs": lambda n: (
        min(PLACES, key=lambda place: n[f"arithmetic_{place}"].value) == "320_6"
    ),
    "at equal depth it is behind after 6 epochs and not after 24": lambda n: (
        n["depth_80_6"].below and n["depth_320_6"].below and n["depth_80_24"].open and n["depth_320_24"].open
    ),
    "but for batch 80 after 24 epochs its training loss is higher": lambda n: all(
        n[f"fit_{place}"].above for place in PLACES if place != "80_24"
    ),
    "at batch 80 after 24 epochs the opposite": lambda n: n["fit_80_24"].below,
    "recycled ConAdv is clearly behind in two cells, the control with noise in none": lambda n: (
        [sum(n[f"{method}_{place}"].below for place in PLACES) for method in ("recycled", "noise")] == [2, 0]
    ),
    "the gap is clearly smaller in four cells": lambda n: (
        sum(n[f"gap_{place}"].below for place in PLACES) == 4
    ),
}
