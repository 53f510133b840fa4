"""SLURM's states, reasons and log lines, in words."""

import re

START_MARK = "conadv_lab starts a stretch"

STATES = {
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "CANCELLED": "cancelled",
    "TIMEOUT": "timed out",
    "DEADLINE": "timed out",
    "PREEMPTED": "preempted",
    "FAILED": "failed",
    "COMPLETED": "lost",  # asked about only where there is no result
}
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED"}
AT_WORK = {"RUNNING", "COMPLETING", "STOPPED", "STAGE_OUT", "SIGNALING"}

REASONS = {
    "None": "not looked at yet",
    "Priority": "others come first",
    "Resources": "waiting for free nodes",
    "BeginTime": "waiting for its start time",
    "Dependency": "waiting for another array",
    "JobArrayTaskLimit": "as many of the sweep run as may",
    "JobHeldUser": "held by the user",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "its time limit is above the partition's",
    "PartitionNodeLimit": "it wants more nodes than the partition has",
    "BadConstraints": "no node has what it wants",
    "AssocGrpGRES": "the account's share of GPUs is in use",
    "QOSMaxJobsPerUserLimit": "as many of your jobs run as may",
}

# What slurmstepd, srun or the kernel's killer leave in the log of a job that could say nothing itself.
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
    """Why a job waits; a reason that is not known here is given as SLURM wrote it.

    >>> reason("Resources"), reason("Licenses")
    ('waiting for free nodes', 'Licenses')
    """
    return REASONS.get(told.split(",")[0], told)


def killed_by(log: str) -> str | None:
    """What ended a log's last stretch, from the lines after its start; None where they do not tell.

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
        if CANCELLED_JOB.search(line):  # a step alone is also ended when one of its ranks dies
            return "cancelled"
    return None
