"""Sharpness during training, for any loop: chosen measures on a fixed batch, at a bounded cost."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from conadv_lab.mistakes import require, unknown
from conadv_lab.sharpness.measures.front import measure, names
from conadv_lab.sharpness.problem.problem import Batch, Criterion

PREFIX = "sharpness_"


class SharpnessProbe:
    """Call it after every step; it measures every ``every`` steps, unless that would take too much time.

    It measures if the total time of all measurements, assuming this one takes as long as the last, stays below
    ``share`` of the training time so far. The cost of the first one is unknown, so it always runs when due, and
    training has to catch up before the next one. Skipped measurements are reported once, and counted in the metrics.

    Args:
        criterion: of outputs and labels, as in training.
        batches: (images, labels), or a list of such pairs: fixed for all measurements, on the model's device.
        measures: names of scalar measures of `conadv_lab.sharpness.measure`.
        every: steps between measurements.
        share: fraction of the training time that measurements may take, above 0.
        clock: returns seconds.
        settings: further arguments of `conadv_lab.sharpness.measure`.

    Raises:
        ValueError: a number out of range, or no such measure.
    """

    def __init__(
        self,
        criterion: Criterion,
        batches: Iterable[Batch] | Batch,
        measures: Sequence[str] = ("top_eigenvalue", "trace"),
        *,
        every: int = 100,
        share: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
        **settings: Any,
    ) -> None:
        require(isinstance(every, int) and every >= 1, "every", every, "a whole number of at least 1")
        require(share > 0, "share", share, "a number above 0")
        for name in measures:
            if name not in names():
                raise unknown("measure", name, names())
        self.criterion, self.measures, self.settings = criterion, tuple(measures), settings
        self.batches = batches if isinstance(batches, tuple) else list(batches)
        self.every, self.share, self.clock = every, share, clock
        self.spent = self.price = 0.0
        self.skipped = 0
        self._began: float | None = None

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Metrics by name after step number ``step``, counted from 1; empty if none are due.

        ``sharpness_top_eigenvalue`` and so on, ``sharpness_seconds`` of this measurement, and ``sharpness_skipped``,
        the number skipped so far.
        """
        now = self.clock()
        if self._began is None:
            self._began = now
        if step % self.every:
            return {}
        training = now - self._began - self.spent
        if self.spent and self.spent + self.price > self.share * training:
            return self._left_out(training)
        figures = self._measured(model)
        self.price = self.clock() - now
        self.spent += self.price
        return figures | self._prefixed({"seconds": self.price, "skipped": self.skipped})

    def _measured(self, model: nn.Module) -> dict[str, float]:
        report = measure(model, self.criterion, self.batches, self.measures, **self.settings)
        found = {name: report[name].value for name in self.measures}
        for name, value in found.items():
            if not isinstance(value, (int, float)):
                raise ValueError(
                    f"measure {name!r} returns a {type(value).__name__}; allowed: measures with a single number"
                )
        return self._prefixed(found)

    def _left_out(self, training: float) -> dict[str, float]:
        if not self.skipped:
            warnings.warn(
                f"skipping a sharpness measurement: they took {self.spent:.3g} s of {training:.3g} s of training, "
                f"and each takes about {self.price:.3g} s; share is {self.share:g}, every is {self.every} steps"
            )
        self.skipped += 1
        return self._prefixed({"skipped": self.skipped})

    def _prefixed(self, figures: dict[str, Any]) -> dict[str, float]:
        return {PREFIX + name: float(value) for name, value in figures.items()}
