"""Where does ConAdv pay after all? Three attempts at the map's largest batch, where the paper would look for it.

The starting point is the cell of `analysis.regimes` in which one step sees all 1,280 images, 24 epochs long. The
attempts are a tuning budget more than twice as large (vanilla tries seven settings and ConAdv three), LARS instead of
SGD at that budget, and 96 epochs instead of 24 at the map's budget. In every attempt both methods are tuned with the
same budget of gradient evaluations, on held-out folds. They are compared at equal epochs, so ConAdv takes 8/3 of
vanilla's arithmetic.

    python -m analysis.regime_attempts --scale smoke                      a minute, digits
    python -m analysis.regime_attempts --scale small --data-dir DIR       an hour on one core; goes on where it was

``regime_attempts.csv`` has one row a run, ``regime_attempts_tuning.csv`` one row a trial.
"""

import sys
import time
from typing import TYPE_CHECKING, Any

from analysis.estimates import Estimate, cell_mean, difference
from analysis.regime_cells import ATTEMPTS, Cell
from analysis.regimes import figures_in, made, runnable, tables, work_through
from analysis.study import Figures, Mapped, Options, Study, commits_of, save
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

NAME = "regime_attempts"
LABELS = {
    "tuned": "SGD, 24 epochs, more tuning",
    "lars": "LARS, 24 epochs, more tuning",
    "longer": "SGD, 96 epochs",
}


def groups(scale: str, data_dir: str) -> dict[str, list[list[Cell]]]:
    """Vanilla's and ConAdv's cell of every attempt."""
    if scale not in ATTEMPTS:
        raise ValueError(f"--scale {scale} has no attempts; allowed: {', '.join(ATTEMPTS)}")
    return {
        name: [[Cell(place, method, place.batches[0], place.epochs[0], "epochs", data_dir) for method in
                place.methods[0]]]
        for name, place in ATTEMPTS[scale].items()
    }  # fmt: skip


def measure(given: Options) -> tuple["pd.DataFrame", Figures]:
    """Run what is missing until the time is up; the table of what is there, with its tuning log beside it."""
    import pandas as pd

    until = time.time() + 60 * given.minutes
    attempts = groups(given.scale, given.data_dir)
    seeds = {name: ATTEMPTS[given.scale][name].seeds for name in attempts}
    if not given.finished:
        for name, cells in attempts.items():
            work_through(cells, ATTEMPTS[given.scale][name], given, until)
    known = figures_in(given.runs)
    rows, logs = zip(*(tables(cells, name, known) for name, cells in attempts.items()), strict=True)
    log = pd.concat([one.assign(attempt=name) for name, one in zip(attempts, logs, strict=True)])
    runs = [run for name, cells in attempts.items() for run in made(cells, seeds[name], known)]
    facts = {
        "command": f"python -m analysis.{NAME} --scale {given.scale} --data-dir DIR",
        "commit": commits_of(runs, given.runs),
        "complete": not any(
            runnable(group, seeds[name], known) for name, cells in attempts.items() for group in cells
        ),
    }
    save(f"{NAME}_tuning", given.out, log, given.scale, **facts)
    return pd.concat(rows).rename(columns={"scale": "attempt"}), facts


def lead(rows: "pd.DataFrame", attempt: str, figure: str = "test_accuracy") -> Estimate:
    """ConAdv's figure minus vanilla's, seed by seed."""
    conadv, vanilla = ({"attempt": attempt, "method": method} for method in ("conadv", "vanilla"))
    return difference(rows, conadv, vanilla, figure)


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.plots import differences, points

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    shown = {LABELS[name]: lead(rows, name) for name in rows["attempt"].unique()}
    differences(shown, "ConAdv − vanilla: test accuracy (points)", ax=left)
    named = rows.assign(attempt=rows["attempt"].map(lambda name: LABELS[name].replace(", ", "\n")))
    points(named, "attempt", "test_accuracy", "", "test accuracy (%)", hue="method", ax=right)
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``lead_ATTEMPT``, each method's accuracy as ``METHOD_ATTEMPT``, and ``fit_ATTEMPT``, of the training loss."""
    found: dict[str, Any] = {"table": _table(rows), "seeds": int(rows["seed"].nunique())}
    for attempt in rows["attempt"].unique():
        key = attempt.replace("-", "_")
        found[f"lead_{key}"] = lead(rows, attempt)
        found[f"fit_{key}"] = lead(rows, attempt, "train_loss")
        for method in ("vanilla", "conadv"):
            found[f"{method}_{key}"] = cell_mean(
                rows, {"attempt": attempt, "method": method}, "test_accuracy"
            )
    return found


def _table(rows: "pd.DataFrame") -> str:
    heads = ["attempt", "steps", "vanilla (%)", "ConAdv (%)", "ConAdv − vanilla"]
    heads += ["training loss, vanilla", "training loss, ConAdv"]
    lines = []
    for attempt in rows["attempt"].unique():
        of = [{"attempt": attempt, "method": method} for method in ("vanilla", "conadv")]
        steps = int(rows.loc[rows["attempt"] == attempt, "steps"].iloc[0])
        cells: list[Any] = [LABELS[attempt], steps]
        cells += [cell_mean(rows, cell, "test_accuracy") for cell in of] + [lead(rows, attempt)]
        lines.append(cells + [cell_mean(rows, cell, "train_loss") for cell in of])
    return markdown(heads, lines)


CONCLUSION = """\
In none of the three attempts does ConAdv pay off at the largest batch: it differs from vanilla by {lead_tuned}
points with more than twice the tuning budget, by {lead_lars} with LARS instead of SGD, and by {lead_longer} after
96 epochs. LARS raises vanilla from {vanilla_tuned} % to {vanilla_lars} %, but ConAdv only from {conadv_tuned} % to
{conadv_lars} %. Training four times as long brings ConAdv closest: its training loss is then no longer clearly
higher ({fit_longer}), but its accuracy is still clearly lower."""
CLAIMS: dict[str, Any] = {
    "ConAdv is behind in all three": lambda n: all(
        n[f"lead_{key}"].below for key in ("tuned", "lars", "longer")
    ),
    "LARS makes vanilla clearly better, and not ConAdv": lambda n: (
        n["vanilla_lars"].low > n["vanilla_tuned"].high and n["conadv_lars"].low < n["conadv_tuned"].high
    ),
    "it comes closest after 96 epochs": lambda n: (
        n["lead_longer"].value > max(n["lead_tuned"].value, n["lead_lars"].value)
    ),
    "its training loss is higher but for the longest runs": lambda n: (
        n["fit_tuned"].above and n["fit_lars"].above and n["fit_longer"].open
    ),
}

STUDY = Study(NAME, __doc__, measure, draw, numbers, CONCLUSION, CLAIMS, Mapped, "small")

if __name__ == "__main__":
    sys.exit(STUDY.main())
