"""What the tests inject their interrupts into, and what they leave alone."""

from __future__ import annotations

import gc
import weakref

from interrupts import interrupted_everywhere


class Thing:
    """Something with a finaliser."""


def test_what_python_drops_is_not_interrupted() -> None:
    """An exception in the callback of a weak reference goes nowhere, whatever dies just then."""
    told: list[str] = []

    def tell() -> None:
        told.append("gone")

    def prepare() -> list[Thing]:
        thing = Thing()
        weakref.finalize(thing, tell)
        return [thing]

    def drop(things: list[Thing]) -> None:
        things.clear()
        max(told)

    places = [where.partition(":")[0] for where, _ in interrupted_everywhere(prepare, drop)]

    assert set(places) == {"drop"}
    assert len(told) >= len(places) - 1


def test_no_collection_falls_into_the_call() -> None:
    seen: list[bool] = []

    for _ in interrupted_everywhere(list, lambda _: seen.append(gc.isenabled())):
        assert gc.isenabled()

    assert seen
    assert not any(seen)
