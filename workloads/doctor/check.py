"""A check of the doctor, and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from parallelmind.errors import UserError, first_line
from parallelmind.redaction import redact_uri
from workloads.doctor.config import DoctorConfig

Status = Literal["ok", "warn", "FAIL", "skip"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of one check. remedy: what the user can do about a problem."""

    status: Status
    message: str
    remedy: str = ""

    def line(self, name: str) -> str:
        """The result in one line, without passwords; line breaks in the message become spaces."""
        text = "; ".join(filter(None, (self.message, self.remedy)))
        return redact_uri(f"{self.status:4}  {name:10}  {' '.join(text.split())}")


@dataclass(frozen=True, slots=True)
class Check:
    """A named check. It is skipped if a check that it needs failed or was skipped.

    run: may raise UserError, which counts as a failure.
    """

    name: str
    run: Callable[[DoctorConfig], CheckResult]
    needs: tuple[str, ...] = ()


def run_checks(checks: Sequence[Check], config: DoctorConfig) -> Iterator[tuple[str, CheckResult]]:
    """Yield the name and result of each check, as soon as it has run."""
    statuses: dict[str, Status] = {}
    for check in checks:
        unmet = [need for need in check.needs if statuses[need] in ("FAIL", "skip")]
        result = CheckResult("skip", f"needs {' and '.join(unmet)}") if unmet else _run_check(check, config)
        statuses[check.name] = result.status
        yield check.name, result


def _run_check(check: Check, config: DoctorConfig) -> CheckResult:
    try:
        return check.run(config)
    except UserError as error:
        message, _, remedy = str(error).rpartition("; ")
        return CheckResult("FAIL", message, remedy)
    except Exception as error:  # the remaining checks still run
        message = f"{type(error).__name__}: {first_line(error)}"
        return CheckResult("FAIL", message, "unexpected error: please report it")


def count(number: float, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
