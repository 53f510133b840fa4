"""What a continued run may have otherwise: every field that cannot change a bit, and no other."""

import shutil
from dataclasses import replace
from typing import Any

import pytest

from conadv_lab.config import Config, resolved
from conadv_lab.runs import RunFolder
from conadv_lab.training.loop import train
from conadv_lab.training.resuming import (
    CHANGES_NO_BIT,
    fingerprint,
    fingerprints,
    reconciled,
    require_same_data,
)
from tests.conftest import image_set
from tests.data.trees import write_tree
from tests.training.test_loop import tiny, train_killed_before

BASE = tiny(method="conadv", staleness=2, micro_batch=16, attackers=0)
FLIPS: dict[str, dict[str, Any]] = {
    "data_dir": {"data_dir": "/elsewhere"},
    "download": {"download": True},
    "workers": {"workers": 3},
    "keep_gb": {"keep_gb": 0.0},
    "log_every": {"log_every": 3},
    "log_to": {"log_to": "tensorboard"},
    "checkpoint_every": {"checkpoint_every": 1},
    "evaluate_every": {"evaluate_every": 2},
    "mirror": {"mirror": True},
    "capture": {"capture": "off"},
    "probe_every": {"probe_every": 1},
}
OVER_RANKS = {"placement", "attackers"}  # in test_ranks.py, from-serial-to-beside
FIELDS = {name: section for section, values in Config().to_dict().items() for name in values}


def another(value: Any) -> Any:
    """A value of the same kind; whether it is possible does not matter, as it is refused before."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"another-{value}"
    if isinstance(value, tuple):
        return (*value, 1.0)
    return 7 if value is None else value + 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    return train(BASE, tmp_path_factory.mktemp("whole") / "run", progress="none")


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> RunFolder:
    """A run with a checkpoint after step 4, to be copied."""
    out = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_killed_before(5, BASE, out, patch)
    return RunFolder(out)


@pytest.mark.parametrize("name", FIELDS)
def test_what_changes_bits_is_refused_and_nothing_else(name, begun):
    """A field that is new is one that changes bits until it is shown here that it does not."""
    config = resolved(BASE)
    section = FIELDS[name]
    flipped = config.replace(**{name: another(config.to_dict()[section][name])})
    if name in CHANGES_NO_BIT:
        assert reconciled(flipped, begun, resume=True) == flipped
    else:
        with pytest.raises(
            ValueError, match=rf"another config: {name} is .*; only these may change: attackers, "
        ):
            reconciled(flipped, begun, resume=True)


def test_every_field_that_may_change_is_flipped_in_a_run():
    assert FLIPS.keys() | OVER_RANKS == CHANGES_NO_BIT


@pytest.mark.parametrize("name", FLIPS)
def test_it_changes_no_bit(name, begun, whole, tmp_path):
    if name == "log_to":
        pytest.importorskip("tensorboard", reason="the extra [adapters] is not installed")
    shutil.copytree(begun.path, tmp_path / "run")
    resumed = train(BASE.replace(**FLIPS[name]), tmp_path / "run", resume=True, progress="none")
    before, after = whole.result(), resumed.result()
    assert before is not None
    assert after is not None
    for figures in (before, after):
        figures.pop("seconds")
    assert before == {key: after[key] for key in before}
    # What is measured later finds the data where they were last.
    assert resumed.config().to_dict()[FIELDS[name]][name] == FLIPS[name][name]


def test_photographs_are_read_from_elsewhere_by_others(tmp_path, monkeypatch):
    """Folder, workers and memory at once, where they have a meaning."""
    config = tiny(
        dataset="imagenet", data_dir=str(write_tree(tmp_path / "tree", train=4, val=1)), pixels=32, eval_pixels=32,
        model="resnet20", global_batch=4, micro_batch=2, steps=3, warmup_epochs=0, bn_recalibrate=4,
        train_images=None, checkpoint_every=1, method="conadv", channels_last=False,
    )  # fmt: skip
    whole = train(config, tmp_path / "whole", progress="none").result()
    train_killed_before(1, config, tmp_path / "run", monkeypatch)
    (tmp_path / "tree").rename(tmp_path / "moved")
    moved = config.replace(data_dir=str(tmp_path / "moved"), workers=1, keep_gb=0.0)
    resumed = train(moved, tmp_path / "run", resume=True, progress="none").result()
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]


class Unnamed:
    """Images that do not tell what they are."""

    classes = 10

    def __len__(self) -> int:
        return 90


def test_images_that_tell_nothing_of_themselves_stay_where_they_are(tmp_path):
    folder, images = RunFolder(tmp_path / "run"), Unnamed()
    folder.create(BASE, {"data": fingerprint(images)})
    require_same_data(BASE, folder, images, images)
    with pytest.raises(ValueError, match=r"data_dir is '/elsewhere', was 'data'.*Unnamed has no fingerprint"):
        require_same_data(BASE.replace(data_dir="/elsewhere"), folder, images, images)


def test_other_test_images_are_refused(tmp_path):
    """They change no weight, but the figures of a run would be of two sets."""
    folder, train_set, test_set = RunFolder(tmp_path / "run"), image_set(8), image_set(6)
    folder.create(BASE, fingerprints(train_set, test_set))
    require_same_data(BASE, folder, train_set, test_set)
    labels = test_set.labels.clone()
    labels[0] = 1 - labels[0].clamp_max(1)
    with pytest.raises(ValueError, match=r"was started with other test images: 6 images, sha256 .*; now 6"):
        require_same_data(BASE, folder, train_set, replace(test_set, labels=labels))
    folder.create(BASE, {"data": fingerprint(train_set)})
    require_same_data(BASE, folder, train_set, replace(test_set, labels=labels))
