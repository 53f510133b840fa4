"""The code of a run, copied beside it and named by its content, so that later edits do not affect queued runs.

``code/HASH/conadv_lab`` is the package, ``code/HASH/own/HASH/file.py`` is a user's file that the config refers to,
with the user's modules that it imports beside it, and ``code/HASH/SNAPSHOT.json`` has the commit and the diff to it.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import conadv_lab
from conadv_lab import provenance
from conadv_lab.config import Config
from conadv_lab.launch.imports import sources, with_own_modules
from conadv_lab.references import COPIES, named_in

PACKAGE = Path(conadv_lab.__file__).resolve().parent


@dataclass(frozen=True)
class Snapshot:
    """The files to copy (relative path to source), where they go, and the copy of each of the user's files."""

    root: Path
    files: dict[str, Path] = field(repr=False)
    digest: str
    copies: dict[Path, str] = field(repr=False)

    @property
    def path(self) -> Path:
        """The folder to import from."""
        return self.root / self.digest[:16]

    def write(self) -> None:
        """Copy, unless a snapshot with this content already exists."""
        if self.path.exists():
            return
        partial = self.root / f".partial-{self.digest[:16]}-{os.getpid()}"
        for relative, source in self.files.items():
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        about = {"digest": self.digest, **provenance.source()}
        (partial / provenance.SNAPSHOT).write_text(json.dumps(about, indent=1) + "\n")
        try:
            partial.rename(self.path)
        except OSError:
            shutil.rmtree(partial)
            if not self.path.exists():  # not lost to another command: a real disk error
                raise

    def redirect(self, config: Config) -> Config:
        """The config with each reference to a user's file pointing at its copy."""
        changes = {}
        for name, reference in named_in(config).items():
            place, _, function = reference.rpartition(":")
            changes[name] = f"{self.path / self.copies[Path(place).expanduser().resolve()]}:{function}"
        return config.replace(**changes) if changes else config


def originals(config: Config) -> dict[str, str]:
    """The config's references to the user's files, by field, as absolute paths."""
    return {
        name: f"{Path(reference.rpartition(':')[0]).expanduser().resolve()}:{reference.rpartition(':')[2]}"
        for name, reference in named_in(config).items()
    }


def take(root: Path, configs: list[Config], start: Path | None = None) -> Snapshot:
    """The snapshot below ``root`` that these configs need; writes nothing.

    Args:
        root: where snapshots are kept.
        configs: of the runs.
        start: the folder the runs were sent from, whose modules ``train`` would find; None: the current folder.

    Raises:
        ValueError: a file that a config refers to does not exist.
    """
    files = {f"conadv_lab/{path.relative_to(PACKAGE)}": path for path in sources(PACKAGE)}
    copies = {}
    for reference in sorted({ref for config in configs for ref in named_in(config).values()}):
        path = Path(reference.rpartition(":")[0]).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"{reference!r} refers to a missing file: {path} does not exist")
        bundle = with_own_modules(path, start or Path.cwd())
        home = f"{COPIES}/{digest_of(bundle)[:16]}"
        copies[path] = f"{home}/{path.name}"
        files |= {f"{home}/{relative}": source for relative, source in bundle.items()}
    return Snapshot(root.absolute(), files, digest_of(files), copies)


def digest_of(files: dict[str, Path]) -> str:
    """Hash of relative paths and contents."""
    total = sha256()
    for relative, path in sorted(files.items()):
        total.update(relative.encode() + b"\0" + sha256(path.read_bytes()).digest())
    return total.hexdigest()


def check(path: Path, digest: str) -> None:
    """Raise unless this process runs the snapshot at ``path``, and the snapshot is unaltered.

    Raises:
        RuntimeError: conadv_lab was imported from elsewhere, or a file in the snapshot was altered.
    """
    if PACKAGE.parent != path.resolve():
        raise RuntimeError(
            f"conadv_lab was imported from {PACKAGE.parent}, but this run was sent with the code in {path}: "
            "the profile's setup lines must not change PYTHONPATH or PYTHONSAFEPATH"
        )
    files = {
        str(file.relative_to(path)): file for part in ("conadv_lab", COPIES) for file in sources(path / part)
    }
    if digest_of(files) != digest:
        raise RuntimeError(f"the code in {path} was altered after it was sent; use submit retry --new-code")
