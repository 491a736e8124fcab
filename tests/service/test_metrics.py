"""`/metrics` of the service."""

from __future__ import annotations

from collections.abc import Callable

from exposition import Samples, samples
from flask import Flask
from flask.testing import FlaskClient

from service.answers import AS_ADMIN, JOB, assert_problem


def numbers(client: FlaskClient) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain")
    return samples(response.text)


def test_each_application_tells_of_its_own_jobs(make_app: Callable[..., Flask]) -> None:
    client, other = make_app().test_client(), make_app().test_client()
    assert client.post("/submit-job?wait=20", json=JOB).status_code == 200
    assert numbers(client)["jobs_total", "completed"] == 1
    assert numbers(other)["jobs_total", "completed"] == 0
    assert numbers(client)["process_resident_memory_bytes",] > 1e6


def test_after_the_shutdown_they_say_that_nothing_is_outstanding(make_app: Callable[..., Flask]) -> None:
    client = make_app().test_client()
    client.post("/submit-job", json=[JOB] * 20)
    assert client.post("/shutdown", headers=AS_ADMIN).status_code == 200
    found = numbers(client)
    assert (found["jobs_submitted_total",], found["jobs_total", "completed"]) == (20, 20)
    assert found["jobs_outstanding",] == 0


def test_one_of_several_workers_does_not_speak_for_all(client: FlaskClient) -> None:
    refused = client.get("/metrics", environ_overrides={"wsgi.multiprocess": True})
    problem = assert_problem(refused, 503, "several-workers")
    assert "PROMETHEUS_MULTIPROC_DIR" in problem["detail"]


def test_openmetrics_is_answered_to_who_accepts_it(client: FlaskClient) -> None:
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.content_type.startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
