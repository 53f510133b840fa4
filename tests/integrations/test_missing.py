"""No adapter needs another's library, none is imported before it is used, and a missing one is one sentence."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn

from conadv_lab import extras
from conadv_lab.integrations import huggingface, lightning
from conadv_lab.integrations.probe import SharpnessProbe
from tests.integrations import examples

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


BLOCK = """
import sys
from importlib.metadata import Distribution, PackageNotFoundError

def from_name(name, found=Distribution.from_name):
    if name.replace("-", "_") in names:
        raise PackageNotFoundError(name)
    return found(name)

Distribution.from_name = from_name
sys.modules.update(dict.fromkeys(names))
"""


def without(names: set[str], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own in which these packages are not installed: no import, and no version."""
    return subprocess.run(
        [sys.executable, "-c", f"names = {sorted(names)}\n{BLOCK}\n{code}"],
        capture_output=True, text=True, cwd=folder, timeout=300,
    )  # fmt: skip


OWN = {
    "lightning": {"lightning"},
    "transformers": {"transformers", "accelerate"},
    "accelerate": {"accelerate"},
}
"""What each library cannot do without: the Trainer itself needs Accelerate."""


@pytest.mark.slow
@pytest.mark.parametrize("library", OWN)
def test_each_adapter_runs_without_the_others_libraries(library, tmp_path):
    if any(find_spec(name) is None for name in OWN[library]):
        pytest.skip("the extra [adapters] is not installed")
    others = {*LIBRARIES, "mlflow_skinny", "onnx", "onnxscript", "timm"} - OWN[library]
    run = without(others, examples.of(library), tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_logger_ends_in_one_sentence_and_leaves_nothing(package, tmp_path):
    words = ["train", "digits-vanilla", "--log-to", package, "--out", "run"]
    code = f"sys.argv = {words}\nfrom conadv_lab.train import main\nsys.exit(main())"
    run = without({package}, code, tmp_path)
    assert run.returncode == 2
    needs = f"log_to {package!r} needs {package}, which is not installed: pip install 'conadv-lab[adapters]'"
    assert run.stderr.strip().endswith(needs)
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()
