# %% [markdown]
# # Planning a 96K run on a cluster
#
# **You will see** predicted step times and speed-ups from 128 to 4,096 devices, the cost of the whole run, and the
# fastest placement of the attack.
#
# **Needs** this package on a CPU, no cluster. **Takes** seconds. **Change** `CLUSTER` (a built-in name, or a
# TOML file with your constants), `DEVICES` and `RECIPE`.
#
# Before you rent 4,096 devices: how long does ResNet-50 at a global batch of 96K take with vanilla, DisAdv and
# ConAdv, and where should the attack run? **Every time below is predicted** by [a model](../docs/staleness.md) whose
# constants are fitted to MLPerf's public step times of vanilla training; no ConAdv step was measured on such a
# cluster.

# %%
import os

from matplotlib import pyplot as plt

from conadv_lab import staleness
from conadv_lab.plots import curves

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
CLUSTER = "h100"
RECIPE = "imagenet-resnet50-96k"
DEVICES = (256, 4096) if FAST else (128, 256, 512, 1024, 2048, 4096)
STEPS = 20 if FAST else 200

# %% [markdown]
# ## Attack and training one after the other
#
# Here DisAdv and ConAdv take the same time, so their lines in the figure below coincide. With few images per device,
# fixed costs outweigh arithmetic, and the depth of a step is what counts.

# %%
rows = staleness.simulate(
    CLUSTER, RECIPE, ["vanilla", "disadv", "conadv", "recycled"], devices=DEVICES, steps=STEPS
)
rows.pivot(index="devices", columns="method", values="step_ms").round(1)

# %% [markdown]
# ## Where to put the attack
#
# `serial`: the same device, one after the other. `stream`: the same device, concurrently with the step. `ranks`:
# separate devices, here one in five, which do not train.

# %%
placed = staleness.simulate(
    CLUSTER,
    RECIPE,
    "conadv",
    devices=DEVICES,
    placement=["serial", "stream", "ranks"],
    attackers=0.2,
    staleness=4,
    steps=STEPS,
)
disadv = rows[rows["method"] == "disadv"].set_index("devices")["step_ms"]
placed["speed-up"] = placed["devices"].map(disadv) / placed["step_ms"]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
curves(
    rows,
    "devices",
    "step_ms",
    "devices",
    "step time (ms, model)",
    hue="method",
    logx=True,
    logy=True,
    ax=axes[0],
)
curves(
    placed, "devices", "speed-up", "devices", "DisAdv's step time over ConAdv's (model)", hue="placement",
    logx=True, ax=axes[1],
)  # fmt: skip
axes[1].axhline(1.0, color="black", linewidth=0.8, linestyle=":")
plt.show()

# %% [markdown]
# ## The whole run
#
# The time includes failures and the work repeated after them; device-hours are what you pay for.

# %%
placed["minutes"] = 60 * placed["hours"]
shown = ["devices", "placement", "attackers", "images_per_device", "tau_mean", "minutes", "device_hours"]
placed[shown].round(2)

# %% [markdown]
# ## Which placement is the fastest?

# %%
best = staleness.best(CLUSTER, RECIPE, devices=max(DEVICES), staleness=4, steps=STEPS)
best[["placement", "attackers", "step_ms", "tau_mean", "device_hours"]].head(5).round(2)

# %% [markdown]
# **What to try next.** Measure a few steps of vanilla on your devices, fit the constants (`python -m
# conadv_lab.staleness timeline --calibrate RUN …`), and plan again. Whether accuracy holds at 96K is another
# question; the paper reports 75.3 % with ConAdv alone and 76.2 % with data augmentation (Liu et al. 2022,
# abstract).
