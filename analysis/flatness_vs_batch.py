"""Is the solution of a large batch sharper, and does ConAdv flatten it: raw and scale-invariant measures side by side?

Regime: as in `analysis.accuracy_vs_batch`, whose runs these are (equal epochs, and the equal-cost forms beside them).
Flatness is that of the training loss on its first 256 images, without augmentation, batch norm re-estimated.
Raw: top eigenvalue λ and trace of the Hessian, which a rescaling of the layers moves; lr · λ, since gradient descent
holds λ near 2/lr. Scale-invariant: the worst rise within ‖d/|w|‖₂ ≤ 1 (Kwon et al. 2021) for the loss and for the
loss of normalised logits, and the mean rise under d ~ N(0, 0.1²·w²) (Andriushchenko et al. 2023).

    python -m analysis.flatness_vs_batch --scale full       about TIME on one core; figure and table: --from-results

CIFAR-10 with ResNet-18: not measured; `python -m analysis.cifar` has its cells.
"""

import sys
from typing import TYPE_CHECKING, Any

from analysis import batches
from analysis.estimates import cell_mean, difference, ratio
from analysis.measuring import MEASURES
from analysis.study import Options, Study

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
    ("adaptive_worst_logit_normalised", "the same, normalised logits", True),
    ("adaptive_average", "adaptive mean rise, ρ = 0.1", True),
)


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    return batches.measure(given, lambda cell: cell.arm in ("equal-epochs", "equal-steps"), COLUMNS)


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.plots import figure_against_batch, over_seeds

    # Vanilla stands in both arms with the same runs.
    own = rows[(rows["arm"] == "equal-epochs") | (rows["method"] != "vanilla")]
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), layout="constrained")
    for ax, (name, label, log) in zip(axes.flat, PANELS, strict=True):
        figure_against_batch(over_seeds(own, name, log=log), name, label, log=log, spread="interval", ax=ax)
    for ax in axes.flat:
        ax.xaxis.label.set_size("small")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=9, frameon=False)
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """Ratios of every measure for the main comparisons, and of the largest over the smallest batch for vanilla."""
    found: dict[str, Any] = {}
    for measure_name in (*MEASURES, "lr_times_eigenvalue"):
        for name, estimate in batches.comparisons(rows, ratio, measure_name).items():
            found[f"{name}_{measure_name}"] = estimate
    for name, estimate in batches.comparisons(rows, difference, "train_test_gap").items():
        found[f"{name}_gap"] = estimate
    sizes = rows.loc[rows["arm"] == "equal-epochs", "global_batch"]
    large, small = (
        {"arm": "equal-epochs", "method": "vanilla", "global_batch": int(size)}
        for size in (sizes.max(), sizes.min())
    )
    for measure_name in (*MEASURES, "lr_times_eigenvalue"):
        found[f"batch_{measure_name}"] = ratio(rows, large, small, measure_name, 1)
    found["batch_accuracy"] = difference(rows, large, small, "test_accuracy")
    found["table"] = _table(rows, int(sizes.max()))
    return found


def _table(rows: "pd.DataFrame", largest: int) -> str:
    """All measures at the largest batch, as Markdown."""
    names = [name for name, _, _ in PANELS]
    lines = [
        f"| batch {largest} | " + " | ".join(label for _, label, _ in PANELS) + " |",
        "|---" * (len(PANELS) + 1) + "|",
    ]
    own = rows[
        (rows["global_batch"] == largest) & ((rows["arm"] == "equal-epochs") | (rows["method"] != "vanilla"))
    ]
    for method in own["method"].unique():
        cells = [
            str(cell_mean(own, {"method": method}, name, 3 if name == "adaptive_average" else 2))
            for name in names
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


CONCLUSION = ""
CLAIMS: dict[str, Any] = {}

STUDY = Study("flatness_vs_batch", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
