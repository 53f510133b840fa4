"""A GPU visit: what is written when, what a kill leaves, and every part in small on a CPU."""

import json
import multiprocessing
import os
import re
import time

import pytest

from benchmarks import gpu_page, gpu_visit
from benchmarks.gpu_page import page
from benchmarks.gpu_parts import PARTS, Part, Place
from tests.benchmarks.small_cifar import write_small_cifar
from tests.docs.test_commands import read

FAKE = """
import json, os, pathlib, subprocess, sys, time
figures, kind, log = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
with log.open("a") as file:
    file.write(f"{figures.parent.name} {os.getpid()}\\n")
print("printed by", figures.parent.name, "in", figures.parent)
if kind == "fails":
    raise RuntimeError("made to fail")
if kind == "hangs":
    child = subprocess.Popen(["sleep", "600"])
    with log.open("a") as file:
        file.write(f"child {child.pid}\\n")
    time.sleep(600)
if kind == "half":
    figures.write_text("{")
    sys.exit()
time.sleep(float(kind))
row = {"name": "a figure", "value": 1.5, "unit": "ms", "peer": "a peer", "ratio": 0.5}
figures.write_text(json.dumps({"rows": [row]}))
"""


@pytest.fixture
def fake(tmp_path):
    """Makes parts of a script that does what it is told: fails, hangs, or takes so many seconds."""
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(FAKE)
    log.touch()

    def made(**kinds):
        return [
            Part(name, f"part {name}", f"{script} {{figures}} {kind} {log}", seconds=60.0, least=1.0)
            for name, kind in kinds.items()
        ]

    made.log = log
    return made


def begun(fake):
    """Names of the parts that were begun, as often as they were."""
    return [line.split()[0] for line in fake.log.read_text().splitlines()]


def alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(fake, seconds=10.0):
    """Whether all processes that parts have begun end within some seconds."""
    pids = [int(line.split()[1]) for line in fake.log.read_text().splitlines()]
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def visited(out, parts, *words):
    return gpu_visit.main(["--small", "--out", str(out), *words], parts)


def statuses(out):
    return {part["part"]: part["status"] for part in json.loads((out / "gpu.json").read_text())["parts"]}


def test_parts_are_written_with_where_they_were_measured(tmp_path, fake):
    out = tmp_path / "out"
    assert visited(out, fake(one=0, two=0)) == 0
    assert begun(fake) == ["one", "two"]
    first = json.loads((out / "gpu.json").read_text())["parts"][0]
    assert first["figures"]["rows"][0]["value"] == 1.5
    assert {"cpu", "torch", "python"} <= first["machine"].keys()
    text = (out / "gpu.md").read_text()
    assert "| a figure | 1.5 | ms | 0.500 × a peer |" in text
    assert first["machine"]["torch"] in text
    assert "printed by one in SCRATCH/one" in first["output"]
    assert str(out) not in (out / "gpu.json").read_text()


def test_a_part_that_fails_leaves_its_traceback_and_the_next_begins(tmp_path, fake):
    out = tmp_path / "out"
    assert visited(out, fake(one="fails", two=0)) == 1
    assert statuses(out) == {"one": "failed", "two": "finished"}
    assert "RuntimeError: made to fail" in json.loads((out / "gpu.json").read_text())["parts"][0]["errors"]
    text = (out / "gpu.md").read_text()
    assert "RuntimeError: made to fail" in text
    assert "printed by one" in text


def test_a_part_that_ends_well_without_figures_has_failed(tmp_path, fake):
    out = tmp_path / "out"
    assert visited(out, fake(one="half", two=0)) == 1
    assert statuses(out) == {"one": "failed", "two": "finished"}
    assert "it wrote no results" in (out / "gpu.md").read_text()


def test_a_part_that_is_out_of_time_is_killed_with_its_children_and_the_next_begins(tmp_path, fake):
    out = tmp_path / "out"
    first, second = fake(one="hangs", two=0)
    limited = Part(first.name, first.about, first.words, seconds=2.0, least=1.0)
    assert visited(out, [limited, second]) == 1
    assert statuses(out) == {"one": "out of time", "two": "finished"}
    assert "child" in begun(fake)
    assert gone(fake)


def test_no_part_is_begun_without_the_time_it_takes_at_least(tmp_path, fake):
    out = tmp_path / "out"
    first, second = fake(one=0, two=0)
    long = Part(second.name, second.about, second.words, seconds=60.0, least=30.0)
    assert visited(out, [first, long], "--minutes", "0.4") == 1
    assert statuses(out) == {"one": "finished", "two": "not run"}
    assert begun(fake) == ["one"]
    assert "s were left" in (out / "gpu.md").read_text()


def test_what_is_finished_is_skipped_and_what_failed_is_tried_again(tmp_path, fake):
    out = tmp_path / "out"
    visited(out, fake(one=0, two="fails", three=0))
    assert visited(out, fake(one=0, two=0, three=0)) == 0
    assert begun(fake) == ["one", "two", "three", "two"]
    assert statuses(out) == dict.fromkeys(("one", "two", "three"), "finished")


def test_parts_can_be_named_alone(tmp_path, fake):
    out = tmp_path / "out"
    parts = fake(one=0, two=0, three=0)
    assert visited(out, parts, "--only", "three", "--only", "one") == 0
    assert begun(fake) == ["one", "three"]
    assert visited(out, parts) == 0
    assert begun(fake) == ["one", "three", "two"]
    assert list(statuses(out)) == ["one", "two", "three"]


@pytest.mark.slow
def test_killed_at_any_moment_and_begun_again_it_loses_no_finished_part(tmp_path, fake):
    out = tmp_path / "out"
    parts = fake(**{f"p{i}": 0.05 for i in range(6)})
    kept: dict[str, dict] = {}
    fork = multiprocessing.get_context("fork")
    for kill in range(40):
        process = fork.Process(target=visited, args=(out, parts))
        process.start()
        process.join(0.05 + 0.09 * (kill % 7))
        process.kill()
        process.join()
        found = gpu_visit.read(out)
        assert all(found[name] == record for name, record in kept.items())
        kept |= {name: record for name, record in found.items() if record["status"] == "finished"}
        if len(kept) == len(parts):
            break
    assert kill > 0
    assert visited(out, parts) == 0
    found = gpu_visit.read(out)
    assert len(found) == 6
    assert all(found[name] == record for name, record in kept.items())
    assert gone(fake)


def test_a_part_does_not_outlive_a_visit_that_is_killed(tmp_path, fake):
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=visited, args=(tmp_path / "out", fake(one=60)))
    process.start()
    while not begun(fake):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert gone(fake)
    assert gpu_visit.read(tmp_path / "out")["one"]["status"] == "begun"


def test_the_page_tells_of_several_machines_and_of_a_part_that_was_cut_off():
    record = {"part": "one", "about": "what it is", "status": "begun", "shown": "rows", "small": False, "figures": None,
              "command": "python -m x", "machine": {"gpu": "A"}, "when": "2026-01-02T03:04:05", "commit": None,
              "output": "", "errors": "Killed"}  # fmt: skip
    other = record | {"part": "two", "machine": {"gpu": "B"}, "commit": "0123456789", "status": "finished"}
    text = page([record, other])
    assert "gpu A · 2026-01-02 · commit unknown (parts one)" in text
    assert "gpu B · 2026-01-02 · commit 0123456 (parts two)" in text
    assert "What it is: begun, cut off." in text
    assert "```text\nKilled\n```" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "cifra"], "unknown part 'cifra'; allowed: .* Did you mean 'cifar'?"),
        (["--data-dir", "EMPTY"], "no cifar10 in EMPTY: put cifar-10-batches-py"),
        (["--only", "lars", "cifar"], "cifar needs CIFAR-10; pass its folder as --data-dir"),
        (["--minutes", "0.1"], "minutes is 0.1; allowed: at least 0.5, as tests starts first"),
        (
            ["--minutes", "0.9", "--data-dir", "IMAGES"],
            "minutes is 0.9; allowed: at least 1, as cifar starts first",
        ),
        (["--minutes", "0.1", "--only", "lars"], "minutes is 0.1; allowed: at least 0.33, as lars"),
        (["--minutes", "nan"], "minutes is nan; allowed: at least 0.5"),
        (["--scratch", "FILE"], "FILE is a file; allowed: a folder"),
        ([], "torch finds no GPU .*; --small tries"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, words, told, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images/cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "file").touch()
    places = {name: str(tmp_path / name.lower()) for name in ("EMPTY", "IMAGES", "FILE")}
    for name, path in places.items():
        words, told = [path if word == name else word for word in words], told.replace(name, path)
    assert gpu_visit.main(["--out", str(tmp_path / "out"), *words]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert re.search(told, sentence)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_file_that_is_no_visits_is_refused_and_kept(tmp_path, fake, capsys):
    (tmp_path / "gpu.json").write_text("[]")
    assert visited(tmp_path, fake(one=0)) == 2
    assert "gpu.json is damaged, or not from a visit" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == "[]"
    assert begun(fake) == []


def test_figures_in_small_and_in_full_do_not_mix(tmp_path, fake, monkeypatch, capsys):
    parts = fake(one=0, two=0)
    monkeypatch.setattr(gpu_visit, "_require_gpu", lambda small: None)
    for first, then, told in ((["--small"], [], "one in small"), ([], ["--small"], "one in full")):
        out = tmp_path / f"out{len(first)}"
        assert gpu_visit.main(["--out", str(out), "--only", "one", *first], parts) == 0
        assert gpu_visit.main(["--out", str(out), *then], parts) == 2
        assert told in capsys.readouterr().err
        assert statuses(out) == {"one": "finished"}


def test_without_cifar_the_other_parts_are_done(tmp_path, fake):
    (one,) = fake(one=0)
    needing = Part("two", "needs images", one.words, seconds=60.0, needs=("cifar10",))
    after = Part("three", "needs a run", one.words, seconds=60.0, needs=("run",))
    assert visited(tmp_path / "out", [needing, after, one]) == 1
    assert statuses(tmp_path / "out") == {"two": "not run", "three": "not run", "one": "finished"}
    assert "not run: needs CIFAR-10 (--data-dir)" in (tmp_path / "out/gpu.md").read_text()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("small", [False, True], ids=["in full", "in small"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_parts_command_exists_and_knows_its_options(part, small, tmp_path):
    _, minus_m, module, *words = part.command(Place(tmp_path, tmp_path, tmp_path, small))
    assert minus_m == "-m"
    read(module, *words)
    assert not any("{" in word for word in words)


@pytest.mark.slow
def test_all_parts_in_small_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    data, out = write_small_cifar(tmp_path / "data"), tmp_path / "out"
    assert gpu_visit.main(["--small", "--data-dir", str(data), "--out", str(out)]) == 0, (
        out / "gpu.md"
    ).read_text()
    found = json.loads((out / "gpu.json").read_text())["parts"]
    assert [part["part"] for part in found] == [part.name for part in PARTS]
    assert {part["status"] for part in found} == {"finished"}
    assert all(part["figures"] for part in found)
    text = (out / "gpu.md").read_text()
    for words in ("plain loop, test accuracy", "PyHessian", "| skipped |", "times vanilla", "lars B"):
        assert words in text


def committed():
    return [json.loads(file.read_text())["parts"] for file in sorted(gpu_page.VISITS.glob("*.json"))]


def test_the_document_shows_the_committed_visits():
    assert gpu_page.main(["--check"]) == 0
    assert gpu_page.MARKED.search(gpu_page.DOCUMENT.read_text())
    assert all(f"### {gpu_page._day(visit)}" in gpu_page.DOCUMENT.read_text() for visit in committed())


def test_visits_are_written_between_the_marks_the_newest_first(tmp_path, fake):
    visited(tmp_path / "out", fake(one=0))
    (record,) = json.loads((tmp_path / "out/gpu.json").read_text())["parts"]
    early = [record | {"when": "2026-01-02T00:00:00", "machine": {"gpu": "A"}}]
    late = [record | {"when": "2026-03-04T00:00:00", "machine": {"gpu": "B"}}]
    text = gpu_page.refreshed("before\n\n<!-- visits -->\nold\n<!-- end -->\n\nafter\n", [early, late])
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["### 2026-03-04, B", "#### one", "### 2026-01-02, A", "#### one"]
    assert text.startswith("before\n\n<!-- visits -->\n\n###")
    assert text.endswith("<!-- end -->\n\nafter\n")
    assert "old" not in text
    assert gpu_page.refreshed(text, [late, early]) == text
