"""The estimate of the time left, where the results of several steps are read at once."""

import re
from types import SimpleNamespace
from unittest import mock

from parallelmind.training.checkpoint import TrainingState
from parallelmind.training.metrics_logger import MetricsLogger
from parallelmind.training.step import Totals


def test_the_time_left_follows_the_steps_that_were_read_at_once() -> None:
    """The first line counts from the start; later ones leave out its steps, which waited for the data."""
    lines, clock = list[str](), mock.Mock(return_value=0.0)
    hooks = SimpleNamespace(log=mock.Mock(), print_line=lines.append)
    state = TrainingState("hash", "run", loss_scale=1.0)
    with mock.patch("time.perf_counter", clock):
        logger = MetricsLogger(hooks)
        for step, now in ((5, 10.0), (10, 15.0), (15, 20.0)):
            clock.return_value, state.step = now, step
            for _ in range(5):
                logger.add(state, Totals(loss=1, targets=1, tokens=8, padded_tokens=8), rate=1e-3, norm=1.0)
            logger.log(state, planned_steps=25)
    assert [re.search(r"ETA (.*)", line).group(1) for line in lines] == ["0:40", "0:15", "0:10"]  # type: ignore[union-attr]
