"""A sweep's report: it lists every trial, plots those that may be compared, and escapes all text."""

from __future__ import annotations

import csv
import math
import re

import pyarrow.parquet as pq
import pytest

from workloads.sweep.plots.cost_vs_quality import cost_vs_quality
from workloads.sweep.plots.heat_map import heat_map
from workloads.sweep.plots.loss_vs_branches import loss_vs_branches
from workloads.sweep.plots.parallel_coordinates import parallel_coordinates
from workloads.sweep.report import write_report
from workloads.sweep.trial import Trial

OBJECTIVE = "validation/loss_8"
PNGS = ["cost_vs_quality.png", "heat_map.png", "loss_vs_branches.png", "parallel_coordinates.png"]
HOSTILE = "<script>alert('$1')</script>"


def trial(number: int, loss: float | None = None, status="finished", **settings) -> Trial:
    """A trial; with a loss, it has that loss at 8 branches and one less at 1 branch."""
    metrics = {} if loss is None else {"validation/loss_1": loss - 1, OBJECTIVE: loss}
    error = "CUDA <b>lost</b>\nsecond line" if status == "failed" else None
    return Trial(
        number, {**settings, "seed": 0}, status, step=10, metrics=metrics, seconds=10.0 + number, error=error
    )


@pytest.fixture
def grid() -> list[Trial]:
    """Ratio x rank with two trials each; one cell has no finished trial."""
    points = [{"rope_2d_ratio": ratio, "lora_rank": rank} for ratio in (0.5, 1.0) for rank in (8, 16)]
    trials = [trial(index, 3.0 + index / 10, **point) for index, point in enumerate(points * 2)]
    trials[3].status = trials[7].status = "stopped"
    return [
        *trials,
        trial(8, None, "failed", rope_2d_ratio=0.5, lora_rank=8),
        trial(9, math.nan, rope_2d_ratio=1.0, lora_rank=8),
    ]


def report(folder, trials, winner=None) -> str:
    return write_report(
        folder, "a <sweep>", trials, [OBJECTIVE], winner, lambda trial: f"train {trial.describe()}"
    ).read_text("utf-8")


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_report_is_complete_and_leaves_no_partial_file(tmp_path, grid):
    page = report(tmp_path, grid, winner=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*PNGS, "report.html", "trials.csv", "trials.parquet"]
    )
    assert page.count("data:image/png;base64,") == 4
    assert "10 trials: 7 finished, 2 stopped early, 1 failed." in page
    assert re.findall(r'<tr class="winner"><td>(\d+)', page) == ["0"]
    assert "Branch tax is" in page
    scores_first = ["trial", "status", OBJECTIVE, "rope_2d_ratio", "lora_rank", "seed", "step", "seconds"]
    assert re.findall(r'<th scope="col">(.*)</th>', page) == scores_first
    assert all(f"<pre><code>train {trial.describe()}</code></pre>" in page for trial in grid)


def test_a_small_branch_tax_looks_small():
    flat = Trial(1, {}, "finished", metrics={"validation/loss_1": 2.0, "validation/loss_8": 2.007})
    low, high = loss_vs_branches([flat]).axes[0].get_ylim()
    assert high - low == pytest.approx(0.1)
    assert low < 2.0 < 2.007 < high


def test_the_page_is_self_contained(tmp_path, grid):
    page = report(tmp_path, grid)
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)
    assert set(re.findall(r'(?:src|href)="([^",]*)', page)) == {
        "data:image/png;base64",
        "trials.csv",
        "trials.parquet",
    }


def test_hostile_text_is_escaped(tmp_path):
    trials = [
        trial(index, 2.0 + index, pairs=pairs)
        for index, pairs in enumerate([HOSTILE, "$a", "\udcff", "mid" * 99])
    ]
    page = report(tmp_path, [*trials, trial(4, None, "failed", pairs="low")])
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;$1&#39;)" in page
    assert "CUDA &lt;b&gt;lost&lt;/b&gt;\nsecond line" in page
    assert "<h1>a &lt;sweep&gt;</h1>" in page


def test_rows_are_sorted_by_the_objective_and_trials_without_it_come_last(tmp_path):
    page = report(
        tmp_path,
        [trial(0, 3.0, x=1), trial(1, None, "failed", x=2), trial(2, math.nan, x=3), trial(3, 2.0, x=4)],
    )
    assert re.findall(r"<tr class=\"\w+\"><td>(\d)", page) == ["3", "0", "1", "2"]


def test_the_table_keeps_types_and_distinguishes_missing_from_nan(tmp_path):
    trials = [
        trial(0, 2.0, learning_rate=0.5, rank=4, lists=[8]),
        trial(1, math.nan, learning_rate=1, rank=None),
        trial(2),
    ]
    trials[0].metrics["learning_rate"] = 1e-6
    trials[1].settings["seed"] = 2**70
    report(tmp_path, trials)
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["learning_rate"] for row in rows] == [0.5, 1.0, None]
    assert [row["metrics/learning_rate"] for row in rows] == [1e-6, None, None]
    assert [row["rank"] for row in rows] == [4, None, None]
    assert [row["lists"] for row in rows] == ["[8]", None, None]
    assert [row["seed"] for row in rows] == ["0", str(2**70), "0"]
    assert [row[OBJECTIVE] for row in rows] == [2.0, pytest.approx(math.nan, nan_ok=True), None]
    assert (rows[0]["status"], rows[0]["step"], rows[0]["command"]) == (
        "finished",
        10,
        f"train {trials[0].describe()}",
    )
    lines = list(csv.DictReader((tmp_path / "trials.csv").read_text(encoding="utf-8").splitlines()))
    assert list(lines[0]) == list(rows[0])
    assert [line[OBJECTIVE] for line in lines] == ["2.0", "nan", ""]


@pytest.mark.parametrize(
    "trials", [[], [trial(0, None, "failed", x=1), trial(1, 2.0, "stopped", x=2), trial(2, None, x=3)]]
)
def test_without_a_finished_trial_there_are_no_plots_and_old_files_are_removed(tmp_path, trials):
    (tmp_path / "heat_map.png").write_bytes(b"old")
    page = report(tmp_path, trials)
    assert not list(tmp_path.glob("*.png"))
    assert "There is no winner." in page


def test_one_trial_has_only_the_plot_of_its_branches(tmp_path):
    report(tmp_path, [trial(0, 2.0, x=1)], winner=0)
    assert [path.name for path in tmp_path.glob("*.png")] == ["loss_vs_branches.png"]


def test_loss_lines_average_the_seeds_of_a_point(grid):
    grid[9].metrics["validation/loss_1"] = (
        9.0  # has no loss at 8 branches, so it must not count in the mean at 1
    )
    lines = loss_vs_branches(grid).axes[0].lines
    points = (
        "rope_2d_ratio=0.5, lora_rank=8",
        "rope_2d_ratio=0.5, lora_rank=16",
        "rope_2d_ratio=1, lora_rank=8",
    )
    assert [line.get_label() for line in lines] == [f"{point}, n = 2" for point in points]
    assert lines[0].get_ydata() == pytest.approx([2.2, 3.2])
    assert lines[2].get_ydata() == pytest.approx([2.4, 3.4])


def test_loss_lines_stand_for_ratios_when_there_are_too_many_points():
    trials = [trial(n, 3.0 + n % 7, rope_2d_ratio=n // 7, lora_rank=n % 7) for n in range(14)]
    lines = loss_vs_branches(trials).axes[0].lines
    assert [line.get_label() for line in lines] == ["rope_2d_ratio=0, n = 7", "rope_2d_ratio=1, n = 7"]
    assert lines[0].get_ydata() == pytest.approx([5.0, 6.0])


def test_many_lines_are_colored_by_tax_without_a_legend():
    few, many = ([trial(n, 2.0 + n, path=f"{n}{'/long' * 9}") for n in range(count)] for count in (12, 13))
    assert (
        len(loss_vs_branches(few).legends[0].get_texts()) == 12
    )  # even though their shortened names are equal
    crowded = loss_vs_branches(many)
    assert not crowded.legends
    assert "branch tax" in crowded.axes[1].get_ylabel()


def test_the_heat_map_shows_means_of_finished_trials(grid):
    figure = heat_map(grid, OBJECTIVE)
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("rope_2d_ratio", "lora_rank")
    assert texts(figure) == ["3.200", "3.300", "3.400"]


def test_the_heat_map_needs_two_fields_with_few_values():
    trials = [
        trial(n, 2.0 + n, learning_rate=n / 1e4, pairs="low" if n % 2 else "mid", rank=n % 3)
        for n in range(20)
    ]
    axes = heat_map(trials, OBJECTIVE).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rank", "pairs")
    assert heat_map([trial(n, 2.0, rank=n % 3) for n in range(6)], OBJECTIVE) is None


def test_parallel_coordinates_dash_unfinished_trials_and_use_log_axes(grid):
    axes = parallel_coordinates(grid, OBJECTIVE).axes[0]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [len(line.get_xdata()) for line in dashed] == [3, 3, 2]  # the failed trial has no objective
    assert len(axes.lines) == 3 + 6 + 3  # dashed lines, finished trials, axes
    spread = [trial(n, 2.0, learning_rate=rate) for n, rate in enumerate([1e-5, 1e-4, 1e-3])]
    lines = parallel_coordinates(spread, OBJECTIVE).axes[0].lines
    assert [line.get_ydata()[0] for line in lines[:3]] == pytest.approx(
        [0, 0.5, 1]
    )  # evenly spaced in the logarithm


def test_the_pareto_front_joins_undominated_trials():
    trials = [trial(n, loss, x=n) for n, loss in enumerate([3.0, 3.5, 2.0, 2.5, math.nan])]
    figure = cost_vs_quality([*trials, trial(5, 1.0, "stopped", x=5)], OBJECTIVE)
    assert list(figure.axes[0].lines[0].get_xdata()) == [
        10.0,
        12.0,
        13.0,
    ]  # the last step extends to the longest training time
    assert texts(figure) == ["5", "0", "1", "2", "3"]
