# %% [markdown]
# # Flatness against batch size
#
# **You will see** four quantities plotted against the batch size, with a colour and a marker per method: test
# accuracy, the top Hessian eigenvalue λ, λ times the learning rate, and a sharpness measure that does not depend on
# the scale of the weights.
#
# **Needs** this package on a CPU. **Takes** about a minute and a half on one core. **Change** `BATCHES`, `METHODS`,
# `SEEDS` and `RATES`.
#
# Large batches are said to end in sharp minima. We train three methods for the same number of epochs at each batch
# size, and measure the solutions.

# %%
import json
import os
import tempfile
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot as plt

import conadv_lab as cl
from conadv_lab.intervals import over_seeds, t_interval
from conadv_lab.plots import figure_against_batch
from conadv_lab.recipes import find
from conadv_lab.training.evaluate import fixed_images
from conadv_lab.training.loop import train
from conadv_lab.training.restore import restore

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
METHODS = ("vanilla", "copy", "conadv")
BATCHES = (256, 898) if FAST else (64, 256, 898)
SEEDS = (0,) if FAST else (0, 1, 2)
RATES = {64: 0.1, 256: 0.2, 898: 0.4}
EPOCHS = 2 if FAST else 10
torch.set_num_threads(1)

# %% [markdown]
# ## Train
#
# `copy` is the control: a second pass over the same images, unchanged. A gain that `copy` shows too is not due to the
# attack.

# %%
folder = Path(tempfile.mkdtemp())
for method, batch, seed in product(METHODS, BATCHES, SEEDS):
    config = find("digits-vanilla")().replace(
        method=method, global_batch=batch, lr=RATES[batch], epochs=EPOCHS, seed=seed
    )
    train(config, folder / f"{method}-{batch}-{seed}", progress="none")
runs = cl.collect(folder / "*")
runs.groupby(["method", "global_batch"])["test_accuracy"].mean().unstack().round(2)

# %% [markdown]
# ## Measure
#
# Rescaling the layers without changing the function changes the top eigenvalue λ, but not the adaptive sharpness.
# Gradient descent tends to hold λ near 2/lr, so lr · λ is shown too.


# %%
def flatness(run: str, lr: float) -> dict:
    """Three measures of one run, on its first training images."""
    parts, judged = restore(run)
    report = cl.sharpness.measure(
        judged,
        parts.criterion,
        [fixed_images(parts.train_set, 128)],
        ("top_eigenvalue", "adaptive_worst"),
        adaptive_rhos=(1.0,),
    )
    top = report["top_eigenvalue"].value
    return {"λ": top, "lr · λ": lr * top, "adaptive": report["adaptive_worst"].value[1.0]}


measures = [flatness(run, lr) for run, lr in zip(runs["run"], runs["lr"], strict=True)]
measured = pd.concat([runs, pd.DataFrame(measures)], axis=1)

# %%
figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), layout="constrained")
for ax, (name, label, log) in zip(
    axes.flat,
    (
        ("test_accuracy", "test accuracy (%)", False),
        ("λ", "top eigenvalue λ", True),
        ("lr · λ", "learning rate · λ", True),
        ("adaptive", "adaptive worst rise, ρ = 1", True),
    ),
    strict=True,
):
    rows = over_seeds(measured, name, log=log)
    figure_against_batch(rows, name, label, log=log, spread="interval", ax=ax)
axes[0, 0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Check a number yourself
#
# Two JSON files in a run folder record what was asked for and what came out. From these alone, we compute ConAdv's
# lead over vanilla at the largest batch, and compare it with the table made from the same folders. If the folders of
# the [map of regimes](../docs/results.md#when-does-an-attack-pay) exist, this is one cell of the map; otherwise it is
# the lead of the runs above.

# %%
RUNS, TABLE = Path("../runs/studies/runs"), Path("../analysis/results/regimes.csv")
if not FAST and RUNS.exists():
    table = pd.read_csv(TABLE)
    reported = "dataset == 'cifar10' and train_images == 1280"  # not the trials, which held-out folds judged
else:
    RUNS, table, reported = folder, runs, "dataset == 'digits'"

records = []
for result in RUNS.glob("*/result.json"):
    config = json.loads(result.with_name("config.json").read_text())
    settings = {name: value for section in config.values() for name, value in section.items()}
    records.append(settings | json.loads(result.read_text()))
raw = pd.DataFrame(records).query(reported)


# %%
def leads(rows: pd.DataFrame) -> pd.Series:
    """ConAdv's lead over vanilla in points, seed by seed."""
    cell = rows[(rows["global_batch"] == rows["global_batch"].max()) & (rows["steps"] == rows["steps"].min())]
    by_seed = cell.pivot(index="seed", columns="method", values="test_accuracy")
    return by_seed["conadv"] - by_seed["vanilla"]


lead = leads(raw)
print(
    f"{lead.mean():+.2f} points from the folders, 95 % interval", [round(end, 2) for end in t_interval(lead)]
)
print(f"{leads(table).mean():+.2f} points from the table")

# %% [markdown]
# **What this shows.** λ grows with the batch for every method. Much of that is due to the number of steps: in the
# same number of epochs, a large batch takes few. The learning rates here were not tuned for each method, and three
# seeds give wide intervals.
#
# **What to try next.** Add `"recycled"` or `"disadv"` to `METHODS`; measure `"trace"` as well.
# `python -m analysis.flatness_vs_batch` asks the same question with tuned learning rates, up to ten seeds and all
# controls.
