"""Whether the share of wrong answers has risen: ADWIN and Page-Hinkley, as river has them.

    changes.rises([True, True, False, …]).adwin      # (412,): the outcomes at which a rise was found

They say that something changed, where `sequential` says that accuracy is below a bound. Neither comes with a promise
over a stream of any length; what they found on streams that did not change is in docs/drift.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ADWIN_DELTA = 0.002
"""Of one comparison of two windows (Bifet and Gavaldà 2007); river's default."""
LOST, SUM = 0.005, 50.0
"""Page-Hinkley's (Page 1954): what each outcome may be worse than the mean so far, and the sum beyond that which is an
alarm; river's defaults."""


@dataclass(frozen=True)
class Rises:
    """After how many outcomes each detector found that wrong answers had become more frequent."""

    adwin: tuple[int, ...] = ()
    page_hinkley: tuple[int, ...] = ()

    @property
    def first(self) -> int | None:
        return min((*self.adwin, *self.page_hinkley), default=None)


def rises(outcomes: Iterable[bool]) -> Rises:
    """Of outcomes in the order of their answers, right or wrong."""
    from river import drift  # brings scikit-learn along: seconds, and who looks at labels alone needs none

    adwin = drift.ADWIN(delta=ADWIN_DELTA)  # type: ignore[no-untyped-call]
    page_hinkley = drift.PageHinkley(mode="up", delta=LOST, threshold=SUM)
    found: tuple[list[int], list[int]] = ([], [])
    for number, right in enumerate(outcomes, start=1):
        wrong = float(not right)
        before = adwin.estimation
        adwin.update(wrong)  # type: ignore[no-untyped-call]
        if adwin.drift_detected and adwin.estimation > before:  # what is left of its window is worse than it was
            found[0].append(number)
        page_hinkley.update(wrong)  # type: ignore[no-untyped-call]
        if page_hinkley.drift_detected:
            found[1].append(number)
    return Rises(tuple(found[0]), tuple(found[1]))
