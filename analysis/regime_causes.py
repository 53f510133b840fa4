"""Why does ConAdv pay or not? Flatness, noise, stale signs, and slices in ε and τ, at the cells of the map.

The runs are those of `analysis.regimes`, with the settings that its tuning chose, vanilla and ConAdv at equal epochs.
Flatness is that of the training loss on the first 256 images, without augmentation, batch norm re-estimated: the top
eigenvalue λ (raw), the worst rise within ‖d/|w|‖₂ ≤ 1 (adaptive), and the same for normalised logits. The gradient
noise scale (McCandlish et al. 2018) is that of the training loss on all images at the end, from groups of 32.

ConAdv runs once more with a dozen probes: the pending attack is compared with a fresh one on the same images, with
the weights of that step. Reported are the share of equal signs and the gain ratio
[L(x̂ stale) − L(x)] / [L(x̂ fresh) − L(x)]. At the middle batch and the longer length, ε and τ each take other values,
with everything else as tuned; nothing is tuned again, so other values of ε are at a disadvantage.

    python -m analysis.regimes --scale small --data-dir DIR           first: the runs and their settings
    python -m analysis.regime_causes --scale small --data-dir DIR     half an hour on one core; goes on where it was
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.estimates import Estimate, cell_mean, difference, ratio
from analysis.measuring import MEASURES, flatness, noise_scale, trained
from analysis.regime_cells import FIRST, MAP, Cell
from analysis.regimes import Search, figures_in
from analysis.regimes_told import PLACES
from analysis.staleness import with_probes
from analysis.study import Figures, Mapped, Options, Study, commits_of, run_all
from conadv_lab.config import Config
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

NAME = "regime_causes"
PROBES = 12
FLAT = tuple(name for name in MEASURES if name != "trace")
"""The trace takes hundreds of products on a smooth network."""
EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""As multiples of the tuned ε."""
TAUS = (0, 1, 2, 4, 8)
EXAMINED = ("test_accuracy", "train_accuracy", "train_loss", *FLAT, "noise_scale")
STALE = ("sign_agreement", "gain_ratio")


def examined(config: Config, path: Path) -> Figures:
    """The run's final metrics, its flatness and its noise scale; it is trained if it is not there."""
    return trained(config, path) | flatness(path, FLAT) | {"noise_scale": noise_scale(path)}


def probed(config: Config, path: Path) -> Figures:
    return with_probes(config, path, max(1, (config.training.steps or 0) // PROBES))


def chosen(given: Options) -> dict[Cell, list[Config]]:
    """The runs of vanilla's and ConAdv's cells, as far as the map is tuned."""
    scale, known = MAP[given.scale], figures_in(given.runs)
    places = [(batch, epochs) for epochs in scale.epochs for batch in scale.batches]
    cells = [Cell(scale, method, *place, "epochs", given.data_dir) for place in places for method in FIRST]
    best = {cell: Search(cell, known).best for cell in cells}
    tuned = {
        cell: [cell.config(one, seed) for seed in range(scale.seeds)] for cell, one in best.items() if one
    }
    if not tuned:
        first = f"python -m analysis.regimes --scale {given.scale}"
        raise ValueError(f"--runs {given.runs} holds no tuned cell; allowed: the folder of `{first}`")
    return tuned


def slices(tuned: dict[Cell, list[Config]]) -> dict[tuple[str, float, Cell], list[Config]]:
    """ConAdv's runs at other ε (in multiples of the tuned one) and τ, at the middle batch and the longest length."""
    scale = next(iter(tuned)).scale
    place = (scale.batches[len(scale.batches) // 2], scale.epochs[-1])
    found: dict[tuple[str, float, Cell], list[Config]] = {}
    for cell, runs in tuned.items():
        if cell.method == "conadv" and (cell.global_batch, cell.epochs) == place:
            for times in EPSILONS:
                found["epsilon", times, cell] = [c.replace(epsilon=times * c.method.epsilon) for c in runs]
            for tau in TAUS:
                found["tau", tau, cell] = [c.replace(staleness=tau) for c in runs]
    return found


def measure(given: Options) -> tuple["pd.DataFrame", Figures]:
    import pandas as pd

    tuned = chosen(given)
    sliced = slices(tuned)
    own = [run for runs in tuned.values() for run in runs]
    attacked = [run for cell, runs in tuned.items() for run in runs if cell.method == "conadv"]
    attacked += [run for runs in sliced.values() for run in runs]
    apart = replace(given, runs=given.runs / "probed")
    seen = run_all(own, given, examined, "examined.json")
    probes = run_all(attacked, apart, probed, "probes.json")
    rows = [
        _row("cell", None, cell, run)
        | {name: seen[run][name] for name in EXAMINED}
        | {name: probes[run][name] for name in STALE if run in probes}
        for cell, runs in tuned.items() for run in runs if run in seen
    ]  # fmt: skip
    rows += [
        _row(part, value, cell, run) | {name: probes[run][name] for name in ("test_accuracy", "train_loss", *STALE)}
        for (part, value, cell), runs in sliced.items() for run in runs if run in probes
    ]  # fmt: skip
    commits = {*commits_of(own, given.runs).split(", "), *commits_of(attacked, apart.runs).split(", ")}
    return pd.DataFrame(rows), {
        "command": f"python -m analysis.{NAME} --scale {given.scale} --data-dir DIR",
        "commit": ", ".join(sorted(commits - {""})),
    }


def _row(part: str, value: float | None, cell: Cell, run: Config) -> dict[str, Any]:
    place = {"method": cell.method, "global_batch": cell.global_batch, "epochs": cell.epochs}
    return {"part": part, "value": value, **place, "seed": run.training.seed}


def lead(rows: "pd.DataFrame", batch: int, epochs: float, metric: str) -> Estimate:
    """ConAdv's metric against vanilla's, seed by seed: a ratio for flatness, else a difference."""
    one, other = (
        {"part": "cell", "method": m, "global_batch": batch, "epochs": epochs} for m in reversed(FIRST)
    )
    return (ratio if metric in FLAT else difference)(rows, one, other, metric)


def places(rows: "pd.DataFrame") -> list[tuple[int, float]]:
    cells = rows[rows["part"] == "cell"]
    return list(dict.fromkeys(zip(cells["global_batch"], cells["epochs"], strict=True)))


PANELS = (
    ("test_accuracy", "test accuracy, ConAdv − vanilla (points)"),
    ("top_eigenvalue", "top eigenvalue λ, ConAdv / vanilla"),
    ("adaptive_worst", "adaptive worst rise, ConAdv / vanilla"),
    ("adaptive_worst_logit_normalised", "the same, normalised logits"),
)


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.plots import differences, points

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for ax, (metric, label) in zip(axes[0], PANELS, strict=True):
        shown = {f"batch {b:,}, {e:g} epochs": lead(rows, b, e, metric) for b, e in places(rows)}
        flat = metric in FLAT
        differences(shown, label, neutral=1.0 if flat else 0.0, log=flat, ax=ax)
        if ax is not axes[0, 0]:
            ax.set_yticklabels([])
    cells = rows[rows["part"] == "cell"].assign(length=lambda r: r["epochs"].map("{:g} epochs".format))
    attacked = cells[cells["method"] == "conadv"]
    ax = axes[1, 0]
    points(attacked, "global_batch", "sign_agreement", "batch", "signs equal to a fresh attack's (share)",
           hue="length", ax=ax)  # fmt: skip
    points(attacked, "global_batch", "gain_ratio", "batch", "loss gain, stale over fresh attack", hue="length",
           ax=axes[1, 1])  # fmt: skip
    sliced = rows.assign(value=rows["value"].map("{:g}".format))
    for ax, part, label in (
        (axes[1, 2], "epsilon", "ε over the tuned ε"),
        (axes[1, 3], "tau", "staleness τ (steps)"),
    ):
        points(sliced[sliced["part"] == part], "value", "test_accuracy", label, "test accuracy (%)", ax=ax)
    for ax in axes.flat:
        ax.xaxis.label.set_fontsize("small")
        ax.yaxis.label.set_fontsize("small")
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``METRIC_BATCH_EPOCHS`` against vanilla, ``agreement_``, ``gain_``, ``noise_METHOD_``; slices."""
    found: dict[str, Any] = {"table": _table(rows), "slices": _slices(rows)}
    for batch, epochs in places(rows):
        key, cell = f"{batch}_{epochs:g}", {"part": "cell", "global_batch": batch, "epochs": epochs}
        for metric in (*(name for name, _ in PANELS), "train_loss"):
            found[f"{metric}_{key}"] = lead(rows, batch, epochs, metric)
        for short, metric in (("agreement", "sign_agreement"), ("gain", "gain_ratio")):
            found[f"{short}_{key}"] = cell_mean(rows, cell | {"method": "conadv"}, metric)
        for method in FIRST:
            found[f"noise_{method}_{key}"] = _noise(rows, cell | {"method": method})
    for part in ("epsilon", "tau"):
        for value in sorted(rows.loc[rows["part"] == part, "value"].unique()):
            one, tuned = ({"part": part, "value": v} for v in (value, 1.0))
            key = f"{part}_{value:g}".replace(".", "_")
            found[key] = difference(rows, one, tuned, "test_accuracy")
            found[f"agreement_{key}"] = cell_mean(rows, one, "sign_agreement")
    return found


def _noise(rows: "pd.DataFrame", cell: dict[str, Any]) -> str:
    """A noise scale, unless its interval reaches below zero: close to a minimum the gradient is too small to tell."""
    found = cell_mean(rows, cell, "noise_scale", decimals=0)
    return str(found) if found.above else "not resolved"


def _table(rows: "pd.DataFrame") -> str:
    heads = [
        "epochs",
        "batch",
        *(label for _, label in PANELS),
        "noise scale, vanilla",
        "noise scale, ConAdv",
    ]
    heads += ["signs equal to a fresh attack's", "loss gain, stale over fresh"]
    lines = []
    for batch, epochs in places(rows):
        cell = {"part": "cell", "global_batch": batch, "epochs": epochs}
        cells = [f"{epochs:g}", f"{batch:,}", *(lead(rows, batch, epochs, metric) for metric, _ in PANELS)]
        cells += [_noise(rows, cell | {"method": method}) for method in FIRST]
        lines.append(cells + [cell_mean(rows, cell | {"method": "conadv"}, metric) for metric in STALE])
    return markdown(heads, lines)


def _slices(rows: "pd.DataFrame") -> str:
    heads = ["changed", "to", "test accuracy (%)", "training loss", "signs equal"]
    lines = []
    for part, label in (("epsilon", "ε / tuned ε"), ("tau", "τ (steps)")):
        for value in sorted(rows.loc[rows["part"] == part, "value"].unique()):
            cell = {"part": part, "value": value}
            cells = [cell_mean(rows, cell, metric) for metric in ("test_accuracy", "train_loss", *STALE)]
            lines.append([label, f"{value:g}", *cells])
    return markdown([*heads, "loss gain, stale over fresh"], lines)


CONCLUSION = """\
A flatter solution is not a more accurate one: at batch 320 after 6 epochs, and at batches 80 and 1,280 after 24,
ConAdv's top eigenvalue is clearly lower, at {top_eigenvalue_320_6}, {top_eigenvalue_80_24} and
{top_eigenvalue_1280_24} times vanilla's, while its accuracy differs by {test_accuracy_320_6}, {test_accuracy_80_24}
and {test_accuracy_1280_24} points, and in no cell is any of the three flatness measures clearly higher. The
attack's strength matters more than its age: at batch 320 after 24 epochs, halving the tuned ε changes accuracy by
{epsilon_0_5} points and quadrupling it by {epsilon_4}, while no τ from 0 to 8 makes a clear difference ({tau_0} at
τ = 0, {tau_8} at τ = 8, where only {agreement_tau_8} of the signs agree with a fresh attack's). One step of
staleness changes more signs where steps are few and large: the share that still agrees is {agreement_80_24} at
batch 80 after 24 epochs, {agreement_1280_24} at batch 1,280, and {agreement_1280_6} at batch 1,280 after only 6."""
CLAIMS: dict[str, Any] = {
    "the eigenvalue is lower in these three cells": lambda n: all(
        n[f"top_eigenvalue_{place}"].below for place in ("320_6", "80_24", "1280_24")
    ),
    "the accuracy is not clearly higher there": lambda n: all(
        not n[f"test_accuracy_{place}"].above for place in ("320_6", "80_24", "1280_24")
    ),
    "no measure is clearly higher in any cell": lambda n: (
        not any(n[f"{metric}_{place}"].above for metric, _ in PANELS[1:] for place in PLACES)
    ),
    "half the ε is better, four times as much is worse": lambda n: (
        n["epsilon_0_5"].above and n["epsilon_4"].below
    ),
    "no τ makes a clear difference": lambda n: all(n[f"tau_{tau}"].open for tau in TAUS if tau != 1),
    "signs agree less with a larger batch, and less after fewer steps": lambda n: (
        n["agreement_80_24"].low > n["agreement_1280_24"].high
        and n["agreement_1280_24"].value > n["agreement_1280_6"].value
    ),
}

STUDY = Study(NAME, __doc__, measure, draw, numbers, CONCLUSION, CLAIMS, Mapped, "small")

if __name__ == "__main__":
    sys.exit(STUDY.main())
