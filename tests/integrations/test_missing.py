"""No adapter needs another's library, none is imported before it is used, and a missing one is one sentence."""

import subprocess
import sys

import pytest
from torch import nn

from conadv_lab import extras
from conadv_lab.integrations import huggingface, lightning
from conadv_lab.integrations.probe import SharpnessProbe

LIBRARIES = ("lightning", "pytorch_lightning", "transformers", "accelerate", "wandb", "mlflow", "tensorboard")


def test_importing_the_adapters_imports_none_of_their_libraries():
    code = (
        "import sys, conadv_lab.integrations.lightning, conadv_lab.integrations.huggingface\n"
        "import conadv_lab.integrations.accelerate, conadv_lab.training.loggers\n"
        f"print([name for name in {LIBRARIES} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_rest_of_the_package_imports_no_adapter():
    code = "import sys, conadv_lab.training.loop; print('conadv_lab.integrations' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (lightning.sharpness_callback, "lightning.pytorch"),
        (lambda probe: huggingface.sharpness_callback(probe, None), "transformers"),
    ],
)
def test_a_missing_library_is_one_sentence(make, missing, monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(extras, "import_module", absent)
    probe = SharpnessProbe(nn.CrossEntropyLoss(), [])
    message = rf"needs {missing}, which is not installed: pip install 'conadv-lab\[adapters\]'$"
    with pytest.raises(ValueError, match=message):
        make(probe)
