"""The command: what it prints, its exit status, what it writes and that a mistake writes nothing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conadv_lab import submit, train
from conadv_lab.launch import local
from conadv_lab.launch.records import Record
from conadv_lab.launch.snapshot import PACKAGE
from conadv_lab.provenance import manifest
from conadv_lab.recipes.digits import conadv
from conadv_lab.runs import RunFolder
from tests.data.trees import write_tree
from tests.launch.conftest import sent, write_command

SHORT = [
    "--train-images",
    "60",
    "--global-batch",
    "20",
    "--steps",
    "3",
    "--warmup-epochs",
    "0",
    "--bn-recalibrate",
    "0",
]


def run(capsys, *words: object) -> tuple[int, str, str]:
    try:
        status = submit.main([str(word) for word in words])
    except SystemExit as stop:  # the parser's own
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


MISTAKES = {
    "verb": (["rnu"], "unknown verb 'rnu'.*Did you mean 'run'"),
    "no recipe": (["run", "--out", "run"], "needs a recipe first"),
    "recipe": (["run", "digits-conav", "--out", "run"], "unknown recipe 'digits-conav'.*Did you mean 'digits-conadv'"),
    "no out": (["run", "digits-conadv"], "--out is missing"),
    "profile": (["run", "digits-conadv", "--out", "run", "--profile", "slrum"], "unknown profile 'slrum'.*'slurm'"),
    "field": (["run", "digits-conadv", "--out", "run", "--stalenes", "2"], r"--stalenes(.|\n)*--staleness"),
    "value": (["run", "digits-conadv", "--out", "run", "--epsilon", "8"], "epsilon is 8.0; allowed: 0 to 1"),
    "method": (["run", "digits-conadv", "--out", "run", "--method", "conav"], "unknown method 'conav'.*'conadv'"),
    "list": (["run", "digits-conadv", "--out", "run", "--lr", "0.1,0.2"], "--lr is '0.1,0.2'; allowed: one value"),
    "partition": (["run", "digits-conadv", "--out", "run", "--partition", "lwo"], "unknown partition 'lwo'.*'low'"),
    "partition here": (["run", "digits-conadv", "--out", "run", "--profile", "local", "--partition", "low"],
                       "partition is 'low'; allowed: only on SLURM"),
    "account here": (["run", "digits-conadv", "--out", "run", "--profile", "local", "--account", "mine"],
                     "account is 'mine'; allowed: only on SLURM"),
    "nodes": (["run", "digits-conadv", "--out", "run", "--nodes", "0"], "nodes is 0; allowed"),
    "file": (["run", "digits-conadv", "--out", "run", "--model", "nowhere.py:net"], "nowhere.py does not exist"),
    "place": (["status", "nowhere"], "nowhere is not a folder"),
    "no runs": (["status", "."], "contains no run"),
    "resume": (["run", "digits-conadv", "--out", "run", "--resume"], "submit retry DIR continues what was sent"),
    "ranks": (["run", "digits-conadv", "--out", "run", "--ranks", "2"], "--ranks; use --tasks-per-node"),
    "gap": (["sweep", "digits-conadv", "--out", "run", "--lr", "1,,2"], "allowed: a list of numbers or None"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_with_a_sentence_and_writes_nothing(name, fake, capsys, tmp_path, monkeypatch):
    words, message = MISTAKES[name]
    write_command(
        fake,
        "sbatch",
        "cat >/dev/null; echo 'allocation failure: Invalid partition name specified' >&2; exit 1",
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, out, err = run(capsys, *words)
    assert status == 2, out + err
    assert re.search(message, out + err), out + err
    assert list((tmp_path / "here").iterdir()) == []


def test_a_dry_run_writes_nothing_and_needs_no_slurm(no_slurm, capsys, tmp_path):
    words = (
        "sweep",
        "digits-conadv",
        "--out",
        tmp_path / "s",
        "--profile",
        "slurm",
        "--lr",
        "0.1,0.2",
        "--dry-run",
    )
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert list(tmp_path.iterdir()) == []
    config = json.loads(out[out.index("{") : out.index("\n}\n") + 3])
    assert config["optimization"]["lr"] == 0.1
    assert config["method"]["weights"] == [0.5, 0.5]
    assert f"    1  {tmp_path}/s/lr=0.2\n" in out
    assert "#SBATCH --array=0-1%2\n" in out.partition("# sbatch script 1 of 1\n")[2]


def test_a_sweep_over_methods_of_other_families_is_shown(no_slurm, capsys, tmp_path):
    words = ("sweep", "digits-conadv", "--out", tmp_path / "s", "--method", "sam,msam,conadv", "--dry-run")
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert all(f"{tmp_path}/s/method={name}\n" in out for name in ("sam", "msam", "conadv"))
    config = json.loads(out[out.index("{") : out.index("\n}\n") + 3])
    assert (config["method"]["method"], config["method"]["rho"]) == ("sam", 0.05)


def test_what_sites_ask_for_first_are_options(fake, capsys, tmp_path):
    wanted = {"account": "my-project", "qos": "long", "constraint": "h100", "gres": "gpu:4"}
    words = [word for name, value in wanted.items() for word in (f"--{name}", value)]
    _, out, _ = run(capsys, "run", "digits-conadv", "--out", tmp_path / "run", *words, "--dry-run")
    for name, value in wanted.items():
        assert f"#SBATCH --{name}={value}\n" in out


def test_what_is_sent_is_what_the_dry_run_showed(fake, capsys, tmp_path):
    words = ("run", "digits-conadv", "--out", tmp_path / "run", "--cpus-per-task", "3", "--threads", "None")
    _, out, _ = run(capsys, *words, "--dry-run")
    status, told, _ = run(capsys, *words)
    assert status == 0
    assert told == f"queued 1 run as job 41\n{tmp_path / 'run'}\n"
    assert (fake / "sent").read_text() == out.partition("# sbatch script 1 of 1\n")[2]
    assert Record(tmp_path / "run").job["config"] == json.loads(out[out.index("{") : out.index("\n}\n") + 3])
    # As many threads as CPUs, wherever it runs, so that every stretch is bitwise the same run.
    assert Record(tmp_path / "run").job["config"]["training"]["threads"] == 3


def test_the_same_sweep_again_queues_nothing_and_a_larger_one_the_rest(fake, capsys, tmp_path):
    words = ("sweep", "digits-conadv", "--out", tmp_path / "s", "--lr", "0.1,0.2")
    assert run(capsys, *words)[0] == 0
    (fake / "sent").unlink()
    assert run(capsys, *words) == (0, "2 of 2 runs were already sent\n", "")
    assert not (fake / "sent").exists()
    _, out, _ = run(capsys, *words[:-1], "0.1,0.2,0.3", "--seed", "0,1")
    assert out.startswith("2 of 6 runs were already sent\nqueued 4 runs as job 41\n")


def test_a_sweep_that_slurm_refuses_leaves_nothing(fake, capsys, tmp_path):
    write_command(
        fake,
        "sbatch",
        'if [ "$1" = --test-only ]; then cat >/dev/null; else echo "sbatch: error: No." >&2; exit 1; fi',
    )
    status, _, err = run(capsys, "sweep", "digits-conadv", "--out", tmp_path / "s", "--lr", "0.1,0.2")
    assert (status, err) == (2, "error: sbatch: No.\n")
    assert not (tmp_path / "s").exists()


def test_arrays_that_were_sent_before_a_refusal_stay(fake, capsys, tmp_path):
    (tmp_path / "site.toml").write_text("max_array = 2\n")
    refuse = 'if [ "$1" = --test-only ]; then cat >/dev/null; elif [ -e "$FAKE/once" ]; then exit 1; else '
    write_command(fake, "sbatch", refuse + 'touch "$FAKE/once"; echo "Submitted batch job 41"; fi')
    words = (
        "sweep",
        "digits-conadv",
        "--out",
        tmp_path / "s",
        "--profile",
        tmp_path / "site.toml",
        "--lr",
        "1,2,3,4",
    )
    assert run(capsys, *words)[0] == 2
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [".launch", "lr=1", "lr=2"]
    (fake / "once").unlink()
    assert run(capsys, *words)[1].startswith("2 of 4 runs were already sent\nqueued 2 runs as job 41\n")


def test_a_run_that_exists_is_not_overwritten(fake, capsys, tmp_path):
    words = ("run", "digits-conadv", "--out", tmp_path / "run")
    assert run(capsys, *words)[0] == 0
    before = (tmp_path / "run" / ".launch" / "job.json").stat().st_mtime_ns
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "already exists; continue an ended run with submit retry" in err
    assert (tmp_path / "run" / ".launch" / "job.json").stat().st_mtime_ns == before


def test_cancel_tells_slurm_once_and_is_remembered(fake, capsys, tmp_path):
    for name in ("a", "b"):
        sent(tmp_path / "s" / name)
    (fake / "queue").write_text("41|PENDING|Priority\n")
    assert run(capsys, "cancel", tmp_path / "s")[1] == "cancelled 2 of 2 runs\n"
    assert (fake / "scancel-calls").read_text() == "41 41\n"
    (fake / "queue").write_text("")
    assert run(capsys, "status", tmp_path / "s")[1].count("cancelled") == 2


def test_retry_sends_what_ended_and_with_failed_only_what_failed(fake, capsys, tmp_path):
    assert run(capsys, "sweep", "digits-conadv", "--out", tmp_path / "s", "--lr", "1,2,3,4")[0] == 0
    for name, event in (("lr=1", "failed"), ("lr=2", "cancelled")):
        Record(tmp_path / "s" / name).note(event, job=f"41_{int(name[-1]) - 1}", error="ValueError: no")
    (tmp_path / "s" / "lr=3" / "result.json").write_text("{}")
    (fake / "queue").write_text("41_3|RUNNING|None\n")
    _, out, _ = run(capsys, "retry", tmp_path / "s", "--failed", "--dry-run")
    assert out == f"{tmp_path}/s/lr=1  failed (ValueError: no)\n1 run to send again\n"
    _, out, _ = run(capsys, "retry", tmp_path / "s")
    assert out.endswith(f"queued 2 runs as job 41\n{tmp_path}/s\n")
    assert [len(Record(tmp_path / "s" / f"lr={n}").events()) for n in range(1, 5)] == [3, 3, 1, 1]


@pytest.mark.slow
def test_retry_tells_of_each_run_by_the_profile_it_was_sent_with(fake, capsys, tmp_path):
    """One on SLURM and one on this machine, where it fails once more: the exit status is the failure's."""
    wrong = (*SHORT, "--lr", "1e30")
    assert (
        run(capsys, "run", "digits-conadv", *SHORT, "--profile", "slurm", "--out", tmp_path / "s" / "a")[0]
        == 0
    )
    assert (
        run(capsys, "run", "digits-conadv", *wrong, "--profile", "local", "--out", tmp_path / "s" / "b")[0]
        == 1
    )
    Record(tmp_path / "s" / "a").note("failed", job="41", error="ValueError: no")
    status, out, _ = run(capsys, "retry", tmp_path / "s")
    assert f"queued 1 run as job 41\n{tmp_path}/s/a\n" in out
    assert re.search(rf"{tmp_path}/s/b  failed \(.*NotFinite: the clean loss", out.split("queued")[1])
    assert status == 1


def test_status_answers_when_slurm_does_not(fake, capsys, tmp_path):
    sent(tmp_path / "run")
    write_command(fake, "squeue", "echo 'squeue: error: no' >&2; exit 1")
    status, out, err = run(capsys, "status", tmp_path / "run")
    assert status == 0
    assert "warning: squeue does not answer" in err
    assert out == "run  unknown (SLURM does not answer)  41\n"


@pytest.mark.slow
def test_the_same_command_runs_here_and_can_be_repeated(no_slurm, capsys, tmp_path):
    # The second learning rate is too high for anything.
    words = ("sweep", "digits-conadv", "--out", tmp_path / "s", *SHORT, "--lr", "0.1,1e30")
    status, out, err = run(capsys, *words, "--max-parallel", "1")
    assert status == 1
    done, failed = out.splitlines()
    assert re.fullmatch(rf"{tmp_path}/s/lr=0\.1 +done", done)
    assert re.match(rf"{tmp_path}/s/lr=1e\+30  failed \(.*NotFinite: the clean loss", failed)
    assert re.search(
        r"started lr=0\.1; follow it with: .*\nended lr=0\.1 after \d+ s \(1 of 2\)\nstarted lr=1e", err
    )
    _, out, _ = run(capsys, "collect", tmp_path / "s", "--csv", tmp_path / "table.csv")
    assert out.split()[:2] == ["run", "state"]
    for verb in ("status", "collect"):  # from any folder above
        assert "s/lr=0.1 " in run(capsys, verb, tmp_path)[1]
    assert (tmp_path / "table.csv").read_text().count("\n") == 3
    chosen = tmp_path / "s" / "lr=0.1"
    manifest = json.loads((chosen / "manifest.json").read_text())
    assert {"commit", "diff", "packages", "machine", "slurm", "data"} <= manifest.keys()
    assert "step 3/3" in run(capsys, "logs", chosen)[1]
    assert (
        "lines is -3; allowed: a whole number of at least 1"
        in run(capsys, "logs", chosen, "--lines", "-3")[2]
    )
    assert '"event": "finished"' in run(capsys, "show", chosen)[1]
    _, out, _ = run(capsys, "show", chosen, "--reproduce")
    folder, repeat = (shlex.split(line) for line in out.splitlines()[-2:])
    assert folder == ["cd", str(Path.cwd())]
    assert repeat[:2] == ["env", "PYTHONSAFEPATH=1"]
    assert train.main(repeat[repeat.index("conadv_lab.train") + 1 :]) == 0
    results = [json.loads((Path(f"{chosen}{more}") / "result.json").read_text()) for more in ("", "-again")]
    assert results[0]["parameters_sha256"] == results[1]["parameters_sha256"]


def test_a_run_of_several_ranks_is_repeated_by_as_many(tmp_path, capsys):
    """Without them the command would be refused: somebody has to train where others attack."""
    config = conadv().replace(placement="ranks", attackers=1, micro_batch=128)
    RunFolder(tmp_path / "run").create(config, manifest({"data": "digits"}) | {"ranks": 3})
    _, out, _ = run(capsys, "show", tmp_path / "run", "--reproduce")
    words = shlex.split(out.splitlines()[-1])
    again, _, options = train.parse(words[words.index("conadv_lab.train") + 1 :])
    assert (again, options.ranks) == (config, 3)


def test_gpus_of_this_machine_are_not_hidden(monkeypatch, tmp_path):
    from conadv_lab.launch.profiles import load

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert "export CUDA_VISIBLE_DEVICES=1,3" in local.python(load("local"), tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "unset CUDA_VISIBLE_DEVICES" in local.python(load("local"), tmp_path)


@pytest.mark.slow
def test_interrupted_here_a_run_saves_and_can_be_continued(no_slurm, own, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "conadv_lab.submit", "run", f"{own}:recipe", "--out", str(out)]
    running = subprocess.Popen(
        [*command, "--profile", "local"],
        cwd=PACKAGE.parent,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    metrics = out / "metrics.jsonl"
    while running.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 12):
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the command and to all that it started
    assert running.wait(timeout=60) == 75
    assert Record(out).events()[-1]["event"] == "stopped"
    assert Record(out).events()[-1]["step"] > 12
    _, told, _ = run(capsys, "status", out)
    assert told.startswith("run  stopped (stopped by SIG")


@pytest.mark.slow
def test_new_code_is_the_users_file_as_it_is_now(no_slurm, capsys, tmp_path):
    """A run that failed by a mistake in a file of the user's own, which is mended then."""
    own = tmp_path / "mine.py"
    text = "from conadv_lab.models.digits import DigitsCNN\ndef model(config):\n    {}\n"
    own.write_text(text.format("raise RuntimeError('a mistake')"))
    words = (
        "run",
        "digits-conadv",
        *SHORT,
        "--model",
        f"{own}:model",
        "--profile",
        "local",
        "--out",
        tmp_path / "a",
    )
    assert run(capsys, *words)[0] == 1
    own.write_text(text.format("return DigitsCNN()"))
    assert run(capsys, "retry", tmp_path / "a")[0] == 1
    status, out, _ = run(capsys, "retry", tmp_path / "a", "--new-code")
    assert (status, "done" in out) == (0, True)


@pytest.mark.parametrize("verb", ["status", "collect", "retry", "cancel"])
def test_a_verb_without_a_folder_says_so(verb, capsys):
    status, _, err = run(capsys, verb)
    assert (status, err) == (
        2,
        "error: no folder given; allowed: run folders, or folders that contain them\n",
    )


def test_a_table_that_cannot_be_written_is_told_first(fake, capsys, tmp_path):
    sent(tmp_path / "run")
    status, _, err = run(capsys, "collect", tmp_path / "run", "--csv", tmp_path / "none" / "a.csv")
    assert (status, "cannot be written; allowed: a file in an existing folder" in err) == (2, True)


REFUSED = {
    "a warm-up longer than the run": (
        ["--steps", "4", "--warmup-steps", "5"],
        r"warmup_steps is 5, 5 steps; allowed",
    ),
    "a batch above the set": (
        ["--train-images", "60", "--global-batch", "64"],
        r"global_batch is 64; allowed: 1 to 60",
    ),
    "ranks without a micro-batch": (
        ["--tasks-per-node", "4"],
        r"4 ranks cannot share a step of 1 micro-batches",
    ),
    "attackers alone": (
        ["--placement", "ranks", "--attackers", "2", "--nodes", "2"],
        r"attackers is 2 of 2 ranks",
    ),
    "no data": (["--dataset", "cifar10", "--data-dir", "nowhere"], r"no cifar10 in nowhere.*--data-on-nodes"),
    "no photographs": (
        ["--dataset", "imagenet", "--data-dir", "nowhere"],
        r"no ImageNet train .*--data-on-nodes",
    ),
    "a model of other images": (
        ["--dataset", "synthetic"],
        r"model digits-cnn cannot process the images of synthetic",
    ),
    "a stream of no GPU": (
        ["--placement", "stream", "--device", "cpu"],
        r"placement is 'stream' on device 'cpu'",
    ),
    "no device": (["--device", "cuda:x"], r"device is 'cuda:x'; allowed"),
    "a percent sign": (["--out", "runs/5%j"], r"--out is '.*runs/5%j'; allowed: a path without '%'"),
    "a colon": (["--out", "runs/a:b"], r"allowed: a path without ':'"),
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_train_refuses_is_neither_sent_nor_shown(name, dry, fake, capsys, tmp_path, monkeypatch):
    words, message = REFUSED[name]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, out, err = run(capsys, "run", "digits-conadv", "--out", "run", *words, *["--dry-run"] * dry)
    assert status == 2
    assert re.search(message, err), err
    assert out == ""
    assert not (fake / "sent").exists()
    assert list((tmp_path / "here").iterdir()) == []


def test_one_impossible_run_keeps_a_whole_sweep_from_being_sent(fake, capsys, tmp_path):
    words = ("sweep", "digits-conadv", "--out", tmp_path / "s", "--global-batch", "64,128,4096")
    status, _, err = run(capsys, *words)
    assert (status, "global_batch is 4096; allowed: 1 to 898" in err) == (2, True), err
    assert not (tmp_path / "s").exists()


def test_what_only_the_nodes_see_is_sent_and_told(fake, capsys, tmp_path):
    words = ("run", "digits-conadv", "--dataset", "imagenet", "--data-dir", "/on/nodes", "--model", "resnet50",
             "--device", "cuda", "--data-on-nodes", "--out", tmp_path / "run")  # fmt: skip
    status, _, err = run(capsys, *words)
    assert status == 0, err
    assert err == "not checked here: device cuda\nnot checked here: data set imagenet in /on/nodes\n"
    assert (fake / "sent").exists()
    status, _, err = run(capsys, *words[:-1], tmp_path / "other", "--tasks-per-node", "4")
    assert (status, "4 ranks cannot share a step" in err) == (2, True)


def test_a_users_file_that_needs_what_only_the_nodes_have_is_sent_and_told(fake, capsys, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def model(config):\n    import apex_of_the_cluster\n")
    words = ("run", "digits-conadv", "--model", f"{own}:model", "--out", tmp_path / "run")
    status, _, err = run(capsys, *words)
    assert status == 0
    assert (
        err
        == f"not checked here: model {own}:model (ModuleNotFoundError: No module named 'apex_of_the_cluster')\n"
    )


def test_a_value_may_have_a_comma_and_a_path_spaces(fake, capsys, tmp_path):
    """Taken as it is by run, and written with a backslash in a sweep, where commas make lists."""
    out = tmp_path / "a b, c"
    words = ("--dataset", "synthetic", "--model", "resnet20")
    status, _, err = run(
        capsys, "run", "digits-conadv", *words, "--data-dir", "/data/a,b", "--out", out / "one"
    )
    assert status == 0, err
    assert Record(out / "one").job["config"]["data"]["data_dir"] == "/data/a,b"
    status, _, err = run(
        capsys, "sweep", "digits-conadv", *words, "--data-dir", r"/a\,b,/c", "--out", out / "many"
    )
    assert status == 0, err
    sent_runs = [path for path in (out / "many").iterdir() if path.name != ".launch"]
    assert {Record(path).job["config"]["data"]["data_dir"] for path in sent_runs} == {"/a,b", "/c"}


def test_photographs_that_are_here_are_looked_at(fake, capsys, tmp_path):
    """A run of another model than the recipe's, on three classes: 24 training images."""
    tree, own = write_tree(tmp_path / "tree"), tmp_path / "mine.py"
    own.write_text("from torch import nn\ndef model(config):\n    return nn.Sequential(nn.AdaptiveAvgPool2d(1), "
                   "nn.Flatten(), nn.Linear(3, 3))\n")  # fmt: skip
    words = ("run", "imagenet-resnet50-4k", "--data-dir", tree, "--model", f"{own}:model", "--warmup-epochs", "1",
             "--micro-batch", "8", "--workers", "2")  # fmt: skip
    status, _, err = run(capsys, *words, "--global-batch", "24", "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    status, _, err = run(capsys, *words, "--global-batch", "32", "--out", tmp_path / "other")
    assert (status, "global_batch is 32; allowed: 1 to 24" in err) == (2, True)


def test_retry_with_more_ranks_than_can_share_a_step_is_refused(fake, capsys, tmp_path):
    (tmp_path / "wide.toml").write_text("tasks_per_node = 4\n")
    assert run(capsys, "run", "digits-conadv", "--out", tmp_path / "run")[0] == 0
    Record(tmp_path / "run").note("failed", job="41", error="ValueError: no")
    (fake / "sent").unlink()
    status, _, err = run(capsys, "retry", tmp_path / "run", "--profile", tmp_path / "wide.toml")
    assert (status, "4 ranks cannot share a step" in err) == (2, True), err
    assert not (fake / "sent").exists()
