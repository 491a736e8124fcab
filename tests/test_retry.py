"""When a failed job is tried again: decisions only."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microbatch.retry import RetryPolicy


def test_by_default_only_the_deadline_bounds_the_attempts() -> None:
    assert RetryPolicy().allows(10**9)


def test_max_attempts_counts_the_first_one() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert [policy.allows(attempts) for attempts in (1, 2, 3, 4)] == [True, True, False, False]
    assert not RetryPolicy(max_attempts=1).allows(1)


def test_the_delay_doubles_up_to_its_cap() -> None:
    policy = RetryPolicy(backoff=0.05, backoff_max=0.3)
    assert [policy.delay(n, lambda: 1.0) for n in (1, 2, 3, 4, 5)] == pytest.approx([0.05, 0.1, 0.2, 0.3, 0.3])


@settings(deadline=None)
@given(
    attempts=st.integers(1, 10**9),
    backoff=st.floats(0, 1e6),
    extra=st.floats(0, 1e6),
    drawn=st.floats(0, 1, exclude_max=True),
)
def test_the_delay_lies_between_zero_and_the_cap_however_many_attempts(
    attempts: int, backoff: float, extra: float, drawn: float
) -> None:
    policy = RetryPolicy(backoff=backoff, backoff_max=backoff + extra)
    assert 0 <= policy.delay(attempts, lambda: drawn) <= policy.backoff_max


def test_the_jitter_is_full_and_random() -> None:
    delays = {RetryPolicy(backoff=1.0).delay(1) for _ in range(50)}
    assert len(delays) == 50
    assert min(delays) < 0.5 < max(delays)


def test_the_jitter_leaves_the_random_numbers_of_the_program_alone() -> None:
    before = random.getstate()
    assert RetryPolicy().delay(1) > 0
    assert random.getstate() == before


def test_retry_on_takes_a_type_several_types_or_a_predicate() -> None:
    error = ConnectionResetError(104, "reset")
    assert not RetryPolicy().matches(error)
    assert RetryPolicy(retry_on=OSError).matches(error)
    assert not RetryPolicy(retry_on=ValueError).matches(error)
    assert RetryPolicy(retry_on=(ValueError, OSError)).matches(error)
    assert RetryPolicy(retry_on=lambda exc: exc.errno == 104).matches(error)  # type: ignore[attr-defined]
    assert not RetryPolicy(retry_on=lambda exc: False).matches(error)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_attempts": 0}, ValueError, "max_attempts must be at least 1, not 0; for no retries pass retry=None"),
        ({"max_attempts": 1.5}, TypeError, "max_attempts must be a whole number or None, not 1.5"),
        ({"max_attempts": True}, TypeError, "max_attempts must be a whole number or None, not True"),
        ({"backoff": "1"}, TypeError, "backoff must be a number of seconds, not '1'"),
        ({"backoff": True}, TypeError, "backoff must be a number of seconds, not True"),
        ({"backoff": -0.1}, ValueError, "backoff must be 0 or more finite seconds, not -0.1"),
        ({"backoff": float("nan")}, ValueError, "backoff must be 0 or more finite seconds, not nan"),
        ({"backoff_max": float("inf")}, ValueError, "backoff_max must be 0 or more finite seconds, not inf"),
        ({"backoff": 3.0}, ValueError, r"backoff_max=2.0 is below backoff=3.0; raise it"),
        ({"retry_on": "OSError"}, TypeError, "retry_on must be exception types or a predicate, not 'OSError'"),
        ({"retry_on": ()}, TypeError, "retry_on must be exception types or a predicate"),
        ({"retry_on": (OSError, 1)}, TypeError, "retry_on must be exception types or a predicate"),
    ],
)
def test_a_wrong_policy_is_refused_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RetryPolicy(**options)


def test_a_policy_is_frozen_and_compares_by_value() -> None:
    assert RetryPolicy(backoff=0.1) == RetryPolicy(backoff=0.1)
    with pytest.raises(AttributeError):
        RetryPolicy().backoff = 1.0  # type: ignore[misc]
