"""What a sweep tries, remembers and stops, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from parallelmind import cli
from parallelmind.config import resolve
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.common.stopping import StopFile
from workloads.sweep import command as sweep
from workloads.sweep.config import SweepConfig, check
from workloads.sweep.journal import Journal
from workloads.sweep.search import point, winner
from workloads.sweep.trial import Trial
from workloads.sweep.tune import JournalingScheduler, JournalSearcher
from workloads.train.command import STOP

LOSS, TAX = "validation/loss_1", "validation/branch_tax_8"
RUN = {"data_path": "data.jsonl", "validation_path": "held_out.jsonl", "max_steps": 90}
SPACE = {
    "lora_rank": {"low": 2, "high": 32, "log": True},
    "rope_2d_ratio": {"low": 0.0, "high": 1.0},
    "pairs": ["low", "high"],
}


def config(**values: Any) -> SweepConfig:
    return resolve(SweepConfig, {"train": RUN, "space": {"lora_rank": [4, 8]}, **values})


def over(
    number: int, settings: dict[str, Any], loss: float, tax: float = 0.0, status: str = "finished"
) -> Trial:
    return Trial(number, {**settings, "seed": 0}, status, metrics={LOSS: loss, TAX: tax})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"lora_rnk": [1]}}, r"space.lora_rnk: unknown field \(did you mean lora_rank\?\)"),
        (
            {"points": [{"num_workers": 2}]},
            "points.num_workers: cannot differ between trials; set it in train",
        ),
        ({"space": {"seed": [1]}}, r"space.seed: .* seeds=\[…\]"),
        ({"space": {}}, "space: nothing to try"),
        (
            {"space": {"lora_rank": []}},
            r"space.lora_rank=\[\]: holds nothing to try; give at least one value",
        ),
        ({"space": SPACE}, "space.lora_rank: a range needs search=random or search=optuna"),
        ({"space": {"lora_rank": {"low": 8, "high": 2}}, "search": "random", "trials": 1}, "low < high"),
        ({"search": "optuna"}, "search=optuna: draws points from a space; give trials=NUMBER and space="),
        ({"trials": 4}, "trials=4: needs search=random or search=optuna"),
        (
            {"metrics": ["validation/loss_3"]},
            "metrics=validation/loss_3: no trial reports it; choose from loss, valid",
        ),
        ({"seeds": [0, -1]}, "seeds"),
        ({"register_as": "org/model"}, "register_as=org/model"),
        ({"alias": "no name"}, "alias=no name"),
        ({"alias": "Latest"}, "alias=Latest: means a version by itself in MLflow"),
        ({"alias": "v2"}, "alias=v2: means a version by itself in MLflow"),
        ({"train": {"data_path": "d"}}, "metrics=validation/loss_1: no trial reports it; choose from loss$"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"rope_2d_ratio": [0.5, 2]}}, "space: rope_2d_ratio=2: rope_2d_ratio=2: should be less"),
        (
            {"space": {"lora_rank": {"low": 0, "high": 9}}, "search": "random", "trials": 1},
            "space: lora_rank=0",
        ),
        (
            {"space": {"min_branches_per_sample": [1, 9]}},
            "min_branches_per_sample=9: exceeds max_branches_per_sample=8",
        ),
    ],
)
def test_every_value_is_held_against_the_training_run(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config(**values))


def test_bad_input_ends_with_2_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["sweep", "train.data_path=nowhere.jsonl", "space.lora_rank=[2]", "metrics=[loss]"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.run(sweep.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: data_path=nowhere.jsonl: ")


def test_a_grid_lies_over_each_point() -> None:
    found = list(
        config(
            space={"lora_rank": [4, 8], "pairs": ["low", "mid"]}, points=[{}, {"positions": "flat"}]
        ).grid()
    )
    assert len(found) == 8
    assert {"positions": "flat", "lora_rank": 8, "pairs": "mid"} in found


def test_draws_depend_on_seed_and_number_alone_and_keep_to_the_space() -> None:
    settings = config(space=SPACE, search="random", trials=200)
    drawn = [point(settings, index, []) for index in range(200)]
    assert drawn == [point(settings, index, [over(0, {}, 1.0)]) for index in range(200)]
    assert point(settings, 200, []) is None
    ranks = [found["lora_rank"] for found in drawn if found]
    assert {min(ranks), max(ranks)} <= set(range(2, 33))
    assert all(isinstance(rank, int) for rank in ranks)
    assert sum(rank <= 8 for rank in ranks) > 80  # half of the logarithm
    for settings_of in drawn:
        assert settings_of is not None
        settings.trial(0, settings_of, "runs")


def test_optuna_is_told_what_is_known() -> None:
    """A loss that falls with the ratio draws the suggestions up, the same ones however often it is asked."""
    settings = config(
        space={"rope_2d_ratio": {"low": 0, "high": 1}}, search="optuna", trials=99, metrics=[LOSS]
    )
    known = [over(number, {"rope_2d_ratio": number / 20}, 1 - number / 20) for number in range(20)]
    asked = [point(settings, index, known) for index in range(20, 40)]
    assert asked == [point(settings, index, known) for index in range(20, 40)]
    ratios = [found["rope_2d_ratio"] for found in asked if found]
    assert sum(ratios) / len(ratios) > 0.7


def test_optuna_makes_both_of_two_metrics_small_and_bears_failures() -> None:
    settings = config(space=SPACE, search="optuna", trials=99)
    known: list[Trial] = []
    for index in range(12):
        found = point(settings, index, known)
        assert found is not None
        known.append(
            over(
                index,
                found,
                found["rope_2d_ratio"],
                1 / found["lora_rank"],
                "failed" if index == 5 else "finished",
            )
        )
    assert len({repr(trial.point) for trial in known}) == 12


def test_the_winner_has_the_lowest_sum_over_its_seeds() -> None:
    trials = [
        over(0, {"a": 1}, 1.0, 0.5),
        over(1, {"a": 2}, 1.2, 0.1),
        over(2, {"a": 2}, 1.4, 0.1),
        over(3, {"a": 3}, 0.1, 0.0),
    ]
    trials[3].status = "stopped"
    found = winner(config(), trials)
    assert found is not None
    assert found.number == 1
    assert winner(config(), trials[3:]) is None


def test_a_journal_is_read_back_and_a_cut_line_never_was(tmp_path: Path) -> None:
    journal = Journal(RemotePath(tmp_path / "journal.jsonl"))
    journal.note(mlflow_key="k")
    journal.begin(0, {"lora_rank": 4, "seed": 0})
    journal.placed(0, "folder", "run")
    assert journal.report(0, 5, {"loss": 1.0, "seconds": 2.0})
    assert not journal.report(0, 5, {"loss": 9.0})
    with open(journal.file.local, "a") as file:
        file.write('{"trial": 0, "status": "fin')
    again = Journal.read(journal.file)
    assert again.trials == journal.trials
    assert again.notes == {"mlflow_key": "k"}
    again.end(0, "finished")
    again.end(0, "failed", "too late")
    assert Journal.read(journal.file).trials[0].status == "finished"
    assert [json.loads(line) for line in journal.file.local.read_text().splitlines()]


def test_what_was_begun_is_gone_on_with_before_anything_new(tmp_path: Path) -> None:
    settings, journal = config(seeds=[1, 2]), Journal(RemotePath(tmp_path / "journal.jsonl"))
    first = JournalSearcher(settings, journal)
    begun = [first.suggest("") for _ in range(3)]
    assert [each["settings"] for each in begun] == [  # type: ignore[index]
        {"lora_rank": 4, "seed": 1}, {"lora_rank": 4, "seed": 2}, {"lora_rank": 8, "seed": 1}
    ]  # fmt: skip
    journal.end(1, "finished")
    again = JournalSearcher(settings, Journal.read(journal.file))
    handed = [again.suggest("") for _ in range(4)]
    assert [each["number"] for each in handed[:3]] == [0, 2, 3]  # type: ignore[index]
    assert handed[3] == "FINISHED"


def test_what_failed_is_repeated_once_all_have_ended(tmp_path: Path) -> None:
    settings, journal = config(), Journal(RemotePath(tmp_path / "journal.jsonl"))
    first = JournalSearcher(settings, journal)
    assert not first.over()
    for number, status in enumerate(("failed", "finished")):
        first.suggest("")
        journal.end(number, status)  # type: ignore[arg-type]
        assert first.over() == (number == 1)
    again = JournalSearcher(settings, Journal.read(journal.file))
    assert not again.over()
    assert [again.suggest(""), again.suggest("")] == [
        {"number": 0, "settings": {"lora_rank": 4, "seed": 0}, "data": None}, "FINISHED"
    ]  # fmt: skip


class _Tuned:
    """A trial as Ray Tune shows it to a scheduler."""

    def __init__(self, number: int) -> None:
        self.config = {"number": number}


@pytest.mark.parametrize("ending", [False, True])
def test_a_trial_that_was_starting_at_a_stop_is_stopped_too(tmp_path: Path, ending: bool) -> None:
    journal = Journal(RemotePath(tmp_path / "journal.jsonl"))
    journal.begin(0, {})
    referee = JournalingScheduler(config(), journal, lambda: None)
    referee.ending = ending
    trial: Any = _Tuned(0)
    referee.on_trial_result(None, trial, {"folder": str(tmp_path / "trial"), "run_id": "run"})
    assert StopFile(RemotePath(tmp_path / "trial" / STOP)).is_requested() == ending


def test_all_trials_have_the_data_of_the_first(tmp_path: Path) -> None:
    journal = Journal(RemotePath(tmp_path / "journal.jsonl"))
    suggestions, referee, trial = (
        JournalSearcher(config(), journal),
        JournalingScheduler(config(), journal, lambda: None),
        _Tuned(0),
    )
    assert suggestions.suggest("")["data"] is None  # type: ignore[index, call-overload]
    for data in ("first", "other"):
        told = {"folder": "trial", "run_id": "run", "data": data}
        referee.on_trial_result(None, trial, told)  # type: ignore[arg-type]
    assert JournalSearcher(config(), Journal.read(journal.file)).suggest("")["data"] == "first"  # type: ignore[index, call-overload]


def _reports(count: int) -> list[tuple[int, int, float]]:
    """(trial, step, loss) in the order in which trials side by side tell them; the later a trial, the worse
    it is.
    """
    return [(number, step, 1 + number / count + 1 / step) for step in (10, 30, 90) for number in range(count)]


@pytest.mark.parametrize("stopping", ["asha", "median"])
@pytest.mark.parametrize("cut", [3, 9, 15, 20])
def test_who_is_stopped_does_not_depend_on_an_interruption(tmp_path: Path, stopping: str, cut: int) -> None:
    settings = config(
        stopping=stopping, grace_steps=10, metrics=[LOSS], space={"lora_rank": list(range(1, 9))}
    )

    def judged(referee: JournalingScheduler, journal: Journal, reports: list[tuple[int, int, float]]) -> None:
        for number, step, loss in reports:
            if not journal.trials[number].ended:
                decision = referee.on_trial_result(None, _Tuned(number), {"step": step, LOSS: loss})  # type: ignore[arg-type]
                assert (decision == TrialScheduler.STOP) == (journal.trials[number].status == "stopped")

    ends = []
    for name, parts in (("whole", [_reports(8)]), ("cut", [_reports(8)[:cut], _reports(8)[cut:]])):
        path = RemotePath(tmp_path / f"{name}.jsonl")
        begun = JournalSearcher(settings, Journal.read(path))
        for _ in range(8):
            begun.suggest("")
        for part in parts:
            journal = Journal.read(path)
            judged(JournalingScheduler(settings, journal, lambda: None), journal, part)
        ends.append({number: trial.status for number, trial in Journal.read(path).trials.items()})
    assert ends[0] == ends[1]
    assert "stopped" in ends[0].values()
    assert ends[0][0] != "stopped"
