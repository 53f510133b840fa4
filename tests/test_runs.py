"""Run folders: atomic, hashed, and nothing in them is trusted."""

import io
import json
import os
from hashlib import sha256

import pytest
import torch

from conadv_lab.checkpoints import KEPT_CHECKPOINTS, read_checkpoint
from conadv_lab.config import Config
from conadv_lab.files import write_json
from conadv_lab.frames import collect
from conadv_lab.runs import RunFolder


def folder_in(path) -> RunFolder:
    folder = RunFolder(path / "run")
    folder.create(Config(), {"created": "today"})
    return folder


def test_the_newest_checkpoints_are_kept(tmp_path):
    folder = folder_in(tmp_path)
    for step in (1, 2, 30, 200):
        folder.save_checkpoint(step, {"step": step, "weight": torch.tensor([1.5, step])})
    assert [path.name for path in folder.committed()] == ["step_00000200", "step_00000030"]
    assert len(folder.committed()) == KEPT_CHECKPOINTS
    commit, state = folder.load_checkpoint()
    assert (commit["step"], state["step"]) == (200, 200)
    assert torch.equal(state["weight"], torch.tensor([1.5, 200.0]))


def test_a_checkpoint_knows_where_the_metrics_stood(tmp_path):
    folder = folder_in(tmp_path)
    folder.append_metrics({"step": 0})
    commit, _ = read_checkpoint(folder.save_checkpoint(1, {}))
    folder.append_metrics({"step": 1})
    folder.metrics_file.open("a").write('{"step": 2, "lo')
    assert [line["step"] for line in folder.metrics()] == [0, 1]
    folder.cut_metrics(commit["metrics_bytes"])
    assert [line["step"] for line in folder.metrics()] == [0]


class Planted:
    """What a stranger could put into a pickle: code that runs when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("planted-by-a-stranger",)


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = folder_in(tmp_path)
    place = folder.save_checkpoint(1, {})
    buffer = io.BytesIO()
    torch.save({"step": Planted()}, buffer)
    (place / "state.pt").write_bytes(buffer.getvalue())
    digest = sha256(buffer.getvalue()).hexdigest()
    commit = json.loads((place / "COMMIT.json").read_text()) | {"files": {"state.pt": digest}}
    (place / "COMMIT.json").write_text(json.dumps(commit))
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        read_checkpoint(place)
    assert not (tmp_path / "planted-by-a-stranger").exists()


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})

    def full(path, content):
        path.write_bytes(content[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conadv_lab.files.write_synced", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config.json"):
        RunFolder(tmp_path).config()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_checkpoint(tmp_path)


def test_leftovers_of_a_kill_are_cleared(tmp_path):
    folder = folder_in(tmp_path)
    (folder.checkpoints / ".partial-00000007-123").mkdir()
    kept = folder.save_checkpoint(7, {})
    folder.clear_leftovers()
    assert list(folder.checkpoints.iterdir()) == [kept]


def test_collecting_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_in(tmp_path / "runs")
    assert list(collect("runs/*")["run"]) == ["runs/run"]
    with pytest.raises(ValueError, match=r"nothing matches 'rnus/\*' in .*\. Did you mean 'runs/\*'\?"):
        collect("rnus/*")
    with pytest.raises(
        ValueError, match=r"nothing matches 'elsewhere', 'runs/rn' .* Did you mean 'runs/run'"
    ):
        collect(["elsewhere", "runs/rn"])
    with pytest.raises(ValueError, match="nothing matches an empty list"):
        collect([])
    with pytest.warns(UserWarning, match="'runs': no run among the 1 matches"):
        assert collect("runs").empty
