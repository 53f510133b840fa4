"""SAM and its scale-invariant variant, ASAM: moves the weights to where the loss is highest nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.later import moving, torch
from conadv_lab.methods.weight_space import PerturbationOptions, RhoOptions, WeightSpace, Whose
from conadv_lab.mistakes import require_number

if TYPE_CHECKING:
    from torch import Tensor

    from conadv_lab.config import Config
    from conadv_lab.data.loader import Step
    from conadv_lab.methods.moving import Move, Part


class SAM(WeightSpace):
    """Sharpness-aware minimization: the gradient at the point of highest loss within ρ, to first order.

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, Algorithm 1:

        e = ρ g / ‖g‖,  g = ∇L(w)        w ← w − η ∇L(w + e)

    Both gradients use the same images; the norm is over all weights of the model, without an added constant; if it is
    0, so is e. Two gradients in sequence. ρ = 0.05 is the paper's for CIFAR-10.

    >>> SAM().gradient_evaluations, SAM().depth
    (2.0, 2)
    """

    name, label, colour, marker = "sam", "SAM", "#332288", "p"
    about = "B clean images, with the gradient at w + ρ g/‖g‖"
    source = "Foret et al., ICLR 2021"
    reads: tuple[type, ...] = (RhoOptions, PerturbationOptions)
    side = "ascent"

    def of_part(self, part: Part, step: Step) -> tuple[Losses, list[Tensor] | None]:
        losses, ascent = part.here(counted=True)
        _, gradient = part.at(self.move(part, ascent), counted=False)
        part.give(gradient)
        return losses, None

    def move(self, part: Part, ascent: list[Tensor]) -> Move:
        """The move, given the gradient at w, which may be overwritten."""
        return moving.along(ascent, self.rho)


@dataclass(frozen=True)
class AsamOptions:
    """Options of `asam`."""

    asam_eta: float = 0.01
    """η, added to |w|."""

    def check(self) -> None:
        require_number(asam_eta=self.asam_eta)


class ASAM(SAM):
    """Adaptive SAM: the radius is relative to the weights, so that rescaling a layer changes nothing.

    Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    ICML 2021, equation 12:

        e = ρ T² g / ‖T g‖,  T = |w| + η        w ← w − η_t ∇L(w + e)

    T is 1 for parameters not named ``weight``, that is biases, as in the authors' code; batch norm's γ counts as a
    weight. η = 0.01 is their class's default (their script passes 0), ρ = 0.5 is the paper's for CIFAR-10.
    """

    name, label, colour, marker = "asam", "ASAM", "#88CCEE", "<"
    about = "B clean images, with the gradient at w + ρ T²g/‖Tg‖, where T scales with |w|"
    source = "Kwon et al., ICML 2021"
    reads: tuple[type, ...] = (RhoOptions, PerturbationOptions, AsamOptions)
    radius = 0.5
    copies = 3

    def __init__(
        self, rho: float | None = None, perturbation: Whose | None = None, eta: float = 0.01
    ) -> None:
        super().__init__(rho, perturbation)
        require_number(eta=eta)
        self.eta = eta

    @classmethod
    def of(cls, config: Config) -> Method:
        return cls(config.method.rho, config.method.perturbation, config.method.asam_eta)

    def move(self, part: Part, ascent: list[Tensor]) -> Move:
        scaled: list[Any] = []
        with torch.no_grad():
            named = zip(part.weights.names, part.weights.parameters, ascent, strict=True)
            scales = [(p.abs() + self.eta if "weight" in name else None) for name, p, _ in named]
            for gradient, scale in zip(ascent, scales, strict=True):
                scaled.append(gradient if scale is None else gradient.mul_(scale))
            length = moving.norm(scaled)
            for gradient, scale in zip(scaled, scales, strict=True):
                if scale is not None:
                    gradient.mul_(scale)
        return moving.Move(scaled, moving.ratio(self.rho, length))
