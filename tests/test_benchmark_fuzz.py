"""The fuzz harness tells every ending from the others, and a few damaged roots end as they should."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from benchmarks import fuzz_inputs
from benchmarks.fuzzing import Outcome, Target, fuzz, outcome_of_error, summary, table


class Endings(Target):
    """The number of the input says how it ends."""

    name = "endings"
    mebibytes = 64

    def prepare(self, folder):
        (folder / "a.json").write_text("sound")

    def mutate(self, generator, folder):
        assert (folder / "a.json").read_text() == "sound"  # a fresh copy each time
        (folder / "a.json").write_text("damaged")
        self.drawn = generator.random()
        return f"half: {self.drawn}"

    def judge(self, folder):
        number = int(self.ends)
        if number == 0:
            return Outcome.SAME, ""
        if number == 1:
            raise KeyError("a.json")
        if number == 2:
            time.sleep(60)
        if number == 3:
            kept = b"x" * (640 * 2**20)  # far above the limit: what is resident is counted with pages that come and go
            return Outcome.SAME, str(len(kept))
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome_of_error(ValueError(f"{folder}/a.json is damaged"), ["a.json"]), "told"


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        (0, Outcome.SAME),
        (1, Outcome.TRACEBACK),
        (2, Outcome.HANG),
        (3, Outcome.MEMORY),
        (4, Outcome.KILLED),
        (5, Outcome.NAMED),
    ],
)
def test_every_ending_is_told_from_the_others(tmp_path, ends, outcome):
    target = Endings()
    target.ends, target.seconds = ends, 0.1 if outcome is Outcome.HANG else 20.0
    (case,) = fuzz(target, [7], tmp_path / "scratch")
    assert (case.number, case.outcome, case.kind) == (7, outcome, "half"), case.told


def test_number_and_seed_say_what_is_done_whatever_ran_before(tmp_path):
    target = Endings()
    target.ends = 0
    damages = [[case.damage for case in fuzz(target, numbers, tmp_path / str(numbers))] for numbers in ([0, 1, 2], [2])]
    assert damages[0][2] == damages[1][0] and len(set(damages[0])) == 3
    assert fuzz(target, [2], tmp_path / "other", seed=1)[0].damage != damages[1][0]


def test_an_error_is_named_in_one_line_or_a_fault():
    assert outcome_of_error(ValueError("a.json: no list"), ["a.json"]) is Outcome.NAMED
    assert outcome_of_error(OSError(2, "No such file", "root/a.json"), ["a.json"]) is Outcome.NAMED
    for error in (ValueError("no list"), RecursionError("too deep"), ValueError("a.json:\nno list")):
        assert outcome_of_error(error, ["a.json"]) is Outcome.UNNAMED
    for error in (TypeError("a.json"), AttributeError("a.json"), OverflowError("a.json"), MemoryError("a.json")):
        assert outcome_of_error(error, ["a.json"]) is Outcome.TRACEBACK


def test_counts_faults_and_table_are_those_of_the_cases(tmp_path):
    target = Endings()
    target.ends = 1
    result = summary(target, fuzz(target, range(2), tmp_path / "scratch"), seed=0)
    assert result["counts"]["traceback"] == 2 == sum(result["counts"].values()) and result["kinds"] == {"half": {"traceback": 2}}
    assert [fault["number"] for fault in result["faults"]] == [0, 1] and "KeyError" in result["faults"][0]["told"]
    assert table([result]).splitlines()[1].split()[:2] == ["endings", "2"]


def test_damaged_annotations_end_as_they_should(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert fuzz_inputs.main(["annotations", "--count", "6", "--json", str(path)]) == 0, capsys.readouterr().out
    (result,) = json.loads(path.read_text())
    assert result["inputs"] == 6 and result["faults"] == [] and result["counts"]["named"] > 0
    assert capsys.readouterr().out.startswith("annotations: 6 inputs from seed 0\n")


@pytest.mark.parametrize("name", ["archives", "checkpoints"])
def test_a_few_damaged_archives_and_checkpoints_end_as_they_should(name):
    result = fuzz_inputs.run(name, range(6), seed=0)
    assert result["inputs"] == 6 and result["faults"] == []
