# %% [markdown]
# # From a sweep to a figure
#
# **You will see** one command submit a sweep of two methods, three learning rates and two seeds, then its table and a
# figure.
#
# **Needs** this package on a CPU; on a machine with SLURM the same cells submit the runs to the cluster.
# **Takes** about a minute on two cores. **Change** the lists of the sweep.
#
# A sweep is a command, its runs are folders, and `collect` reads them into a table: no server, no database.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib import pyplot as plt

import conadv_lab as cl
from conadv_lab.plots import points

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
folder = Path(tempfile.mkdtemp()) / "sweep"
epochs = "2" if FAST else "8"

# %% [markdown]
# ## Submit
#
# A value with commas is a list, and several lists make a grid: two methods, three learning rates and two seeds are
# twelve runs. `--dry-run` shows the plan and writes nothing. Repeating the command submits only missing runs.

# %%
words = ["digits-vanilla", "--method", "vanilla,conadv", "--lr", "0.1,0.4" if FAST else "0.1,0.2,0.4"]
words += ["--seed", "0" if FAST else "0,1", "--epochs", epochs, "--global-batch", "256"]
print("python -m conadv_lab.submit sweep", " ".join(words), "--out runs/mine")
sent = subprocess.run(
    [sys.executable, "-m", "conadv_lab.submit", "sweep", *words, "--out", str(folder)],
    capture_output=True,
    text=True,
    check=True,
)

# %% [markdown]
# ## Collect
#
# The table has one row per run, with every field of its config and its final figures. `submit collect DIR --csv FILE`
# does the same on the command line.

# %%
runs = cl.collect(folder / "*")
runs[["method", "lr", "seed", "state", "steps", "test_accuracy", "train_test_gap"]].round(2)

# %% [markdown]
# ## Draw

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
label = f"learning rate\nn = {runs['seed'].nunique()} seeds, bars 95 % t intervals"
points(runs, "lr", "test_accuracy", label, "test accuracy (%)", hue="method", ax=axes[0])
points(runs, "lr", "train_test_gap", label, "train − test accuracy (points)", hue="method", ax=axes[1])
plt.show()

# %% [markdown]
# **What to try next.** For a sweep that is not a grid, write a Python file that returns a list of configs, as the
# studies in `analysis/` do. `python -m conadv_lab.submit status DIR` shows the state of each run.
