"""Talks to SLURM: writes the sbatch script, checks it before sending, sends it, and queries all jobs in one call."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from conadv_lab.launch.profiles import Profile
from conadv_lab.launch.worker import work
from conadv_lab.mistakes import unknown

DEFAULT_MAX_ARRAY = 1001
PATIENCE = 60.0
"""Seconds to wait for a command of SLURM's."""
SEPARATOR = "|"
BINDINGS = "SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE SLURM_MEM_BIND"
BLOCK = "--block-signal=USR2 --block-signal=TERM"
CONFIGURATIONS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")
# That the cluster cannot start the job right now is not the user's mistake.
ONLY_LATER = ("not available (down", "ReqNodeNotAvail", "Requested nodes are busy")
NO_CONTACT = ("nable to contact", "configuration source", "onnection refused", "timed out")


def is_here() -> bool:
    """Whether SLURM's commands are installed and configured on this machine."""
    configured = "SLURM_CONF" in os.environ or any(Path(file).exists() for file in CONFIGURATIONS)
    return configured and shutil.which("sbatch") is not None


class Executor(submitit.SlurmExecutor):
    """submitit's executor that can also write its script without srun, and can make an array wait for another."""

    after: str | None = None

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, count: int) -> str:
        """The exact sbatch script for an array of ``count`` runs, or for a single one."""
        many = {"map_count": count} if count > 1 else {}
        return submitit.slurm.slurm._make_sbatch_string(
            command=self._submitit_command_str, folder=self.folder, **self.parameters, **many
        )

    def send(self, paths: Sequence[Path]) -> list[str]:
        """Queue the runs in these folders as one array; returns one job id per run.

        Raises:
            ValueError: SLURM refused; this call leaves no file behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        script = self.folder / f".{token}.sh"
        pickles = [self.folder / f".{token}_{number}.pkl" for number in range(len(paths))]
        try:
            script.write_text(self.script(len(paths)))
            for path, pickle in zip(paths, pickles, strict=True):
                submission = utils.DelayedSubmission(work, str(path))
                submission.set_timeout(self.parameters["time"], 0)
                submission.dump(pickle)
            waits = [f"--dependency=afterany:{self.after}"] if self.after else []
            printed = _run("sbatch", *waits, str(script))
        except BaseException:
            for file in (script, *pickles):
                file.unlink(missing_ok=True)
            raise
        job = self._get_job_id_from_submission_command(printed)
        jobs = [f"{job}_{number}" for number in range(len(paths))] if len(paths) > 1 else [job]
        script.rename(self.folder / f"{job}_submission.sh")
        for name, pickle in zip(jobs, pickles, strict=True):
            pickle.rename(self.folder / f"{name}_submitted.pkl")
        return jobs


def executor(profile: Profile, jobs: Path, code: Path, name: str, parallel: int) -> Executor:
    """The executor for runs whose submitit files go to ``jobs`` and that import the code in ``code``."""
    made = Executor(jobs, python=python_words(profile))
    wanted: dict[str, Any] = {
        "job_name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "gres": profile.gres,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": profile.gpus_per_node,
        "mem": None if profile.mem_gb is None else f"{round(profile.mem_gb * 1024)}M",
        "time": profile.minutes,
        "signal_delay_s": profile.delay,
        "array_parallelism": parallel,
        "wckey": None,
        "additional_parameters": {"requeue": True, **profile.extra},
        "setup": [*profile.setup, *environment_lines(code)],
        # Since 22.05 srun does not inherit --cpus-per-task; by default its ranks wait forever for one that died.
        "srun_args": [f"--cpus-per-task={profile.cpus_per_task}", "--kill-on-bad-exit=1", "--wait=60"],
    }
    made.update_parameters(
        **{key: value for key, value in wanted.items() if value is not None or key == "wckey"}
    )
    return made


def python_words(profile: Profile) -> str:
    """The command that starts Python, after `environment_lines`."""
    python = profile.python or shlex.quote(sys.executable)
    return " ".join(["$HOLD", *([profile.container] if profile.container else []), python])


def environment_lines(code: Path) -> list[str]:
    """Shell lines that make Python import ``code`` and undo a CPU binding inherited from the submitting job."""
    path = shlex.quote(str(code))
    return [
        f"unset {BINDINGS}",
        # Without PYTHONSAFEPATH the current folder, often the checkout, would shadow the copied code.
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        # If env is new enough, block stop signals until Python can handle them.
        f'HOLD=$(env {BLOCK} true 2>/dev/null && echo "env {BLOCK}" || true)',
    ]


def check(script: str) -> None:
    """Ask SLURM whether it could ever run this script, without sending or writing anything.

    Raises:
        ValueError: it could not, or SLURM is not installed; suggests the nearest partition if that was wrong.
        ConnectionError: the controller does not answer.
    """
    asked = _answered("sbatch", "--test-only", given=script)
    said = asked.stderr.strip()
    if asked.returncode == 0 or any(mark in said for mark in ONLY_LATER):
        return
    if any(mark in said for mark in NO_CONTACT):
        raise ConnectionError(f"SLURM does not answer: {_sentence(said)}")
    raise _mistake(said, script)


def max_array() -> int:
    """The largest job array that the cluster allows."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run("scontrol", "show", "config"), re.MULTILINE)
    return int(found.group(1)) if found else DEFAULT_MAX_ARRAY


def queue() -> dict[str, tuple[str, str]]:
    """(state, reason) of every job of the user's that SLURM still knows, including finished ones; one call.

    Raises:
        ConnectionError: SLURM does not answer.
    """
    form = f"--format=%i{SEPARATOR}%T{SEPARATOR}%r"
    try:
        lines = _run("squeue", "--me", "--states=all", "--array", "--noheader", form).splitlines()
    except ValueError as error:
        raise ConnectionError(f"squeue does not answer: {error}") from None
    rows = (line.strip().split(SEPARATOR, 2) for line in lines)
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; those that have already ended are ignored.

    Raises:
        ValueError: SLURM refused for any other reason than that a job had ended.
    """
    for start in range(0, len(jobs), 500):
        done = _answered("scancel", *jobs[start : start + 500])
        ended = ("nvalid job id", "completing")
        told = [line for line in done.stderr.splitlines() if not any(mark in line for mark in ended)]
        if done.returncode and told:
            raise ValueError(f"scancel: {_sentence(told[0])}")


def _answered(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command of SLURM's that has ended, whatever its status.

    Raises:
        ValueError: it is not installed.
        ConnectionError: it did not end in time.
    """
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not installed here; use --profile local to run on this machine"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"{command[0]} did not answer within {PATIENCE:g} s") from None


def _run(*command: str) -> str:
    done = _answered(*command)
    if done.returncode:
        raise ValueError(f"{command[0]}: {_sentence(done.stderr)}")
    return done.stdout


def _sentence(said: str) -> str:
    line = (said.strip().splitlines() or ["no reason given"])[-1]
    return re.sub(r"^(sbatch|squeue|scancel|scontrol)?:? ?(error: |allocation failure: )*", "", line)


def _mistake(said: str, script: str) -> ValueError:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    if "partition" in said:
        partitions = sorted(set(_run("sinfo", "--noheader", "--format=%R").split()))
        name = asked.get("partition", "(the default)")
        if name not in partitions:
            return unknown("partition", name, partitions)
    told = _sentence(said)
    if "node configuration" in told or "Node count" in told:
        nodes = _run("sinfo", "--noheader", "--format=%R: %D nodes of %c CPUs, %m MiB, gres %G").splitlines()
        wish = ", ".join(f"{key} {asked[key]}" for key in ("partition", "nodes", "ntasks-per-node", "cpus-per-task",
                         "gpus-per-node", "gres", "mem", "constraint") if key in asked)  # fmt: skip
        return ValueError(f"no nodes for {wish} ({told}); available: {'; '.join(nodes)}")
    if "generic resource" in told:
        there = sorted(set(_run("sinfo", "--noheader", "--format=%G").split()))
        return ValueError(
            f"gres is {asked.get('gres', asked.get('gpus-per-node'))!r}; available: {', '.join(there)}"
        )
    if "feature" in told:
        features = ",".join(_run("sinfo", "--noheader", "--format=%f").split()).split(",")
        return unknown("constraint", asked.get("constraint", ""), set(features))
    return ValueError(f"SLURM rejects this job: {told}")
