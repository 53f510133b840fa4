"""What does a step cost by local batch and method on one device, compared with counted arithmetic and the simulator?

Regime: digits, the six-conv network, and at full scale ResNet-18 on synthetic images of 32 pixels; one device, one
thread on a CPU, attack and step one after the other. Methods are timed in turn, round after round, so that a varying
load on the machine affects all alike; a ratio is the median over rounds of a method's time over vanilla's in the same
round. On a device without spare capacity ConAdv saves nothing: this study is about arithmetic, not depth.

    python -m analysis.cost --scale full       about 2 minutes on one core, on a quiet machine

The column ``predicted_ratio`` is filled where `conadv_lab.staleness.simulate` knows this machine, else empty. GPUs: not
measured; the command is the same.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from analysis.estimates import rows_of
from analysis.study import Options, Study
from conadv_lab.displays import markdown

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("vanilla", "disadv", "conadv", "recycled", "recycled-equal")
PLANS: dict[str, dict[str, Any]] = {
    "smoke": {"batches": {"digits-cnn": (8, 64)}, "rounds": 5},
    "small": {"batches": {"digits-cnn": (4, 16, 64, 256)}, "rounds": 15},
    "full": {"batches": {"digits-cnn": (2, 8, 32, 128, 512), "resnet18": (2, 8)}, "rounds": 9},
}


def measure(given: Options) -> tuple["pd.DataFrame", dict[str, Any]]:
    import pandas as pd
    import torch

    torch.set_num_threads(1)
    chosen = PLANS[given.scale]
    rows = [
        row
        for model, sizes in chosen["batches"].items()
        for batch in sizes
        for row in _timed(model, batch, chosen["rounds"])
    ]
    return pd.DataFrame(rows), {"rounds": chosen["rounds"]}


def _timed(model: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    from benchmarks.harness import interleaved
    from benchmarks.step import our_run

    with tempfile.TemporaryDirectory() as scratch:
        runs = {method: our_run(model, method, batch, Path(scratch)) for method in METHODS}
        for _ in range(3):  # recycled methods have images to recycle only from the second step on
            for run in runs.values():
                run.train_step()
        steps = _steps_a_call(runs["vanilla"].train_step)
        times = interleaved(
            {method: _repeated(run.train_step, steps) for method, run in runs.items()}, rounds
        )
        predicted = _predicted({method: run.config for method, run in runs.items()})
    rows = []
    for method, run in runs.items():
        pairs = zip(times.seconds[method], times.seconds["vanilla"], strict=True)
        ratios = [own / vanilla for own, vanilla in pairs]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        rows.append({
            "model": model, "batch": batch, "method": method,
            "milliseconds": 1e3 * times.median(method) / steps,
            "ratio": median(ratios), "ratio_low": low, "ratio_high": high,
            "arithmetic": run.parts.method.gradient_evaluations,
            "predicted_ratio": predicted.get(method),
        })  # fmt: skip
    return rows


def _steps_a_call(step: Callable[[], None]) -> int:
    """Enough steps for a timed call of about 50 ms; a single short step would mostly measure interruptions."""
    started = time.perf_counter()
    step()
    return max(1, round(0.05 / (time.perf_counter() - started)))


def _repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            step()

    return several


def _predicted(configs: dict[str, Any]) -> dict[str, float]:
    """The simulator's step times on one device of this machine, relative to vanilla; empty if it is not modelled."""
    try:
        from conadv_lab.staleness import simulate  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return {}
    try:
        found = {
            method: float(
                simulate("this-machine", config, method, devices=1, placement="serial")["step_ms"].iloc[0]
            )
            for method, config in configs.items()
        }
    except ValueError:  # a network whose arithmetic the simulator does not know
        return {}
    return {method: value / found["vanilla"] for method, value in found.items()}


def draw(rows: "pd.DataFrame") -> Any:
    from matplotlib import pyplot as plt

    from conadv_lab.plots import look_of

    models = list(rows["model"].unique())
    figure, axes = plt.subplots(
        1, len(models), figsize=(5.4 * len(models), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    for ax, model in zip(axes.flat, models, strict=True):
        for method in METHODS[1:]:
            own = rows[(rows["model"] == model) & (rows["method"] == method)]
            look = look_of(method)
            spread = [own["ratio"] - own["ratio_low"], own["ratio_high"] - own["ratio"]]
            ax.errorbar(own["batch"], own["ratio"], yerr=spread, capsize=2.5, linewidth=1.2, **look)
            ax.axhline(own["arithmetic"].iloc[0], color=look["color"], linewidth=1.0, linestyle=":")
            if own["predicted_ratio"].notna().any():
                ax.plot(
                    own["batch"], own["predicted_ratio"], color="black", linewidth=1.0, linestyle=(0, (6, 4))
                )
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(rows.loc[rows["model"] == model, "batch"].unique()))
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_xlabel("clean images per step on the device")
        ax.set_ylabel("step time / vanilla's (bars: quartiles)")
        ax.set_title(f"{model} (dotted: arithmetic, dashed: simulator)")
        ax.grid(axis="y", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    return figure


def numbers(rows: "pd.DataFrame") -> dict[str, Any]:
    """``MODEL_METHOD_BATCH`` ratios as text, smallest and largest batch, and a table."""
    found: dict[str, Any] = {}
    for model in rows["model"].unique():
        own = rows[rows["model"] == model]
        for batch in (own["batch"].min(), own["batch"].max()):
            for method in METHODS[1:]:
                (row,) = rows_of(own, batch=batch, method=method).to_dict("records")
                end = "small" if batch == own["batch"].min() else "large"
                found[f"{model}_{method}_{end}".replace("-", "_")] = row["ratio"]
    found["table"] = _table(rows)
    return found


def _table(rows: "pd.DataFrame") -> str:
    lines = []
    for model, batch in dict.fromkeys(zip(rows["model"], rows["batch"], strict=True)):
        own = {row["method"]: row for row in rows_of(rows, model=model, batch=batch).to_dict("records")}
        cells = [
            f"{own[m]['ratio']:.2f} ({own[m]['ratio_low']:.2f}–{own[m]['ratio_high']:.2f})"
            for m in METHODS[1:]
        ]
        lines.append([f"{model}, {batch}", f"{own['vanilla']['milliseconds']:.2f}", *cells])
    return markdown(["model, local batch", "vanilla (ms)", *METHODS[1:]], lines)


CONCLUSION = """\
On one device ConAdv saves nothing over DisAdv: a step of ResNet-18 at batch 8 takes {resnet18_conadv_large:.2f}
times as long as vanilla's with ConAdv and {resnet18_disadv_large:.2f} times with DisAdv, where counting arithmetic
predicts 8/3. Recycled ConAdv takes {resnet18_recycled_large:.2f} times as long, and recycled-equal, which trains on
as many images as vanilla, {resnet18_recycled_equal_large:.2f} times. In small steps of the small network, overheads
weigh more than the simulator predicts: at batch 2 ConAdv takes {digits_cnn_conadv_small:.2f} times as long as
vanilla and recycled-equal {digits_cnn_recycled_equal_small:.2f} times."""
CLAIMS: dict[str, Any] = {
    "ConAdv takes what DisAdv takes": lambda n: (
        0.85 < n["resnet18_conadv_large"] / n["resnet18_disadv_large"] < 1.15
    ),
    "both near 8/3": lambda n: abs(n["resnet18_conadv_large"] - 8 / 3) < 0.4,
    "recycled near 2": lambda n: abs(n["resnet18_recycled_large"] - 2) < 0.3,
    "recycled-equal near 1": lambda n: abs(n["resnet18_recycled_equal_large"] - 1) < 0.15,
    "small steps of the small network pay overheads": lambda n: (
        n["digits_cnn_conadv_small"] > 8 / 3 and n["digits_cnn_recycled_equal_small"] > 1.1
    ),
}

STUDY = Study("cost", __doc__, measure, draw, numbers, CONCLUSION, CLAIMS)

if __name__ == "__main__":
    sys.exit(STUDY.main())
