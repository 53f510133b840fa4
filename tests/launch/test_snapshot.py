"""The copied code is what runs, and nothing else is."""

import json
import shutil
import subprocess
import sys

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
