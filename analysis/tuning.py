"""A fair search of settings: the same budget of gradient evaluations for every method, spent on held-out folds.

Random search with successive halving (Jamieson and Talwalkar, AISTATS 2016) over folds instead of lengths, since
a short run does not predict a long one: all candidates are evaluated on one fold, the better half on a second one, and
so on. Every candidate trains as long as the reported run. The next step follows from the results on disk, so a killed
search continues where it stopped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

Trial = tuple[int, int]
"""(candidate number, fold number)."""
Score = tuple[float, float]
"""(accuracy on the fold, loss on the fold); the loss breaks ties."""
REACH = 4.0
"""Settings are drawn between the default divided by this factor and the default times it."""


@dataclass(frozen=True)
class Candidate:
    """Settings as multiples of their defaults."""

    lr: float
    weight_decay: float
    epsilon: float


def candidates(count: int, seed: int, tunes_epsilon: bool) -> list[Candidate]:
    """The defaults, then log-uniform draws, each a function of (seed, number), so that all methods share them.

    >>> candidates(2, 0, True)[0]
    Candidate(lr=1.0, weight_decay=1.0, epsilon=1.0)
    >>> candidates(3, 0, True)[2].lr == candidates(9, 0, False)[2].lr
    True
    """
    drawn = [Candidate(1.0, 1.0, 1.0)]
    for number in range(1, count):
        key = int.from_bytes(sha256(f"{seed}:candidate:{number}".encode()).digest()[:8], "little")
        lr, decay, epsilon = REACH ** np.random.default_rng(key).uniform(-1, 1, 3)
        drawn.append(Candidate(float(lr), float(decay), float(epsilon) if tunes_epsilon else 1.0))
    return drawn[:count]


def rungs(count: int) -> list[int]:
    """The number of candidates evaluated on each further fold, until one is left.

    >>> rungs(6), rungs(1)
    ([6, 3, 2], [])
    """
    sizes = []
    while count > 1:
        sizes.append(count)
        count = math.ceil(count / 2)
    return sizes


def affordable(budget: float, cost: float) -> int:
    """The number of trials of cost ``cost`` that a budget pays for; at least one, the default.

    >>> affordable(16, 1), affordable(16, 8 / 3)
    (8, 4)
    """
    count = 1
    while sum(rungs(count + 1)) * cost <= budget * (1 + 1e-9):
        count += 1
    return count


def search(count: int, scores: Mapping[Trial, Score]) -> tuple[list[Trial], int | None]:
    """What to try next, and the best candidate once nothing is left to try.

    >>> search(2, {})
    ([(0, 0), (1, 0)], None)
    >>> search(2, {(0, 0): (90.0, 0.5), (1, 0): (91.0, 0.4)})
    ([], 1)
    """
    left = list(range(count))
    for fold, size in enumerate(rungs(count)):
        left = left[:size]
        missing = [(number, fold) for number in left if (number, fold) not in scores]
        if missing:
            return missing, None
        left = sorted(left, key=lambda number: _standing(number, fold, scores))
    return [], left[0]


def _standing(number: int, last: int, scores: Mapping[Trial, Score]) -> tuple[float, float, int]:
    """Best first: mean accuracy over the folds so far, then mean loss, then the earlier draw."""
    own = [scores[number, fold] for fold in range(last + 1)]
    accuracy, loss = (sum(part) / len(own) for part in zip(*own, strict=True))
    return -accuracy, loss, number
