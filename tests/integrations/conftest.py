"""What every adapter is compared with: our own loop's parameters after five steps, and the batches it saw."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.integrations import five_steps


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> dict[str, torch.Tensor]:
    return five_steps.trained_by_us(tmp_path_factory.mktemp("ours") / "run")


@pytest.fixture(scope="session")
def batches(tmp_path_factory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return five_steps.batches(tmp_path_factory.mktemp("stream") / "run")


def assert_equal_parameters(
    model: torch.nn.Module, state: dict[str, torch.Tensor], within: float = 1e-9
) -> None:
    """Running statistics too."""
    assert any(value.dtype == torch.float64 for value in state.values())
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name], rtol=0, atol=within), name


LIBRARIES = {
    "test_lightning": ("PyTorch Lightning", ["lightning"]),
    "test_huggingface": ("Hugging Face Trainer", ["transformers", "accelerate"]),
    "test_tokens": ("Token models: a tiny BERT's embeddings", ["transformers", "accelerate"]),
    "test_accelerate": ("Hugging Face Accelerate", ["accelerate"]),
    "test_ddp": ("DistributedDataParallel, two ranks", ["torch"]),
    "test_architectures": (
        "Fourteen architectures: ConAdv, sharpness, torch.export, ONNX",
        ["transformers", "onnx", "onnxscript"],
    ),
    "test_timm": (
        "timm's EfficientNet, MobileNet V2 and V3, RegNet, ResNet, ConvNeXt, ViT, NFNet",
        ["timm", "onnx", "onnxscript"],
    ),
    "test_tensorboard": ("TensorBoard", ["tensorboard"]),
    "test_wandb": ("Weights & Biases, offline", ["wandb"]),
    "test_mlflow": ("MLflow, a local store", ["mlflow-skinny"]),
}
"""What a test is of, by how its file or its own name begins."""
_passed: dict[str, int] = {}
_others: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file, _, name = report.nodeid.partition("::")
    for key in LIBRARIES:
        if Path(file).stem == key or name.startswith(key):
            if report.failed:
                _others.add(key)
            elif report.passed and report.when == "call":
                _passed[key] = _passed.get(key, 0) + 1


def pytest_sessionfinish() -> None:
    """Write the table of the documents, where make test-adapters asks for it."""
    if page := os.environ.get("CONADV_WORKS_WITH"):
        file = Path(page)
        before, start, rest = file.read_text(encoding="utf-8").partition("<!-- works with -->\n")
        end = rest[rest.index("<!-- /works with -->") :]
        file.write_text(before + start + works_with(_passed, _others) + end, encoding="utf-8")


def works_with(passed: dict[str, int], others: set[str]) -> str:
    """A row for each library of whose tests some passed and none failed; ``others`` are those with a failure."""
    lines = ["| | versions | tests |", "|---|---|---|"]
    for key, (title, packages) in LIBRARIES.items():
        if passed.get(key) and key not in others:
            told = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys([*packages, "torch"]))
            lines.append(f"| {title} | {told} | {passed[key]} |")
    return "\n".join(lines) + "\n"
