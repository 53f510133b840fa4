"""From a run folder back to its objects, to measure or export the trained model."""

from pathlib import Path

from torch import nn

from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.models.norm import plain_batch_norm
from conadv_lab.references import named_in
from conadv_lab.runs import RunFolder
from conadv_lab.training.build import Parts, assemble, pick_device
from conadv_lab.training.evaluate import calibrated_copy
from conadv_lab.training.weights import load_weights


def restore(
    path: str | Path, checkpoint: Path | None = None, *, trust: bool = False, **changes: object
) -> tuple[Parts, nn.Module]:
    """(parts, evaluation model) of a run's latest intact checkpoint, or of the given one.

    The model is in evaluation mode with re-estimated main statistics, as for the run's own metrics, and without the
    adversarial branch; if the run kept a weight average, it is that average. Process-wide settings, such as threads
    and deterministic algorithms, do not change.

    Args:
        path: the run folder.
        checkpoint: a folder below its ``checkpoints``.
        trust: run the Python files that the folder's config names, wherever they are; a folder from somebody else may
            name any file.
        changes: fields of the config to override, such as ``device="cpu"`` or ``data_dir=…``.

    Raises:
        ValueError: no run folder, no intact checkpoint, a checkpoint that does not match the model, or untrusted code.
    """
    folder = RunFolder(path)
    # A single process has no other rank to attack on, and perhaps no GPU.
    config = folder.config()
    if not trust:
        _require_no_code(folder, {k: v for k, v in named_in(config).items() if k not in changes})
    config = config.replace(**{"placement": "serial", "attackers": 0, **changes})
    parts = assemble(config, pick_device(config.training.device))
    loaded = folder.load_checkpoint() if checkpoint is None else read_checkpoint(checkpoint)
    if loaded is None:
        raise ValueError(f"{folder.path} has no intact checkpoint")
    _, state = loaded
    weights = state["model"]
    if state["ema"] is not None:
        prefix = "module."
        weights = {k.removeprefix(prefix): v for k, v in state["ema"].items() if k.startswith(prefix)}
    load_weights(parts.model, weights, str(checkpoint or folder.path))
    return parts, plain_batch_norm(calibrated_copy(parts, parts.model))


def _require_no_code(folder: RunFolder, references: dict[str, str]) -> None:
    """Raise ``ValueError`` if building the folder's objects would run files that it names."""
    if references:
        told = ", ".join(f"{name} {reference}" for name, reference in references.items())
        raise ValueError(
            f"{folder.path} refers to code that would run here: {told}; inspect it, then pass --trust or "
            "restore(…, trust=True)"
        )
