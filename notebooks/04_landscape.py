# %% [markdown]
# # The landscape between a small-batch and a large-batch solution
#
# **You will see** the loss on the straight line from a small-batch solution to a large-batch one, and around each of
# the two on a comparable scale.
#
# **Needs** this package on a CPU. **Takes** about a minute on one core. **Change** `SMALL`, `LARGE`, the
# learning rates and `METHOD`.
#
# Keskar et al. (2017) drew such a line: the loss looked flat around the small-batch solution and sharp around the
# large-batch one. But how wide a valley looks depends on the norm of the weights, so the second figure measures
# distances in units of each filter's norm.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt

from conadv_lab import sharpness
from conadv_lab.plots import curves
from conadv_lab.recipes import find
from conadv_lab.sharpness.measures.landscape import between, landscape, random_direction
from conadv_lab.training.evaluate import fixed_images
from conadv_lab.training.loop import train
from conadv_lab.training.restore import restore

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
METHOD = "vanilla"
SMALL, LARGE = (32, 0.1), (898, 0.4)  # batch, learning rate
EPOCHS = 2 if FAST else 16
POINTS = 9 if FAST else 41
torch.set_num_threads(1)

# %%
folder = Path(tempfile.mkdtemp())
solutions = {}
for label, (batch, lr) in {"small batch": SMALL, "large batch": LARGE}.items():
    config = find("digits-vanilla")().replace(method=METHOD, global_batch=batch, lr=lr, epochs=EPOCHS)
    run = train(config, folder / label, progress="none")
    parts, judged = restore(run.path)
    train_batch = fixed_images(parts.train_set, len(parts.train_set))
    test_batch = fixed_images(parts.test_set, len(parts.test_set))
    solutions[label] = {
        "train": sharpness.Problem(judged, parts.criterion, [train_batch]),
        "test": sharpness.Problem(judged, parts.criterion, [test_batch]),
    }
    print(f"{label} ({batch}): test accuracy {run.result()['test_accuracy']:.2f} %")

# %% [markdown]
# ## The line between the two solutions
#
# Position 0 is the small-batch solution, 1 the large-batch one. Running statistics are interpolated too, so
# the line ends at 1.05: beyond that, extrapolated variances would be negative.

# %%
positions = np.arange(-0.2, 1.051, 0.1 if FAST else 0.05)
rows = []
for split in ("train", "test"):
    line = between(solutions["small batch"][split], solutions["large batch"][split], positions)
    rows.append(pd.DataFrame({"position": positions, "loss": line.losses, "loss of": f"{split} images"}))
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
curves(
    pd.concat(rows), "position", "loss", "0: small batch, 1: large batch", "cross-entropy",
    hue="loss of", logy=True, ax=ax,
)  # fmt: skip
for place in (0, 1):
    ax.axvline(place, color="black", linewidth=0.8, linestyle=":")
plt.show()

# %% [markdown]
# ## Around each solution, on its own scale
#
# Along a random direction whose filters have the same norms as the weights' filters (Li et al. 2018), rescaling the
# layers changes nothing, so the two widths are comparable.

# %%
around = np.linspace(-1, 1, POINTS)
rows = []
for label, problems in solutions.items():
    problem = problems["train"]
    losses = landscape(problem, [random_direction(problem)], [around]).losses
    rows.append(pd.DataFrame({"distance": around, "loss": losses, "around": label}))
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
curves(
    pd.concat(rows), "distance", "loss", "distance, in units of each filter's norm", "training loss",
    hue="around", logy=True, ax=ax,
)  # fmt: skip
plt.show()

# %% [markdown]
# **What this shows.** One line and one direction for two runs. A barrier separates the two, so they are different
# solutions. That the line looks narrower on one side does not yet say anything about generalisation (Dinh et al.
# 2017).
#
# **What to try next.** `METHOD = "conadv"`; other seeds for the two solutions; a plane instead of a line with
# `landscape(problem, [first, second], [around, around])`.
