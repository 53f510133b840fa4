"""A run folder that came from somebody else is opened without running what it names."""

import json
import shutil
from pathlib import Path

import pytest

from conadv_lab.frames import collect
from conadv_lab.runs import RunFolder
from conadv_lab.sharpness.__main__ import main as sharpness
from conadv_lab.training.loop import train
from conadv_lab.training.restore import restore
from tests.training.test_loop import tiny

PLANTED = """
import pathlib
from conadv_lab.data.digits import load_digits
from conadv_lab.data.sets import TensorSet
from conadv_lab.methods.base import Vanilla
from conadv_lab.models.digits import DigitsCNN

pathlib.Path({mark!r}).touch()

def method(config):
    return Vanilla()

def model(config):
    return DigitsCNN(10)

def dataset(config):
    images, labels, test_images, test_labels = load_digits()
    return TensorSet(images, labels, 10), TensorSet(test_images, test_labels, 10)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    return train(tiny(steps=2, warmup_epochs=0, bn_recalibrate=0), out, progress="none").path


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that is there once the planted one has run."""
    return tmp_path / "it-has-run"


def foreign(run: Path, tmp_path: Path, mark: Path, place: str, field: str) -> Path:
    """The folder as a stranger sends it: its config names a file, in it, beside it or elsewhere."""
    section = {"dataset": "data", "model": "model", "method": "method"}[field]
    folder = tmp_path / "download" / "run"
    folder.parent.mkdir()
    run.rename(folder)
    (folder / place).write_text(PLANTED.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config[section][field] = f"{folder / place}:{field}"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize("place", ["planted.py", "../beside.py"])
@pytest.mark.parametrize("field", ["dataset", "model", "method"])
def test_a_planted_file_runs_only_where_the_user_says_so(
    copy, tmp_path, mark, place, field, capsys, monkeypatch
):
    """In the folder, or beside it, where an archive was unpacked in the working directory."""
    folder = foreign(copy, tmp_path, mark, place, field)
    monkeypatch.chdir(tmp_path)
    words = [str(folder), "--measures", "top_eigenvalue", "--examples", "20", "--json", "found.json"]
    assert sharpness(words) == 2
    told = capsys.readouterr().err
    assert f"refers to code that would run here: {field} {folder / place}:{field}; inspect it" in told
    assert "--trust" in told
    with pytest.raises(ValueError, match="refers to code that would run here"):
        restore(folder)
    collect(folder)
    RunFolder(folder).config()
    assert not mark.exists()
    assert not (tmp_path / "found.json").exists()
    if field == "model":
        assert sharpness([*words, "--trust", "--learning-rate", "0.1"]) == 0
    else:
        restore(folder, trust=True)
    assert mark.exists()


def test_a_line_to_a_strangers_run_is_as_careful(copy, run, tmp_path, mark, capsys):
    folder = foreign(copy, tmp_path, mark, "planted.py", "model")
    words = [str(run), "--measures", "top_eigenvalue", "--examples", "20", "--line-to", str(folder)]
    assert sharpness(words) == 2
    assert str(folder / "planted.py") in capsys.readouterr().err
    assert not mark.exists()


def test_a_file_that_the_user_names_is_the_users_own_word(copy, tmp_path, mark):
    folder = foreign(copy, tmp_path, mark, "planted.py", "method")
    restore(folder, method="vanilla")
    assert not mark.exists()
    own = tmp_path / "own.py"
    own.write_text(PLANTED.format(mark=str(tmp_path / "mine")))
    restore(folder, method=f"{own}:method")
    assert (tmp_path / "mine").exists()
    assert not mark.exists()
