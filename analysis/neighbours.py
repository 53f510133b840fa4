"""Which of ConAdv's neighbours gains most for its cost, among those that perturb images or weights?

Regime: digits, the six-conv network, SGD at batch 256. Two arms: ``equal-epochs``, 56 steps of every method (for
free-at, whose steps repeat their images, 56 updates); and ``equal-arithmetic``, as many steps as 149 of vanilla cost,
which are ConAdv's 56. One budget for all: nine trials on two validation folds, three learning rates times three radii
of the method's own (ρ, ε, or the extrapolation), or nine learning rates where there is no radius. Everything else is at
the method's default. The default ε comes from trials on these images, so that input space starts ahead; controls and
equal-cost forms are in `accuracy_vs_batch`.

    python -m analysis.neighbours --scale full       about an hour on one core
    python -m benchmarks.step --models digits-cnn --threads 1 --methods … --json analysis/results/neighbours_step.json

Figure: accuracy against cost. The second command times a step of every method in turn with vanilla's, on a quiet
machine; times of the study's own runs would be those of a busy one.
"""

import json
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from analysis.arms import ATTACK_COST, Cell
from analysis.estimates import Estimate, cell_mean, difference
from analysis.measuring import attempted, measured
from analysis.study import RESULTS, Figures, Options, Study, run_all
from conadv_lab.config import Config
from conadv_lab.displays import markdown
from conadv_lab.methods import METHODS, method_of

if TYPE_CHECKING:
    import pandas as pd

BATCH, STEPS = 256, 56
LEFT_OUT = ("copy", "noise", "copy-equal", "noise-equal", "recycled-equal")
SHOWN = tuple(name for name in METHODS if name not in LEFT_OUT)
RADII = {"rho": (1 / 3, 1, 3), "extrapolation": (0.5, 1, 2), "epsilon": (0.5, 1, 2)}
"""Multiples of the default; a method has the first of these options that it reads."""
COLUMNS = (
    "test_accuracy",
    "train_test_gap",
    "top_eigenvalue",
    "adaptive_worst",
    "gradient_evaluations",
    "depth",
)


@dataclass(frozen=True)
class Scale:
    """The size of the study."""

    methods: tuple[str, ...]
    steps: int
    rates: tuple[float, ...]
    folds: tuple[int, ...]
    seeds: int


FEW = ("vanilla", "conadv", "msam", "sam", "late-sam")
SCALES = {
    "smoke": Scale(FEW[:3], 3, (0.2,), (100,), 2),
    "small": Scale(FEW, 28, (0.1, 0.2, 0.4), (100,), 3),
    "full": Scale(SHOWN, STEPS, (0.1, 0.2, 0.4), (100, 101), 10),
}


@dataclass(frozen=True)
class Trial:
    """One setting of a method: a learning rate and a radius, None if the method has none."""

    lr: float
    option: str = ""
    radius: float | None = None

    @property
    def changes(self) -> dict[str, float]:
        return {} if self.radius is None else {self.option: self.radius}


def trials(method: str, rates: tuple[float, ...]) -> list[Trial]:
    """The same number for every method: rates times three radii, or three times as many rates."""
    own = {field.name for part in METHODS[method].reads for field in fields(part)}
    option = next((name for name in RADII if name in own), None)
    if option is None:
        return [Trial(rate * factor) for rate in rates for factor in (2 ** (-1 / 3), 1, 2 ** (1 / 3))]
    default = default_of(method, option)
    return [Trial(rate, option, default * factor) for rate in rates for factor in RADII[option]]


def default_of(method: str, option: str) -> float:
    """The option's default in the study's recipe."""
    from conadv_lab.config import resolved

    return getattr(resolved(Cell("", method, BATCH, STEPS).config(0.1, 0)).method, option)


def cells(scale: Scale) -> list[Cell]:
    """Every method in both arms."""
    planned = []
    for method in scale.methods:
        cost = method_of(Cell("", method, BATCH, scale.steps).config(0.1, 0)).gradient_evaluations
        planned += [
            Cell("equal-epochs", method, BATCH, scale.steps),
            Cell("equal-arithmetic", method, BATCH, max(2, round(ATTACK_COST * scale.steps / cost))),
        ]
    return planned


def tuned(given: Options) -> dict[Cell, Trial]:
    """Each cell's trial with the highest validation accuracy; ties go to the lower loss."""
    scale = SCALES[given.scale]
    configs = {
        (cell, trial, fold): cell.tuning(trial.lr, fold).replace(**trial.changes)
        for cell in cells(scale) for trial in trials(cell.method, scale.rates) for fold in scale.folds
    }  # fmt: skip
    found = run_all(configs.values(), given, attempted)

    def judged(cell: Cell, trial: Trial) -> tuple[float, float]:
        runs: list[Figures] = [found[configs[cell, trial, fold]] for fold in scale.folds]
        return sum(-run["test_accuracy"] for run in runs), sum(run["test_loss"] for run in runs)

    best = {}
    for cell in cells(scale):
        own = trials(cell.method, scale.rates)
        if all(configs[cell, trial, fold] in found for trial in own for fold in scale.folds):
            best[cell] = min(own, key=lambda trial: judged(cell, trial))
    return best


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    import pandas as pd

    best = tuned(given)
    planned: dict[tuple[Cell, int], Config] = {
        (cell, seed): cell.config(trial.lr, seed).replace(**trial.changes)
        for seed in range(SCALES[given.scale].seeds) for cell, trial in best.items()
    }  # fmt: skip
    found = run_all(planned.values(), given, measured)
    rows = [
        {
            "method": cell.method, "arm": cell.arm, "seed": seed, "steps": cell.steps,
            "lr": best[cell].lr, "option": best[cell].option, "radius": best[cell].radius,
            **{name: found[config][name] for name in COLUMNS},
        }
        for (cell, seed), config in planned.items()
        if config in found
    ]  # fmt: skip
    seconds = sum(figures["seconds"] for figures in found.values())
    return pd.DataFrame(rows), {"runs": len(found), "run_seconds": round(seconds)}


def _places(rows: "pd.DataFrame") -> dict[str, float]:
    """Each method's x position: its cost, shifted slightly where points would overlap."""
    costs = rows[rows["arm"] == "equal-epochs"].groupby("method", sort=False)["gradient_evaluations"].first()
    places = {}
    for near in (1, 1.5, 2, 2.5, 4.5, 5):
        own = costs[(costs >= near) & (costs < near + 0.5)].sort_values(kind="stable")
        for number, (method, cost) in enumerate(own.items()):
            places[str(method)] = cost + 0.06 * (number - (len(own) - 1) / 2)
    return {method: places[method] for method in costs.index}


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.intervals import t_interval
    from conadv_lab.plots import look_of

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    places = _places(rows)
    for ax, arm in zip(axes, ("equal-epochs", "equal-arithmetic"), strict=True):
        for method, place in places.items():
            own = rows[(rows["arm"] == arm) & (rows["method"] == method)]
            middle, (low, high) = own["test_accuracy"].mean(), t_interval(own["test_accuracy"])
            spread = [[middle - low], [high - middle]]
            ax.errorbar(place, middle, yerr=spread, capsize=2.5, linestyle="none", **look_of(method))
        ax.set_xlabel("gradient evaluations of a step (equal ones side by side)")
        ax.set_title(arm.replace("-", " "))
        ax.grid(axis="y", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize="small")
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``METHOD_ARM`` differences of accuracy from vanilla in the same arm, the best of each arm, and a table."""
    found: dict[str, Any] = {
        "table": _table(rows),
        "seeds": int(rows.groupby(["method", "arm"]).size().min()),
    }
    for arm in ("equal-epochs", "equal-arithmetic"):
        short = arm.rpartition("-")[2]
        against = {"method": "vanilla", "arm": arm}
        leads: dict[str, Estimate] = {
            method: difference(rows, {"method": method, "arm": arm}, against, "test_accuracy")
            for method in rows["method"].unique()
            if method != "vanilla"
        }
        found |= {f"{method}_{short}".replace("-", "_"): lead for method, lead in leads.items()}
        found[f"clear_{short}"] = [method for method, lead in leads.items() if lead.low > 0]
        found[f"behind_{short}"] = [method for method, lead in leads.items() if lead.high < 0]
    fresh, stale = ({"method": name, "arm": "equal-epochs"} for name in ("sam", "asyncsam"))
    for short in ("epochs", "arithmetic"):
        found[f"clear_of_{short}"] = len(found[f"clear_{short}"])
    found["stale_sam"] = difference(rows, stale, fresh, "test_accuracy")
    return found


def step_times() -> dict[str, float]:
    """Each measured method's step time relative to vanilla."""
    file = RESULTS / "neighbours_step.json"
    if not file.exists():
        return {}
    rows = json.loads(file.read_text())["rows"]
    return {"vanilla": 1.0} | {row["name"]: row["ratio"] for row in rows if row["peer"] == "vanilla"}


def _table(rows: "pd.DataFrame") -> str:
    """Every method's results at equal epochs, and its accuracy at equal arithmetic, as Markdown."""
    heads = (
        "digits", "cost", "depth", "test accuracy (%)", "at equal arithmetic", "train − test (points)",
        "top eigenvalue λ", "adaptive worst rise", "lr", "radius", "time of a step, × vanilla",
    )  # fmt: skip
    times = step_times()
    lines = []
    for method in rows["method"].unique():
        cell = {"method": method, "arm": "equal-epochs"}
        own = rows[(rows["method"] == method) & (rows["arm"] == "equal-epochs")]
        radius = own["radius"].iloc[0]
        chosen = "–" if radius != radius else f"{own['option'].iloc[0]} {radius:.3g}"
        lines.append([
            method, f"{own['gradient_evaluations'].iloc[0]:.3g}", f"{own['depth'].iloc[0]:.3g}",
            cell_mean(rows, cell, "test_accuracy"),
            cell_mean(rows, cell | {"arm": "equal-arithmetic"}, "test_accuracy"),
            *(cell_mean(rows, cell, name) for name in COLUMNS[1:4]),
            f"{own['lr'].iloc[0]:.3g}", chosen,
            f"{times[method]:.2f}" if method in times else "not measured",
        ])  # fmt: skip
    return markdown(heads, lines)


CONCLUSION = """\
At equal epochs {clear_of_epochs} of the 18 neighbours beat vanilla clearly, AdvProp by {advprop_epochs} points,
DisAdv by {disadv_epochs}, ConAdv by {conadv_epochs} and SAM by {sam_epochs}; none is clearly behind. At equal
arithmetic {clear_of_arithmetic} still do, all of which perturb images (recycled ConAdv by {recycled_arithmetic} and
with MSAM by {recycled_msam_arithmetic}, DisAdv by {disadv_arithmetic}, FreeAT by {free_at_arithmetic}, FGSM-RS by
{fgsm_rs_arithmetic}, fast AdvProp by {fast_advprop_arithmetic} and ConAdv with SAM by {conadv_sam_arithmetic}),
while the leads of ConAdv ({conadv_arithmetic}) and SAM ({sam_arithmetic}) are no longer clear. A stale ascent
direction costs SAM nothing that ten seeds can show (AsyncSAM − SAM: {stale_sam}), and with 18 comparisons in each
arm the largest lead is likely to be overestimated."""
MOVE_IMAGES = {
    "recycled", "recycled-msam", "disadv", "free-at", "fgsm-rs", "fast-advprop", "conadv-sam",
}  # fmt: skip
CLAIMS: dict[str, Any] = {
    "ten seeds of every method": lambda n: n["seeds"] >= 10,
    "no neighbour is clearly behind vanilla": lambda n: not n["behind_epochs"] and not n["behind_arithmetic"],
    "at equal epochs AdvProp, DisAdv, ConAdv and SAM beat vanilla clearly": lambda n: (
        {"advprop", "disadv", "conadv", "sam"} <= set(n["clear_epochs"])
    ),
    "at equal arithmetic just these, which move images, still do": lambda n: (
        set(n["clear_arithmetic"]) == MOVE_IMAGES
    ),
    "AsyncSAM is not clear of SAM": lambda n: n["stale_sam"].low < 0 < n["stale_sam"].high,
}

STUDY = Study("neighbours", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
