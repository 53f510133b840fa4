"""Does AutoWU find a learning rate as good as the best of a grid, at three batch sizes?

Regime: digits, the six-conv network, vanilla SGD, 20 epochs. By hand: cosine decay after two epochs of warm-up, at each
rate of a grid, the best by the very test accuracy that is then quoted, which favours it. AutoWU: its own constants,
from 1e-5 towards 1 within half of the run. Two of its three positive tests may fall beyond that half, as a run has
few epochs.

    python -m analysis.autowu --scale full       a few minutes on one core; figure and table: --from-results
"""

import sys
from typing import TYPE_CHECKING, Any

from analysis.estimates import mean
from analysis.measuring import trained
from analysis.study import Options, Study, run_all
from conadv_lab.config import Config
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
    return pd.DataFrame(rows), {"runs": len(found), "run_seconds": round(seconds)}


def compared(rows: "pd.DataFrame") -> "pd.DataFrame":
    """AutoWU's rows, and at each batch those of the rate with the highest mean accuracy."""
    import pandas as pd

    hand = rows[rows["schedule"] == BY_HAND]
    means = hand.groupby(["global_batch", "lr"], as_index=False)["test_accuracy"].mean()
    best = means.loc[means.groupby("global_batch")["test_accuracy"].idxmax(), ["global_batch", "lr"]]
    return pd.concat([hand.merge(best, on=["global_batch", "lr"]), rows[rows["schedule"] == FOUND]])


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.plots import curves

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    chosen = compared(rows)
    for ax, column, label in (
        (axes[0], "test_accuracy", "test accuracy (%)"),
        (axes[1], "lr", "learning rate"),
    ):
        curves(chosen, "global_batch", column, "global batch (images)", label, hue="schedule", logx=True,
               logy=column == "lr", ax=ax)  # fmt: skip
        ax.legend(frameon=False, fontsize="small")
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """By batch: ``hand_B`` and ``found_B``, mean accuracies, and ``gap_B``, their difference in points."""
    chosen = compared(rows)
    told: dict[str, Any] = {}
    lines = ["| global batch | best of a grid | AutoWU | difference in points |", "|---|---|---|---|"]
    for batch in sorted(chosen["global_batch"].unique()):
        at = chosen[chosen["global_batch"] == batch]
        hand, found = (at[at["schedule"] == schedule] for schedule in (BY_HAND, FOUND))
        gap = found["test_accuracy"].mean() - hand["test_accuracy"].mean()
        told |= {
            f"hand_{batch}": mean(hand["test_accuracy"].tolist(), decimals=2),
            f"found_{batch}": mean(found["test_accuracy"].tolist(), decimals=2),
            f"gap_{batch}": f"{gap:+.2f}",
        }
        rates = f"{hand['lr'].iloc[0]:g}", ", ".join(f"{lr:.3g}" for lr in found["lr"])
        lines.append(
            f"| {batch} | {told[f'hand_{batch}']} % at {rates[0]} | {told[f'found_{batch}']} % at {rates[1]} "
            f"| {told[f'gap_{batch}']} |"
        )
    told["table"] = "\n".join(lines)
    return told


CONCLUSION = "{table}"
CLAIMS: dict[str, Any] = {}

STUDY = Study("autowu", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
