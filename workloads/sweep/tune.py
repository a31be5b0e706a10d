"""Running the trials of a sweep with Ray Tune, which places them on the cluster."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import workloads.sweep.tune_env  # noqa: F401  (before Ray)

# isort: split
from ray import tune
from ray.tune import TuneError

from workloads.common import resources
from workloads.sweep.journal import Journal
from workloads.sweep.scheduler import MAX_RESTARTS, JournalingScheduler
from workloads.sweep.searcher import JournalSearcher
from workloads.sweep.trainable import SweepContext, run_trial

_TUNE_DIR = ".tune"  # Ray Tune's folder in the sweep's folder


def run_trials(
    context: SweepContext,
    journal: Journal,
    on_change: Callable[[int], None],
    set_stop_hook: Callable[[Callable[[], None]], None],
) -> None:
    """Run every trial to its end.

    on_change: called with the number of a trial after each of its events. set_stop_hook: receives a function
    that starts no more trials and stops those that are still starting. Raises the journal's error if an event
    could not be written.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # The scheduler comes first: it may find that a started trial is to stop, and the searcher skips it then.
    scheduler = JournalingScheduler(context.config, journal, on_change)
    searcher = JournalSearcher(context.config, journal)

    def stop() -> None:
        searcher.stopping = scheduler.stopping = True

    set_stop_hook(stop)
    if searcher.is_exhausted():  # Ray Tune fails without any trial
        return
    # Ray Tune's state of an earlier start is deleted, not restored: the journal holds everything.
    tune_dir = context.sweep_dir.child(_TUNE_DIR)
    tune_dir.delete()
    try:
        _tuner(context, searcher, scheduler).fit()
    except TuneError:  # Ray Tune replaces an error of the scheduler by one that holds its traceback as text
        if journal.error is None:
            raise
    if journal.error is not None:
        raise journal.error
    tune_dir.delete()


def _tuner(context: SweepContext, searcher: JournalSearcher, scheduler: JournalingScheduler) -> tune.Tuner:
    storage_path, filesystem = context.sweep_dir.pyarrow_filesystem()
    return tune.Tuner(
        tune.with_resources(
            functools.partial(run_trial, context=context), {"CPU": resources.TRIAL_DRIVER_CPUS}
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=context.max_concurrent,
            reuse_actors=True,  # starting a process and importing libraries takes seconds of both cores
        ),
        run_config=tune.RunConfig(
            name=_TUNE_DIR,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_RESTARTS),
            log_to_file=True,
        ),
    )
