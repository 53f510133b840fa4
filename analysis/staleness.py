"""What does staleness cost? Accuracy, sharpness, and how much of its attack's strength ConAdv loses with τ.

Regime: digits, the six-conv network, SGD, 56 steps at every batch (so that τ is the same share of a run), ε = 0.1, one
learning rate for every τ. The first τ steps train on images attacked with the initial weights, which at τ = 32 is more
than half of the run. Every fourth step the pending attack is compared with a fresh one on the same images: the share
of equal signs, and the gain ratio [L(x̂ stale) − L(x)] / [L(x̂ fresh) − L(x)], both with the weights of that step and
batch statistics of the adversarial branch. τ = 0 is DisAdv, where both are 1.

    python -m analysis.staleness --scale full       about 10 minutes on one core; figure and table: --from-results
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arms import Cell
from analysis.estimates import cell_mean, difference, ratio
from analysis.measuring import flatness
from analysis.study import Options, Study, run_all
from conadv_lab.config import Config
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

STEPS = 56
PROBE_EVERY = 4
LR = 0.2
PLANS: dict[str, dict[str, tuple[int, ...]]] = {
    "smoke": {"taus": (0, 1, 4), "batches": (64, 256), "seeds": (0, 1)},
    "small": {"taus": (0, 1, 4, 16), "batches": (64, 256), "seeds": (0, 1)},
    "full": {"taus": (0, 1, 2, 4, 8, 16, 32), "batches": (64, 256, 898), "seeds": (0, 1, 2)},
}


def plan(scale: str) -> list[Config]:
    """All runs; not for ``submit sweep``, because probes are taken during training."""
    chosen = PLANS[scale]
    steps = 8 if scale == "smoke" else STEPS
    return [
        Cell("staleness", "conadv", batch, steps).config(LR, seed).replace(staleness=tau)
        for seed in chosen["seeds"] for batch in chosen["batches"] for tau in chosen["taus"]
    ]  # fmt: skip


def probed(config: Config, path: Path) -> dict[str, Any]:
    """Train with a probe every fourth step, and measure the flatness."""
    found = with_probes(config, path, PROBE_EVERY)
    return found | flatness(path)


def with_probes(config: Config, path: Path, every: int) -> dict[str, Any]:
    """Train, comparing the pending attack with a fresh one before every ``every``-th step."""
    import shutil

    from conadv_lab.training.loop import prepare

    shutil.rmtree(path, ignore_errors=True)  # an interrupted run has lost its probes
    run = prepare(config, path, progress="none")
    assert run is not None
    probes = []
    with run.saver:
        run.start()
        while run.step < run.parts.stream.steps:
            if run.step % every == 0:
                probes.append({"step": run.step, **_compared(run)})
            run.train_step()
        run.finish()
    gains = [sum(probe[name] for probe in probes) for name in ("stale_gain", "fresh_gain")]
    return (run.folder.result() or {}) | {
        "sign_agreement": sum(probe["agreement"] for probe in probes) / len(probes),
        "gain_ratio": gains[0] / gains[1],
        "probes": probes,
    }  # fmt: skip


def _compared(run: Any) -> dict[str, float]:
    """Sign agreement and both losses' gains at this step; 1 and equal where nothing is pending (τ = 0)."""
    import torch

    from conadv_lab.methods.signs import unpack
    from conadv_lab.models.norm import branch_of

    method, model, criterion = run.parts.method, run.parts.model, run.parts.criterion
    step = run.parts.stream.step(run.step, method.lookahead)
    pending = method.pending.get(run.step)
    found = {"agreement": 0.0, "stale_gain": 0.0, "fresh_gain": 0.0}
    for place, batch in enumerate(step.batches()):
        fresh = method.attack.perturb(model, batch, criterion)
        stale = fresh if pending is None else pending[place]

        def loss(images: torch.Tensor, labels: torch.Tensor = batch.labels) -> float:
            with torch.no_grad(), branch_of(model, "adversarial", "batch"):
                return float(criterion(model(images), labels))

        clean = loss(batch.images)
        same = unpack(stale, batch.images) == unpack(fresh, batch.images)
        found["agreement"] += batch.share * float(same.float().mean())
        found["stale_gain"] += batch.share * (loss(method.attack.apply(batch, stale)) - clean)
        found["fresh_gain"] += batch.share * (loss(method.attack.apply(batch, fresh)) - clean)
    return found


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    import pandas as pd

    configs = plan(given.scale)
    # In separate folders: another study may have trained and measured one of these configs without probes.
    found = run_all(configs, replace(given, runs=given.runs / "probed"), probed, "probes.json")
    columns = (
        "test_accuracy", "train_test_gap", "top_eigenvalue", "trace", "adaptive_worst", "sign_agreement",
        "gain_ratio",
    )  # fmt: skip
    rows = [
        {
            "tau": config.method.staleness,
            "global_batch": config.training.global_batch,
            "steps": config.training.steps,
            "lr": config.optimization.lr,
            "seed": config.training.seed,
            **{name: found[config][name] for name in columns},
        }
        for config in configs
        if config in found
    ]
    return pd.DataFrame(rows), {
        "runs": len(found),
        "run_seconds": round(sum(figures["seconds"] for figures in found.values())),
    }


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.plots import points

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained", gridspec_kw={"wspace": 0.06})
    label = f"staleness τ (steps; a run has {int(rows['steps'].iloc[0])}); n = {rows['seed'].nunique()} seeds"
    shown = rows.assign(batch=rows["global_batch"].map("batch {}".format))
    for ax, (name, what, log) in zip(axes, PANELS, strict=True):
        points(shown, "tau", name, label, what, hue="batch", log=log, ax=ax)
        ax.legend(frameon=False, fontsize="small")
    axes[2].axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes[2].annotate("chance", (0, 0.505), fontsize="small")
    axes[3].axhline(0.0, color="black", linewidth=0.8, linestyle=":")
    axes[3].annotate("no gain", (0, 0.01), fontsize="small")
    return figure


PANELS = (
    ("test_accuracy", "test accuracy (%); bars: 95 % t intervals", False),
    ("top_eigenvalue", "top eigenvalue λ of the training loss", True),
    ("sign_agreement", "signs equal to a fresh attack's (share)", False),
    ("gain_ratio", "loss gain, stale over fresh attack", False),
)


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``NAME_BATCH_TAU`` means, and ``accuracy_BATCH_TAU`` differences from τ = 0."""
    found: dict[str, Any] = {}
    for batch in rows["global_batch"].unique():
        fresh = {"global_batch": batch, "tau": 0}
        for tau in rows["tau"].unique():
            cell = {"global_batch": batch, "tau": tau}
            for name in ("sign_agreement", "gain_ratio", "test_accuracy", "top_eigenvalue"):
                found[f"{name}_{batch}_{tau}"] = cell_mean(rows, cell, name)
            if tau:
                found[f"accuracy_{batch}_{tau}"] = difference(rows, cell, fresh, "test_accuracy")
                found[f"eigenvalue_{batch}_{tau}"] = ratio(rows, cell, fresh, "top_eigenvalue")
    found["table"] = _table(rows)
    return found


def _table(rows: "pd.DataFrame") -> str:
    names = ("test_accuracy", "top_eigenvalue", "sign_agreement", "gain_ratio")
    heads = ["batch", "τ", "test accuracy (%)", "top eigenvalue λ", "signs equal"]
    lines = []
    for batch in rows["global_batch"].unique():
        for tau in rows["tau"].unique():
            cell = {"global_batch": batch, "tau": tau}
            lines.append([batch, tau, *(cell_mean(rows, cell, name) for name in names)])
    return markdown([*heads, "loss gain, stale over fresh"], lines)


CONCLUSION = """\
An attack goes stale within a few steps: at batch 256 its loss gain is {gain_ratio_256_1} of a fresh attack's at τ =
1, {gain_ratio_256_8} at τ = 8 and {gain_ratio_256_32} at τ = 32, where {sign_agreement_256_32} of its signs agree
with a fresh attack's, little more than by chance. No loss of accuracy is visible: from τ = 0 to τ = 32 it changes
by {accuracy_64_32}, {accuracy_256_32} and {accuracy_898_32} points at batches of 64, 256 and 898. With three seeds
the intervals reach two points, so the study finds no harm here but does not prove that there is none."""
CLAIMS: dict[str, Any] = {
    "the gain falls with τ": lambda n: all(
        n[f"gain_ratio_{batch}_{old}"].high < n[f"gain_ratio_{batch}_{young}"].low
        for batch in (64, 256, 898)
        for young, old in ((0, 1), (1, 4), (4, 8), (8, 16), (16, 32))
    ),
    "signs fall towards chance": lambda n: 0.5 < n["sign_agreement_256_32"].value < 0.6,
    "no accuracy is clearly lower": lambda n: (
        not any(
            n[f"accuracy_{batch}_{tau}"].below for batch in (64, 256, 898) for tau in (1, 2, 4, 8, 16, 32)
        )
    ),
}

STUDY = Study("staleness", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
