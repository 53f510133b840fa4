"""The copied code is what runs, and nothing else is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conadv_lab import provenance
from conadv_lab.launch import snapshot
from conadv_lab.recipes.digits import vanilla


def test_the_copy_is_complete_and_can_be_imported_from_anywhere(tmp_path):
    taken = snapshot.take(tmp_path, [vanilla()])
    taken.write()
    taken.write()
    code = (
        "from conadv_lab.launch import snapshot; from conadv_lab import provenance\n"
        "print(snapshot.PACKAGE, provenance.source()['commit'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=snapshot.PACKAGE.parent,
        env={"PYTHONPATH": str(taken.path), "PYTHONSAFEPATH": "1"}
    )  # fmt: skip
    assert ran.stdout.split() == [str(taken.path / "conadv_lab"), str(provenance.source()["commit"])]
    assert [path.name for path in tmp_path.iterdir()] == [taken.digest[:16]]


def test_the_same_content_has_the_same_name_and_another_another(own, tmp_path):
    configs = [vanilla().replace(method=f"{own}:slow")]
    first = snapshot.take(tmp_path, configs)
    assert snapshot.take(tmp_path, configs).digest == first.digest
    with open(own, "a") as file:
        file.write("# edited\n")
    assert snapshot.take(tmp_path, configs).digest != first.digest


def test_a_users_file_is_copied_and_the_config_points_at_the_copy(own, tmp_path):
    config = vanilla().replace(method=f"{own}:slow")
    taken = snapshot.take(tmp_path / "code", [config])
    taken.write()
    place, _, name = taken.redirect(config).method.method.rpartition(":")
    assert name == "slow"
    assert place.startswith(str(taken.path))
    with open(place) as copy, open(own) as original:
        assert copy.read() == original.read()


USES = """
import json, torch
import helpers
from conadv_lab.methods.base import Vanilla

def method(config):
    from lazily import late
    assert json and torch and late == 3
    return helpers.made()
"""
OWN_MODULES = {
    "here/uses.py": USES,
    "here/helpers.py": "from tools.making import made\n",
    "here/lazily.py": "import rest\nlate = rest.value()\n",
    "here/json.py": "raise ImportError('not the one that Python has imported long since')\n",
    "here/unused.py": "",
    "there/rest/part.py": "import string\n\ndef three():\n    return 3\n",  # no __init__.py
    "there/rest/__init__.py": "from .part import three as value\n",
    "there/tools/making.py": "from conadv_lab.methods.base import Vanilla\n\ndef made():\n    return Vanilla()\n",
    "there/tools/table.csv": "a,b\n",
    "there/data/large.csv": "a,b\n",
}


@pytest.fixture
def using(tmp_path, monkeypatch) -> Path:
    """A user's file that imports what lies beside it and in the working directory."""
    for name, content in OWN_MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "here" / "uses.py"


def test_the_modules_that_a_users_file_imports_are_copied_with_it(using, tmp_path):
    """The worker finds the copies alone: the originals are gone, as if edited."""
    config = vanilla().replace(method=f"{using}:method")
    taken = snapshot.take(tmp_path / "code", [config])
    taken.write()
    reference = taken.redirect(config).method.method
    home = Path(reference.rpartition(":")[0]).parent
    copied = {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()}
    assert copied == {
        "uses.py", "helpers.py", "lazily.py", "json.py", "rest/__init__.py", "rest/part.py", "tools/making.py",
        "tools/table.csv",
    }  # fmt: skip
    for folder in ("here", "there"):
        shutil.rmtree(tmp_path / folder)
    code = f"import json\nfrom conadv_lab import references\nprint(references.load({reference!r})(None))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PYTHONPATH": str(taken.path), "PYTHONSAFEPATH": "1"}
    )  # fmt: skip
    assert "Vanilla object" in ran.stdout, ran.stderr


def test_an_edited_helper_is_other_code(using, tmp_path):
    configs = [vanilla().replace(method=f"{using}:method")]
    first = snapshot.take(tmp_path / "code", configs)
    (using.parent / "helpers.py").write_text("from tools.making import made as made\n")
    assert snapshot.take(tmp_path / "code", configs).digest != first.digest


def test_sent_again_from_elsewhere_it_is_complete(using, tmp_path, monkeypatch):
    config = vanilla().replace(method=f"{using}:method")
    first = snapshot.take(tmp_path / "code", [config])
    monkeypatch.chdir(tmp_path)
    assert snapshot.take(tmp_path / "code", [config], tmp_path / "there").digest == first.digest
    first.write()
    # Its own copies, where the originals are gone, are complete too.
    assert snapshot.take(tmp_path / "code", [first.redirect(config)]).digest == first.digest


def test_every_file_of_the_package_is_copied(tmp_path):
    """Data files too, of which the simulator's clusters are such."""
    taken = snapshot.take(tmp_path, [vanilla()])
    here = {
        f"conadv_lab/{file.relative_to(snapshot.PACKAGE)}"
        for file in snapshot.PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert set(taken.files) == here
    assert "conadv_lab/staleness/timeline/clusters/h100.toml" in here


def test_code_from_elsewhere_is_refused(tmp_path):
    taken = snapshot.take(tmp_path, [vanilla()])
    taken.write()
    with pytest.raises(RuntimeError, match="was sent with the code in"):
        snapshot.check(taken.path, taken.digest)


def test_altered_code_is_refused(tmp_path, monkeypatch):
    taken = snapshot.take(tmp_path, [vanilla()])
    taken.write()
    monkeypatch.setattr(snapshot, "PACKAGE", taken.path / "conadv_lab")
    snapshot.check(taken.path, taken.digest)
    (taken.path / "conadv_lab" / "plots.py").write_text("")
    with pytest.raises(RuntimeError, match="was altered after it was sent"):
        snapshot.check(taken.path, taken.digest)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.py does not exist"):
        snapshot.take(tmp_path, [vanilla().replace(method="nowhere.py:method")])


def test_the_difference_to_the_commit_is_known(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "conadv_lab"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert provenance.source()["diff"] == ""
    (package / "a.py").write_text("2\n")
    about = provenance.source()
    assert about["commit"].endswith("+")
    assert "+2" in about["diff"]
    (tmp_path / provenance.SNAPSHOT).write_text(json.dumps({"commit": "abc", "diff": "d"}))
    assert provenance.source() == {"commit": "abc", "diff": "d"}


def test_the_access_token_of_slurm_is_not_recorded(monkeypatch):
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    variables = provenance.slurm_variables()
    assert variables["SLURM_JOB_ID"] == "3"
    assert "secret" not in variables.values()
