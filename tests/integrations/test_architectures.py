"""Architectures that people use, at tiny sizes: ConAdv trains them, sharpness is measured, the plain model exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import conadv_lab as cl
from conadv_lab import sharpness
from conadv_lab.models.mixture import MixtureBatchNorm
from conadv_lab.models.norm import has_batch_norm

CLASSES, PIXELS, STEPS = 4, 32, 3


def hugging_face(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A classifier of transformers' by its name, from a config: no weights are downloaded."""

    def made() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="the extra [adapters] is not installed")
        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **sizes)
        return Logits(getattr(transformers, f"{name}ForImageClassification")(config))

    return made


class Logits(nn.Module):
    """The output that an export can be compared by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def ours(function: str, **options: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        from importlib import import_module

        module, _, name = function.partition(":")
        return getattr(import_module(f"conadv_lab.models.{module}"), name)(**options)

    return made


TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "hf-resnet-basic": hugging_face(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
    ),
    "hf-resnet-bottleneck": hugging_face("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]),
    "hf-regnet": hugging_face("RegNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8),
    "hf-mobilenet-v1": hugging_face("MobileNetV1", depth_multiplier=0.25, image_size=PIXELS),
    "hf-mobilenet-v2": hugging_face("MobileNetV2", depth_multiplier=0.35, image_size=PIXELS),
    "hf-efficientnet": hugging_face(
        "EfficientNet", image_size=PIXELS, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320,
    ),
    "hf-vit": hugging_face("ViT", image_size=PIXELS, patch_size=8, **TRANSFORMER),
    "hf-deit": hugging_face("DeiT", image_size=PIXELS, patch_size=8, **TRANSFORMER),
    "hf-convnext": hugging_face("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "hf-convnext-v2": hugging_face("ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    # torch's converter to ONNX cannot take Swin's fused attention apart.
    "hf-swin": hugging_face(
        "Swin", image_size=PIXELS, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4,
        attn_implementation="eager",
    ),
    "hf-poolformer": hugging_face("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "resnet20": ours("resnet:resnet20", classes=CLASSES),
    "nf-resnet20": ours("nf_resnet:nf_resnet20", classes=CLASSES),
}  # fmt: skip
WITHOUT_BATCH_NORM = {
    "hf-vit",
    "hf-deit",
    "hf-convnext",
    "hf-convnext-v2",
    "hf-swin",
    "hf-poolformer",
    "nf-resnet20",
}

MEASURE = {"max_samples": 8, "deflate": 4}


def images_and_labels(count: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, PIXELS, PIXELS, generator=draw)
    return images, torch.arange(count) % CLASSES


def trained(made: Callable[[], nn.Module]) -> nn.Module:
    """Three ConAdv steps; every weight that learns has moved, those of both branches too."""
    torch.manual_seed(0)
    model = cl.mixture_batch_norm(made())
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    method = cl.ConAdv(cl.SignAttack(0.05), staleness=1, weights=(0.5, 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    moved: set[str] = set()
    for step in cl.lookahead([images_and_labels()] * STEPS, steps=STEPS, ahead=1):
        losses = method.backward(model, step, nn.CrossEntropyLoss())
        moved |= {key for key, value in model.named_parameters() if value.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    assert bool(torch.isfinite(losses.clean + losses.adversarial))
    assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    adversarial = {key for key in before if ".adversarial." in key}
    assert adversarial <= moved
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_is_measured_and_exported(name, tmp_path):
    assert_it_works(MODELS[name], name not in WITHOUT_BATCH_NORM, tmp_path / "model.onnx")


def assert_it_works(made: Callable[[], nn.Module], with_batch_norm: bool, file: Path) -> None:
    model = trained(made)
    mixtures = [module for module in model.modules() if isinstance(module, MixtureBatchNorm)]
    assert bool(mixtures) == with_batch_norm
    images, labels = images_and_labels()
    with torch.no_grad():
        expected = model(images)

    report = sharpness.measure(model, nn.CrossEntropyLoss(), (images, labels), ["trace"], **MEASURE)
    assert torch.isfinite(torch.tensor(report["trace"].value))

    plain = cl.plain_batch_norm(model)
    assert not any(isinstance(module, MixtureBatchNorm) for module in plain.modules())
    assert has_batch_norm(plain) == bool(mixtures)
    with torch.no_grad():
        assert torch.equal(plain(images), expected)
    program = torch.export.export(plain, (images,))
    assert torch.allclose(program.module()(images), expected, rtol=1e-4, atol=1e-5)

    again = cl.mixture_batch_norm(plain)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), expected)
    assert_onnx_gives(cl.plain_batch_norm(model), images, expected, file)


def assert_onnx_gives(plain: nn.Module, images: Tensor, expected: Tensor, file: Any) -> None:
    """By the reference evaluator of the format itself."""
    onnx = pytest.importorskip("onnx", reason="the extra [adapters] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [adapters] is not installed")
    from onnx.reference import ReferenceEvaluator

    torch.onnx.export(plain, (images,), str(file), dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(onnx.load(str(file)))
    (found,) = evaluator.run(None, {evaluator.input_names[0]: images.numpy()})
    assert torch.allclose(torch.from_numpy(found.copy()), expected, rtol=1e-3, atol=1e-4)
