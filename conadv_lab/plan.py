"""What a run will cost, before it is sent: figures from a model, each labelled predicted. Nothing here imports torch.

Step time is the straight line 3.48 ms + 0.1434 ms an image that fits MLPerf's ResNet-50 results on H100s within −6 to
+7 % (training_results v2.1 and v3.0: tuned MXNet and DALI, vanilla, 16 to 400 images a device). It is no measurement
of this package, which may be slower.
"""

IMAGENET_IMAGES = 1_281_167
FIXED_MS, IMAGE_MS = 3.48, 0.1434


def step_ms(images: float, passes: float = 1.0) -> float:
    """Predicted milliseconds of a ResNet-50 step at 224 pixels of so many images on each H100.

    Args:
        images: of the global batch, a device.
        passes: gradient evaluations an image: 1 for vanilla, 8/3 for ConAdv with its attack on the same devices.

    >>> round(step_ms(400), 1)  # MLPerf: 57.07 on 8 devices
    60.8
    """
    return FIXED_MS + IMAGE_MS * images * passes


def run_minutes(batch: int, devices: int, epochs: float = 90, passes: float = 1.0) -> float:
    """Predicted minutes of a run over ImageNet.

    >>> round(run_minutes(32_768, 256), 1)
    1.3
    """
    return epochs * IMAGENET_IMAGES / batch * step_ms(batch / devices, passes) / 60_000
