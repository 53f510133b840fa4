"""What a measurement returns: numbers with their error, cost and conditions."""

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
"""Conditions that are recorded with every number (besides its products, error and convergence)."""
FACTS = ("split", "augmentation", "learning_rate", "weight_decay_inside", "label_smoothing")
"""Conditions that cannot always be inferred from model, loss and batches: the caller states them."""

SHOWN = ("split", "examples", "loss_value", "gradient_norm", "bn", "precision")
"""Conditions shown above the numbers in a notebook."""


def require_facts(who: str, conditions: Mapping[str, Any]) -> None:
    """Reject numbers with missing metadata; "unknown" is accepted.

    Raises:
        ValueError: lists the missing facts and how to state them.

    >>> require_facts("net", dict.fromkeys(FACTS, "unknown"))
    """
    missing = [name for name in FACTS if conditions.get(name) is None]
    if missing:
        raise ValueError(
            f"{who} lacks metadata that cannot be inferred: {', '.join(missing)}; nothing was written. "
            f"Pass --fact {missing[0]}=… or facts={{{missing[0]!r}: …}}; 'unknown' is accepted"
        )


@dataclass(frozen=True)
class Measure:
    """One number, or a list or mapping of numbers.

    Attributes:
        name: as in ``measure(..., measures=(name,))``.
        value: a number, a list of numbers, or a mapping from radii (numbers) or layer names.
        error: bound or half-width of the interval, shaped like the value; ``None`` if unknown.
        products: number of products with a curvature matrix over the whole data set that the value uses; the
            conditions count gradients as ``gradients`` and forward passes as ``forwards``.
        seconds: additional wall-clock seconds for this measure.
        conditions: everything that the number depends on.
    """

    name: str
    value: Any
    error: Any
    products: int
    seconds: float
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> list[tuple[Any, float, float | None]]:
        """(part, value, error) of every number; part is the radius, the list index or the layer; none for curves.

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
        """Read a measure from JSON; radii, which are strings there, become numbers.

        >>> Measure.from_dict({"name": "sam_worst", "value": {"0.1": 2.0}, "error": None, "products": 0, "seconds": 0})
        Measure(name='sam_worst', value={0.1: 2.0}, error=None, products=0, seconds=0, conditions={})
        """
        if data["name"].startswith("layer_"):  # layers may be named by numbers
            return cls(**data)
        return cls(
            **(
                dict(data)
                | {key: _numbered(data[key]) for key in ("value", "error", "conditions") if key in data}
            )
        )


def _numbered(value: Any) -> Any:
    """Turn keys into numbers in mappings whose keys are all numbers written as text."""
    if not isinstance(value, Mapping):
        return value
    try:
        return {float(key): one for key, one in value.items()}
    except ValueError:
        return {key: _numbered(one) for key, one in value.items()}


def _written(value: Any) -> Any:
    """For JSON: every key as text."""
    return {str(key): _written(one) for key, one in value.items()} if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Report:
    """The measures of one model on one data set, by name: ``report["top_eigenvalue"].value``.

    A notebook shows it as a table; ``sharpness.figures(report)`` draws its curves and landscapes.
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
        """The conditions that all measures share."""
        first = self.measures[0].conditions if self.measures else {}
        return {key: first[key] for key in CONDITIONS if key in first}

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, as written to JSON, where every key is text."""
        return {"measures": [_written(asdict(measure)) for measure in self.measures]}

    def to_frame(self) -> "pd.DataFrame":
        """One row per number: ``measure``, ``part`` (radius, list index or layer), ``value``, ``error`` and cost.

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
        told = ", ".join(
            f"{key.replace('_', ' ')} {number(known[key])}" for key in SHOWN if known.get(key) is not None
        )
        return table(("measure", "part", "value", "error"), rows, f"Sharpness on {told}{more}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of ``to_dict``."""
        return cls(tuple(map(Measure.from_dict, data["measures"])))

    def complete(self, who: str = "the report") -> None:
        """Check that every number has the metadata required for writing.

        Raises:
            ValueError: a measure lacks one of ``CONDITIONS``, or one of ``FACTS`` was not stated.
        """
        for measure in self.measures:
            missing = [key for key in CONDITIONS if key not in measure.conditions]
            if missing:
                raise ValueError(f"{who}: {measure.name} lacks {', '.join(missing)}; nothing was written")
            require_facts(who, measure.conditions)

    def save(self, path: str | Path) -> None:
        """Write ``to_dict()`` as JSON; raises if a number lacks its conditions, see :meth:`complete`."""
        self.complete()
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=True) + "\n")
