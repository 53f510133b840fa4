"""The command: what it prints, its exit status, and that a mistake writes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest

from conadv_lab import train
from conadv_lab.config import Config, resolved
from conadv_lab.recipes import RECIPES

SHORT = ["--train-images", "60", "--global-batch", "20", "--steps", "3", "--warmup-epochs", "0"]


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        status = train.main(list(words))
    except SystemExit as stop:  # the parser's own
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_run_prints_its_folder_last(capsys, tmp_path):
    status, out, _ = run(capsys, "digits-conadv", *SHORT, "--out", str(tmp_path / "run"))
    assert status == 0
    assert out.splitlines()[-1] == str(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "manifest.json", "metrics.jsonl", "checkpoints", "result.json"}
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())["parameters_sha256"]) == 64


def test_resume_says_where_it_goes_on(capsys, tmp_path):
    words = ("digits-vanilla", *SHORT, "--checkpoint-every", "1", "--out", str(tmp_path / "run"))
    run(capsys, *words)
    assert run(capsys, *words, "--resume")[2] == f"{tmp_path}/run is finished; nothing to do\n"
    (tmp_path / "run" / "result.json").unlink()
    assert run(capsys, *words, "--resume")[2] == f"{tmp_path}/run has trained all steps\n"
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
    assert run(capsys, *words, "--resume")[2] == f"{tmp_path}/run continues at step 3 of 3\n"


@pytest.mark.parametrize(("words", "warned"), [((), True), (("--pixels", "32"), False)])
def test_photographs_without_a_gpu_are_warned_of(words, warned, capsys):
    config, _, _ = train.parse(["imagenet-resnet50-4k", *words])
    for device in ("cuda", "cpu"):
        train._warn_of_photographs_without_a_gpu(config, device)
        err = capsys.readouterr().err
        assert ("a step may take minutes" in err) == (warned and device == "cpu")
        assert ("--precision float32" in err) == bool(err)


def test_without_out_the_folder_is_named_by_what_is_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "digits-conadv", *SHORT, "--method", "recycled", "--seed", "3")
    assert status == 0
    assert out.splitlines()[-1] == str(Path("runs") / "digits-conadv-recycled-b20-s3")


def test_list_names_every_recipe_with_a_sentence(capsys):
    status, out, _ = run(capsys, "--list")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(line.rstrip().endswith(".") and len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_possible_and_states_its_command(name):
    config = resolved(RECIPES[name]())
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert f"python -m conadv_lab.train {name}" in RECIPES[name].__doc__


MISTAKES = {
    "unknown recipe": (["digits-conav"], r"unknown recipe 'digits-conav'.*Did you mean 'digits-conadv'"),
    "unknown field": (["digits-conadv", "--stalenes", "2"], r"--stalenes(.|\n)*--staleness"),
    "no number": (["digits-conadv", "--lr", "fast"], "fast"),
    "unknown method": (["digits-conadv", "--method", "conav"], r"unknown method 'conav'.*'conadv'"),
    "unknown model": (["digits-conadv", "--model", "resnet81"], r"unknown model 'resnet81'.*'resnet18'"),
    "unknown dataset": (["digits-conadv", "--dataset", "digit"], r"unknown dataset 'digit'.*'digits'"),
    "unknown optimizer": (["digits-conadv", "--optimizer", "lar"], r"unknown optimizer 'lar'.*'lars'"),
    "unknown schedule": (["digits-conadv", "--schedule", "cosin"], r"'cosin'(.|\n)*cosine"),
    "batch 0": (["digits-conadv", "--global-batch", "0"], r"global_batch is 0; allowed: a whole number of at least 1"),
    "batch above the set": (["digits-conadv", "--global-batch", "900"], r"global_batch is 900; allowed: 1 to 898"),
    "micro-batch above the batch": (
        ["digits-conadv", "--micro-batch", "512"], r"micro_batch is 512; allowed: at most 256"),
    "odd batch at equal cost": (
        ["digits-recycled-equal", "--global-batch", "33"], r"global_batch is 33;.*an even number"),
    "negative epsilon": (["digits-conadv", "--epsilon", "-0.1"], r"epsilon is -0.1; allowed: 0 to 1"),
    "epsilon beyond the range": (["digits-conadv", "--epsilon", "8"], r"epsilon is 8.0; allowed: 0 to 1"),
    "epsilon nan": (["digits-conadv", "--epsilon", "nan"], r"epsilon is nan"),
    "negative staleness": (["digits-conadv", "--staleness", "-1"], r"staleness is -1"),
    "half a step": (["digits-conadv", "--staleness", "1.5"], r"1\.5"),
    "negative lr": (["digits-conadv", "--lr", "-0.1"], r"lr is -0.1; allowed: at least 0"),
    "weights": (["digits-conadv", "--weights", "0", "0"], r"weights are \(0.0, 0.0\)"),
    "warm-up longer than the run": (["digits-conadv", "--warmup-epochs", "99"], r"warmup"),
    "nesterov with lars": (["digits-conadv", "--optimizer", "lars", "--nesterov"], r"nesterov is True"),
    "no gpu": (["digits-conadv", "--device", "cuda:7"], r"device is 'cuda:7'|CUDA"),
    "no device": (["digits-conadv", "--device", "gpu"], r"device is 'gpu'"),
    "no archive": (["cifar10-resnet20-cpu", "--data-dir", "/nowhere"], r"/nowhere"),
    "another number of channels": (["digits-conadv", "--dataset", "synthetic"], r"cannot process the images"),
    "a step of nothing": (["digits-conadv", "--attack-step", "0"], r"attack_step is 0.0; allowed: above 0"),
    "endless warm-up": (["digits-conadv", "--warmup-epochs", "inf"], r"warmup_epochs is inf"),
    "endless decay": (["digits-conadv", "--weight-decay", "inf"], r"weight_decay is inf"),
    "no milestone": (["digits-conadv", "--milestone-epochs", "nan"], r"milestone_epochs is \(nan,\)"),
    "no images": (["digits-conadv", "--train-images", "0"], r"train_images is 0; allowed: a whole number"),
    "nothing to recycle": (["digits-recycled", "--weights", "0", "1"], r"a clean weight above 0"),
    "no such file": (["digits-conadv", "--model", "nowhere.py:net"], r"nowhere.py does not exist"),
    "no such recipe file": (["nowhere.py:recipe"], r"nowhere.py does not exist"),
    "a file without its function": (["digits-conadv", "--model", "nowhere.py"], r"name the function too: nowhere.py:"),
    "another case": (["digits-vanilla", "--method", "SAM"], r"Did you mean 'sam'\?"),
    "no recipe": (["--epochs", "3"], r"the first word is '--epochs'; allowed: a recipe"),
    "no such list": (["--list", "method"], r"unknown list 'method'.* Did you mean 'methods'\?"),
    "infinite lr": (["digits-conadv", "--lr", "inf"], r"lr is inf; allowed: at least 0, and finite"),
    "devices that are only planned": (["digits-conadv", "--devices", "4"], r"devices is 4; allowed: with --plan only"),
    "no step down": (["digits-conadv", "--schedule", "step"], r"milestone_epochs is \(\); allowed with"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_with_a_sentence_and_writes_nothing(name, capsys, tmp_path, monkeypatch):
    words, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *words, "--out", "run")
    assert status == 2, out + err
    assert re.search(message, out + err), out + err
    assert list(tmp_path.iterdir()) == []


OWN = '''
import numpy as np, torch
from torch import nn
from conadv_lab.config import Config
from conadv_lab.data.sets import TensorSet
from conadv_lab.methods.base import Losses, Method
from conadv_lab.methods.steps import train_on_clean
from conadv_lab.recipes.digits import vanilla

def recipe():
    """Mine."""
    return vanilla().replace(model=f"{__file__}:net", dataset=f"{__file__}:data", method=f"{__file__}:slow",
                             global_batch=20, steps=4, warmup_epochs=0)

def net(config):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))

def data(config):
    draw = torch.Generator().manual_seed(0)
    def part(n):
        return TensorSet(torch.rand(n, 1, 8, 8, generator=draw), torch.arange(n) % 3, 3)
    return part(60), part(30)

def broken_data(config):
    train, test = data(config)
    train.images[7, 0, 0, 0] = float("nan")
    return TensorSet(train.images, train.labels, 3), test

class Slow(Method):
    def backward(self, model, step, criterion):
        return Losses(train_on_clean(model, step, criterion, weight=0.5))

def slow(config):
    return Slow()

def no_method(config):
    return 3

class Pair(nn.Module):
    """Returns more than its logits, and writes into its input."""

    def __init__(self):
        super().__init__()
        self.net = net(None)

    def forward(self, x):
        out = self.net(x.sub_(0.5))
        return {"logits": out, "features": x}

def pair(config):
    return Pair()

def eager():
    return Slow()

def one_set(config):
    return data(config)[0]

def float_labels(config):
    train, test = data(config)
    return TensorSet(train.images, train.labels.float(), 3), test

def no_test(config):
    train, test = data(config)
    return train, TensorSet(test.images[:0], test.labels[:0], 3)

def more_classes(config):
    train, test = data(config)
    return train, TensorSet(test.images, test.labels, 4)

class Nothing:
    classes = 3

    def __len__(self):
        return 60

    def fetch(self, indices):
        return None

def nothing(config):
    return Nothing(), Nothing()
'''


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_a_users_own_recipe_model_data_and_method_are_files(own, capsys, tmp_path):
    status, _out, err = run(capsys, f"{own}:recipe", "--out", str(tmp_path / "run"))
    assert status == 0, err
    status, _, _ = run(capsys, f"{own}:recipe", "--out", str(tmp_path / "other"), "--method", "conadv")
    assert status == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "other")]
    assert results[0]["parameters_sha256"] != results[1]["parameters_sha256"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_users_model_may_return_more_and_write_into_its_input(own, capsys, tmp_path, precision):
    words = ["--model", f"{own}:pair", "--method", "conadv", "--precision", precision, "--pgd-images", "20"]
    status, _out, err = run(capsys, f"{own}:recipe", *words, "--out", str(tmp_path / "run"))
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["pgd_accuracy"] >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "{own}:no_method"], "returned int; allowed: a conadv_lab Method"),
        (
            ["--method", "{own}:Slow"],
            "Slow is a class that takes (); allowed: a function of one argument, the config,",
        ),
        (
            ["--method", "{own}:eager"],
            "eager is a function that takes (); allowed: a function of one argument",
        ),
        (["--method", "{own}:torch"], "torch is of type module; allowed: a function"),
        (["--dataset", "{own}:one_set"], "returned TensorSet; allowed: two ImageSets, train and test"),
        (["--model", "{own}:data"], "returned tuple; allowed: a torch.nn.Module"),
        (["--dataset", "{own}:broken_data"], "contain NaN or infinity, the first at index 7"),
        (["--model", "{own}:nte"], "Did you mean 'net'"),
        (["--dataset", "{own}:float_labels"], "labels' dtype is 'torch.float32'; allowed: torch.int64"),
        (["--dataset", "{own}:no_test"], "the number of images in the test set of"),
        (["--dataset", "{own}:more_classes"], "has 3 classes for training and 4 for the test"),
        (["--dataset", "{own}:nothing"], "fetch returned NoneType; allowed: (images, labels)"),
    ],
)
def test_mistakes_in_a_users_file_are_told(words, message, own, capsys, tmp_path):
    words = [word.replace("{own}", own) for word in words]
    status, _, err = run(capsys, f"{own}:recipe", *words, "--out", str(tmp_path / "run"))
    assert status == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_bug_is_no_mistake_of_the_user(own, capsys, tmp_path):
    Path(own).write_text(OWN.replace("weight=0.5", "weight=half"))
    with pytest.raises(NameError):
        run(capsys, f"{own}:recipe", "--out", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rho", "0.1"], "--rho has no effect with method 'vanilla', whose options are: none of its own"),
        (
            ["--method=sam", "--staleness=3"],
            "--staleness has no effect with method 'sam', whose options are: ",
        ),
        (["--power", "3"], "--power has no effect with schedule 'cosine'"),
        (["--lars-variant", "A"], "--lars-variant has no effect with optimizer 'sgd'"),
        (["--steps", "2", "--epochs", "4"], "--epochs has no effect beside --steps"),
        (["--epsilon", "0.1", "--pgd-images", "4"], None),
        (["--method", "late-sam", "--early-method", "conadv", "--staleness", "3", "--rho", "0.1"], None),
    ],
)
def test_an_option_without_effect_is_warned_of(words, told, capsys):
    status, _, err = run(capsys, "digits-vanilla", "--plan", *words)
    assert status == 0
    assert told in err if told else "no effect" not in err


def test_a_folder_below_a_file_is_refused_before_anything_is_loaded(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = run(capsys, "digits-vanilla", "--out", str(tmp_path / "file" / "run"))
    assert status == 2
    assert f"is below {tmp_path / 'file'}, which is a file; pass the path of a folder as --out" in err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": "2"}, "epochs is '2'; allowed: a number"),
        ({"flip": "no"}, "flip is 'no'; allowed: true or false"),
        ({"weights": 0.5}, "weights is 0.5; allowed: a list of 2 numbers or None"),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(change, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        resolved(Config().replace(**change))


def test_not_finite_exits_1(capsys, tmp_path):
    words = ["digits-vanilla", *SHORT, "--lr", "1e30", "--steps", "9", "--out", str(tmp_path / "run")]
    status, _, err = run(capsys, *words)
    assert status == 1
    assert "the clean loss is" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_exits_1_with_a_sentence(capsys, tmp_path, monkeypatch):
    from conadv_lab import checkpoints

    original = checkpoints.write_hashed
    monkeypatch.setattr(checkpoints, "write_hashed", lambda path, state: original(Path("/dev/full"), state))
    monkeypatch.setattr(checkpoints.os, "fsync", lambda handle: None)
    status, _, err = run(capsys, "digits-vanilla", *SHORT, "--out", str(tmp_path / "run"))
    assert status == 1
    assert "No space left on device" in err
    assert "--resume" in err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
