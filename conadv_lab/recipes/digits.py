"""scikit-learn's digits: 898 training images of 8x8 pixels, bundled with scikit-learn, small enough for one core.

Results are test accuracies of seed 0 only; times are of whole commands on one core of a shared Intel Xeon.
"""

from conadv_lab.config import Config, Data, Method, Model, Optimization, Training


def vanilla() -> Config:
    """Digits, plain SGD at batch 256: the baseline.

    Command: python -m conadv_lab.train digits-vanilla
    Result: 98.78 %. Time: 9 s.
    """
    return Config(
        data=Data(dataset="digits"),
        model=Model(model="digits-cnn", channels_last=True),
        method=Method(method="vanilla", epsilon=0.1),
        optimization=Optimization(optimizer="sgd", base_lr=0.1, weight_decay=5e-4, warmup_epochs=2),
        training=Training(epochs=40, global_batch=256, threads=1, log_every=10),
    )


def conadv() -> Config:
    """Digits with ConAdv, τ = 1, at batch 256.

    Command: python -m conadv_lab.train digits-conadv
    Result: 99.22 %. Time: 15 s.
    """
    return vanilla().replace(method="conadv")


def disadv() -> Config:
    """Digits with DisAdv, the attack before the step, at batch 256.

    Command: python -m conadv_lab.train digits-disadv
    Result: 99.11 %. Time: 16 s.
    """
    return vanilla().replace(method="disadv")


def recycled() -> Config:
    """Digits with recycled ConAdv, which reuses the previous step's input gradient, at batch 256.

    Command: python -m conadv_lab.train digits-recycled
    Result: 99.22 %. Time: 14 s.
    """
    return vanilla().replace(method="recycled")


def recycled_equal() -> Config:
    """Digits with recycled ConAdv at the cost of a vanilla step: half of 256 images are new, half recycled.

    Command: python -m conadv_lab.train digits-recycled-equal
    Result: 99.33 %. Time: 20 s.
    """
    return vanilla().replace(method="recycled-equal")


RECIPES = {
    "digits-vanilla": vanilla,
    "digits-conadv": conadv,
    "digits-disadv": disadv,
    "digits-recycled": recycled,
    "digits-recycled-equal": recycled_equal,
}
