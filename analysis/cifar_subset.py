"""Does ConAdv help on a part of CIFAR-10 that a CPU can train on, at small and large batch, and at equal cost?

Regime: 4,096 fixed training images of CIFAR-10 (of 50,000) and all 10,000 test images; the fast CPU network of recipe
`cifar10-fast-cpu` with its augmentation, label smoothing and schedule, 10 epochs (40 steps at batch 1,024, 320 at
batch 128), ε = 2/255. Networks end far from convergence, as is usual at large batch. Methods: vanilla, ConAdv, and the
equal-cost forms of recycled ConAdv and of its control, copy; vanilla also with 8/3 of the steps, which the attack's
arithmetic would pay for. Each cell has its own learning rate, 1.5 · √(B/512) times a factor of (½, 1, 2), chosen with
one run per factor on 5,000 other training images; the 3 reported seeds are not used for tuning. Flatness is that of
the training loss on its first 256 images.

    python -m analysis.cifar_subset --scale full --data-dir DIR       finished runs are not repeated

All of CIFAR-10 with ResNet-18 needs a GPU: `python -m analysis.cifar`.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis import batches, folds
from analysis.accuracy_vs_batch import COMPARED, compared
from analysis.arms import ATTACK_COST, Cell
from analysis.estimates import cell_mean, difference, ratio
from analysis.measuring import measured_without_trace, trained
from analysis.study import Archived, Figures, Options, Study, commits_of, run_all
from conadv_lab.config import Config
from conadv_lab.displays import markdown
from conadv_lab.recipes import cifar

if TYPE_CHECKING:
    import pandas as pd

NAME = "cifar_subset"
TUNING_SEED = 100
COLUMNS = (
    "test_accuracy", "train_test_gap", "top_eigenvalue", "adaptive_worst",
    "adaptive_worst_logit_normalised", "adaptive_average", "gradient_evaluations",
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The size of the study."""

    images: int
    epochs: int
    batches: tuple[int, ...]
    factors: tuple[float, ...]
    seeds: int


SCALES = {
    "smoke": Scale(256, 1, (64,), (1.0,), 1),
    "small": Scale(1_024, 4, (256, 64), (0.5, 1.0), 2),
    "full": Scale(4_096, 10, (1_024, 128), (0.5, 1.0, 2.0), 3),
}


def cells(scale: Scale) -> list[Cell]:
    """Most important first: the largest batch, and vanilla beside ConAdv."""
    planned = []
    for batch in scale.batches:
        steps = round(scale.epochs * scale.images / batch)
        planned += [Cell("equal-epochs", method, batch, steps) for method in ("vanilla", "conadv")]
        planned += [
            Cell("equal-steps", method, batch, steps)
            for method in ("vanilla", "recycled-equal", "copy-equal")
        ]
        planned.append(Cell("equal-arithmetic", "vanilla", batch, round(ATTACK_COST * steps)))
    return planned


def config_of(cell: Cell, scale: Scale, factor: float, seed: int, data_dir: str) -> Config:
    """The run of a cell at one factor of the learning rate."""
    return cifar.fast_cpu().replace(
        train_images=scale.images, data_dir=data_dir, method=cell.method, global_batch=cell.global_batch,
        steps=cell.steps, warmup_epochs=0, warmup_steps=round(0.23 * cell.steps),
        lr=factor * 1.5 * (cell.global_batch / 512) ** 0.5, seed=seed,
        threads=1, log_every=1_000_000, checkpoint_every=1_000_000,
    )  # fmt: skip


def tuning_of(cell: Cell, scale: Scale, factor: float, data_dir: str) -> Config:
    """The same run, validated on training images that no run trains on."""
    return config_of(cell, scale, factor, TUNING_SEED, data_dir).replace(dataset=folds.CIFAR10_PART)


def measure(given: Options) -> tuple["pd.DataFrame", Figures]:
    import pandas as pd

    scale = SCALES[given.scale]
    planned = cells(scale)
    trials = {(c, f): tuning_of(c, scale, f, given.data_dir) for c in planned for f in scale.factors}
    tuned = run_all(trials.values(), given, trained)
    best = {
        cell: max(scale.factors, key=lambda factor: tuned[trials[cell, factor]]["test_accuracy"])
        for cell in planned
        if all(trials[cell, factor] in tuned for factor in scale.factors)
    }
    jobs = {
        (cell, seed): config_of(cell, scale, best[cell], seed, given.data_dir)
        for seed in range(scale.seeds) for cell in best
    }  # fmt: skip
    found = run_all(jobs.values(), given, measured_without_trace)
    rows = [
        {
            "arm": cell.arm, "method": cell.method, "global_batch": cell.global_batch, "steps": cell.steps,
            "factor": best[cell], "lr": config.optimization.lr, "seed": seed,
            **{name: found[config][name] for name in COLUMNS},
        }
        for (cell, seed), config in jobs.items()
        if config in found
    ]  # fmt: skip
    every = [*tuned.values(), *found.values()]
    facts = {
        "commit": commits_of([*trials.values(), *jobs.values()], given.runs),
        "command": f"python -m analysis.{NAME} --scale {given.scale} --data-dir DIR",
        "runs": len(every),
        "run_seconds": round(sum(figures["seconds"] for figures in every)),
    }
    return pd.DataFrame(rows), facts


PANELS = (
    ("test_accuracy", "test accuracy (%)", False),
    ("top_eigenvalue", "top eigenvalue λ (raw)", True),
    ("adaptive_worst_logit_normalised", "adaptive worst rise, normalised logits", True),
)


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.intervals import over_seeds
    from conadv_lab.plots import differences, figure_against_batch

    figure = plt.figure(figsize=(13, 6.8), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    upper, lower = parts
    once = rows[(rows["arm"] == "equal-epochs") | (rows["method"].str.endswith("-equal"))]
    for ax, (name, label, log) in zip(upper.subplots(1, 3), PANELS, strict=True):
        figure_against_batch(over_seeds(once, name, log=log), name, label, log=log, spread="interval", ax=ax)
        ax.xaxis.label.set_size("small")
        if name == "test_accuracy":
            ax.legend(frameon=False, fontsize="small")
    shown = {}
    for batch in sorted(rows["global_batch"].unique(), reverse=True):
        own = rows[rows["global_batch"] == batch]
        names = batches.labels(own)
        for name, estimate in batches.comparisons(own, difference, "test_accuracy").items():
            shown[names[name]] = estimate
    differences(shown, "difference of test accuracy (points)", ax=lower.subplots())
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``NAME`` differences of accuracy, ``NAME_eig`` and ``NAME_adaptive`` ratios; ``small_`` at the small batch."""
    found: dict[str, Any] = {}
    lines: list[list[Any]] = []
    for batch in sorted(rows["global_batch"].unique(), reverse=True):
        own = rows[rows["global_batch"] == batch]
        accuracy = batches.comparisons(own, difference, "test_accuracy")
        flatness = batches.comparisons(own, ratio, "top_eigenvalue")
        adaptive = batches.comparisons(own, ratio, "adaptive_worst_logit_normalised")
        prefix = "small_" if lines else ""
        lines += compared(own, accuracy, flatness)
        found |= {prefix + name: estimate for name, estimate in accuracy.items()}
        found |= {f"{prefix}{name}_eig": estimate for name, estimate in flatness.items()}
        found |= {f"{prefix}{name}_adaptive": estimate for name, estimate in adaptive.items()}
    tables = {"table": _table(rows), "typical": batches.typical(rows)}
    return found | tables | {"comparisons": markdown(["part of CIFAR-10 (JPEG)", *COMPARED], lines)}


def _table(rows: "pd.DataFrame") -> str:
    """Every cell's results as Markdown."""
    lines = []
    cells_there = rows[["global_batch", "arm", "method", "lr"]].drop_duplicates()
    for batch, arm, method, rate in cells_there.sort_values(
        "global_batch", ascending=False, kind="stable"
    ).values:
        if (arm, method) == ("equal-steps", "vanilla"):
            continue  # the same runs as at equal epochs
        cell = {"global_batch": batch, "arm": arm, "method": method}
        figures = [cell_mean(rows, cell, name) for name, _, _ in PANELS]
        longer = ", 8/3 of the steps" if arm == "equal-arithmetic" else ""
        lines.append([batch, f"{method}{longer}", f"{rate:.3f}", *figures])
    return markdown(["batch", "method", "learning rate", *(label for _, label, _ in PANELS)], lines)


CONCLUSION = """\
On this part of CIFAR-10 (JPEG), in ten epochs, ConAdv does not help: at equal epochs it differs from vanilla by
{conadv_vanilla} points at batch 1,024 and, not clear either way, by {small_conadv_vanilla} at batch 128, and from
vanilla with 8/3 of the steps by {arithmetic} and {small_arithmetic}. At vanilla's cost, recycled-equal differs from
vanilla by {requal_vanilla} and {small_requal_vanilla}; against copy-equal, which sees as few new images, it is
clearly behind at batch 128 ({small_requal_copy}) but not at batch 1,024 ({requal_copy}). At batch 1,024 ConAdv is
flatter than vanilla, with {conadv_vanilla_eig} times its λ and {conadv_vanilla_adaptive} times its worst rise on
normalised logits, yet less accurate: what these runs lack is steps, not flatness."""
CLAIMS: dict[str, Any] = {
    "ConAdv is behind vanilla at the large batch": lambda n: n["conadv_vanilla"].below,
    "ConAdv against vanilla is not clear at the small batch": lambda n: n["small_conadv_vanilla"].open,
    "vanilla with more steps is ahead": lambda n: n["arithmetic"].below and n["small_arithmetic"].below,
    "recycled-equal is behind": lambda n: n["requal_vanilla"].below and n["small_requal_vanilla"].below,
    "recycled-equal is behind copy-equal at the small batch": lambda n: n["small_requal_copy"].below,
    "recycled-equal against copy-equal is not clear at the large batch": lambda n: n["requal_copy"].open,
    "ConAdv is flatter at the large batch": lambda n: (
        n["conadv_vanilla_eig"].below and n["conadv_vanilla_adaptive"].below
    ),
}

STUDY = Study(NAME, __doc__, measure, draw, numbers, CONCLUSION, CLAIMS, Archived)

if __name__ == "__main__":
    sys.exit(STUDY.main())
