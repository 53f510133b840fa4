"""Site profiles: shipped ones load, mistakes in one's own are told."""

import re
from pathlib import Path

import pytest

from conadv_lab.launch import profiles
from conadv_lab.launch.profiles import Profile

SHIPPED = sorted(file.stem for file in (Path(__file__).parents[2] / "slurm" / "profiles").glob("*.toml"))


@pytest.mark.parametrize("name", [*SHIPPED, "local", "slurm"])
def test_a_shipped_profile_loads_by_its_name(name):
    assert profiles.load(name).name == name
    assert name in profiles.names()


def test_a_new_site_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text('partition = "p"\nsetup = ["module load x"]\n')
    monkeypatch.setenv("CONADV_PROFILES", str(tmp_path))
    assert profiles.load("mine") == Profile(name="mine", partition="p", setup=("module load x",))
    assert profiles.load(str(tmp_path / "mine.toml")).partition == "p"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('partiton = "p"', "unknown key of .*'partiton'.*Did you mean 'partition'"),
        ('minutes = "60"', "minutes in .* is '60'; allowed: a whole number"),
        ("minutes = true", "allowed: a whole number"),
        ("setup = 'module load x'", "allowed: a list of strings"),
        ("nodes = 0", "nodes is 0; allowed: a whole number of at least 1"),
        ("minutes = 1\nsignal_delay_s = 60", "signal_delay_s is 60; allowed: 1 to 59"),
        ("executor = 'lsf'", "executor is 'lsf'; allowed: slurm, local"),
        ("mem_gb = -1", "mem_gb is -1; allowed: above 0"),
        ("partition = ", "is not valid TOML"),
    ],
)
def test_mistakes_in_a_profile_are_told(text, message, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        profiles.load(str(tmp_path / "mine.toml"))


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(ValueError, match=re.escape("Did you mean 'local'?")):
        profiles.load("locl")


@pytest.mark.parametrize(("minutes", "delay"), [(1, 15), (4, 60), (60, 120)])
def test_the_notice_is_a_quarter_of_a_short_limit(minutes, delay):
    assert Profile(minutes=minutes).delay == delay
