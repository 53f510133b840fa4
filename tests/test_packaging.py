"""The wheel and the sdist hold what the commands need, and work where the checkout is not."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(words: list[str], cwd: Path, **more: str) -> str:
    """Standard output of a command that must succeed, without this checkout or any other on the path."""
    hidden = ("PYTHONPATH", "CONADV_LAB")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)} | more
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(kind: str, source: Path, folder: Path) -> Path:
    name = run([sys.executable, "-c", BUILD, kind, str(folder)], source).splitlines()[-1]
    return folder / name


def copy_of_the_checkout(folder: Path) -> Path:
    """The files that git tracks or would, so that a build leaves nothing behind and takes nothing stray with it."""
    import shutil

    names = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the unpacked sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    source = copy_of_the_checkout(tmp_path_factory.mktemp("source"))
    dist = tmp_path_factory.mktemp("dist")
    sdist = built("sdist", source, dist)
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return sdist, built("wheel", next(unpacked.iterdir()), dist)


@pytest.mark.slow
def test_the_archives_hold_the_whole_package(archives):
    sdist, wheel = archives
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    tracked = run(["git", "ls-files", "conadv_lab"], ROOT).splitlines()
    assert {Path(name).suffix for name in tracked} == {".py", ".typed", ".csv", ".toml", ".html"}
    assert set(tracked) <= packed
    assert set(tracked) <= installed
    assert {
        "CITATION.cff",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "docs/index.md",
        "tests/conftest.py",
    } <= packed
    assert not [name for name in installed if name.startswith(("tests", "docs", "analysis", "benchmarks"))]


@pytest.mark.slow
def test_the_wheel_trains_and_measures_away_from_the_checkout(archives, tmp_path):
    """Dependencies are the parent environment's, by a path file; the package itself is the wheel's."""
    _, wheel = archives
    run([sys.executable, "-m", "venv", "clean"], tmp_path)
    python = str(tmp_path / "clean/bin/python")
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], tmp_path)
    where = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    parents = [path for path in sys.path if path.endswith("site-packages")]
    (Path(where) / "parent.pth").write_text("\n".join(parents) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert where in run([python, "-c", "import conadv_lab; print(conadv_lab.__file__)"], elsewhere)
    short = ["--steps", "2", "--warmup-epochs", "0", "--out", "run"]
    run([python, "-m", "conadv_lab.train", "digits-conadv", *short], elsewhere)
    measure = [
        "--examples",
        "64",
        "--measures",
        "top_eigenvalue",
        "--json",
        "report.json",
        "--html",
        "report.html",
    ]
    run([python, "-m", "conadv_lab.sharpness", "run", *measure], elsewhere)
    assert "top_eigenvalue" in (elsewhere / "report.html").read_text()
    run([python, "-m", "conadv_lab.demo", "--help"], elsewhere)
