"""Finds what `train` would reject before runs are submitted; writes nothing."""

from collections.abc import Hashable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from conadv_lab.capture.choice import require_graphs
from conadv_lab.config import Config, check_method
from conadv_lab.data.loader import ImageSet
from conadv_lab.data.options import Data, Demand
from conadv_lab.data.sets import load_sets, require_enough
from conadv_lab.data.synthetic import Synthetic
from conadv_lab.methods import method_of
from conadv_lab.methods.lanes import require_streams
from conadv_lab.models.build import build_model
from conadv_lab.models.options import TIMM
from conadv_lab.references import is_file_reference
from conadv_lab.training.build import build_optimizer, build_schedule, build_stream, pick_device, require_fit
from conadv_lab.training.distributed import Ranks, require_trainers


class Beforehand:
    """Checks configs one by one; data sets and networks that they share are made once.

    Args:
        ranks: how many will share a step.
        here: whether the runs will be on this machine, so that its devices can be checked.
        data_here: whether the data are visible from this machine.
        same_environment: whether the runs will use this machine's Python.

    Attributes:
        unseen: what could not be checked from here, in words.
    """

    def __init__(
        self, ranks: int, *, here: bool, data_here: bool = True, same_environment: bool = True
    ) -> None:
        self.ranks, self.here, self.data_here = ranks, here, data_here
        self.same_environment = same_environment
        self.unseen: dict[str, None] = {}
        self._sets: dict[Data, ImageSet | None] = {}
        self._fitting: set[Hashable] = set()

    def check(self, config: Config) -> None:
        """Raise ``ValueError`` if `train` would reject this resolved config."""
        try:
            self._check(config)
        except OSError as failure:  # such as an unreadable image
            raise ValueError(str(failure)) from failure

    def _check(self, config: Config) -> None:
        require_trainers(config.method.attackers, self.ranks)
        self._check_device(config)
        method = self._users_own("method", config.method.method, lambda: method_of(config))
        images = self._training_set(config)
        if images is not None:
            require_enough(config.data.dataset, len(images), config.training.global_batch)
            self._check_network(config, images)
        if method is not None:
            check_method(config, method)
            ranks = Ranks(count=self.ranks, attackers=config.method.attackers)
            known = Synthetic(2**31 - 1 if images is None else len(images))
            stream = build_stream(config, method, known, ranks)
            if images is not None or config.training.steps is not None:
                build_schedule(config.optimization, stream)

    def _check_device(self, config: Config) -> None:
        name = config.training.device
        if self.here or not name.startswith("cuda"):
            device = pick_device(name) if self.here or name != "auto" else None
            if device is not None:
                require_graphs(config.training.capture, device)
                if config.method.placement == "stream":
                    require_streams(device)
            return
        try:
            torch.device(name)
        except RuntimeError:
            pick_device(name)  # raises an error that says what is allowed
        self.unseen[f"device {name}"] = None

    def _training_set(self, config: Config) -> ImageSet | None:
        """The set, or a stand-in of its size; None if it is unknown here."""
        data = config.data
        own = is_file_reference(data.dataset)
        if not self.data_here and (own or data.source.photographs):
            self.unseen[f"data set {data.dataset} in {data.data_dir}"] = None
            return None
        if data not in self._sets:  # a user's set may depend on more, but a sweep may have thousands of seeds
            self._sets[data] = self._loaded(config)
        return self._sets[data]

    def _loaded(self, config: Config) -> ImageSet | None:
        data = config.data
        source = data.source
        if source.official and (data.download or not self.data_here):
            images = source.images or 0
            shape, classes = source.shape or (3, 32, 32), source.classes or 10
            return Synthetic(min(data.train_images or images, images), shape, classes)
        # The smallest demand: memory and workers are those of the node.
        bare = config.replace(global_batch=1, micro_batch=1, workers=0, keep_gb=0.0, reader="native")
        demand = Demand(config.training.seed, global_batch=1, micro_batch=1, rereads=False)

        def loaded() -> ImageSet:
            return load_sets(bare.data, demand, torch.device("cpu"), bare)[0]

        try:
            return self._users_own("data set", data.dataset, loaded)
        except ValueError as mistake:
            if self.here or Path(data.data_dir).is_dir():
                raise
            raise ValueError(f"{mistake}; if only the nodes can see it, pass --data-on-nodes") from None

    def _check_network(self, config: Config, images: ImageSet) -> None:
        name = config.model.model
        if name.startswith(TIMM) and not self.same_environment and find_spec("timm") is None:
            self.unseen[f"model {name}"] = None
            return
        own = is_file_reference(name)
        optimizer = config.optimization.optimizer
        key = (config.data, config.model, config.method if own else None, images.classes, optimizer)
        if key in self._fitting:
            return

        def fitting() -> None:
            model = build_model(config.model, images.classes, config.training.seed, config)
            require_fit(model, images, config)
            build_optimizer(config.optimization, model)

        self._users_own("model", name, fitting)
        self._fitting.add(key)

    def _users_own(self, what: str, name: str, make: Any) -> Any:
        """What ``make`` returns; None, and noted in `unseen`, if a user's file needs what only the nodes have."""
        try:
            return make()
        except ValueError:
            raise
        except Exception as error:
            if not is_file_reference(name):
                raise
            line = (str(error).strip().splitlines() or [""])[0]
            self.unseen[f"{what} {name} ({type(error).__name__}: {line})"] = None
            return None
