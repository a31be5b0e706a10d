"""Write events to a sweep's journal until this process is killed: `python journaling.py FILE`.

Each event follows from the state that the journal has in memory. Its number is printed once it is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from parallelmind.remote import RemotePath
from workloads.sweep.journal import Journal


def next_metrics(journal: Journal) -> dict[str, float]:
    """Metrics that depend on all reports so far, with a line of a length that changes."""
    return {"sum": sum(report.step for report in journal.reports[-9:]), "x" * (len(journal.reports) % 999): 1}


def write_events(file: RemotePath) -> None:
    journal = Journal.open(file)
    if not journal.trials:
        journal.add_trial(0, {})
    while True:
        step = journal.trials[0].step + 1
        journal.add_report(0, step, next_metrics(journal))
        print(step, flush=True)


if __name__ == "__main__":
    write_events(RemotePath(Path(sys.argv[1])))
