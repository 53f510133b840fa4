"""slurm/local/up and down: a cluster of their own, others left alone, nothing left."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
LOCAL = Path(__file__).parents[2] / "slurm" / "local"


def script(name: str, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_CONF"}
    environment["CONADV_SLURM_DIR"] = str(folder)
    return subprocess.run(
        [LOCAL / name], env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def pids(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted((folder / "pid").iterdir())]


def test_a_second_cluster_comes_and_goes_beside_the_first(cluster, tmp_path):
    first, second = Path(os.environ["SLURM_CONF"]).parent, tmp_path / "second"
    before = pids(first)
    assert script("up", second).splitlines()[-1] == f"export SLURM_CONF={second}/slurm.conf"
    running = pids(second)
    assert not set(running) & set(before)
    assert script("up", second).splitlines()[0] == f"already running in {second}"
    assert pids(second) == running
    # A job that runs while the cluster is stopped goes with it.
    marker = "86399"
    command = ["sbatch", "--output=/dev/null", f"--wrap=exec sleep {marker}"]
    subprocess.run(
        command, env=os.environ | {"SLURM_CONF": f"{second}/slurm.conf"}, check=True, capture_output=True
    )
    script("down", second)
    assert not second.exists()
    shown = subprocess.run(["ps", "-eo", "pid,stat,args"], capture_output=True, text=True, check=True).stdout
    left = [line.split() for line in shown.splitlines() if f"sleep {marker}" in line]
    assert left == []
    alive = {line.split()[0] for line in shown.splitlines()[1:] if not line.split()[1].startswith("Z")}
    assert not {pid.strip() for pid in running} & alive
    assert pids(first) == before
    assert cluster.command("sinfo", "--noheader", "--format=%R").split()


def test_a_folder_of_somebody_elses_is_not_touched(cluster, tmp_path):
    (tmp_path / "theirs").write_text("x")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        script("up", tmp_path)
    assert "is not ours and not empty" in refused.value.stderr
    assert "no cluster of slurm/local/up" in script("down", tmp_path)
    assert (tmp_path / "theirs").read_text() == "x"


def test_down_without_a_cluster_says_so(cluster, tmp_path):
    assert "no cluster of slurm/local/up" in script("down", tmp_path / "nothing")
