"""What the two batch studies share: their table, one row per run, and the comparisons at the largest batch."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from analysis.arms import ATTACK_COST, LEARNING_RATES, SCALES, Cell, best_rates, cells, tune
from analysis.estimates import Estimate
from analysis.measuring import measured
from analysis.study import Options, run_all, table
from conadv_lab.displays import markdown
from conadv_lab.mistakes import require

if TYPE_CHECKING:
    import pandas as pd


def measure(
    given: Options, wanted: Callable[[Cell], bool], columns: tuple[str, ...]
) -> tuple["pd.DataFrame", dict]:
    """Tune, train and measure a study's cells."""
    import pandas as pd

    scale = SCALES[given.scale]
    tune(given)
    best = best_rates(table(LEARNING_RATES, given.out))
    tuned = [cell for cell in cells(scale) if wanted(cell) and cell in best]
    jobs = [(cell, seed) for cell in tuned for seed in scale.seeds_of(cell)]
    configs = {job: job[0].config(best[job[0]], job[1]) for job in jobs}
    found = run_all(configs.values(), given, measured)
    rows = [
        {
            "arm": cell.arm, "method": cell.method, "global_batch": cell.global_batch, "steps": cell.steps,
            "lr": best[cell], "seed": seed,
            **{name: found[configs[cell, seed]][name] for name in columns},
        }
        for cell, seed in jobs
        if configs[cell, seed] in found
    ]  # fmt: skip
    seconds = sum(figures["seconds"] for figures in found.values())
    return pd.DataFrame(rows), {"runs": len(found), "run_seconds": round(seconds)}


def comparisons(
    rows: "pd.DataFrame", compare: Callable[..., Estimate], figure: str, decimals: int = 2
) -> dict[str, Estimate]:
    """The studies' comparisons; those missing at a smaller scale are left out.

    Args:
        compare: `analysis.estimates.difference` or ``ratio``.

    At the largest batch; equal depth and devices at the largest batch whose 8/3 fits.
    """
    largest = int(rows.loc[rows["arm"] == "equal-epochs", "global_batch"].max())
    deep = rows[rows["arm"] == "equal-depth"]
    third = int(deep["global_batch"].min()) if len(deep) else 0

    def cell(method: str, arm: str = "equal-epochs", batch: int = largest) -> dict[str, Any]:
        return {"method": method, "arm": arm, "global_batch": batch}

    def at_third(method: str) -> dict[str, Any]:
        return cell(method, "equal-depth", third)

    conadv, equal = cell("conadv"), cell("recycled-equal", "equal-steps")
    pairs = {
        "conadv_vanilla": (conadv, cell("vanilla")),
        "conadv_copy": (conadv, cell("copy")),
        "conadv_noise": (conadv, cell("noise")),
        "conadv_disadv": (conadv, cell("disadv")),
        "recycled_conadv": (cell("recycled"), conadv),
        "requal_vanilla": (equal, cell("vanilla", "equal-steps")),
        "requal_copy": (equal, cell("copy-equal", "equal-steps")),
        "requal_noise": (equal, cell("noise-equal", "equal-steps")),
        "arithmetic": (conadv, cell("vanilla", "equal-arithmetic")),
        "depth": (at_third("conadv"), cell("vanilla", "equal-depth", round(ATTACK_COST * third))),
        "updates_conadv": (cell("conadv", "equal-updates"), cell("vanilla", "equal-updates")),
        "updates_requal": (cell("recycled-equal", "equal-updates"), cell("vanilla", "equal-updates")),
        "updates_requal_copy": (cell("recycled-equal", "equal-updates"), cell("copy-equal", "equal-updates")),
        "third_vanilla": (at_third("conadv"), at_third("vanilla")),
        "third_copy": (at_third("conadv"), at_third("copy")),
    }
    found = {}
    for name, (one, other) in pairs.items():
        try:
            found[name] = compare(rows, one, other, figure, decimals)
        except ValueError:  # a smaller scale leaves methods and arms out
            continue
    require(bool(found), "rows", len(rows), "a table that holds at least one of the comparisons")
    return found


def labels(rows: "pd.DataFrame") -> dict[str, str]:
    """The comparisons in words."""
    largest = int(rows.loc[rows["arm"] == "equal-epochs", "global_batch"].max())
    deep = rows[rows["arm"] == "equal-depth"]["global_batch"]
    third, wide = (int(deep.min()), int(deep.max())) if len(deep) else (0, 0)
    steps = rows.loc[rows["arm"] == "equal-updates", "steps"]
    updates = int(steps.max()) if len(steps) else 0
    return {
        "conadv_vanilla": f"ConAdv − vanilla, equal epochs, {largest}",
        "conadv_copy": f"ConAdv − copy, equal epochs, {largest}",
        "conadv_noise": f"ConAdv − noise, equal epochs, {largest}",
        "conadv_disadv": f"ConAdv − DisAdv, equal epochs, {largest}",
        "recycled_conadv": f"recycled − ConAdv, equal epochs, {largest}",
        "requal_vanilla": f"recycled-equal − vanilla, equal cost and steps, {largest}",
        "requal_copy": f"recycled-equal − copy-equal, {largest}",
        "requal_noise": f"recycled-equal − noise-equal, {largest}",
        "arithmetic": f"ConAdv − vanilla with 8/3 of the steps, {largest}",
        "depth": f"ConAdv at {third} − vanilla at {wide}, equal steps",
        "updates_conadv": f"ConAdv − vanilla, {updates} steps, {largest}",
        "updates_requal": f"recycled-equal − vanilla, {updates} steps, equal cost, {largest}",
        "updates_requal_copy": f"recycled-equal − copy-equal, {updates} steps, {largest}",
        "third_vanilla": f"ConAdv − vanilla, equal epochs, {third}",
        "third_copy": f"ConAdv − copy, equal epochs, {third}",
    }


TYPICAL = ("top_eigenvalue", "trace", "lr_lambda_max", "adaptive_worst", "adaptive_worst_logit_normalised")


def typical(rows: "pd.DataFrame") -> str:
    """Range, over the methods at equal epochs, of each measure's mean over seeds, by batch, as Markdown."""
    own = rows[rows["arm"] == "equal-epochs"].assign(lr_lambda_max=rows["lr"] * rows["top_eigenvalue"])
    names = [name for name in TYPICAL if name in own]
    lines = []
    for batch, one in own.groupby("global_batch"):
        means = one.groupby("method")[names].mean()
        ends = [f"{_rounded(means[name].min())} to {_rounded(means[name].max())}" for name in names]
        lines.append([batch, *ends])
    return markdown(["batch", *(f"`{name}`" for name in names)], lines)


def _rounded(value: float) -> str:
    """Two digits, without an exponent.

    >>> _rounded(163.8), _rounded(0.0629)
    ('160', '0.063')
    """
    return f"{float(f'{value:.2g}'):g}"
