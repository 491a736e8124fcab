"""What the tests of the service send and expect."""

from __future__ import annotations

from typing import Any

import psycopg

ADMIN = "the-admin-token-of-the-tests"
AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}
JOB = {"user_id": 1, "amount": 100.00, "status": "pending"}
ACCEPTED = "Job accepted and will be processed in the next batch."


def rows_of(database: str, user_id: int) -> list[int]:
    """The ids of a user's payments."""
    with psycopg.connect(database) as connection:
        found = connection.execute(
            "SELECT id FROM payment_transactions WHERE user_id = %s ORDER BY id", [user_id]
        ).fetchall()
    return [row[0] for row in found]


def assert_problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    """That *response* is problem details of this kind; returns them."""
    assert (response.status_code, response.mimetype) == (status, "application/problem+json"), response.text
    problem: dict[str, Any] = response.get_json()
    assert problem["type"] == f"urn:microbatch:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem
