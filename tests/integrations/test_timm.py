"""timm's own families, at its smallest sizes: ConAdv trains them, sharpness is measured, the plain model exported."""

from importlib.util import find_spec

import pytest
import torch

import conadv_lab as cl
from conadv_lab.models.timm_models import split_batch_norms, timm_model
from tests.integrations.test_architectures import CLASSES, assert_it_works
from tests.integrations.torchvision_stand_in import timm

FAMILIES = {
    "test_efficientnet": True,
    "mobilenetv2_035": True,
    "mobilenetv3_small_050": True,
    "regnetx_002": True,
    "test_resnet": True,
    "test_convnext": False,
    "test_vit": False,
    "test_nfnet": False,
}
"""Whether each has batch norm."""


@pytest.fixture(autouse=True)
def library():
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return timm()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains_is_measured_and_exported(name, tmp_path):
    assert_it_works(lambda: timm_model(name, CLASSES), FAMILIES[name], tmp_path / "model.onnx")


def test_a_network_of_timms_own_is_converted_in_two_lines(library):
    network = library.create_model("mobilenetv2_035", num_classes=CLASSES).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = network(images)
    with pytest.raises(ValueError, match=r"BatchNormAct2d.*conadv_lab.models.timm_models.split_batch_norms"):
        cl.mixture_batch_norm(network)
    model = cl.mixture_batch_norm(split_batch_norms(network))
    assert torch.equal(model(images), expected)
