"""Does AutoWU find a learning rate as good as the best of a grid, at three batch sizes?

Regime: digits, the six-conv network, vanilla SGD, 20 epochs. By hand: cosine decay after two epochs of warm-up, at each
learning rate of a grid. The best is chosen by the same test accuracy that is reported, which favours it. AutoWU: its
own constants, from 1e-5 towards 1 in at most half of the run.

    python -m analysis.autowu --scale full       a few minutes on one core; figure and table: --from-results
"""

import sys
from typing import TYPE_CHECKING, Any

from analysis.measuring import trained
from analysis.study import Options, Study, commits_of, run_all
from conadv_lab.config import Config
from conadv_lab.displays import markdown
from conadv_lab.recipes import digits

if TYPE_CHECKING:
    import pandas as pd

PLANS: dict[str, dict[str, Any]] = {
    "smoke": {"batches": (256, 898), "rates": (0.2,), "seeds": (0,), "epochs": 3},
    "small": {"batches": (256, 898), "rates": (0.1, 0.4), "seeds": (0,), "epochs": 10},
    "full": {"batches": (64, 256, 898), "rates": (0.1, 0.2, 0.4), "seeds": (0, 1), "epochs": 20},
}
BY_HAND, FOUND = "best of a grid", "AutoWU"


def plan(scale: str) -> list[Config]:
    """Each batch and seed with every rate of the grid, and with AutoWU."""
    chosen = PLANS[scale]
    made = []
    for seed in chosen["seeds"]:
        for batch in chosen["batches"]:
            base = digits.vanilla().replace(
                global_batch=batch,
                seed=seed,
                epochs=chosen["epochs"],
                checkpoint_every=1_000_000,
                log_every=1,
            )
            made += [base.replace(lr=lr) for lr in chosen["rates"]] + [
                base.replace(schedule="autowu", lr=1.0)
            ]
    return made


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    import pandas as pd

    found = run_all(plan(given.scale), given, trained)
    rows = []
    for config, figures in found.items():
        own = config.optimization.schedule == "autowu"
        rows.append(
            {
                "schedule": FOUND if own else BY_HAND,
                "global_batch": config.training.global_batch,
                "seed": config.training.seed,
                "lr": figures["autowu_lr"] if own else config.optimization.lr,
                "test_accuracy": figures["test_accuracy"],
                "steps": figures["steps"],
                "switch": figures.get("autowu_switch"),
                "reason": figures.get("autowu_reason"),
            }
        )
    seconds = sum(figures["seconds"] for figures in found.values())
    commits = commits_of(found, given.runs)
    return pd.DataFrame(rows), {"runs": len(found), "run_seconds": round(seconds), "commit": commits}


def compared(rows: "pd.DataFrame") -> "pd.DataFrame":
    """AutoWU's rows, and for each batch the rows of the rate with the highest mean accuracy."""
    import pandas as pd

    hand = rows[rows["schedule"] == BY_HAND]
    means = hand.groupby(["global_batch", "lr"], as_index=False)["test_accuracy"].mean()
    best = means.loc[means.groupby("global_batch")["test_accuracy"].idxmax(), ["global_batch", "lr"]]
    return pd.concat([hand.merge(best, on=["global_batch", "lr"]), rows[rows["schedule"] == FOUND]])


def draw(rows: "pd.DataFrame") -> Any:
    import seaborn
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    chosen = compared(rows)
    for ax, column, label in (
        (axes[0], "test_accuracy", "test accuracy (%), one point per seed"),
        (axes[1], "lr", "learning rate, one point per seed"),
    ):
        seaborn.lineplot(chosen, x="global_batch", y=column, hue="schedule", errorbar=None, palette="colorblind",
                         legend=False, ax=ax)  # fmt: skip
        seaborn.scatterplot(chosen, x="global_batch", y=column, hue="schedule", style="schedule", s=60,
                            palette="colorblind", ax=ax)  # fmt: skip
        ax.set(xscale="log", xlabel="global batch (images)", ylabel=label)
        ax.set_xticks(sorted(chosen["global_batch"].unique()), sorted(chosen["global_batch"].unique()))
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize="small")
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].set(yscale="log", yticks=(rates := (0.1, 0.2, 0.5, 1)), yticklabels=rates)
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """By batch: ``hand_B`` and ``found_B``, mean accuracies, and ``gap_B``, their difference in points.

    ``turned`` counts growth phases ended by a test, ``runs`` all growth phases, ``seeds`` the seeds per mean.
    """
    chosen = compared(rows)
    grown = rows[rows["schedule"] == FOUND]
    told: dict[str, Any] = {
        "turned": int(grown["reason"].str.contains("turned").sum()),
        "runs": len(grown),
        "seeds": int(grown["seed"].nunique()),
    }
    lines = []
    for batch in sorted(chosen["global_batch"].unique()):
        at = chosen[chosen["global_batch"] == batch]
        hand, found = (at[at["schedule"] == schedule] for schedule in (BY_HAND, FOUND))
        means = hand["test_accuracy"].mean(), found["test_accuracy"].mean()
        gap = f"{means[1] - means[0]:+.2f}".replace("-", "−")
        told |= {f"hand_{batch}": f"{means[0]:.2f}", f"found_{batch}": f"{means[1]:.2f}", f"gap_{batch}": gap}
        rates = f"{hand['lr'].iloc[0]:g}", " and ".join(f"{lr:.2g}" for lr in found["lr"])
        lines.append([batch, f"{means[0]:.2f} % at {rates[0]}", f"{means[1]:.2f} % at {rates[1]}", gap])
    told["table"] = markdown(["global batch", "best of a grid", "AutoWU", "difference in points"], lines)
    return told


CONCLUSION = """\
AutoWU's test accuracy differs from that of the grid's best learning rate by {gap_64} points at batch 64, {gap_256}
at 256 and {gap_898} with the whole set as one batch: it comes within half a point only at the smallest batch. All
{runs} growth phases ended because half of the steps were used up, not because AutoWU's tests found that the loss
had turned; a run of 20 epochs leaves time for few tests. With {seeds} seeds and AutoWU's own constants, this shows
that it does not replace a small grid in short runs, and says nothing about long ones."""
CLAIMS: dict[str, Any] = {
    "within half a point at the smallest batch alone": lambda n: (
        abs(_points(n["gap_64"])) <= 0.5 and max(_points(n["gap_256"]), _points(n["gap_898"])) < -0.5
    ),
    "no growth was ended by its tests": lambda n: n["turned"] == 0,
}


def _points(gap: str) -> float:
    return float(gap.replace("−", "-"))


STUDY = Study("autowu", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
