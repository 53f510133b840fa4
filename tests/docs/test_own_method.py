"""The guide's method of one's own is a file that runs, and is the method that it says."""

from pathlib import Path

import torch

from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.recipes.digits import vanilla
from conadv_lab.training.loop import train

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "examples" / "sam.py"


def test_the_guide_shows_the_file():
    text = FILE.read_text()
    assert text in (ROOT / "docs" / "guide.md").read_text()
    assert len(text.splitlines()) < 40


def test_it_trains_as_the_built_in_method(tmp_path):
    small = vanilla().replace(
        train_images=64,
        global_batch=32,
        micro_batch=16,
        steps=4,
        warmup_epochs=0,
        threads=1,
        precision="float64",
    )
    weights = []
    for name in (f"{FILE}:sam", "sam"):
        folder = train(small.replace(method=name), tmp_path / name.rpartition(":")[2][:3] / str(len(weights)))
        result = folder.result()
        assert (result["gradient_evaluations"], result["depth"]) == (2, 2)
        weights.append(read_checkpoint(folder.committed()[0])[1]["model"])
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-9, atol=1e-12), name
