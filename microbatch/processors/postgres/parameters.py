"""What a job may be, and what psycopg gets for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias


class Dataclass(Protocol):
    """Any dataclass instance, as a type checker sees it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Job: TypeAlias = Mapping[str, Any] | Sequence[Any] | Dataclass
Parameters: TypeAlias = Mapping[str, Any] | Sequence[Any]

_TEXT = (str, bytes, bytearray, memoryview)


def parameters_of(job: Job) -> Parameters:
    """A mapping or a sequence as it is, a dataclass as a dict of its fields; `TypeError` for others."""
    if isinstance(job, Mapping):
        return job
    # Text is a sequence too: a lone string would be taken for one parameter per character.
    if isinstance(job, Sequence) and not isinstance(job, _TEXT):
        return job
    if dataclasses.is_dataclass(job) and not isinstance(job, type):
        # Not dataclasses.asdict(): it copies deeply, and psycopg may know how to adapt a nested dataclass.
        return {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    raise TypeError(
        f"a job must be a mapping, a sequence or a dataclass instance, not {type(job).__qualname__};"
        " submit a single value as a tuple: (value,)"
    )
