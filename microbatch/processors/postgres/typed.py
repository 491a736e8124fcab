"""Which parameters of a statement are JSON: what the server infers, asked once per connection where it matters."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
from psycopg.abc import Query
from psycopg.adapt import PyFormat, Transformer

from .columns import at
from .conversions import context_of
from .documents import Documents
from .parameters import Parameters
from .session import Session
from .sqlstate import is_retryable
from .translate import placeholders

# What a job nearly always holds, and what is certainly no document.
_PLAIN = frozenset((str, int, float, bool, type(None), bytes, Decimal, date, datetime, timedelta, UUID))
_TRUSTED_SECONDS = 60.0
# Types that every server has: whether the json is an item of an array.
_BUILT_IN = {114: False, 3802: False, 199: True, 3807: True}
_FIRST_OF_USERS = 16384
_BEHIND = b"""
WITH RECURSIVE behind (root, oid, is_array) AS (
    SELECT t.oid, t.oid, false FROM pg_catalog.pg_type t WHERE t.oid = ANY ($1::pg_catalog.oid[])
    UNION ALL
    SELECT b.root, CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.typelem END, b.is_array OR t.typtype <> 'd'
    FROM behind b JOIN pg_catalog.pg_type t ON t.oid = b.oid
    WHERE t.typtype = 'd' OR (t.typcategory = 'A' AND t.typelem <> 0 AND NOT b.is_array))
SELECT root, is_array::int FROM behind WHERE oid IN ('pg_catalog.json'::regtype, 'pg_catalog.jsonb'::regtype)"""


@dataclass(frozen=True, slots=True)
class Known:
    """The parameters that are JSON, and whether in an array: by name, or by number where they have none."""

    kinds: Mapping[Any, bool]
    asked_at: float

    def is_trusted(self) -> bool:
        return time.monotonic() - self.asked_at < _TRUSTED_SECONDS


class JsonParameters:
    """Makes JSON of what the jobs of one batch give for a parameter of such a type.

    The server is asked when the first job holds a mapping, a list or a tuple, which may be JSON or something else;
    *at_once* when it has refused others by their type.
    """

    def __init__(self, session: Session, statement: Query, known: Known | None, at_once: bool) -> None:
        self.known = known
        self.has_asked = False
        self.failure: psycopg.Error | None = None
        self._session = session
        self._statement = statement
        self._at_once = at_once
        self._made: Documents | None = None

    def applied(self, parameters: Parameters) -> Parameters:
        """*parameters* of a job, with JSON in the place of documents.

        Raises:
            TypeError: something has no form in JSON.
        """
        # Nearly always: nothing is known, and nothing has to be.
        if self._is_plain(parameters) and not self._at_once and self.known is None:
            return parameters
        if isinstance(parameters, Mapping) and not isinstance(parameters, dict):
            parameters = self._read(parameters)
        if self.known is None and self.failure is None and (self._at_once or self._holds_documents(parameters)):
            self._ask(parameters)
        if self.known is None or not self.known.kinds:
            return parameters
        return self._converted(parameters, self.known.kinds)

    def _is_plain(self, parameters: Parameters) -> bool:
        if type(parameters) is dict:
            return _PLAIN.issuperset(map(type, parameters.values()))
        return type(parameters) is tuple and _PLAIN.issuperset(map(type, parameters))

    @property
    def _documents(self) -> Documents:
        if self._made is None:
            self._made = Documents(self._session.connection.adapters)
        return self._made

    def _read(self, lazy: Mapping[str, Any]) -> Mapping[str, Any]:
        # Once: it may be the user's own code.
        try:
            return {name: lazy[name] for name in self._placeholders()[1]} or lazy
        except KeyError:
            return lazy  # it lacks one, which the binding tells

    def _placeholders(self) -> tuple[bytes, Sequence[str]]:
        return placeholders(self._session.connection, self._statement)

    def _holds_documents(self, parameters: Parameters) -> bool:
        values = parameters.values() if isinstance(parameters, Mapping) else parameters
        return any(map(self._is_document, values))

    def _is_document(self, value: Any) -> bool:
        return isinstance(value, (list, tuple, Mapping)) and not self._documents.is_users(type(value))

    def _converted(self, parameters: Parameters, kinds: Mapping[Any, bool]) -> Parameters:
        changed: Any = dict(parameters) if isinstance(parameters, Mapping) else list(parameters)
        for key, is_array in kinds.items():
            try:
                changed[key] = self._documents.value(changed[key], is_array)
            except (KeyError, IndexError):
                return parameters  # too few of them, which the binding tells
            except Exception as error:
                at(error, key if isinstance(key, str) else None)
                raise
        return changed  # type: ignore[no-any-return]

    def _ask(self, parameters: Parameters) -> None:
        self.has_asked = True
        command, names = self._placeholders()
        oids: Sequence[int] = ()
        for types in self._guesses(parameters, names):
            try:
                answer = self._session.describe(command, types)
                oids = [answer.param_type(i) for i in range(answer.nparams)]
                found = self._json_types(oids)
                break
            except psycopg.Error as error:
                if is_retryable(error) or self._session.connection.closed:
                    self.failure = error
                    return
        else:
            found = {}  # the server will tell the jobs what is wrong with their statement
        keys: Sequence[Any] = names or range(len(oids))
        kinds = {key: found[oid] for key, oid in zip(keys, oids, strict=False) if oid in found}
        self.known = Known(kinds, time.monotonic())

    def _guesses(self, parameters: Parameters, names: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """The types to ask with: those that JSON might be mistaken for are left open, then only those of documents."""
        try:
            values = [parameters[name] for name in names] if isinstance(parameters, Mapping) else list(parameters)
        except KeyError:
            values = []
        yield self._types([value if self._documents.is_settled(value) else None for value in values])
        yield self._types([None if self._is_document(value) else value for value in values])

    def _types(self, values: Sequence[Any]) -> tuple[int, ...]:
        transformer = Transformer.from_context(context_of(self._session.connection))
        try:
            transformer.dump_sequence(values, [PyFormat.AUTO] * len(values))
        except Exception:  # a value that cannot be sent, which the binding tells
            return ()
        return transformer.types or ()

    def _json_types(self, oids: Sequence[int]) -> dict[int, bool]:
        found = dict(_BUILT_IN)
        others = {oid for oid in oids if oid >= _FIRST_OF_USERS}
        if others:
            answer = self._session.ask(_BEHIND, f"{{{','.join(map(str, others))}}}")
            for row in range(answer.ntuples):
                found[int(answer.get_value(row, 0) or 0)] = answer.get_value(row, 1) == b"1"
        return found
