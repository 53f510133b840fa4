"""Runs that are stopped at any moment go on bitwise; run folders never show a step twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conadv_lab import checkpoints
from conadv_lab.checkpoints import read_checkpoint
from conadv_lab.config import Config
from conadv_lab.frames import collect
from conadv_lab.methods.attack import PGDAttack
from conadv_lab.recipes import digits
from conadv_lab.runs import RunFolder
from conadv_lab.training import loop
from conadv_lab.training.finite import NotFinite
from conadv_lab.training.loop import StoppedOnRequest, train
from conadv_lab.training.restore import restore
from tests.conftest import rest_slow

METHODS = ["vanilla", "disadv", "conadv", "recycled", "recycled-equal", "noise-equal", "copy"]


def tiny(**changes) -> Config:
    recipe = digits.vanilla().replace(
        train_images=90,
        global_batch=32,
        steps=11,
        warmup_epochs=1,
        log_every=2,
        checkpoint_every=4,
        threads=1,
    )
    return recipe.replace(**{"bn_recalibrate": 90, **changes})


def digest(folder: RunFolder) -> str:
    return folder.result()["parameters_sha256"]


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


def train_killed_before(step: int, config: Config, out: Path, monkeypatch) -> None:
    original = loop.Run.train_step

    def until(run):
        if run.step == step:
            raise Killed
        original(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", until)
        with pytest.raises(Killed):
            train(config, out, resume=True, progress="none")


def test_what_is_no_config_or_no_progress_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config is 'digits-conadv'; allowed: a Config, such as"):
        train("digits-conadv", tmp_path / "run")
    with pytest.raises(ValueError, match=r"unknown progress 'no'; allowed: auto, none\. Did you mean 'none'"):
        train(tiny(), tmp_path / "run", progress="no")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", rest_slow(METHODS, "conadv", "recycled-equal"))
def test_resumed_is_bitwise_as_if_never_stopped(method, tmp_path, monkeypatch):
    config = tiny(method=method, staleness=3, ema=0.9, evaluate_every=3, pgd_images=20, micro_batch=8, crop=1)
    whole = train(config, tmp_path / "whole", progress="none")
    for step in (3, 6, 10):
        train_killed_before(step, config, tmp_path / "killed", monkeypatch)
    resumed = train(config, tmp_path / "killed", resume=True, progress="none")
    assert digest(resumed) == digest(whole)
    timeless = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in folder.metrics()]
        for folder in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    figures = [{k: v for k, v in f.result().items() if k != "seconds"} for f in (whole, resumed)]
    assert figures[0] == figures[1]


def test_the_fused_sgd_of_a_gpu_serves_weights_that_begin_later_and_resumes(tmp_path, monkeypatch):
    """A CPU has it too; without a hook it refuses step 1, which is the first of the adversarial branch."""
    monkeypatch.setattr("conadv_lab.optim.sgd.all_on_gpu", lambda groups: True)
    config = tiny(method="recycled", micro_batch=8, checkpoint_every=1)
    whole = train(config, tmp_path / "whole", progress="none")
    train_killed_before(1, config, tmp_path / "killed", monkeypatch)
    assert digest(train(config, tmp_path / "killed", resume=True, progress="none")) == digest(whole)


def test_seeds_and_methods_give_different_runs(tmp_path):
    """The bitwise test could not fail if all runs were alike."""
    names = [("vanilla", 0), ("vanilla", 1), ("conadv", 0), ("recycled", 0)]
    digests = {digest(train(tiny(method=m, seed=s), tmp_path / f"{m}{s}", progress="none")) for m, s in names}
    assert len(digests) == len(names)


def test_micro_batches_change_memory_not_steps(tmp_path):
    whole = train(tiny(global_batch=30, steps=4), tmp_path / "whole", progress="none")
    parts = train(tiny(global_batch=30, steps=4, micro_batch=8), tmp_path / "parts", progress="none")
    assert [line["step"] for line in whole.metrics()] == [line["step"] for line in parts.metrics()]
    assert parts.result()["clean_images"] == whole.result()["clean_images"] == 120


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "conadv_lab.train", "digits-conadv", *words]


RUN = ["--train-images", "90", "--global-batch", "16", "--steps", "100", "--log-every", "1",
       "--checkpoint-every", "7", "--warmup-epochs", "0"]  # fmt: skip


def wait_for_lines(folder: RunFolder, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(folder.metrics()) < count:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_signalled_processes_resume_bitwise(tmp_path):
    config = digits.conadv().replace(
        train_images=90, global_batch=16, steps=100, log_every=1, checkpoint_every=7, warmup_epochs=0
    )
    whole = train(config, tmp_path / "whole", progress="none")
    folder = RunFolder(tmp_path / "killed")
    for number, lines in ((signal.SIGKILL, 10), (signal.SIGTERM, 15), (signal.SIGKILL, 40)):
        words = [*RUN, "--out", str(folder.path), "--resume"]
        process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_lines(folder, lines, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == 75
            assert out.splitlines()[-1] == str(folder.path)
    resumed = train(config, folder.path, resume=True, progress="none")
    assert digest(resumed) == digest(whole)
    assert [line["step"] for line in resumed.metrics()] == list(range(100))


def test_a_stop_request_is_taken_at_a_step_boundary(tmp_path, monkeypatch):
    original = loop.Run.train_step

    def signalling(run):
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        original(run)

    monkeypatch.setattr(loop.Run, "train_step", signalling)
    with pytest.raises(StoppedOnRequest, match="SIGUSR2 after step 6"):
        train(tiny(), tmp_path / "run", progress="none")
    assert RunFolder(tmp_path / "run").committed()[0].name == "step_00000006"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_is_left_as_it_is(tmp_path):
    folder = train(tiny(), tmp_path / "run", progress="none")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    train(tiny(), tmp_path / "run", resume=True, progress="none")
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_another_config_or_an_existing_folder_is_refused(tmp_path):
    train(tiny(), tmp_path / "run", progress="none")
    with pytest.raises(ValueError, match="already exists"):
        train(tiny(), tmp_path / "run", progress="none")
    with pytest.raises(ValueError, match=r"another config: lr is 0.3, was 0.1"):
        train(tiny(lr=0.3), tmp_path / "run", resume=True, progress="none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a run folder"):
        train(tiny(), tmp_path / "other", resume=True, progress="none")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no state", "broken commit"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(damage, tmp_path, monkeypatch):
    config = tiny()
    whole = train(config, tmp_path / "whole", progress="none")
    train_killed_before(9, config, tmp_path / "run", monkeypatch)
    folder = RunFolder(tmp_path / "run")
    newest = folder.committed()[0]
    content = (newest / "state.pt").read_bytes()
    if damage == "cut":
        (newest / "state.pt").write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        (newest / "state.pt").write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "no state":
        (newest / "state.pt").unlink()
    else:
        (newest / "COMMIT.json").write_text('{"step": 8, "fil')
    with pytest.warns(UserWarning, match="damaged.*trying the previous one"):
        resumed = train(config, folder.path, resume=True, progress="none")
    assert digest(resumed) == digest(whole)
    assert [line["step"] for line in resumed.metrics()] == [line["step"] for line in whole.metrics()]


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    train(tiny(), tmp_path / "run", progress="none")
    config_file = tmp_path / "run" / "config.json"
    config_file.write_text(config_file.read_text().replace("digits-cnn", "resnet20"))
    with pytest.raises(ValueError, match=r"does not match the model: .*missing, such as"):
        restore(tmp_path / "run")


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    config = tiny()
    whole = train(config, tmp_path / "whole", progress="none")
    original = checkpoints.write_hashed

    def full(path, state):
        if "00000008" in str(path):
            original(path, {"step": 8})
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_hashed", full)
        with pytest.raises(OSError, match=r"step 8 could not be saved.*No space left.*intact: step_00000004"):
            train(config, tmp_path / "run", progress="none")
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000004"]
    assert read_checkpoint(folder.committed()[0])[1]["step"] == 4
    assert digest(train(config, folder.path, resume=True, progress="none")) == digest(whole)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path):
    with pytest.raises(NotFinite, match=r"the clean loss is (nan|inf) at step \d+ .*lr .*last checkpoint"):
        train(tiny(lr=1e20, warmup_epochs=0), tmp_path / "run", progress="none")
    assert RunFolder(tmp_path / "run").result() is None


@pytest.mark.parametrize(("what", "changes"), [
    ("bfloat16", {"precision": "bfloat16"}), ("float64", {"precision": "float64"}),
    ("channels last", {"channels_last": True}), ("lars", {"optimizer": "lars", "lr": 5.0}),
    ("lamb", {"optimizer": "lamb", "lr": 0.01}), ("polynomial", {"schedule": "polynomial", "end_lr": 1e-3}),
    ("step decay", {"schedule": "step", "milestone_epochs": (1.0, 2.0)}), ("cutout", {"cutout": 3, "flip": True}),
    ("label smoothing", {"label_smoothing": 0.1}), ("l2", {"norm": "l2", "epsilon": 0.5}),
    ("three attack steps", {"attack_steps": 3}),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_every_setting_trains(what, changes, tmp_path):
    config = tiny(method="conadv", steps=25, **changes)
    folder = train(config, tmp_path / "run", progress="none")
    losses = [line["loss"] for line in folder.metrics()]
    assert losses[-1] < losses[0]
    assert folder.config() == folder.config().from_dict(json.loads(json.dumps(folder.config().to_dict())))


def test_weights_are_halves_for_sgd_and_ones_for_lars(tmp_path):
    for optimizer, expected in (("sgd", (0.5, 0.5)), ("lars", (1.0, 1.0))):
        folder = train(
            tiny(method="conadv", optimizer=optimizer, steps=1, warmup_epochs=0), tmp_path / optimizer
        )
        assert folder.config().method.weights == expected


def test_the_probe_and_pgd_accuracy_are_logged(tmp_path):
    config = tiny(method="conadv", probe_every=2, evaluate_every=4, pgd_images=20, epsilon=0.1)
    folder = train(config, tmp_path / "run", progress="none")
    probes = {line["step"]: line["sign_agreement"] for line in folder.metrics() if "sign_agreement" in line}
    assert sorted(probes) == [2, 4, 6, 8, 10]
    assert all(0.3 < value <= 1 for value in probes.values())
    assert sum("pgd_accuracy" in line for line in folder.metrics()) == 2
    assert 0 <= folder.result()["pgd_accuracy"] <= 100


def test_an_attack_takes_no_more_images_at_once_than_training(tmp_path, monkeypatch):
    sizes, original = [], PGDAttack.perturb

    def perturb(self, model, batch, criterion):
        sizes.append(len(batch.labels))
        return original(self, model, batch, criterion)

    monkeypatch.setattr(PGDAttack, "perturb", perturb)
    config = tiny(steps=1, warmup_epochs=0, pgd_images=20, epsilon=0.1)
    whole = train(config, tmp_path / "whole", progress="none").result()
    parts = train(config.replace(micro_batch=8), tmp_path / "parts", progress="none").result()
    assert sizes == [20, 8, 8, 4]
    assert {whole["pgd_accuracy"], parts["pgd_accuracy"]} <= {5.0 * n for n in range(21)}


def test_evaluation_does_not_touch_the_run(tmp_path):
    quiet = train(tiny(), tmp_path / "quiet", progress="none")
    judged = train(tiny(evaluate_every=1, pgd_images=10), tmp_path / "judged", progress="none")
    assert digest(quiet) == digest(judged)


def test_collect_gives_one_row_a_run(tmp_path, monkeypatch):
    train(tiny(), tmp_path / "a", progress="none")
    train_killed_before(5, tiny(seed=1), tmp_path / "b", monkeypatch)
    (tmp_path / "not-a-run").mkdir()
    frame = collect(f"{tmp_path}/*")
    assert list(frame["state"]) == ["done", "unfinished"]
    assert list(frame["seed"]) == [0, 1]
    assert frame["test_accuracy"].notna().tolist() == [True, False]
    (tmp_path / "a").rename(tmp_path / "lr=[0.1]")  # a name, not a pattern
    assert len(collect([tmp_path / "lr=[0.1]", tmp_path / "b"])) == 2
    (tmp_path / "b" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"b/config.json is damaged"):
        collect(f"{tmp_path}/b")


def test_restored_is_what_was_judged(tmp_path):
    from conadv_lab.training.evaluate import evaluate

    folder = train(tiny(ema=0.8), tmp_path / "run", progress="none")
    parts, judged = restore(folder.path)
    figures = evaluate(parts, judged)
    assert {name: folder.result()[name] for name in figures} == figures


def test_new_checkpoints_live_on_beside_damaged_newer_ones(tmp_path, monkeypatch):
    config = tiny(checkpoint_every=1)
    train_killed_before(9, config, tmp_path / "run", monkeypatch)
    folder = RunFolder(tmp_path / "run")
    for damaged in folder.committed():
        (damaged / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        train_killed_before(3, config, tmp_path / "run", monkeypatch)
    intact = [path for path in folder.committed() if (path / "state.pt").stat().st_size]
    assert [path.name for path in intact] == ["step_00000003", "step_00000002"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    with pytest.raises(NotFinite, match="a weight is NaN or infinite after step 0"):
        train(tiny(lr=1e38, warmup_epochs=0, steps=1, weight_decay=1e3), tmp_path / "run", progress="none")
    folder = RunFolder(tmp_path / "run")
    assert folder.committed() == []
    assert folder.result() is None


def test_other_data_are_refused(tmp_path, monkeypatch):
    train_killed_before(5, tiny(), tmp_path / "run", monkeypatch)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("90 images, sha256", "90 images, sha257"))
    with pytest.raises(ValueError, match="started with other data"):
        train(tiny(), tmp_path / "run", resume=True, progress="none")


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        train(tiny(), tmp_path / "run", progress="none")


def test_the_same_groups_in_micro_batches_give_the_gradient_of_the_whole(tmp_path):
    """Without batch norm in the way: evaluation statistics are what the groups share."""
    from conadv_lab.config import resolved
    from conadv_lab.models.norm import branch_of
    from conadv_lab.training.build import build

    gradients = []
    for micro_batch in (None, 8, 5):
        parts = build(resolved(tiny(micro_batch=micro_batch, precision="float64")))
        for batch in parts.stream.step(0).batches():
            with branch_of(parts.model, "main", "running"):
                loss = parts.criterion(parts.model(batch.images.double()), batch.labels)
            (loss * batch.share).backward()
        gradients.append([p.grad for n, p in parts.model.named_parameters() if "adversarial" not in n])
    for part in gradients[1:]:
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(gradients[0], part, strict=True))
