"""CIFAR-10 with residual networks and with fast shallow ones.

Archives are read from ``--data-dir``, or downloaded with ``--download``. Results are test accuracies on CIFAR-10
(JPEG), whose images were once encoded as JPEG, which costs about four points; nothing was measured on the official
images. docs/gpu.md has the GPU results with their commands.
"""

from conadv_lab.config import Config, Data, Method, Model, Optimization, Training


def resnet18_128() -> Config:
    """CIFAR-10, ResNet-18, batch 128, 30 epochs: the small-batch reference.

    Command: python -m conadv_lab.train cifar10-resnet18-128 --data-dir DIR
    Result: not measured. Time on a GPU: not measured.
    """
    return Config(
        data=Data(dataset="cifar10", crop=4, flip=True, cutout=8),
        model=Model(model="resnet18", last_gamma=1.0, precision="bfloat16", channels_last=True),
        method=Method(method="vanilla", epsilon=2 / 255),
        optimization=Optimization(
            optimizer="sgd",
            base_lr=0.05,
            base_batch=128,
            lr_rule="linear",
            nesterov=True,
            weight_decay=5e-4,
            warmup_epochs=3,
        ),
        training=Training(epochs=30, global_batch=128, log_every=50, checkpoint_every=2000),
    )


def resnet18_512() -> Config:
    """CIFAR-10, ResNet-18, batch 512, 36 epochs.

    Command: python -m conadv_lab.train cifar10-resnet18-512 --data-dir DIR
    Result: 90.54 %, seed 0. Time: 49 s on one NVIDIA H100.
    """
    return resnet18_128().replace(epochs=36, global_batch=512, label_smoothing=0.1)


def resnet18_2k() -> Config:
    """CIFAR-10, ResNet-18, batch 2,048 with LARS, 20 epochs.

    Command: python -m conadv_lab.train cifar10-resnet18-2k --data-dir DIR
    Result: not measured. Time on a GPU: not measured.
    """
    return _large(2_048)


def resnet18_8k() -> Config:
    """CIFAR-10, ResNet-18, batch 8,192 with LARS, 20 epochs: 122 steps.

    Command: python -m conadv_lab.train cifar10-resnet18-8k --data-dir DIR
    Result: not measured. Time on a GPU: not measured.
    """
    return _large(8_192)


def resnet20_cpu() -> Config:
    """CIFAR-10, ResNet-20, batch 128, 4 epochs: for a CPU.

    Command: python -m conadv_lab.train cifar10-resnet20-cpu --data-dir DIR
    Result: 77.10 %, seed 0, trained on an NVIDIA H100 in float32. Time: 19 minutes on one thread of a busy Intel Xeon.
    """
    return resnet18_128().replace(
        model="resnet20",
        precision="float32",
        epochs=4,
        warmup_epochs=1,
        base_lr=0.1,
        cutout=0,
        log_every=20,
        checkpoint_every=200,
    )


def fast() -> Config:
    """CIFAR-10, a shallow network modelled on airbench94, batch 1,024, 12 epochs: seconds on one GPU.

    Command: python -m conadv_lab.train cifar10-fast --data-dir DIR
    Result: 89.59 ± 0.08 %, mean and standard deviation of three seeds; airbench94, run alternately, 89.82 ± 0.27 %.
    Time: 5.2 s on one NVIDIA H100, 4.1 s of it training; airbench94 2.5 s and 2.3 s.
    """
    return Config(
        data=Data(dataset="cifar10", crop=2, crop_padding="reflect", flip=True, flip_rule="alternating"),
        model=Model(model="fast-cnn", precision="bfloat16", channels_last=True),
        method=Method(method="vanilla", epsilon=2 / 255),
        optimization=Optimization(
            optimizer="sgd",
            base_lr=1.5,
            base_batch=1_024,
            momentum=0.85,
            nesterov=True,
            weight_decay=2e-3,
            bias_lr_factor=16,
            schedule="polynomial",
            power=1.0,
            warmup_epochs=2.8,
            label_smoothing=0.2,
        ),
        training=Training(epochs=12, global_batch=1_024, log_every=50, checkpoint_every=10_000),
    )


def fast_2k() -> Config:
    """CIFAR-10, the network of cifar10-fast at batch 2,048 with SGD, 20 epochs.

    Command: python -m conadv_lab.train cifar10-fast-2k --data-dir DIR
    Result: 89.98 %, seed 0. Time: 16 s on one NVIDIA H100 beside other work.
    """
    return fast().replace(global_batch=2_048, epochs=20, warmup_epochs=5, lr_rule="sqrt")


def fast_8k() -> Config:
    """CIFAR-10, the network of cifar10-fast at batch 8,192 with SGD, 20 epochs: 122 steps.

    Command: python -m conadv_lab.train cifar10-fast-8k --data-dir DIR
    Result: 87.70 %, seed 0. Time: 18 s on one NVIDIA H100 beside other work.
    """
    return fast_2k().replace(global_batch=8_192, micro_batch=2_048)


def fast_cpu() -> Config:
    """CIFAR-10, a smaller version of cifar10-fast, batch 512, 10 epochs: minutes on two CPU cores.

    Command: python -m conadv_lab.train cifar10-fast-cpu --data-dir DIR
    Result: 84.15 ± 0.23 %, mean and standard deviation of three seeds. Time: 5 minutes (4.9 to 6.4) on two shared
    cores of an AMD EPYC. On CPUs with bfloat16 arithmetic (AVX-512 BF16, AMX), `--precision bfloat16` is faster.
    """
    return fast().replace(
        model="fast-cnn-small",
        precision="float32",
        epochs=10,
        warmup_epochs=2.3,
        global_batch=512,
        weight_decay=5e-4,
        log_every=20,
        checkpoint_every=1_000,
    )


def _large(batch: int) -> Config:
    """LARS with square-root scaling, as in NUS-HPC-AI's ImageNet recipe; the values are ours, not tuned."""
    return resnet18_128().replace(
        optimizer="lars",
        lars_variant="C",
        nesterov=False,
        base_lr=4.0,
        base_batch=512,
        lr_rule="sqrt",
        weight_decay=1e-4,
        epochs=20,
        warmup_epochs=5,
        global_batch=batch,
        micro_batch=min(batch, 2_048),
        label_smoothing=0.1,
        log_every=10,
    )


RECIPES = {
    "cifar10-resnet18-128": resnet18_128,
    "cifar10-resnet18-512": resnet18_512,
    "cifar10-resnet18-2k": resnet18_2k,
    "cifar10-resnet18-8k": resnet18_8k,
    "cifar10-resnet20-cpu": resnet20_cpu,
    "cifar10-fast": fast,
    "cifar10-fast-2k": fast_2k,
    "cifar10-fast-8k": fast_8k,
    "cifar10-fast-cpu": fast_cpu,
}
