"""NoFrost: adversarial training of a network without batch norm (Wang et al., ICML 2022, arXiv 2207.01156).

"Removing Batch Normalization Boosts Adversarial Training"; settings and results from the authors' repository and the
paper's abstract. The loss is ½ clean + ½ adversarial, label smoothing 0.1, without warm-up or clipping.

Differences: we leave out their dropout 0.25 and drop-path 0.1, as nothing in a run may depend on the order of random
numbers; gains and biases are not decayed; the cosine falls at each step instead of each epoch.
"""

from conadv_lab.config import Config, Data, Method, Model, Optimization, Training
from conadv_lab.recipes.imagenet import IMAGENET_IMAGES

BATCH = 256


def nofrost() -> Config:
    """ImageNet, NF-ResNet-50, half clean and half under PGD of 10 steps, batch 256.

    Command: python -m conadv_lab.train imagenet-nofrost --data-dir DIR
    Result: not yet measured. Published: 74.06 % clean and 23.56 % under PGD (abstract; 22.45 % in their README); with
    batch norm 76.06 % with standard training, and 59.28 % clean, 13.57 % under PGD with adversarial training.
    Time: not yet measured; a step has 12 passes.
    """
    steps_of_an_epoch = round(IMAGENET_IMAGES / BATCH)
    return Config(
        data=Data(dataset="imagenet", flip=True, workers=8),
        model=Model(model="nf-resnet50", precision="bfloat16", channels_last=True),
        method=Method(method="advprop", epsilon=8 / 255, attack_step=1 / 255, attack_steps=10),
        optimization=Optimization(
            optimizer="sgd",
            nesterov=True,
            base_lr=0.1,
            base_batch=256,
            lr_rule="linear",
            weight_decay=5e-5,
            label_smoothing=0.1,
        ),
        training=Training(
            epochs=90,
            global_batch=BATCH,
            log_every=100,
            checkpoint_every=steps_of_an_epoch,
            evaluate_every=5 * steps_of_an_epoch,
            pgd_images=5_000,
        ),
    )


RECIPES = {"imagenet-nofrost": nofrost}
