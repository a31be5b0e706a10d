"""Configuration, search, journal and scheduling of a sweep, without a running Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from parallelmind import cli
from parallelmind.config import resolve
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.sweep import command
from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.progress import ProgressView
from workloads.sweep.ranking import find_winner
from workloads.sweep.scheduler import JournalingScheduler
from workloads.sweep.search import choose_point, draw_point
from workloads.sweep.searcher import JournalSearcher
from workloads.sweep.space import check_space
from workloads.sweep.trial import Trial
from workloads.train.run_dir import stop_file

LOSS, TAX = "validation/loss_1", "validation/branch_tax_8"
RUN = {"data_path": "data.jsonl", "validation_path": "held_out.jsonl", "max_steps": 90}
SPACE = {
    "lora_rank": {"low": 2, "high": 32, "log": True},
    "rope_2d_ratio": {"low": 0.0, "high": 1.0},
    "pairs": ["low", "high"],
}


def sweep_config(**values: Any) -> SweepConfig:
    return resolve(SweepConfig, {"train": RUN, "space": {"lora_rank": [4, 8]}, **values})


def ended_trial(
    number: int, settings: dict[str, Any], loss: float, tax: float = 0.0, status: str = "finished"
) -> Trial:
    metrics = {LOSS: loss, TAX: tax}
    return Trial(number, {**settings, "seed": 0}, status, metrics=metrics)  # type: ignore[arg-type]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty journal."""
    return Journal(RemotePath(tmp_path / "journal.jsonl"))


def test_trials_are_tracked_as_the_sweep_says_and_not_uploaded() -> None:
    """The winner alone is uploaded, by the sweep."""
    config = sweep_config(train={**RUN, "track": "wandb", "push_to": "me/mine"})
    trial = config.trial_config(0, {"lora_rank": 4}, "trials")
    assert trial.services.track == "wandb"
    assert trial.hub.push_to is None
    assert config.train.hub.push_to == "me/mine"
    plain = sweep_config()
    assert command.sweep_dir_of(config) == command.sweep_dir_of(plain)


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
        ({"space": {"lora_rank": []}}, r"space.lora_rank=\[\]: has no values; give at least one"),
        ({"space": SPACE}, "space.lora_rank: a range needs search=random or search=optuna"),
        ({"space": {"lora_rank": {"low": 8, "high": 2}}, "search": "random", "trials": 1}, "low < high"),
        (
            {"points": [{"lora_rank": 32}], "space": {"lora_rank": [4]}},
            "space.lora_rank: points have values of",
        ),
        ({"search": "optuna"}, "search=optuna: draws points from a space; give trials=NUMBER and space="),
        ({"trials": 4}, "trials=4: needs search=random or search=optuna"),
        (
            {"metrics": ["validation/loss_3"]},
            "metrics=validation/loss_3: is not reported by these trials; choose from loss, valid",
        ),
        (
            {"train": {**RUN, "patch_rope": False, "branches_per_sample": 1, "max_branches_per_sample": 1}},
            "metrics=validation/branch_tax_8: is not reported by these trials; choose from loss, "
            "validation/loss_1$",
        ),
        (
            {"points": [{"patch_rope": False}, {}]},
            "metrics=validation/branch_tax_8: is not reported by these trials; choose from loss, "
            "validation/loss_1$",
        ),
        ({"seeds": [0, -1]}, "seeds"),
        ({"register_as": "org/model"}, "register_as=org/model"),
        ({"alias": "no name"}, "alias=no name"),
        ({"alias": "Latest"}, "alias=Latest: is reserved by MLflow"),
        ({"alias": "v2"}, "alias=v2: is reserved by MLflow"),
        (
            {"train": {"data_path": "d"}},
            "metrics=validation/loss_1: is not reported by these trials; choose from loss$",
        ),
    ],
)
def test_invalid_configurations_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sweep_config(**values)
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
def test_every_value_of_the_space_is_checked_as_a_training_setting(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_space(sweep_config(**values))


def test_bad_input_exits_with_2_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["sweep", "train.data_path=nowhere.jsonl", "space.lora_rank=[2]", "metrics=[loss]"]
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.run(command.main)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: data_path=nowhere.jsonl: ")


def test_a_grid_combines_its_lists_with_each_point() -> None:
    config = sweep_config(
        space={"lora_rank": [4, 8], "pairs": ["low", "mid"]}, points=[{}, {"positions": "flat"}]
    )
    points = list(config.search_space.grid())
    assert len(points) == 8
    assert {"positions": "flat", "lora_rank": 8, "pairs": "mid"} in points


def test_random_points_depend_on_seed_and_index_alone_and_lie_in_the_space() -> None:
    config = sweep_config(space=SPACE, search="random", trials=200)
    points = [choose_point(config, index, []) for index in range(200)]
    assert points == [choose_point(config, index, [ended_trial(0, {}, 1.0)]) for index in range(200)]
    assert choose_point(config, 200, []) is None
    ranks = [point["lora_rank"] for point in points if point]
    assert {min(ranks), max(ranks)} <= set(range(2, 33))
    assert all(isinstance(rank, int) for rank in ranks)
    assert sum(rank <= 8 for rank in ranks) > 80  # half of the logarithmic range
    for point in points:
        assert point is not None
        config.trial_config(0, point, "runs")


def test_optuna_follows_a_falling_loss_and_is_deterministic() -> None:
    config = sweep_config(
        space={"rope_2d_ratio": {"low": 0, "high": 1}}, search="optuna", trials=99, metrics=[LOSS]
    )
    trials = [ended_trial(number, {"rope_2d_ratio": number / 20}, 1 - number / 20) for number in range(20)]
    points = [choose_point(config, index, trials) for index in range(20, 40)]
    assert points == [choose_point(config, index, trials) for index in range(20, 40)]
    ratios = [point["rope_2d_ratio"] for point in points if point]
    assert sum(ratios) / len(ratios) > 0.7


def test_optuna_bears_failed_trials_and_suggests_no_point_twice() -> None:
    config = sweep_config(space=SPACE, search="optuna", trials=99)
    trials: list[Trial] = []
    for index in range(12):
        point = choose_point(config, index, trials)
        assert point is not None
        status = "failed" if index == 5 else "finished"
        trials.append(ended_trial(index, point, point["rope_2d_ratio"], 1 / point["lora_rank"], status))
    assert len({repr(trial.point) for trial in trials}) == 12


def test_a_point_outside_the_space_is_tried_and_does_not_disturb_optuna() -> None:
    space, learned = {"sibling_penalty": {"low": 0.0, "high": 3.0}}, {"sibling_penalty": "learned"}
    config = sweep_config(space=space, search="optuna", trials=9, points=[learned])
    assert choose_point(config, 0, []) == learned
    point = choose_point(config, 1, [ended_trial(0, learned, 1.0)])
    assert point is not None
    assert 0 <= point["sibling_penalty"] <= 3


def test_a_range_of_whole_numbers_that_holds_none_is_refused() -> None:
    space = {"lora_rank": {"low": 8.2, "high": 8.9}}
    with pytest.raises(UserError, match=r"space.lora_rank: holds no whole number from 8.2 to 8.9; widen"):
        check_space(sweep_config(space=space, search="random", trials=9))


PLANE = {"rope_2d_ratio": {"low": 0.0, "high": 1.0}, "lora_dropout": {"low": 0.0, "high": 0.9}}
OPTIMUM = {"rope_2d_ratio": 0.8, "lora_dropout": 0.2}


def plane_trial(number: int, point: dict[str, Any], optimum: dict[str, float]) -> Trial:
    """A trial with two objectives; each depends on one field only and is zero at the optimum."""
    loss, tax = (abs(point[name] - optimum[name]) for name in PLANE)
    return ended_trial(number, point, loss, tax)


def mean_distances(points: list[dict[str, Any]], optimum: dict[str, float]) -> dict[str, float]:
    """Mean distance of the points from the optimum, by field."""
    return {name: sum(abs(point[name] - optimum[name]) for point in points) / len(points) for name in PLANE}


@pytest.mark.parametrize("search_seed", [0, 7])
def test_optuna_minimizes_both_of_two_metrics_and_random_search_neither(search_seed: int) -> None:
    """A search of 80 points on a known objective: the later half lies near the optimum in both fields."""
    options = {"space": PLANE, "trials": 80, "search_seed": search_seed, "metrics": [LOSS, TAX]}
    config = sweep_config(search="optuna", **options)
    trials: list[Trial] = []
    for index in range(80):
        point = choose_point(config, index, trials)
        assert point is not None
        trials.append(plane_trial(index, point, OPTIMUM))
    suggested = mean_distances([trial.point for trial in trials[40:]], OPTIMUM)
    drawn = mean_distances([draw_point(config, index) for index in range(40, 80)], OPTIMUM)
    for name in PLANE:
        assert suggested[name] < 0.2
        assert suggested[name] < 0.6 * drawn[name]


def test_what_optuna_suggests_depends_on_the_results_of_both_metrics() -> None:
    """The same points with mirrored results of one metric: suggestions move in the field of that metric."""
    config = sweep_config(space=PLANE, search="optuna", trials=99, metrics=[LOSS, TAX])
    points = [{"rope_2d_ratio": x / 5, "lora_dropout": 0.9 * y / 5} for x in range(6) for y in range(6)]

    def mean_suggestion(optimum: dict[str, float]) -> dict[str, float]:
        trials = [plane_trial(number, point, optimum) for number, point in enumerate(points)]
        suggestions = [choose_point(config, index, trials) or {} for index in range(36, 56)]
        return {name: sum(point[name] for point in suggestions) / len(suggestions) for name in PLANE}

    mean = mean_suggestion(OPTIMUM)
    other_loss = mean_suggestion({**OPTIMUM, "rope_2d_ratio": 0.2})
    other_tax = mean_suggestion({**OPTIMUM, "lora_dropout": 0.72})
    assert mean["rope_2d_ratio"] > other_loss["rope_2d_ratio"] + 0.4
    assert mean["lora_dropout"] < other_tax["lora_dropout"] - 0.4


def test_the_winner_has_the_lowest_sum_over_its_seeds() -> None:
    trials = [
        ended_trial(0, {"a": 1}, 1.0, 0.5),
        ended_trial(1, {"a": 2}, 1.2, 0.1),
        ended_trial(2, {"a": 2}, 1.4, 0.1),
        ended_trial(3, {"a": 3}, 0.1, 0.0),
    ]
    trials[3].status = "stopped"
    winner = find_winner(sweep_config(), trials)
    assert winner is not None
    assert winner.number == 1
    assert find_winner(sweep_config(), trials[3:]) is None


def test_a_journal_is_replayed_without_its_cut_line(journal: Journal) -> None:
    journal.add_notes(mlflow_key="k")
    journal.add_trial(0, {"lora_rank": 4, "seed": 0})
    journal.set_location(0, "folder", "run")
    assert journal.add_report(0, 5, {"loss": 1.0, "seconds": 2.0})
    assert not journal.add_report(0, 5, {"loss": 9.0})
    with open(journal.file.local, "a") as file:
        file.write('{"trial": 0, "status": "fin')
    replayed = Journal.open(journal.file)
    assert replayed.trials == journal.trials
    assert replayed.notes == {"mlflow_key": "k"}
    replayed.end_trial(0, "finished")
    replayed.end_trial(0, "failed", "too late")
    assert Journal.open(journal.file).trials[0].status == "finished"
    assert [json.loads(line) for line in journal.file.local.read_text().splitlines()]


def test_the_journal_has_the_keys_of_earlier_versions(journal: Journal) -> None:
    journal.add_notes(mlflow_key="k")
    journal.add_trial(0, {"lora_rank": 4, "seed": 0})
    journal.set_location(0, "folder", "run")
    journal.add_report(0, 5, {"loss": 1.0})
    journal.end_trial(0, "failed", "why")
    assert [json.loads(line) for line in journal.file.local.read_text().splitlines()] == [
        {"notes": {"mlflow_key": "k"}},
        {"trial": 0, "settings": {"lora_rank": 4, "seed": 0}},
        {"trial": 0, "folder": "folder", "run_id": "run"},
        {"trial": 0, "step": 5, "metrics": {"loss": 1.0}},
        {"trial": 0, "status": "failed", "error": "why"},
    ]


def test_started_trials_are_handed_out_before_new_ones(journal: Journal) -> None:
    config = sweep_config(seeds=[1, 2])
    searcher = JournalSearcher(config, journal)
    started = [searcher.suggest("") for _ in range(3)]
    assert [trial["settings"] for trial in started] == [  # type: ignore[index]
        {"lora_rank": 4, "seed": 1}, {"lora_rank": 4, "seed": 2}, {"lora_rank": 8, "seed": 1}
    ]  # fmt: skip
    journal.end_trial(1, "finished")
    resumed = JournalSearcher(config, Journal.open(journal.file))
    suggested = [resumed.suggest("") for _ in range(4)]
    assert [trial["number"] for trial in suggested[:3]] == [0, 2, 3]  # type: ignore[index]
    assert suggested[3] == "FINISHED"


def test_failed_trials_are_repeated_once_all_have_ended(journal: Journal) -> None:
    searcher = JournalSearcher(sweep_config(), journal)
    assert not searcher.is_exhausted()
    for number, status in enumerate(("failed", "finished")):
        searcher.suggest("")
        journal.end_trial(number, status)  # type: ignore[arg-type]
        assert searcher.is_exhausted() == (number == 1)
    resumed = JournalSearcher(sweep_config(), Journal.open(journal.file))
    assert not resumed.is_exhausted()
    assert [resumed.suggest(""), resumed.suggest("")] == [
        {"number": 0, "settings": {"lora_rank": 4, "seed": 0}, "data": None}, "FINISHED"
    ]  # fmt: skip


class FakeTuneTrial:
    """A trial as Ray Tune passes it to a scheduler."""

    def __init__(self, number: int) -> None:
        self.config = {"number": number}


@pytest.mark.parametrize("stopping", [False, True])
def test_a_trial_that_was_starting_at_a_stop_is_stopped_too(
    journal: Journal, tmp_path: Path, stopping: bool
) -> None:
    journal.add_trial(0, {})
    scheduler = JournalingScheduler(sweep_config(), journal, lambda number: None)
    scheduler.stopping = stopping
    trial: Any = FakeTuneTrial(0)
    scheduler.on_trial_result(None, trial, {"folder": str(tmp_path / "trial"), "run_id": "run"})
    assert stop_file(RemotePath(tmp_path / "trial")).is_requested() == stopping


def test_a_trial_that_restarts_says_so_once(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    journal.add_trial(0, {"seed": 3})
    view = ProgressView("sweep", ["loss"], journal, planned=1)
    scheduler = JournalingScheduler(sweep_config(), journal, view.update)
    reports: list[dict[str, Any]] = [
        {"folder": "trial", "run_id": "run"},
        {"step": 2, "loss": 1.5},
        {"restart": "lost a worker; restarting from the newest checkpoint (memory)"},
        {"step": 4, "loss": 1.25},
    ]
    for report in reports:
        scheduler.on_trial_result(None, FakeTuneTrial(0), report)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [
        "trial 0  seed=3  running",
        "trial 0  seed=3  running  step 2  loss 1.500",
        "trial 0  seed=3  lost a worker; restarting from the newest checkpoint (memory)",
        "trial 0  seed=3  running  step 4  loss 1.250",
    ]
    replayed = Journal.open(journal.file)
    assert replayed.trials == journal.trials
    ProgressView("sweep", ["loss"], replayed, planned=1).update(0)
    assert capsys.readouterr().out == ""


def test_all_trials_have_the_data_of_the_first(journal: Journal) -> None:
    searcher = JournalSearcher(sweep_config(), journal)
    scheduler = JournalingScheduler(sweep_config(), journal, lambda number: None)
    assert searcher.suggest("")["data"] is None  # type: ignore[index, call-overload]
    for data in ("first", "other"):
        result = {"folder": "trial", "run_id": "run", "data": data}
        scheduler.on_trial_result(None, FakeTuneTrial(0), result)  # type: ignore[arg-type]
    resumed = JournalSearcher(sweep_config(), Journal.open(journal.file))
    assert resumed.suggest("")["data"] == "first"  # type: ignore[index, call-overload]


def test_trials_with_other_files_have_data_of_their_own(journal: Journal) -> None:
    config = sweep_config(space={"data_path": ["one.jsonl", "other.jsonl"]}, seeds=[0, 1])
    searcher = JournalSearcher(config, journal)
    scheduler = JournalingScheduler(config, journal, lambda number: None)
    expected = []
    for number in range(4):
        expected.append(searcher.suggest("")["data"])  # type: ignore[index, call-overload]
        result = {"folder": "trial", "run_id": "run", "data": f"fingerprint {number // 2}"}
        scheduler.on_trial_result(None, FakeTuneTrial(number), result)  # type: ignore[arg-type]
    assert expected == [None, "fingerprint 0", None, "fingerprint 1"]


Reports = list[tuple[int, int, float]]  # (trial, step, loss)


def interleaved_reports(count: int) -> Reports:
    """Reports of concurrent trials in the order of arrival; a trial is worse the higher its number."""
    return [(number, step, 1 + number / count + 1 / step) for step in (10, 30, 90) for number in range(count)]


def feed(scheduler: JournalingScheduler, journal: Journal, reports: Reports) -> None:
    """Pass reports of running trials to the scheduler; its decisions must match the journal."""
    for number, step, loss in reports:
        if not journal.trials[number].ended:
            result = {"step": step, LOSS: loss}
            decision = scheduler.on_trial_result(None, FakeTuneTrial(number), result)  # type: ignore[arg-type]
            assert (decision == TrialScheduler.STOP) == (journal.trials[number].status == "stopped")


def final_statuses(
    file: Path, config: SweepConfig, trials: int, parts: Sequence[list[Any]], feed_part: Callable[..., None]
) -> list[str]:
    """The statuses of all trials after reports in parts, between which the sweep is interrupted."""
    path = RemotePath(file)
    searcher = JournalSearcher(config, Journal.open(path))
    for _ in range(trials):
        searcher.suggest("")
    for part in parts:
        journal = Journal.open(path)
        feed_part(JournalingScheduler(config, journal, lambda number: None), journal, part)
    return [trial.status for trial in Journal.open(path).trials.values()]


@pytest.mark.parametrize("stopping", ["asha", "median"])
@pytest.mark.parametrize("cut", [3, 9, 15, 20])
def test_early_stopping_does_not_depend_on_an_interruption(tmp_path: Path, stopping: str, cut: int) -> None:
    config = sweep_config(
        stopping=stopping, grace_steps=10, metrics=[LOSS], space={"lora_rank": list(range(1, 9))}
    )
    reports = interleaved_reports(8)
    whole = final_statuses(tmp_path / "whole.jsonl", config, 8, [reports], feed)
    assert final_statuses(tmp_path / "cut.jsonl", config, 8, [reports[:cut], reports[cut:]], feed) == whole
    assert "stopped" in whole
    assert whole[0] != "stopped"


def last_results(step: int) -> list[tuple[int, dict[str, Any]]]:
    """Four good trials that finish with a report of a new step, then reports of two others at that step."""
    good = [(number, {"status": "finished", "step": step, "metrics": {LOSS: 0.1}}) for number in range(4)]
    return [*good, (4, {"step": step, LOSS: 0.2}), (5, {"status": "interrupted", "step": step, LOSS: 9.0})]


@pytest.mark.parametrize("stopping", ["asha", "median"])
@pytest.mark.parametrize("cut", range(7))
def test_the_last_report_of_a_run_counts_before_and_after_an_interruption(
    tmp_path: Path, stopping: str, cut: int
) -> None:
    config = sweep_config(
        stopping=stopping, grace_steps=10, metrics=[LOSS], space={"lora_rank": [*range(1, 9)]}
    )

    def feed_results(scheduler: JournalingScheduler, _: Journal, results: list[Any]) -> None:
        for number, result in results:
            scheduler.on_trial_result(None, FakeTuneTrial(number), dict(result))  # type: ignore[arg-type]

    results = last_results(40)
    whole = final_statuses(tmp_path / "whole.jsonl", config, 6, [results], feed_results)
    parts = [results[:cut], results[cut:]]
    assert final_statuses(tmp_path / "cut.jsonl", config, 6, parts, feed_results) == whole
    assert whole[:4] == ["finished"] * 4
    assert whole[4:] == ["stopped"] * 2


def test_the_validation_at_the_end_counts_where_the_last_checkpoint_was_reported_before(
    journal: Journal,
) -> None:
    journal.add_trial(0, {})
    scheduler = JournalingScheduler(sweep_config(), journal, lambda number: None)
    validated = {"loss": 1.0, LOSS: 2.0}
    results: list[dict[str, Any]] = [
        {"step": 5, "loss": 1.5},
        {"step": 9, "loss": 1.0},  # a checkpoint
        {"step": 9, **validated},
        {"status": "finished", "step": 9, "metrics": validated | {"learning_rate": 0.1}},
    ]
    for result in results:
        scheduler.on_trial_result(None, FakeTuneTrial(0), result)  # type: ignore[arg-type]
    assert journal.trials[0].status == "finished"
    assert journal.trials[0].curve == [(5, {"loss": 1.5}), (9, validated)]
    assert [report.step for report in journal.reports] == [5, 9]
    replayed = Journal.open(journal.file)
    assert (replayed.trials, replayed.reports) == (journal.trials, journal.reports)


def test_a_run_ends_in_the_event_of_its_last_report(journal: Journal) -> None:
    journal.add_trial(0, {})
    scheduler = JournalingScheduler(sweep_config(), journal, lambda number: None)
    result = {"status": "finished", "step": 7, "metrics": {LOSS: 1.0}}
    for _ in range(2):
        scheduler.on_trial_result(None, FakeTuneTrial(0), result)  # type: ignore[arg-type]
    events = [json.loads(line) for line in journal.file.local.read_text().splitlines()]
    assert events[1:] == [
        {"trial": 0, "step": 7, "metrics": {LOSS: 1.0}, "status": "finished", "error": None}
    ]
