"""One line of ``fcunet doctor``: what was found, and what to do when it is red."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the examination."""

    name: str
    ok: bool
    finding: str
    advice: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """The check, or its failure as a finding: a broken installation may fail in any way."""
    try:
        return check()
    except Exception as err:
        return Check(
            name, False, f"{type(err).__name__}: {err}", "see the message; then: fcunet --verbose doctor"
        )
