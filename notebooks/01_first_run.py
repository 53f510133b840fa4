# %% [markdown]
# # A first ConAdv run, step by step
#
# **You will see** twenty ConAdv steps written out by hand, what the attack does to an image, and a whole run of
# ConAdv beside vanilla (plain) training, with losses and accuracies.
#
# **Needs** this package on a CPU; the digits come with scikit-learn. **Takes** about a minute on one core.
# **Change** `METHOD`, `EPSILON`, `BATCH` and `EPOCHS` below.
#
# ConAdv trains each step on clean images and on adversarial ones made with the weights of τ steps ago.

# %%
import os
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import conadv_lab as cl
from conadv_lab.data.digits import load_digits
from conadv_lab.frames import frame_of_metrics
from conadv_lab.models.digits import DigitsCNN
from conadv_lab.plots import curves
from conadv_lab.recipes import find
from conadv_lab.training.loop import train

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
METHOD, EPSILON, BATCH = "conadv", 0.1, 256
EPOCHS = 2 if FAST else 16
torch.set_num_threads(1)

# %% [markdown]
# ## Data and model
#
# Images are floats in [0, 1]. `mixture_batch_norm` gives every batch norm a second branch for adversarial
# images, whose statistics differ from those of clean ones.

# %%
train_images, train_labels, _, _ = load_digits()
images = train_images.float() / 255
loader = [(images[i : i + BATCH], train_labels[i : i + BATCH]) for i in range(0, len(images), BATCH)]

torch.manual_seed(0)
model = cl.mixture_batch_norm(DigitsCNN())
print(sum(parameter.numel() for parameter in model.parameters()), "parameters")

# %% [markdown]
# ## Twenty steps by hand
#
# `lookahead` yields steps that can see ahead: at step t the batch of step t + τ is attacked with the current weights,
# and the result is kept until it is needed. No step waits for its own attack.

# %%
attack = cl.SignAttack(epsilon=EPSILON)
method = cl.ConAdv(attack, staleness=1, weights=(0.5, 0.5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
criterion = torch.nn.CrossEntropyLoss()
history = []
for step in cl.lookahead(loader, steps=20, ahead=method.lookahead):
    losses = method.backward(model, step, criterion)
    optimizer.step()
    optimizer.zero_grad()
    history.append((losses.clean.item(), losses.adversarial.item()))
print(
    f"clean loss {history[0][0]:.2f} -> {history[-1][0]:.2f}, adversarial {history[0][1]:.2f} -> {history[-1][1]:.2f}"
)

# %% [markdown]
# ## What the attack does
#
# Each pixel moves by at most ε along the sign of the loss's gradient, so only one bit per pixel is stored.

# %%
batch = next(iter(step.batches()))
attacked = attack.apply(batch, attack.perturb(model, batch, criterion))
figure, axes = plt.subplots(2, 6, figsize=(7, 2.6), layout="constrained")
for column in range(6):
    for row, pixels in enumerate((batch.images, attacked)):
        axes[row, column].imshow(pixels[column, 0], cmap="gray", vmin=0, vmax=1)
        axes[row, column].set_axis_off()
figure.suptitle(f"clean (above) and attacked with ε = {EPSILON} (below)", fontsize="medium")
plt.show()

# %% [markdown]
# ## A whole run
#
# `train` also handles the schedule, checkpoints, evaluation and a run folder that can be resumed. On the command line
# this is `python -m conadv_lab.train digits-conadv`. We also train vanilla, on the same stream of images.

# %%
folder = Path(tempfile.mkdtemp())
runs = {}
for name in ("vanilla", METHOD):
    config = find("digits-vanilla")().replace(
        method=name, epsilon=EPSILON, global_batch=BATCH, epochs=EPOCHS, lr=0.2, log_every=2, evaluate_every=4
    )
    runs[name] = train(config, folder / name, progress="none")
    result = runs[name].result()
    print(
        f"{name:8} test accuracy {result['test_accuracy']:.2f} %, "
        f"{result['gradient_evaluations']:.2f} gradient evaluations and depth {result['depth']} a step"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
metrics = frame_of_metrics(runs)
curves(metrics, "step", "loss", "step", "clean training loss", hue="run", logy=True, ax=axes[0])
curves(
    metrics.dropna(subset="test_accuracy"),
    "step",
    "test_accuracy",
    "step",
    "test accuracy (%)",
    hue="run",
    ax=axes[1],
)
plt.show()

# %% [markdown]
# **What this shows.** How a step works, and that it trains. One seed on an easy data set says nothing about which
# method is better. For that, notebook 02 has seeds and a control, and the [studies](../docs/results.md) also tune
# learning rates.
#
# **What to try next.** `METHOD = "recycled"` or `"disadv"`; a larger `EPSILON`; the whole set as one batch
# (`BATCH = 898`). Notebook 07 does the same with your own model and data.
