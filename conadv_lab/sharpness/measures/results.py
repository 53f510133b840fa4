"""What a measurement returns: numbers that carry their error, their price and their conditions."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conadv_lab.displays import number, table
from conadv_lab.mistakes import unknown

if TYPE_CHECKING:
    import pandas as pd

CONDITIONS = (
    "split", "augmentation", "examples", "data_hash", "batch_size", "bn", "loss", "reduction",
    "label_smoothing", "weight_decay_inside", "parameters", "precision", "seed", "loss_value",
    "gradient_norm", "weight_norm", "learning_rate",
)  # fmt: skip
"""What every number must carry (besides its own products, error and convergence)."""
FACTS = ("split", "augmentation", "learning_rate", "weight_decay_inside", "label_smoothing")
"""Those that the model, the loss and the batches do not always show: the caller's to state."""

SHOWN = ("split", "examples", "loss_value", "gradient_norm", "bn", "precision")
"""Conditions that a notebook shows above the numbers."""


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
        value: a number, a list of numbers, or a mapping: of radii, which are numbers, or of layers, by name.
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

    def parts(self) -> list[tuple[Any, float, float | None]]:
        """(part, value, error) of every number: the radius, the place in a list or the layer; curves have none.

        >>> Measure("sam_worst", {0.1: 2.0}, None, 0, 0.0).parts()
        [(0.1, 2.0, None)]
        """
        if isinstance(self.value, (int, float)):
            return [(None, self.value, self.error)]
        items = self.value.items() if isinstance(self.value, Mapping) else enumerate(self.value)
        return [
            (part, one, None if self.error is None else self.error[part])
            for part, one in items
            if isinstance(one, (int, float))
        ]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Measure":
        """The measure that JSON holds; its radii, which are strings there, are numbers again.

        >>> Measure.from_dict({"name": "sam_worst", "value": {"0.1": 2.0}, "error": None, "products": 0, "seconds": 0})
        Measure(name='sam_worst', value={0.1: 2.0}, error=None, products=0, seconds=0, conditions={})
        """
        if data["name"].startswith("layer_"):  # layers may have numbers for names
            return cls(**data)
        return cls(
            **(
                dict(data)
                | {key: _numbered(data[key]) for key in ("value", "error", "conditions") if key in data}
            )
        )


def _numbered(value: Any) -> Any:
    """Mappings whose keys are all numbers, written as text, with numbers for keys."""
    if not isinstance(value, Mapping):
        return value
    try:
        return {float(key): one for key, one in value.items()}
    except ValueError:
        return {key: _numbered(one) for key, one in value.items()}


def _written(value: Any) -> Any:
    """As JSON has it: every key is text."""
    return {str(key): _written(one) for key, one in value.items()} if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Report:
    """The measures of one model on one data set, by name: ``report["top_eigenvalue"].value``.

    In a notebook it shows as a table; ``sharpness.figures(report)`` shows its curves and landscapes.
    """

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
        first = self.measures[0].conditions if self.measures else {}
        return {key: first[key] for key in CONDITIONS if key in first}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as written to JSON, where every key is text."""
        return {"measures": [_written(asdict(measure)) for measure in self.measures]}

    def to_frame(self) -> "pd.DataFrame":
        """One row a number: ``measure``, ``part`` (radius, place in a list or layer), ``value``, ``error`` and cost.

        >>> Report((Measure("sam_worst", {0.1: 2.0}, None, 0, 0.5),)).to_frame()["part"].tolist()
        [0.1]
        """
        import pandas as pd

        rows = [
            (m.name, part, value, error, m.products, m.seconds)
            for m in self.measures
            for part, value, error in m.parts()
        ]
        return pd.DataFrame(rows, columns=["measure", "part", "value", "error", "products", "seconds"])

    def _repr_html_(self) -> str:
        rows = [
            (m.name, "" if part is None else part, value, "" if error is None else f"± {error:.1g}")
            for m in self.measures
            for part, value, error in m.parts()
        ]
        curves = [m.name for m in self.measures if not m.parts()]
        more = f"; in sharpness.figures: {', '.join(curves)}" if curves else ""
        known = self.conditions
        told = ", ".join(f"{key.replace('_', ' ')} {number(known[key])}" for key in SHOWN if key in known)
        return table(("measure", "part", "value", "error"), rows, f"Sharpness on {told}{more}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The report that ``to_dict`` gave."""
        return cls(tuple(map(Measure.from_dict, data["measures"])))

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
