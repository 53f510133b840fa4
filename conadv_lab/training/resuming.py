"""What a resumed run must have in common with its run folder."""

from pathlib import Path

from conadv_lab.config import Config
from conadv_lab.data.loader import ImageSet
from conadv_lab.mistakes import creatable
from conadv_lab.references import COPIES, is_file_reference
from conadv_lab.runs import RunFolder
from conadv_lab.training.claim import LOCK

CHANGES_NO_BIT = frozenset(
    {
        "data_dir",  # the images are compared instead; photographs by name and label
        "download",
        "workers",
        "keep_gb",
        "placement",
        "attackers",  # as long as the number of trainers is the same
        "capture",  # on a GPU up to rounding; bit for bit with deterministic
        "log_every",
        "log_to",
        "checkpoint_every",
        "evaluate_every",
        "mirror",
        "probe_every",
    }
)
"""Fields of the config that may change on resuming: they alter no weight, and no metric that both runs have."""


def reconciled(config: Config, folder: RunFolder, resume: bool) -> Config:
    """The config, with machine-dependent None values filled in from the resumed folder.

    Raises:
        ValueError: a value that changes bits differs from the folder's, or the folder exists and ``resume`` is False.
    """
    creatable(folder.path)
    if not folder.path.exists() or all(child.name == LOCK for child in folder.path.iterdir()):
        return config
    if not resume:
        raise ValueError(f"{folder.path} already exists; pass --resume to continue it, or another --out")
    if not (folder.path / "config.json").exists():
        if any(not child.name.startswith(".") and child.name != "manifest.json" and child.name != "checkpoints"
               for child in folder.path.iterdir()):  # fmt: skip
            raise ValueError(
                f"{folder.path} is not a run folder, so it cannot be resumed; pass another --out"
            )
        return config
    before = folder.config()
    if config.training.threads is None:
        config = config.replace(threads=before.training.threads)
    ours, theirs = config.to_dict(), before.to_dict()
    different = [
        f"{name} is {ours[section][name]!r}, was {value!r}"
        for section, values in theirs.items()
        for name, value in values.items()
        if ours[section][name] != value
        and name not in CHANGES_NO_BIT
        and not _copies_of_one_file(ours[section][name], value)
    ]
    if different:
        raise ValueError(
            f"{folder.path} was started with another config: {'; '.join(different)}; only these may change: "
            f"{', '.join(sorted(CHANGES_NO_BIT))}. Pass another --out for a new run"
        )
    return config


def _copies_of_one_file(one: object, other: object) -> bool:
    """Whether both refer to submit's copies of one user file, which --new-code copies again."""
    paths = [Path(value) for value in (one, other) if isinstance(value, str) and is_file_reference(value)]
    return (
        len(paths) == 2
        and paths[0].name == paths[1].name
        and all(len(path.parts) > 3 and path.parts[-3] == COPIES for path in paths)
    )


def require_unchanged(config: Config, folder: RunFolder, resume: bool) -> None:
    """Raise ``ValueError`` if another job has started or finished the run since it was checked."""
    if (folder.path / "config.json").exists():  # other files may come from this job's own model or data
        reconciled(config, folder, resume)
    if folder.result() is not None:
        raise ValueError(f"{folder.path} was finished by another job while this one started")


def fingerprints(train_set: ImageSet, test_set: ImageSet) -> dict[str, str]:
    """The fingerprints of a run's images, for its manifest."""
    return {"data": fingerprint(train_set), "test_data": fingerprint(test_set)}


def require_same_data(config: Config, folder: RunFolder, train_set: ImageSet, test_set: ImageSet) -> None:
    """Raise ``ValueError`` if the folder's run was started on other images, as far as fingerprints show.

    Folders written by versions that recorded only the training images are compared by these.
    """
    if not (folder.path / "manifest.json").exists():
        return
    noted = folder.manifest()
    for name, now in fingerprints(train_set, test_set).items():
        if noted.get(name) not in (None, now):
            which = "data" if name == "data" else "test images"
            raise ValueError(f"{folder.path} was started with other {which}: {noted[name]}; now {now}")
    silent = [images for images in (train_set, test_set) if not hasattr(images, "fingerprint")]
    if (folder.path / "config.json").exists() and silent:
        was, now = folder.config().data.data_dir, config.data.data_dir
        if was != now:
            raise ValueError(
                f"data_dir is {now!r}, was {was!r}; allowed: {was!r}, as {type(silent[0]).__name__} has no "
                "fingerprint() to tell whether the images are the same"
            )


def fingerprint(images: ImageSet) -> str:
    """A set's own fingerprint, or its number of images if it has none."""
    own = getattr(images, "fingerprint", None)
    return own() if own else f"{len(images)} images"
