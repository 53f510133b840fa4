"""Is a large batch's solution sharper, and does ConAdv flatten it? Raw and scale-invariant measures side by side.

Regime: as in `analysis.accuracy_vs_batch`, whose runs these are (equal epochs, and the equal-cost forms beside them).
Flatness is that of the training loss on its first 256 images, without augmentation, batch norm re-estimated.
Raw: top eigenvalue λ and trace of the Hessian, which rescaling the layers changes; lr · λ, since gradient descent
holds λ near 2/lr. Scale-invariant: the worst rise within ‖d/|w|‖₂ ≤ 1 (Kwon et al. 2021) for the loss and for the
loss of normalised logits, and the mean rise under d ~ N(0, 0.1²·w²) (Andriushchenko et al. 2023).

    python -m analysis.flatness_vs_batch --scale full       about an hour on one core; shares its runs
                                                            with accuracy_vs_batch; --from-results redraws

CIFAR-10 with ResNet-18: not measured; `python -m analysis.cifar` runs it.
"""

import sys
from typing import TYPE_CHECKING, Any

from analysis import batches
from analysis.estimates import cell_mean, difference, ratio
from analysis.measuring import MEASURES
from analysis.study import Options, Study
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("test_accuracy", "train_test_gap", "train_loss", "lr_times_eigenvalue", *MEASURES)
PANELS = (
    ("test_accuracy", "test accuracy (%)", False),
    ("train_test_gap", "train − test accuracy (points)", False),
    ("top_eigenvalue", "top eigenvalue λ (raw)", True),
    ("trace", "trace of the Hessian (raw)", True),
    ("lr_times_eigenvalue", "learning rate · λ", True),
    ("adaptive_worst", "adaptive worst rise, ρ = 1", True),
    ("adaptive_worst_logit_normalised", "adaptive worst rise, normalised logits", True),
    ("adaptive_average", "adaptive mean rise, ρ = 0.1", True),
)


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    return batches.measure(given, lambda cell: cell.arm != "equal-updates", COLUMNS)


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.intervals import over_seeds
    from conadv_lab.plots import figure_against_batch

    own = at_equal_epochs(rows)
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), layout="constrained")
    for ax, (name, label, log) in zip(axes.flat, PANELS, strict=True):
        figure_against_batch(over_seeds(own, name, log=log), name, label, log=log, spread="interval", ax=ax)
    for ax in axes.flat:
        ax.xaxis.label.set_size("x-small")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=9, frameon=False)
    return figure


def at_equal_epochs(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Each method and batch once: vanilla is in two arms, and equal depth's smallest batch in equal epochs too."""
    first = (rows["arm"] == "equal-epochs") | ((rows["arm"] == "equal-steps") & (rows["method"] != "vanilla"))
    deep = rows["arm"] == "equal-depth"
    third = deep & (rows["global_batch"] == rows.loc[deep, "global_batch"].min())
    return rows[first | third]


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """Ratios of every measure for the main comparisons, and of the largest over the smallest batch for vanilla."""
    found: dict[str, Any] = {}
    for measure_name in (*MEASURES, "lr_times_eigenvalue"):
        for name, estimate in batches.comparisons(rows, ratio, measure_name).items():
            found[f"{name}_{measure_name}"] = estimate
    for name, estimate in batches.comparisons(rows, difference, "train_test_gap").items():
        found[f"{name}_gap"] = estimate
    for name, estimate in batches.comparisons(rows, difference, "test_accuracy").items():
        found[f"{name}_accuracy"] = estimate
    sizes = rows.loc[rows["arm"] == "equal-epochs", "global_batch"]
    large, small = (
        {"arm": "equal-epochs", "method": "vanilla", "global_batch": int(size)}
        for size in (sizes.max(), sizes.min())
    )
    for measure_name in (*MEASURES, "lr_times_eigenvalue"):
        found[f"batch_{measure_name}"] = ratio(
            rows, large, small, measure_name, 0 if "worst" not in measure_name else 1
        )
    found["batch_accuracy"] = difference(rows, large, small, "test_accuracy")
    found["table"] = _table(rows, int(sizes.max()))
    found["typical"] = batches.typical(rows)
    return found


def _table(rows: "pd.DataFrame", largest: int) -> str:
    """All measures at the largest batch, as Markdown."""
    lines = []
    own = at_equal_epochs(rows)
    own = own[own["global_batch"] == largest]
    for method in own["method"].unique():
        cells = [
            cell_mean(own, {"method": method}, name, 3 if name == "adaptive_average" else 2)
            for name, _, _ in PANELS
        ]
        lines.append([method, *cells])
    return markdown([f"batch {largest}", *(label for _, label, _ in PANELS)], lines)


CONCLUSION = """\
From batch 64 to the whole set, at equal epochs and so in a fourteenth of the steps, vanilla's top eigenvalue grows
by a factor of {batch_top_eigenvalue} and its accuracy changes by {batch_accuracy} points (n = {batch_accuracy.n}),
but the scale-invariant worst rises show no clear growth: factors of {batch_adaptive_worst}, and of
{batch_adaptive_worst_logit_normalised} on normalised logits. With the whole set as one batch, ConAdv is flatter
than vanilla by raw and by scale-invariant measures, with {conadv_vanilla_top_eigenvalue} times the λ and
{conadv_vanilla_adaptive_worst_logit_normalised} times the worst rise on normalised logits at the same learning
rate, and level with DisAdv. But flatness does not explain accuracy: recycled-equal is flatter than vanilla by both
measures ({requal_vanilla_top_eigenvalue} and {requal_vanilla_adaptive_worst_logit_normalised}) yet less accurate,
and at batch 336 ConAdv is more accurate with a λ {third_vanilla_top_eigenvalue} times as large."""
CLAIMS: dict[str, Any] = {
    "λ grows with the batch, accuracy falls": lambda n: (
        n["batch_top_eigenvalue"].above and n["batch_accuracy"].below
    ),
    "no growth of the scale-invariant worst rises is clear": lambda n: (
        n["batch_adaptive_worst"].open and n["batch_adaptive_worst_logit_normalised"].open
    ),
    "ConAdv lies flatter than vanilla": lambda n: (
        n["conadv_vanilla_top_eigenvalue"].below and n["conadv_vanilla_adaptive_worst_logit_normalised"].below
    ),
    "at the same learning rate": lambda n: (
        abs(n["conadv_vanilla_lr_times_eigenvalue"].value - n["conadv_vanilla_top_eigenvalue"].value) < 1e-4
    ),
    "ConAdv is level with DisAdv": lambda n: (
        n["conadv_disadv_top_eigenvalue"].open and n["conadv_disadv_adaptive_worst_logit_normalised"].open
    ),
    "recycled-equal lies flatter and is less accurate": lambda n: (
        n["requal_vanilla_top_eigenvalue"].below
        and n["requal_vanilla_adaptive_worst_logit_normalised"].below
        and n["requal_vanilla_accuracy"].below
    ),
    "ConAdv at batch 336 is sharper by λ and more accurate": lambda n: (
        n["third_vanilla_top_eigenvalue"].above and n["third_vanilla_accuracy"].above
    ),
}

STUDY = Study("flatness_vs_batch", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
