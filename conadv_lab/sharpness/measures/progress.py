"""Progress of a measurement: one line per measure with the time left on standard error, or a bar in a notebook."""

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from conadv_lab.displays import in_notebook

PRICES = {
    "top_eigenvalue": 12, "top_eigenvalues": 28, "bottom_eigenvalue": 45, "trace": 27, "ggn_trace": 2,
    "density": 105, "sam_worst": 60, "sam_average": 12, "adaptive_worst": 60, "adaptive_average": 8,
    "adaptive_worst_logit_normalised": 60, "adaptive_average_logit_normalised": 8, "batch_sharpness": 3,
    "frobenius_norm": 40, "keskar": 53, "keskar_subspace": 71, "landscape_eigen": 57, "landscape_line": 6,
    "landscape_plane": 57, "layer_top_eigenvalues": 28, "m_sharpness": 12, "pac_bayes_flatness": 73,
    "pac_bayes_flatness_magnitude": 74, "pgd_accuracy": 5, "sam_average_logit_normalised": 12,
    "sam_worst_logit_normalised": 64, "trace_hutch_pp": 129, "trace_xtrace": 133,
}  # fmt: skip
"""Cost of measures in gradients, on top of the others, measured on the digits network; default: 2.

Used for time estimates, and to decide which measures need ``--also``.
"""
EVERY = 5.0
"""Seconds between two lines for one measure."""


def duration(seconds: float) -> str:
    """Seconds in words, rounded.

    >>> [duration(s) for s in (0.2, 12.4, 200, 9000)]
    ['1 s', '12 s', '3 min', '2.5 h']
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Reports progress over the measures ``names``, in order; a long measure gets several lines.

    Args:
        names: the measures to be computed.
        gradient: seconds per gradient, for the first estimate; later ones use the times observed.
        shown: whether to print anything.
    """

    def __init__(self, names: Sequence[str], gradient: float, shown: bool) -> None:
        self.names, self.shown = list(names), shown
        self.seconds, self.spent = gradient, 1.0  # observed seconds, for this many gradients
        self.place, self.products = -1, 0
        self.began = time.monotonic()
        self.over = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if self.shown and in_notebook():
            self.bar = _bar(sum(map(self._price, range(len(self.names)))))
        elif self.shown:
            self.ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.bar is not None:
            self.bar.close()
        elif self.shown:
            self.ticker.join()

    def begin(self) -> None:
        """The next measure starts."""
        self.place, self.products = self.place + 1, 0
        self.began = time.monotonic()
        self._say()

    def product(self) -> None:
        """This measure has made another product."""
        self.products += 1

    def end(self) -> None:
        """The measure is done; one that was nearly free, being stored or shared, does not count for the estimate."""
        took, price = time.monotonic() - self.began, self._price(self.place)
        if took > 0.1 * price * self.seconds / self.spent:
            self.seconds, self.spent = self.seconds + took, self.spent + price
        if self.bar is not None:
            self.bar.update(price)

    def left(self) -> float:
        """Estimated seconds until the last measure is done, from costs and observed times."""
        prices = sum(self._price(place) for place in range(self.place, len(self.names)))
        passed = time.monotonic() - self.began
        later = prices - self._price(self.place)
        rate = self.seconds / self.spent
        return max(rate * prices - passed, rate * later)

    def _price(self, place: int) -> float:
        return PRICES.get(self.names[place], 2)

    def _tick(self) -> None:
        """Repeats the line during a long measure."""
        while not self.over.wait(EVERY):
            if self.place >= 0 and time.monotonic() - self.began >= EVERY:
                self._say()

    def _say(self) -> None:
        if self.bar is not None:
            self.bar.set_description(self.names[self.place])
        elif self.shown:
            more = f", {self.products} products" if self.products else ""
            name, place, count = self.names[self.place], self.place + 1, len(self.names)
            told = f"{name} ({place} of {count}){more}; about {duration(self.left())} left"
            print(told, file=sys.stderr, flush=True)


def _bar(total: float) -> Any:
    """A bar over all measures, proportional to their costs."""
    from tqdm.auto import tqdm

    return tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed}, about {remaining} left")
