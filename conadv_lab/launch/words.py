"""SLURM's states, reasons and log lines, in words."""

import re

START_MARK = "conadv_lab starts an attempt"

STATES = {
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "CANCELLED": "cancelled",
    "TIMEOUT": "timed out",
    "DEADLINE": "timed out",
    "PREEMPTED": "preempted",
    "FAILED": "failed",
    "COMPLETED": "lost",  # only asked where there is no result
}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED"}
AT_WORK = {"RUNNING", "COMPLETING", "STOPPED", "STAGE_OUT", "SIGNALING"}

REASONS = {
    "None": "not yet considered by the scheduler",
    "Priority": "jobs with higher priority come first",
    "Resources": "waiting for free nodes",
    "BeginTime": "waiting for its start time",
    "Dependency": "waiting for another array",
    "JobArrayTaskLimit": "the sweep's limit of parallel runs is reached",
    "JobHeldUser": "held by the user",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "its time limit exceeds the partition's",
    "PartitionNodeLimit": "it asks for more nodes than the partition has",
    "BadConstraints": "no node meets its constraints",
    "AssocGrpGRES": "the account's share of GPUs is in use",
    "QOSMaxJobsPerUserLimit": "your limit of running jobs is reached",
}

# Lines that slurmstepd, srun or the kernel's OOM killer leave in the log of a job that could not report its own end.
MARKS = (
    ("memory limit", "out of memory"),
    ("oom_kill", "out of memory"),
    ("oom-kill", "out of memory"),
    ("Out Of Memory", "out of memory"),
    ("DUE TO NODE FAILURE", "node failure"),
    ("DUE TO TIME LIMIT", "timed out"),
    ("DUE TO PREEMPTION", "preempted"),
)
CANCELLED_JOB = re.compile(r"\*\*\* JOB .* CANCELLED AT")


def reason(told: str) -> str:
    """Why a job waits, in words; an unknown reason is returned as SLURM wrote it.

    >>> reason("Resources"), reason("Licenses")
    ('waiting for free nodes', 'Licenses')
    """
    return REASONS.get(told.split(",")[0], told)


def killed_by(log: str) -> str | None:
    """What killed the last attempt in a log, from the lines after its start; None if they do not say.

    >>> killed_by("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***")
    'timed out'
    """
    for line in reversed(log.splitlines()):
        if line.startswith(START_MARK):
            return None
        if "DUE TO JOB REQUEUE" in line:
            continue
        for mark, words in MARKS:
            if mark in line:
                return words
        if CANCELLED_JOB.search(line):  # a job step alone is also cancelled when one of its ranks dies
            return "cancelled"
    return None
