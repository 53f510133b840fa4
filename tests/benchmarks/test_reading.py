"""The reading benchmark compares the same work, and writes what others read."""

import json
import sys

from benchmarks import reading
from tests.data.trees import write_tree


def test_it_runs_and_names_its_rows(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "data", train=4, val=1)
    words = ["--data-dir", str(tmp_path / "data"), "--images", "64", "--workers", "1", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["reading", *words, "--json", str(tmp_path / "rows.json")])
    reading.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert set(rows) - {"full size, DALI"} == {
        "pixels equal", reading.PEER, "full size", "pack 400",
        "bare loop full size", "loader full size", "bare loop pack 400", "loader pack 400",
    }  # fmt: skip
    assert rows["pixels equal"]["ratio"] == 1
    assert rows["full size"]["peer"] == reading.PEER
    assert rows["loader pack 400"]["peer"] == "bare loop pack 400"
    assert "loader pack 400" in capsys.readouterr().out


def test_ours_and_the_peer_make_the_same_images(tmp_path):
    photos = reading.open_split(write_tree(tmp_path, train=4, val=1), "train")
    draws = reading.draws_of(12)
    ours, theirs = reading.ours(photos, draws)[:12].permute(0, 3, 1, 2), reading.peers(photos, draws)[:12]
    assert (ours.int() - theirs.int()).abs().max() <= 2  # Pillow rounds in another order
