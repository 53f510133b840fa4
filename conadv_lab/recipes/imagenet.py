"""ImageNet with ResNet-50 and LARS from batch 4,096 to 98,304; 90 epochs, photographs from ``--data-dir``. AdvProp.

Method and augmentation are options of every recipe: ``--method conadv`` (or disadv, recycled, recycled-equal, and the
controls), ``--policy autoaugment`` or ``randaugment``, ``--mixup 0.2``, ``--erasing 0.25``. Another network is
``--model timm:efficientnet_b0``, with the extra ``vision``. ``--data-dir`` holds packs (`conadv_lab.data.pack`), class
folders or the official archives.

Settings of the large batches are the LARS recipe of NUS-HPC-AI (variant C, trust ratio at most 50): learning rate
4 √(B/512), weight decay 1e-4 except for batch norm and biases, η 0.001, momentum 0.9, its warm-ups up to 32K. Nothing
was published with them beyond 32K: there learning rate and warm-up are our untuned extrapolations. Label smoothing 0.1
and the micro-batch, batch norm's ghost batch, are from MLPerf's recipes; cosine decay is the set-up quoted for ConAdv.
ε and attack step are our defaults (1/255), as the paper's are unknown.

Accuracies are published results, not ours: "quoted" is ConAdv's LARS baseline as quoted by the VRGD paper (arXiv
2309.13681, table 2), with unknown settings. Times are predicted by ``--plan`` (`conadv_lab.plan`) for the command, with
the simulator fitted to MLPerf's results on H100s; beyond 400 images per device they are extrapolated.
"""

from conadv_lab.config import Config, Data, Method, Model, Optimization, Training

IMAGENET_IMAGES = 1_281_167


def resnet50_4k() -> Config:
    """ImageNet, ResNet-50, batch 4,096 with LARS.

    Command: python -m conadv_lab.train imagenet-resnet50-4k --data-dir DIR
    Result: not yet measured. Published: 76.9 %, quoted.
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 44.0 / 5.8 / 2.7 minutes.
    """
    return _recipe(4_096, warmup_epochs=10 / 8, micro_batch=64)


def resnet50_8k() -> Config:
    """ImageNet, ResNet-50, batch 8,192 with LARS.

    Command: python -m conadv_lab.train imagenet-resnet50-8k --data-dir DIR
    Result: not yet measured. Published: 76.6 %, quoted.
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 44.0 / 5.7 / 1.9 minutes.
    """
    return _recipe(8_192, warmup_epochs=10 / 4, micro_batch=64)


def resnet50_16k() -> Config:
    """ImageNet, ResNet-50, batch 16,384 with LARS.

    Command: python -m conadv_lab.train imagenet-resnet50-16k --data-dir DIR
    Result: not yet measured. Published: 76.6 %, quoted.
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 38.6 / 5.0 / 1.5 minutes.
    """
    return _recipe(16_384, warmup_epochs=5, micro_batch=128)


def resnet50_32k() -> Config:
    """ImageNet, ResNet-50, batch 32,768 with LARS.

    Command: python -m conadv_lab.train imagenet-resnet50-32k --data-dir DIR
    Result: not yet measured. Published: 76.75 % with these settings (NUS-HPC-AI); 76.6 %, quoted.
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 38.6 / 5.0 / 1.3 minutes.
    """
    return _recipe(32_768, warmup_epochs=14, micro_batch=128)


def resnet50_64k() -> Config:
    """ImageNet, ResNet-50, batch 65,536 with LARS, settings extrapolated.

    Command: python -m conadv_lab.train imagenet-resnet50-64k --data-dir DIR --method conadv
    Result: not yet measured. Published: LARS 75.3 %, quoted. MLPerf reaches 75.9 % at this batch without any attack.
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 102.5 / 13.1 / 3.4 minutes.
    """
    return _recipe(65_536, warmup_epochs=25, micro_batch=128)


def resnet50_96k() -> Config:
    """ImageNet, ResNet-50, batch 98,304 with LARS, settings extrapolated: 13 steps per epoch.

    Command: python -m conadv_lab.train imagenet-resnet50-96k --data-dir DIR --method conadv --policy autoaugment
    Result: not yet measured. Published: LARS 74.3 %, quoted; ConAdv 75.3 %, with augmentation 76.2 % (the paper's
    abstract, settings unknown).
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 102.6 / 13.1 / 3.4 minutes.
    """
    return _recipe(98_304, warmup_epochs=30, micro_batch=128)


def advprop() -> Config:
    """ImageNet, ResNet-50, batch 256 with AdvProp's one-step attack towards random classes.

    The settings are from a public port that AdvProp's author advised
    (tingxueronghua/pytorch-classification-advprop): SGD at learning rate 0.1, divided by 10 after 30, 60, 90 and 100 of
    105 epochs, ε and step of 1/255, the mean of clean and adversarial loss. Weight decay 1e-4 and no label smoothing
    are the defaults of fast AdvProp's repository. Fast AdvProp, at about the cost of vanilla on all its images, is
    ``--method fast-advprop --epochs 87.5 --milestone-epochs 25 50 75 83``.

    Command: python -m conadv_lab.train imagenet-advprop --data-dir DIR
    Result: not yet measured. Published: 77.42 %, against 76.67 % for standard training (that port).
    Time: not yet measured. Predicted on 8 / 64 / 256 H100s: 169.4 / 81.8 / 73.5 minutes.
    """
    return _recipe(256, warmup_epochs=0, micro_batch=32).replace(
        method="advprop",
        attack_steps=1,
        attack_target="random",
        weights=(0.5, 0.5),
        optimizer="sgd",
        base_lr=0.1,
        base_batch=256,
        lr_rule="linear",
        lars_variant="B",
        schedule="step",
        milestone_epochs=(30.0, 60.0, 90.0, 100.0),
        label_smoothing=0.0,
        epochs=105,
    )


def _recipe(batch: int, warmup_epochs: float, micro_batch: int) -> Config:
    steps_of_an_epoch = round(IMAGENET_IMAGES / batch)
    return Config(
        data=Data(dataset="imagenet", flip=True, workers=8),
        model=Model(model="resnet50", precision="bfloat16", channels_last=True),
        method=Method(method="vanilla", epsilon=1 / 255),
        optimization=Optimization(
            optimizer="lars",
            lars_variant="C",
            base_lr=4.0,
            base_batch=512,
            lr_rule="sqrt",
            weight_decay=1e-4,
            warmup_epochs=warmup_epochs,
            label_smoothing=0.1,
        ),
        training=Training(
            epochs=90,
            global_batch=batch,
            micro_batch=micro_batch,
            log_every=max(1, steps_of_an_epoch // 10),
            checkpoint_every=steps_of_an_epoch,
            evaluate_every=5 * steps_of_an_epoch,
        ),
    )


RECIPES = {
    "imagenet-resnet50-4k": resnet50_4k,
    "imagenet-resnet50-8k": resnet50_8k,
    "imagenet-resnet50-16k": resnet50_16k,
    "imagenet-resnet50-32k": resnet50_32k,
    "imagenet-resnet50-64k": resnet50_64k,
    "imagenet-resnet50-96k": resnet50_96k,
    "imagenet-advprop": advprop,
}
