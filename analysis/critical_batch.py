"""Where does a larger batch stop saving steps? Gradient noise scale along training, and steps to a target.

Regime: digits, the six-conv network, SGD at a constant learning rate after five steps of warm-up, vanilla; a run
reaches the target at the first evaluation, made every second step, with a test accuracy of 97 %. Each batch uses its
best learning rate of one grid, the same for all; choosing it this way biases step counts downwards. The noise scale is
measured for the training loss on all 898 images, from groups of 32 (McCandlish et al. 2018), along vanilla training at
batch 64. For comparison: MLPerf's public reference points for ResNet-50 on ImageNet (mlcommons/logging,
rcps_resnet.json of training 4.0), epochs to 75.9 % converted to steps.

    python -m analysis.critical_batch --scale full       about 5 minutes on one core; figure and table: --from-results
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arms import TRAIN_IMAGES
from analysis.estimates import mean
from analysis.measuring import trained
from analysis.study import RESULTS, Options, Study, run_all
from conadv_lab.config import Config
from conadv_lab.displays import markdown
from conadv_lab.recipes import digits

if TYPE_CHECKING:
    import pandas as pd

TARGET = 97.0
EVALUATE_EVERY = 2
LONGEST = {16: 224, 32: 160, 64: 112, 128: 80, 256: 60, 512: 44, 898: 44}
METHODS = ("vanilla",)
GROUP = 32
MLPERF = RESULTS / "mlperf_resnet50.csv"
IMAGENET_IMAGES = 1_281_167
PLANS: dict[str, dict[str, Any]] = {
    "smoke": {"batches": (64, 898), "rates": (0.2,), "seeds": (0, 1), "longest": 12, "noise_steps": (0, 4, 8)},
    "small": {"batches": (32, 128, 898), "rates": (0.1, 0.2), "seeds": (0, 1), "longest": 0,
              "noise_steps": (0, 8, 16, 32, 56)},
    "full": {"batches": (16, 64, 256, 898), "rates": (0.05, 0.1, 0.2, 0.4), "seeds": (0, 1, 2), "longest": 0,
             "noise_steps": (0, 4, 8, 16, 32, 56, 112, 224)},
}  # fmt: skip


def plan(scale: str) -> list[Config]:
    """The runs to the target."""
    chosen = PLANS[scale]
    return [
        _config(method, batch, chosen["longest"] or LONGEST[batch], lr, seed).replace(
            evaluate_every=EVALUATE_EVERY
        )
        for seed in chosen["seeds"] for batch in chosen["batches"] for lr in chosen["rates"] for method in METHODS
    ]  # fmt: skip


def sweep() -> list[Config]:
    """The full scale's runs, for ``submit sweep analysis/critical_batch.py:sweep``."""
    return plan("full")


def steps_to_target(config: Config, path: Path) -> dict[str, Any]:
    """Train and look up the first evaluation that reached the target; None where none did."""
    from conadv_lab.runs import RunFolder

    figures = trained(config, path)
    evaluated = {
        line["step"] + 1: line["test_accuracy"]
        for line in RunFolder(path).metrics()
        if "test_accuracy" in line
    } | {figures["steps"]: figures["test_accuracy"]}
    there = [step for step, accuracy in sorted(evaluated.items()) if accuracy >= TARGET]
    return {"steps_to_target": there[0] if there else None, "seconds": figures["seconds"]}


def noise_along(config: Config, path: Path) -> dict[str, Any]:
    """Train vanilla and measure the gradient noise scale before the steps of the plan."""
    import shutil

    from conadv_lab import sharpness
    from conadv_lab.models.norm import plain_batch_norm
    from conadv_lab.training.evaluate import calibrated_copy, fixed_images
    from conadv_lab.training.loop import prepare

    shutil.rmtree(path, ignore_errors=True)  # an interrupted run has lost its measurements
    run = prepare(config, path, progress="none")
    assert run is not None
    found = []

    def look() -> None:
        judged = plain_batch_norm(calibrated_copy(run.parts, run.parts.model))
        batch = fixed_images(run.parts.train_set, TRAIN_IMAGES)
        report = sharpness.measure(judged, run.parts.criterion, [batch], ("gradient_noise_scale",), m=GROUP)
        measure = report["gradient_noise_scale"]
        found.append({"step": run.step, "noise_scale": measure.value, "error": measure.error})

    with run.saver:
        run.start()
        while run.step < run.parts.stream.steps:
            if run.step in NOISE_STEPS:
                look()
            run.train_step()
        run.finish()
        look()
    return {"noise": found, "seconds": (run.folder.result() or {})["seconds"]}


NOISE_STEPS = frozenset(step for chosen in PLANS.values() for step in chosen["noise_steps"])


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    import pandas as pd

    chosen = PLANS[given.scale]
    configs = plan(given.scale)
    found = run_all(configs, given, steps_to_target, "steps.json")
    rows = [
        {
            "kind": "steps to target",
            "method": config.method.method,
            "global_batch": config.training.global_batch,
            "lr": config.optimization.lr,
            "seed": config.training.seed,
            "steps": found[config]["steps_to_target"],
            "longest": config.training.steps,
        }
        for config in configs
        if config in found
    ]
    along = [_config("vanilla", 64, max(chosen["noise_steps"]), 0.1, seed) for seed in chosen["seeds"]]
    noise = run_all(along, replace(given, runs=given.runs / "probed"), noise_along, "noise.json")
    rows += [
        {
            "kind": "noise scale", "method": "vanilla", "global_batch": 64, "lr": 0.1, "seed": config.training.seed,
            "steps": point["step"], "noise_scale": point["noise_scale"], "noise_error": point["error"],
        }
        for config in noise for point in noise[config]["noise"]
    ]  # fmt: skip
    seconds = sum(figures["seconds"] for figures in [*found.values(), *noise.values()])
    return pd.DataFrame(rows), {"runs": len(found) + len(noise), "run_seconds": round(seconds)}


def _config(method: str, batch: int, steps: int, lr: float, seed: int) -> Config:
    return digits.vanilla().replace(
        method=method,
        global_batch=batch,
        steps=steps,
        warmup_steps=5,
        schedule="constant",
        lr=lr,
        seed=seed,
        log_every=1_000_000,
        checkpoint_every=1_000_000,
    )


def best_steps(rows: "pd.DataFrame") -> "pd.DataFrame":
    """For every method and batch, the learning rate with the fewest steps among those where every seed succeeded."""
    own = rows[rows["kind"] == "steps to target"]
    by = ["method", "global_batch", "lr"]
    arrived = own.groupby(by).filter(lambda group: bool(group["steps"].notna().all()))
    means = arrived.groupby(by, as_index=False)["steps"].mean()
    chosen = means.loc[means.groupby(["method", "global_batch"])["steps"].idxmin(), by]
    return arrived.merge(chosen, on=by)


def draw(rows: "pd.DataFrame") -> Any:
    import pandas as pd
    from matplotlib import pyplot as plt

    from conadv_lab.plots import curves

    figure, axes = plt.subplots(1, 3, figsize=(14.5, 4.3), layout="constrained")
    noise = rows[rows["kind"] == "noise scale"].assign(run=lambda r: r["seed"].map("seed {}".format))
    curves(
        noise.assign(noise_scale=noise["noise_scale"].where(noise["noise_scale"] > 0)), "steps", "noise_scale",
        "step of vanilla training", "gradient noise scale (images)",
        hue="run", logy=True, ax=axes[0],
    )  # fmt: skip
    axes[0].set_title("digits, batch 64")
    best = best_steps(rows)
    label = f"steps to {TARGET:g} % test accuracy; bars: 95 % t intervals"
    curves(best, "global_batch", "steps", f"global batch (images); n = {best['seed'].nunique()} seeds", label,
           hue="method", logx=True, logy=True, ax=axes[1])  # fmt: skip
    axes[1].set_title("digits, best learning rate per batch")
    public = pd.read_csv(MLPERF)
    public["steps"] = public["epochs_to_target"] * IMAGENET_IMAGES / public["global_batch"]
    public["source"] = "MLPerf reference points"
    curves(public, "global_batch", "steps", "global batch (images); one public value each",
           "steps to 75.9 % top-1", hue="source", logx=True, logy=True, ax=axes[2])  # fmt: skip
    axes[2].set_title("ResNet-50, ImageNet (mlcommons/logging)")
    for ax, own in ((axes[1], best), (axes[2], public)):
        smallest = own["global_batch"].min()
        first = own.loc[own["global_batch"] == smallest, "steps"].mean()
        ends = [smallest, own["global_batch"].max()]
        ax.plot(ends, [first, first * ends[0] / ends[1]], color="black", linestyle=":", linewidth=1,
                label="twice the batch, half the steps")  # fmt: skip
    for ax in axes:
        ax.legend(frameon=False, fontsize="small")
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``METHOD_BATCH`` steps to the target, the noise scale by step, and how far steps fall from batch to batch."""
    best = best_steps(rows)
    found: dict[str, Any] = {}
    for name, own in best.groupby(best["method"] + "_" + best["global_batch"].astype(int).astype(str)):
        found[str(name)] = mean(own["steps"].tolist(), decimals=0)
    for batch in best["global_batch"].unique():
        found[f"rate_{int(batch)}"] = float(best.loc[best["global_batch"] == batch, "lr"].iloc[0])
    for method, own in best.groupby("method"):
        steps = own.groupby("global_batch")["steps"].mean()
        for small, large in itertools.pairwise(steps.index):
            found[f"{method}_{small}_to_{large}"] = f"{steps[small] / steps[large]:.1f}"
    noise = rows[rows["kind"] == "noise scale"]
    for step in noise["steps"].unique():
        own = noise[noise["steps"] == step]
        found[f"noise_{int(step)}"] = mean(own["noise_scale"].tolist(), decimals=0)
    found["table"] = _table(best)
    return found


def _table(best: "pd.DataFrame") -> str:
    sizes = sorted(best["global_batch"].unique())
    lines = []
    for method in best["method"].unique():
        cells = []
        for size in sizes:
            own = best[(best["method"] == method) & (best["global_batch"] == size)]["steps"].tolist()
            cells.append(mean(own, decimals=0) if own else "not reached")
        lines.append([method, *cells])
    return markdown([f"steps to {TARGET:g} %", *(f"batch {size}" for size in sizes)], lines)


CONCLUSION = """\
On digits, quadrupling the batch divides the number of steps to the target by {vanilla_16_to_64} from 16 to 64
images and by {vanilla_64_to_256} from 64 to 256, and going on to the whole set divides it by no more than
{vanilla_256_to_898}; each batch uses the best learning rate of a grid, which at 16, at 64 and with the whole set
lies at an edge of the grid. The gradient noise scale is {noise_8} images at step 8 and, with wide intervals,
{noise_32} at step 32 and {noise_56} at step 56: it passes through the batch sizes at which larger batches stop
saving steps. MLPerf's public points bend in the same way at far larger batches, with savings nearly proportional up
to 8K and almost none beyond 50K, for different data, network, optimiser and target."""
CLAIMS: dict[str, Any] = {
    "savings shrink as the batch grows": lambda n: (
        float(n["vanilla_16_to_64"]) > 4 > 2 * float(n["vanilla_64_to_256"])
        and 1.5 > float(n["vanilla_256_to_898"]) > 1
    ),
    "the grid's ends are the best at three batches": lambda n: (
        n["rate_16"] == n["rate_64"] == min(PLANS["full"]["rates"])
        and n["rate_898"] == max(PLANS["full"]["rates"])
    ),
    "the noise scale rises through the batches between": lambda n: (
        n["noise_8"].high < 64 < n["noise_32"].value < n["noise_56"].value < 898
    ),
}

STUDY = Study("critical_batch", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
