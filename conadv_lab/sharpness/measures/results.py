"""What a measurement returns: numbers that carry their error, their price and their conditions."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conadv_lab.mistakes import unknown

CONDITIONS = (
    "split", "augmentation", "examples", "data_hash", "batch_size", "bn", "loss", "reduction",
    "label_smoothing", "weight_decay_inside", "parameters", "precision", "seed", "loss_value",
    "gradient_norm", "weight_norm", "learning_rate",
)  # fmt: skip
"""What every number must carry (besides its own products, error and convergence)."""
FACTS = ("split", "augmentation", "learning_rate", "weight_decay_inside", "label_smoothing")
"""Those that the model, the loss and the batches do not always show: the caller's to state."""


def require_facts(who: str, conditions: Mapping[str, Any]) -> None:
    """Refuse numbers whose conditions are partly unstated; "unknown" is a statement.

    Raises:
        ValueError: naming the facts that are missing and how to give them.

    >>> require_facts("net", dict.fromkeys(FACTS, "unknown"))
    """
    missing = [name for name in FACTS if conditions.get(name) is None]
    if missing:
        raise ValueError(
            f"{who} does not state {', '.join(missing)}, which its numbers must carry, so nothing is written; "
            f"state each (as 'unknown', if need be): --fact {missing[0]}=… or facts={{{missing[0]!r}: …}}"
        )


@dataclass(frozen=True)
class Measure:
    """One number, or a list or mapping of numbers.

    Attributes:
        name: as in ``measure(..., measures=(name,))``.
        value: a number, a list of numbers, or a mapping.
        error: bound or half-width of the interval, shaped like the value; ``None`` where no error is known.
        products: what the value rests on, in products with a curvature matrix over the whole data set;
            gradients are counted in the conditions as ``gradients`` and forward passes as ``forwards``.
        seconds: wall-clock seconds that this measure added.
        conditions: everything that the number depends on.
    """

    name: str
    value: Any
    error: Any
    products: int
    seconds: float
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The measures of one model on one data set, by name: ``report["top_eigenvalue"].value``."""

    measures: tuple[Measure, ...]

    def __getitem__(self, name: str) -> Measure:
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise unknown("measure", name, [m.name for m in self.measures])

    def __contains__(self, name: object) -> bool:
        return any(measure.name == name for measure in self.measures)

    @property
    def conditions(self) -> dict[str, Any]:
        """What all measures have in common."""
        return {key: self.measures[0].conditions[key] for key in CONDITIONS} if self.measures else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as written to JSON."""
        return {"measures": [asdict(measure) for measure in self.measures]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The report that ``to_dict`` gave."""
        return cls(tuple(Measure(**measure) for measure in data["measures"]))

    def complete(self, who: str = "the report") -> None:
        """Refuse to be written down while a number lacks something that it must carry.

        Raises:
            ValueError: a measure lacks one of ``CONDITIONS``, or one of ``FACTS`` was not stated.
        """
        for measure in self.measures:
            missing = [key for key in CONDITIONS if key not in measure.conditions]
            if missing:
                raise ValueError(f"{who}: {measure.name} lacks {', '.join(missing)}; nothing was written")
            require_facts(who, measure.conditions)

    def save(self, path: str | Path) -> None:
        """Write ``to_dict()`` as JSON; a number without its conditions is refused, see :meth:`complete`."""
        self.complete()
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=True) + "\n")
