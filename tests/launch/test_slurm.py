"""Scripts, the check before sending, and reading the queue, with stand-ins for SLURM's commands."""

import pickletools
import re
from pathlib import Path

import pytest

from conadv_lab.launch import slurm
from conadv_lab.launch.profiles import Profile
from conadv_lab.launch.send import arrays
from tests.launch.conftest import write_command


def script(profile: Profile, count: int = 1, parallel: int = 4) -> str:
    made = slurm.executor(
        profile, Path("/shared/x y/.launch/jobs"), Path("/shared/x y/code/ab"), "name", parallel
    )
    return made.script(count)


def test_a_script_avoids_the_traps(no_slurm):
    text = script(Profile(cpus_per_task=3, minutes=10, mem_gb=1.5))
    srun = text.splitlines()[-1]
    # Since 22.05 srun does not take it from sbatch; without the others a dead rank leaves the rest hanging.
    assert srun.count("--cpus-per-task=3 --kill-on-bad-exit=1 --wait=60") == 1
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --time=10" in text
    assert "#SBATCH --mem=1536M" in text
    assert "#SBATCH --signal=USR2@120" in text
    assert "wckey" not in text
    assert "export PYTHONSAFEPATH=1" in text
    assert "export PYTHONPATH='/shared/x y/code/ab'${PYTHONPATH:+:$PYTHONPATH}" in text
    assert re.search(r"^unset SLURM_CPU_BIND ", text, re.MULTILINE)
    assert "SLURM_CONF" not in text


def test_a_site_is_told_in_the_script(no_slurm):
    text = script(
        Profile(partition="gpu", account="abc", constraint="h100", gres="gpu:4", qos="long", nodes=2, tasks_per_node=4,
                setup=("module load cuda",), container="apptainer exec --nv image.sif", python="python3",
                extra={"reservation": "mine"})
    )  # fmt: skip
    for line in ("partition=gpu", "account=abc", "constraint=h100", "gres=gpu:4", "qos=long", "nodes=2",
                 "ntasks-per-node=4", "reservation=mine"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert "\nmodule load cuda\n" in text
    assert " $HOLD apptainer exec --nv image.sif python3 -u -m submitit.core._submit " in text


def test_an_array_has_its_share_of_the_cap(no_slurm):
    assert "#SBATCH --array=0-9%4\n" in script(Profile(), count=10)
    assert "%A_%a_%t_log.err" in script(Profile(), count=10)


@pytest.mark.parametrize(
    ("count", "longest", "cap"), [(1, 1, 1), (2500, 1001, 64), (2500, 1001, 2), (7, 2, 3), (1001, 1001, 5000)]
)
def test_arrays_hold_every_run_once_and_never_exceed_the_cap(count, longest, cap):
    made = arrays(count, longest, cap)
    assert [run for one in made for run in range(one.start, one.stop)] == list(range(count))
    assert all(one.stop - one.start <= longest for one in made)
    # At any time at most one array of each chain runs.
    firsts = [one.parallel for one in made if one.after is None]
    assert sum(firsts) == cap if len(made) > 1 or cap <= count else True
    for one in made:
        if one.after is not None:
            assert one.parallel == made[one.after].parallel


def test_what_is_pickled_is_a_name_and_a_path(fake, tmp_path):
    made = slurm.executor(Profile(), tmp_path / "jobs", tmp_path / "code", "name", 1)
    assert made.send([tmp_path / "run"]) == ["41"]
    assert sorted(file.name for file in (tmp_path / "jobs").iterdir()) == [
        "41_submission.sh",
        "41_submitted.pkl",
    ]
    pickled = (tmp_path / "jobs" / "41_submitted.pkl").read_bytes()
    words = {str(value) for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)}
    assert {"conadv_lab.launch.worker", "work", str(tmp_path / "run")} <= words
    assert not any("Config" in word or "__main__" in word for word in words)
    assert (fake / "sent").read_text() == made.script(1)


def test_a_refused_array_leaves_no_file(fake, tmp_path):
    write_command(fake, "sbatch", 'echo "sbatch: error: Batch job submission failed: No." >&2; exit 1')
    made = slurm.executor(Profile(), tmp_path / "jobs", tmp_path / "code", "name", 1)
    with pytest.raises(ValueError, match="Batch job submission failed: No"):
        made.send([tmp_path / "a", tmp_path / "b"])
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ("sbatch: error: invalid partition specified: lwo\nallocation failure: Invalid partition name specified",
         ValueError, "unknown partition 'lwo'; allowed: high, low. Did you mean 'low'?"),
        ("allocation failure: Requested node configuration is not available", ValueError, "no nodes for partition lwo"),
        ("sbatch: error: Invalid generic resource (gres) specification", ValueError, "gres is None; available"),
        ("allocation failure: Invalid account", ValueError, "SLURM rejects this job: Invalid account"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", ConnectionError, "does not answer"),
    ],
)  # fmt: skip
def test_slurms_refusals_are_told_in_a_sentence(fake, said, error, message):
    write_command(fake, "sbatch", f"cat >/dev/null; printf '%s\\n' {said!r} >&2; exit 1".replace("\\n", "\n"))
    with pytest.raises(error, match=re.escape(message)):
        slurm.check(script(Profile(partition="lwo")))


def test_nodes_that_are_down_for_now_are_no_mistake(fake):
    said = "allocation failure: Required node not available (down, drained or reserved)"
    write_command(fake, "sbatch", f"cat >/dev/null; echo '{said}' >&2; exit 1")
    slurm.check(script(Profile()))


def test_the_queue_is_read_in_one_call(fake):
    (fake / "queue").write_text("41|RUNNING|None\n42_7|PENDING|ReqNodeNotAvail, UnavailableNodes:n1\n")
    assert slurm.queue() == {
        "41": ("RUNNING", "None"),
        "42_7": ("PENDING", "ReqNodeNotAvail, UnavailableNodes:n1"),
    }
    assert len((fake / "squeue-calls").read_text().splitlines()) == 1


def test_a_squeue_that_fails_is_told(fake):
    write_command(
        fake, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    with pytest.raises(ConnectionError, match="Unable to contact"):
        slurm.queue()


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("sbatch", lambda: slurm.check("")),
        ("scancel", lambda: slurm.cancel(["1"])),
        ("scontrol", slurm.max_array),
    ],
)
def test_without_slurm_there_is_a_sentence(command, asked, no_slurm, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=f"{command} is not installed here; use --profile local"):
        asked()


def test_a_command_that_hangs_is_told(fake, monkeypatch):
    monkeypatch.setattr(slurm, "PATIENCE", 0.2)
    write_command(fake, "scancel", "exec sleep 60")
    with pytest.raises(ConnectionError, match=r"scancel did not answer within 0.2 s"):
        slurm.cancel(["1"])
