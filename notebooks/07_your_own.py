# %% [markdown]
# # ConAdv on your own model and data
#
# **You will see** a plain PyTorch model and data set, standing in for yours. Four changed lines turn the usual loop
# into ConAdv, and at the end a table compares the accuracy and sharpness of both solutions.
#
# **Needs** this package on a CPU. **Takes** under a minute on one core. **Change** `MyData`, `MyModel` and `LR`:
# the rest of the notebook only needs images in [0, 1] and class labels.

# %%
import os

import pandas as pd
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import conadv_lab as cl
from conadv_lab.models.norm import recalibrate
from conadv_lab.optim.groups import parameter_groups
from conadv_lab.plots import curves

FAST = os.environ.get("CONADV_LAB_FAST") == "1"
BATCH, LR, EPSILON = 256, 0.2, 0.1
STEPS = 12 if FAST else 80
torch.set_num_threads(1)

# %% [markdown]
# ## Your data and your model
#
# Any `Dataset` that returns floats in [0, 1] will do; this one shifts each image by up to a pixel. Normalisation
# belongs inside the model, so that the attack's ε is in image units.


# %%
class MyData(Dataset):
    """Handwritten digits of 8×8 pixels; the first half trains, the second half tests."""

    def __init__(self, train: bool) -> None:
        images, labels = load_digits(return_X_y=True)
        half = slice(None, 898) if train else slice(898, None)
        self.images = torch.tensor(images[half] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.labels, self.train = torch.tensor(labels[half]), train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.train:
            image = image.roll(int(torch.randint(-1, 2, ())), dims=-1)
        return image, self.labels[index]


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 0.3) / 0.37)


test_set = MyData(train=False)
plain_images = MyData(train=True).images, MyData(train=True).labels  # without shifts, for evaluation

# %% [markdown]
# ## The loop
#
# Four lines differ from a plain loop: the conversion of batch norm, the method, `lookahead` in place of the loader,
# and `method.backward` in place of `loss.backward`. `cl.Vanilla()` in the same loop is plain training. Weights (½, ½)
# keep the gradient as large as in plain training, so one learning rate suits both under SGD; LARS and LAMB do not need
# them.


# %%
def train(name: str, method) -> tuple[nn.Module, pd.DataFrame]:
    """The model after `STEPS` steps, and the loss on clean images at each."""
    torch.manual_seed(0)
    loader = DataLoader(MyData(train=True), batch_size=BATCH, shuffle=True, drop_last=True)
    model = cl.mixture_batch_norm(MyModel())  # 1: a second branch for adversarial images
    optimizer = torch.optim.SGD(parameter_groups(model, 5e-4), lr=LR, momentum=0.9)  # after the conversion
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    criterion, lines = nn.CrossEntropyLoss(), []
    for step in cl.lookahead(loader, steps=STEPS, ahead=method.lookahead):  # 2 and 3
        losses = method.backward(model, step, criterion)  # 4
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        lines.append({"step": step.number, "loss": losses.clean.item(), "method": name})
    recalibrate(model, plain_images[0].split(BATCH))  # the averages lag behind after so few steps
    return model.eval(), pd.DataFrame(lines)


attack = cl.SignAttack(epsilon=EPSILON)
methods = {"vanilla": cl.Vanilla(), "conadv": cl.ConAdv(attack, staleness=1, weights=(0.5, 0.5))}
trained = {name: train(name, method) for name, method in methods.items()}

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
losses = pd.concat([lines for _, lines in trained.values()])
losses["smoothed"] = losses.groupby("method")["loss"].transform(lambda values: values.rolling(3, 1).mean())
curves(losses, "step", "smoothed", "step", "training loss, clean images", hue="method", logy=True, ax=axes)
plt.show()

# %% [markdown]
# ## Accuracy and sharpness, side by side
#
# `plain_batch_norm` returns your model without the adversarial branch, with its own parameter names. `measure` takes
# any model, loss and batches; `facts` are recorded with the numbers. `compare` puts reports side by side.


# %%
def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        right = (model(test_set.images).argmax(1) == test_set.labels).float().mean()
        return round(100 * right.item(), 2)


batches = [(plain_images[0][:256], plain_images[1][:256])]
reports = {}
for name, (model, _) in trained.items():
    facts = {"method": name, "test_accuracy": accuracy(model), "split": "train", "augmentation": "none"}
    plain, wanted = cl.plain_batch_norm(model), ("top_eigenvalue", "trace", "sam_worst")
    reports[name] = cl.sharpness.measure(plain, nn.CrossEntropyLoss(), batches, wanted, facts=facts)
cl.sharpness.compare(reports)

# %% [markdown]
# A single report shows every number with its error, below the conditions under which the numbers hold.

# %%
reports["conadv"]

# %% [markdown]
# ## Use it elsewhere
#
# The plain model has your parameter names, so its weights load wherever yours do.

# %%
mine = MyModel()
mine.load_state_dict(cl.plain_batch_norm(trained["conadv"][0]).state_dict())
print(f"test accuracy {accuracy(mine.eval()):.2f} %")

# %% [markdown]
# **What to try next.** Another method in place of `cl.ConAdv`: `cl.DisAdv(attack)` waits for a fresh attack, and
# `cl.Recycled(EPSILON)` needs no attack pass at all. Try a larger `BATCH` with a larger `LR`, which is what ConAdv is
# for. Use several seeds before drawing conclusions: one run of each says little. For schedules, checkpoints and
# resuming, pass your model and data to `python -m conadv_lab.train` as
# `--model mine.py:model --dataset mine.py:data`.
