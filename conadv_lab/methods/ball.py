"""How far an attack may move an input: radius, step, bounds and norm, in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import sub
from typing import TYPE_CHECKING, Any, Literal

from conadv_lab.methods.later import signs, torch
from conadv_lab.mistakes import require, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from conadv_lab.data.loader import Batch

Norm = Literal["linf", "l2"]
Value = float | Sequence[float]
"""A number, or one for each channel: a sequence, array or tensor of C values."""
Bounds = tuple[Value, Value] | None

UNIT: Bounds = (0.0, 1.0)
"""The range of images before normalisation."""
ROUNDING = 1e-3
"""How far inputs may overshoot their bounds, relative to the range, as pixels do after resizing."""


class Ball:
    """Inputs within ε of a clean one, in the L∞ or the L2 norm, and within bounds.

    Inputs (B, C, …), ε, step and bounds share their units. Each is a number, or one value per channel (dimension 1).
    The L2 norm is taken over a whole input, so ε and step are then numbers.

    Args:
        epsilon: radius.
        step: length of one step; None is ``epsilon``.
        bounds: lowest and highest input value; None does not clip.
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: a number out of range, or different numbers of channels.

    >>> Ball((0.1, 0.2), bounds=None).step
    (0.1, 0.2)
    """

    def __init__(
        self, epsilon: Value, step: Value | None = None, bounds: Bounds = UNIT, norm: Norm = "linf"
    ) -> None:
        if norm not in ("linf", "l2"):
            raise unknown("norm", str(norm), ["linf", "l2"])
        self.norm, self.bounds = norm, _edges(bounds)
        self.epsilon, self.step = _alike(epsilon=epsilon, step=epsilon if step is None else step)
        self._require_ranges(step is None)
        self._is_checked = False
        self._tensors: dict[Any, Tensor] = {}

    def _require_ranges(self, own_step: bool) -> None:
        low, high = self.bounds or (-math.inf, math.inf)
        if self.norm == "l2":
            alone = not isinstance(self.epsilon, tuple)
            require(alone, "epsilon", self.epsilon, "a number with norm 'l2', as is step")
            low, high = -math.inf, math.inf  # a ball that reaches across images is wider than a channel
        radii, lows, highs = _alike(epsilon=self.epsilon, low=low, high=high)
        for radius, width in zip(_each(radii), map(sub, _each(highs), _each(lows)), strict=True):
            allowed = f"0 to {width:g}" if width < math.inf else "a number of at least 0"
            allowed += ", as images are in [0, 1]" if (low, high) == UNIT else ""
            require(0 <= radius <= width and radius < math.inf, "epsilon", radius, allowed)
        for length, radius in () if own_step else zip(_each(self.step), _each(self.epsilon), strict=True):
            fine = 0 < length < math.inf or length == radius == 0
            require(fine, "step", length, "a number above 0, or None")

    def require_inputs(self, batch: Batch) -> None:
        """Raise ``ValueError`` if the first inputs seen lie outside the bounds, or if bounds would clip embeddings."""
        if self.bounds is None:
            return
        require(batch.tokens is None, "bounds", self.bounds, "None with embeddings=, which have no bounds")
        if self._is_checked:
            return
        inputs = batch.images
        widths = map(sub, _each(self.bounds[1]), _each(self.bounds[0]))
        slack = ROUNDING * max((width for width in widths if width < math.inf), default=0.0)
        low, high = (self._beside(edge, inputs) for edge in self.bounds)
        if not ((inputs >= low - slack) & (inputs <= high + slack)).all():
            allowed = "[0, 1]" if self.bounds == UNIT else f"bounds={self.bounds}"
            raise ValueError(
                f"images lie in [{inputs.min():.3g}, {inputs.max():.3g}]; allowed: {allowed}, to which attacks are "
                "clipped; move the normalisation into the model, or give the attack its units, "
                "SignAttack(**conadv_lab.normalised(epsilon, mean, std)), or bounds=None for inputs without bounds"
            )
        self._is_checked = True

    def clip(self, inputs: Tensor) -> Tensor:
        """Clip inputs to the bounds, in place."""
        if self.bounds is None:
            return inputs
        low, high = (self._beside(edge, inputs) for edge in self.bounds)
        return inputs.clamp_(low, high)

    def project(self, delta: Tensor) -> Tensor:
        """Project a perturbation into the ball; in place for the L∞ norm."""
        if self.norm == "linf":
            radius = self._beside(self.epsilon, delta)
            return delta.clamp_(-radius, radius)
        return delta * (self.epsilon / _lengths(delta).clamp_min(1e-12)).clamp_max(1.0)

    def moved(self, inputs: Tensor, delta: Tensor) -> Tensor:
        """Inputs plus a perturbation, projected into ball and bounds; may overwrite ``delta``."""
        return self.clip(self.project(delta).add_(inputs))

    def along(self, gradient: Tensor) -> Tensor:
        """One step up a gradient, sign(0) = +1."""
        if self.norm == "l2":
            direction = gradient / _lengths(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
        else:
            direction = torch.where(gradient >= 0, 1.0, -1.0).to(gradient.dtype)
        return self.scaled(direction)

    def scaled(self, directions: Tensor) -> Tensor:
        """Multiply unit directions (B, C, …) by the step, in place."""
        return directions.mul_(self._beside(self.step, directions))

    def keep(self, gradient: Tensor) -> Tensor:
        """What to keep of a gradient for one step: one bit per value, or the step itself in the L2 norm."""
        return signs.pack(gradient) if self.norm == "linf" else self.along(gradient)

    def taken(self, kept: Tensor, inputs: Tensor) -> Tensor:
        """The step for these inputs from what `keep` returned, as a new tensor."""
        return self.scaled(signs.unpack(kept, inputs)) if self.norm == "linf" else kept.clone()

    def start(self, values: Tensor) -> Tensor:
        """Map uniform numbers (B, C, …) in [0, 1) to the L∞ ball, in place."""
        radius = self._beside(self.epsilon, values)
        return values.mul_(2 * radius).sub_(radius)

    def _beside(self, value: Any, inputs: Tensor) -> Any:
        """A number unchanged; channel values as (C, 1, …), created once, as a captured step cannot."""
        if not isinstance(value, tuple):
            return value
        if inputs.ndim < 2 or inputs.shape[1] != len(value):
            raise ValueError(
                f"inputs have the shape {tuple(inputs.shape)}; allowed: (B, {len(value)}, …), as the attack has "
                f"{len(value)} channels"
            )
        key = value, inputs.device, inputs.dtype, inputs.ndim
        if key not in self._tensors:
            values = torch.tensor(value, dtype=inputs.dtype, device=inputs.device)
            self._tensors[key] = values.view(-1, *[1] * (inputs.ndim - 2))
        return self._tensors[key]


def normalised(epsilon: Value, mean: Value, std: Value, step: Value | None = None) -> dict[str, Any]:
    """An attack's arguments for images that were normalised, (x − mean) / std, outside the model.

    Args:
        epsilon, step: in units of images x in [0, 1].
        mean, std: of the normalisation, numbers or one value per channel.

    Returns:
        ``epsilon``, ``bounds`` and, if given, ``step``, in units of the normalised images.

    >>> normalised(0.1, mean=(0.5, 0.5), std=(0.25, 0.2))
    {'epsilon': (0.4, 0.5), 'bounds': ((-2.0, -2.5), (2.0, 2.5))}
    """
    radii, lengths, means, stds = _alike(
        epsilon=epsilon, step=0.0 if step is None else step, mean=mean, std=std
    )
    units = list(zip(*map(_each, (radii, lengths, means, stds)), strict=True))
    require(all(unit > 0 for *_, unit in units), "std", std, "numbers above 0")
    require(all(radius >= 0 for radius, *_ in units), "epsilon", epsilon, "a number of at least 0")
    found = {
        "epsilon": tuple(radius / unit for radius, _, _, unit in units),
        "step": tuple(length / unit for _, length, _, unit in units),
        "bounds": tuple(tuple((edge - middle) / unit for _, _, middle, unit in units) for edge in (0, 1)),
    }
    return {name: value for name, value in found.items() if name != "step" or step is not None}


def times(factor: float, epsilon: Value) -> float | tuple[float, ...]:
    """A radius multiplied by a number, channel by channel.

    >>> times(2, (0.1, 0.2))
    (0.2, 0.4)
    """
    radii = _numbers("epsilon", epsilon)
    return tuple(factor * radius for radius in radii) if isinstance(radii, tuple) else factor * radii


def _edges(bounds: Any) -> Any:
    if bounds is None:
        return None
    pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    require(pair, "bounds", bounds, "(lowest, highest) value of an input, or None")
    low, high = _alike(lowest=bounds[0], highest=bounds[1])
    fine = all(least < most for least, most in zip(_each(low), _each(high), strict=True))
    require(fine, "bounds", bounds, "the lowest value below the highest")
    return low, high


def _alike(**values: Any) -> list[Any]:
    """All as numbers or, if any has channel values, all as tuples of equal length."""
    numbers = {name: _numbers(name, value) for name, value in values.items()}
    count = max((len(one) for one in numbers.values() if isinstance(one, tuple)), default=0)
    for name, one in numbers.items():
        if isinstance(one, tuple):
            require(
                len(one) == count, f"{name}'s number of channels", len(one), f"{count}, or one number for all"
            )
    return [one if isinstance(one, tuple) or not count else (one,) * count for one in numbers.values()]


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """A number, or the values of a sequence, array or tensor of any shape, such as (C, 1, 1)."""
    if hasattr(value, "flatten"):
        value = value.flatten().tolist()
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, (int, float)) for one in value):
        return tuple(value) if len(value) > 1 else value[0]
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}; allowed: a number, or one value per channel")
    return value


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _lengths(inputs: Tensor) -> Tensor:
    return inputs.flatten(1).norm(dim=1).view(-1, *[1] * (inputs.ndim - 1))
