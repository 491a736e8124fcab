"""Who is likely to be back at once. It decides only: no locks, no clock, no threads."""

from __future__ import annotations

# A job that waits for company costs its caller time; the measurements are in the tuning page.
_PATIENCE = 0.3  # of the time that the last batch took
_SHORTEST, _LONGEST = 0.0001, 0.05  # seconds; a shorter sleep is not worth its price
# How fast the share follows: up by so much with every batch that got its callers, down by this factor at most where
# they stayed away, and where it is nothing, this slowly towards another try.
_GROWTH, _DECAY, _PROBE = 0.02, 0.5, 0.002


class Returning:
    """The callers who were woken by the last batch and are likely to be back at once, each with another job.

    The first of them to come would make a batch of one, and the others would wait for all of it: so many callers would
    go on in two halves. So the next batch is held open for them, as long as it pays: for a part of the time that the
    last one took, and for the share of them that lately came back within it. Nobody waits for a caller who is alone,
    nor for those who did not wait for their jobs.
    """

    def __init__(self) -> None:
        self.jobs = 0  # the size that the next batch waits for
        self.until = 0.0
        self._share = 1.0
        self._waited_for = self._callers = 0

    def expect(self, callers: int, backlog: int, seconds: float, now: float, *, max_batch_size: int) -> None:
        """A batch that took *seconds* has woken *callers* who waited; *backlog* jobs are queued besides."""
        patience = min(_PATIENCE * seconds, _LONGEST)
        callers = min(callers, max_batch_size - backlog)
        if callers < 1 or callers + backlog < 2 or patience < _SHORTEST:
            return
        self._waited_for = round(self._share * callers)
        if not self._waited_for:
            self._share += _PROBE
            return
        self._callers = callers
        self.until = now + patience
        self.jobs = backlog + self._waited_for  # last: what `came` divides by is there

    def came(self, jobs: int, now: float) -> None:
        """The batch that waited closes, with *jobs* in it or left over."""
        expected, self.jobs = self.jobs, 0
        if not expected:
            return
        if jobs >= expected:
            self._share = min(1.0, self._share + _GROWTH)
        else:
            missing = expected - jobs
            back = max(0, self._waited_for - missing) / self._callers if now < self.until + _LONGEST else 0.0
            self._share = max(back, _DECAY * self._share)
