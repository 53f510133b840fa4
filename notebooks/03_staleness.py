# %% [markdown]
# # Staleness: how old may an attack be?
#
# **You will see** how quickly an attack goes stale: the share of its signs that a fresh attack would also choose,
# during training and against the staleness τ, and the effect on test accuracy.
#
# **Needs** this package on a CPU. **Takes** up to two minutes on one core. **Change** `TAUS`, `BATCH`, `RATES`
# and `STEPS`.
#
# ConAdv trains on images attacked with the weights of τ steps ago. A small learning rate moves the weights less, so τ
# should matter through τ times the learning rate.

# %%
import os
import tempfile
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot as plt

from conadv_lab.plots import curves, points
from conadv_lab.recipes import find
from conadv_lab.training.loop import train

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
TAUS = (1, 4) if FAST else (1, 2, 4, 8, 16)
RATES = (0.2,) if FAST else (0.05, 0.2)
STEPS, BATCH = (12 if FAST else 40), 128
torch.set_num_threads(1)

# %% [markdown]
# ## Train with every τ
#
# With `probe_every` the run compares its pending attack with a fresh one and writes the share of equal signs to
# `metrics.jsonl`. Half of the signs agree by chance.

# %%
folder = Path(tempfile.mkdtemp())
rows, finals = [], []
for tau, lr in product(TAUS, RATES):
    config = find("digits-conadv")().replace(
        staleness=tau, lr=lr, global_batch=BATCH, steps=STEPS, warmup_steps=STEPS // 8, probe_every=2
    )
    run = train(config, folder / f"{tau}-{lr}", progress="none")
    for line in run.metrics():
        if "sign_agreement" in line:
            rows.append({"τ": tau, "lr": lr, "step": line["step"], "agreement": line["sign_agreement"]})
    finals.append({"τ": tau, "lr": lr, "test accuracy": run.result()["test_accuracy"]})
probes = pd.DataFrame(rows)

# %% [markdown]
# ## During training
#
# The first τ steps train on images attacked with the initial weights, so the age of the attack grows from 0 to τ
# during them.

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
shown = probes[probes["lr"] == max(RATES)].assign(kind=lambda row: row["τ"].map("τ = {}".format))
curves(shown, "step", "agreement", f"step (learning rate {max(RATES)})", "share of signs equal to a fresh attack's",
       hue="kind", ax=axes[0])  # fmt: skip
labelled = probes.assign(rate=probes["lr"].map("lr {}".format))
means = labelled.groupby(["τ", "rate"], as_index=False)["agreement"].mean()
curves(means, "τ", "agreement", "staleness τ (steps)", "share of equal signs, mean over the run", hue="rate",
       logx=True, ax=axes[1])  # fmt: skip
for ax in axes:
    ax.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    ax.legend(frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# ## Effect on the result

# %%
fig, ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
points(
    pd.DataFrame(finals),
    "τ",
    "test accuracy",
    "staleness τ (steps); one seed",
    "test accuracy (%)",
    hue="lr",
    ax=ax,
)
plt.show()

# %% [markdown]
# **What this shows.** Signs go stale within a few steps; how much of the attack's effect is lost with them is a
# separate question. One seed cannot distinguish the accuracies.
#
# **What to try next.** A larger `BATCH`, where a step moves the weights further; `first="clean"` in the config.
# `python -m analysis.staleness` adds seeds, three batch sizes, sharpness, and the loss that a stale attack adds
# relative to a fresh one.
