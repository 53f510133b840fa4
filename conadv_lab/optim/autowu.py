"""AutoWU: the learning rate grows until the loss has turned (Kim et al. 2021, arXiv 2107.05855).

"Automated Learning Rate Scheduler for Large-batch Training", AutoML workshop at ICML 2021. Constants are from the
authors' code; our own choices are marked.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from conadv_lab.mistakes import require, require_count
from conadv_lab.optim.gaussian_process import GaussianProcess, Posterior
from conadv_lab.optim.options import Length, Optimization
from conadv_lab.seeds import generator

CONFIDENCE, PREDICTIONS, PATIENCE = 0.95, 5, 3
FIT_POINTS, PREDICTION_POINTS, GRID = 100, 500, 500
_EXTRA_VARIANCE = 1e-4
"""Added to the variance of each difference, as in the authors' code."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of testing the losses so far.

    Attributes:
        step: number of steps taken.
        probability: median over the predictions of the highest probability that the loss was lower before than now.
        votes: number of predictions in which it exceeds 0.95; the test is positive if most do.
        positives: consecutive positive tests, including this one.
        lr: mean over the predictions of the learning rate at which the loss is lowest.
    """

    step: int
    probability: float
    votes: int
    positives: int
    lr: float


class AutoWU:
    """A schedule that is called with a step, like `conadv_lab.optim.schedule.Schedule`, and is given the losses.

    While growing, step t uses first · (lr / first)^(t / longest), where longest is half of all steps. After each epoch
    a Gaussian process smooths the losses so far over x = (t + 1) / (steps so far). Each of five predictions, from up to
    500 losses, votes that the loss has turned if max_i P(f(x_i) < f(now)) > 0.95 on a grid of 500; the test is positive
    if most do. Three consecutive positive tests end the growth. The learning rate is then the mean, over the
    predictions, of its value where the loss is lowest; it stays constant, and falls by cosine over the last
    fraction ``cooldown`` of all steps.

    Ours: growth also ends like this when it reaches its maximum length or a non-finite loss, which the authors' code
    drops; and the cosine starts at the learning rate, not at half of it.

    Losses stay on their device until a test reads them.

    Args:
        lr: where the growth would end, above ``first``.
        steps: of the whole run, at least 1.
        epoch: steps between two tests, at least 1.
        first: learning rate of step 0, above 0.
        cooldown: fraction of all steps, in [0, 1]; with 1 the learning rate falls as soon as the growth ends.
        end: final learning rate, at least 0.
        seed: selects which losses a fit and a prediction use, if there are more.

    Raises:
        ValueError: a value outside its range.

    >>> schedule = AutoWU(lr=1.0, steps=100, epoch=10)
    >>> round(schedule(0), 6), round(schedule(25), 6)
    (1e-05, 0.003162)
    """

    def __init__(
        self,
        lr: float,
        steps: int,
        epoch: int,
        *,
        first: float = 1e-5,
        cooldown: float = 0.2,
        end: float = 0.0,
        seed: int = 0,
    ) -> None:
        require(0 < first < float("inf"), "first_lr", first, "a finite number above 0")
        require(first < lr < float("inf"), "lr", lr, f"a finite number above first_lr, which is {first!r}")
        require_count(steps=steps, epoch=epoch)
        require(0 <= cooldown <= 1, "cooldown", cooldown, "0 to 1")
        require(0 <= end <= lr, "end_lr", end, f"0 to lr, which is {lr!r}")
        self.lr, self.first, self.end, self.seed = lr, first, end, seed
        self.steps, self.epoch, self.longest = steps, epoch, max(1, steps // 2)
        self.cooldown = steps - round(cooldown * steps)
        self.process = GaussianProcess()
        self.losses: Tensor | None = None
        self.verdicts: list[Verdict] = []
        self.switch: int | None = None
        self.found, self.reason = 0.0, ""

    @property
    def growing(self) -> bool:
        return self.switch is None

    def __call__(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0; for future steps as currently planned."""
        require(step >= 0, "step", step, "a whole number of at least 0")
        if self.switch is None or step < self.switch:
            return self.first * (self.lr / self.first) ** (min(step, self.longest) / self.longest)
        begin = max(self.switch, self.cooldown)
        if step < begin:
            return self.found
        end = min(self.end, self.found)
        done = min(1.0, (step - begin) / max(1, self.steps - begin))
        return end + (self.found - end) * (1 + cos(pi * done)) / 2

    @torch.no_grad()
    def note(self, step: int, loss: Tensor, gradients: Iterable[Tensor] = ()) -> None:
        """Record the loss of a growth step; if it is not finite, skip the step by zeroing its gradients.

        Never synchronises. Taking such a step would make the weights non-finite too.

        Args:
            step: counted from 0.
            loss: a scalar on any device; stored as is.
            gradients: changed in place.
        """
        if self.losses is None:
            self.losses = torch.full((self.longest,), float("nan"), dtype=loss.dtype, device=loss.device)
        self.losses[step] = loss
        broken = ~torch.isfinite(loss)
        for gradient in gradients:
            gradient.masked_fill_(broken, 0.0)

    def due(self, taken: int) -> bool:
        """Whether a test is due once ``taken`` steps have been taken."""
        return self.growing and (taken % self.epoch == 0 or taken >= self.longest)

    def judge(self, taken: int) -> Verdict:
        """Test the losses of the first ``taken`` steps, which the host reads; ends the growth if they have turned.

        A non-finite loss ends the growth, using the losses before it.
        """
        require(self.losses is not None, "losses", None, "a loss noted for each step")
        assert self.losses is not None
        known = self.losses[:taken].to("cpu", torch.float64)
        broken = (~torch.isfinite(known)).nonzero()
        finite = int(broken[0]) if len(broken) else taken
        verdict = self._judged(known[:finite], taken)
        self.verdicts.append(verdict)
        if finite < taken:
            self._end(taken, verdict, f"the loss of step {finite} is {known[finite].item()}")
        elif verdict.positives >= PATIENCE:
            self._end(taken, verdict, f"{PATIENCE} consecutive tests say that the loss has turned")
        elif taken >= self.longest:
            self._end(taken, verdict, "half of all steps have been taken")
        return verdict

    def follow(self, taken: int, lr: float) -> None:
        """End the growth as another rank has decided."""
        self.switch, self.found, self.reason = taken, lr, "as rank 0 decided"

    def _end(self, taken: int, verdict: Verdict, reason: str) -> None:
        self.switch, self.found, self.reason = taken, verdict.lr, reason

    def _judged(self, losses: Tensor, taken: int) -> Verdict:
        if not len(losses):
            return Verdict(taken, 0.0, 0, 0, self.first)
        predictions = self._predictions(losses, taken)
        highest = sorted(turned(posterior) for posterior in predictions)
        votes = sum(probability > CONFIDENCE for probability in highest)
        before = self.verdicts[-1].positives if self.verdicts else 0
        positives = before + 1 if 2 * votes > len(highest) else 0
        rates = [self(self._lowest(posterior, len(losses))) for posterior in predictions]
        return Verdict(taken, highest[len(highest) // 2], votes, positives, sum(rates) / len(rates))

    def _predictions(self, losses: Tensor, taken: int) -> list[Posterior]:
        count = len(losses)
        x = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / count
        grid = torch.linspace(1 / count, 1.0, GRID, dtype=torch.float64, device="cpu")
        some = self._drawn(count, FIT_POINTS, taken, "fit")
        self.process.fit(x[some], losses[some])
        predictions = []
        for number in range(PREDICTIONS if count > PREDICTION_POINTS else 1):
            some = self._drawn(count, PREDICTION_POINTS, taken, number)
            predictions.append(self.process.predict(x[some], losses[some], grid))
        return predictions if len(predictions) > 1 else predictions * PREDICTIONS

    def _drawn(self, count: int, most: int, *names: object) -> Tensor:
        if count <= most:
            return torch.arange(count, device="cpu")
        draw = generator(self.seed, "autowu", *names)
        return torch.randperm(count, generator=draw, device="cpu")[:most].sort().values

    def _lowest(self, posterior: Posterior, count: int) -> int:
        """The taken step nearest to where the predicted loss is lowest."""
        place = 1 / count + (1 - 1 / count) * int(posterior.mean.argmin()) / (GRID - 1)
        return min(count - 1, max(0, round(place * count) - 1))

    def figures(self) -> dict[str, Any]:
        """Entries about the schedule for a run's result, flat."""
        if self.switch is None:
            return {"autowu_switch": None}
        return {"autowu_switch": self.switch, "autowu_lr": self.found, "autowu_reason": self.reason}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to resume, bit for bit."""
        return {
            "losses": None if self.losses is None else self.losses.cpu().clone(),
            "process": self.process.state_dict(),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "switch": self.switch,
            "found": self.found,
            "reason": self.reason,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.losses = None if state["losses"] is None else state["losses"].clone().to(device)
        self.process.load_state_dict(state["process"])
        self.verdicts = [Verdict(**verdict) for verdict in state["verdicts"]]
        self.switch, self.found, self.reason = state["switch"], state["found"], state["reason"]


def turned(posterior: Posterior) -> float:
    """The highest probability over the grid that the curve was lower there than at the end of the grid."""
    rise = posterior.mean[-1] - posterior.mean
    deviation = (posterior.difference_variance.clamp_min(0) + _EXTRA_VARIANCE).sqrt()
    return torch.special.ndtr(rise / deviation).max().item()


def build_autowu(section: Optimization, length: Length) -> AutoWU:
    """Build it from a config's section.

    Raises:
        ValueError: as for `AutoWU`.
    """
    assert section.lr is not None, "the config is not resolved"
    return AutoWU(
        section.lr,
        length.steps,
        max(1, length.steps_of(1)),
        first=section.first_lr,
        cooldown=section.cooldown,
        end=section.end_lr,
        seed=length.seed,
    )
