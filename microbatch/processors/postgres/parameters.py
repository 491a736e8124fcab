"""What a job may be, and what psycopg gets for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias


class Dataclass(Protocol):
    """Any dataclass instance, as a type checker sees it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Job: TypeAlias = Mapping[str, Any] | Sequence[Any] | Dataclass
Parameters: TypeAlias = Mapping[str, Any] | Sequence[Any]

_TEXT = (str, bytes, bytearray, memoryview)
_AS_THEY_ARE = frozenset((dict, list, tuple))


class _Nothing(Mapping[str, Any]):
    """No names at all, and true: an empty mapping would be taken for an empty sequence by psycopg."""

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True


_NOTHING = _Nothing()


def parameters_of(job: Job) -> Parameters:
    """A mapping for a job that has names, else the sequence that it is.

    Raises:
        TypeError: it is neither.
        ValueError: two of its names are the same.
    """
    parameters = _parameters_of(job)
    return parameters if parameters or not isinstance(parameters, Mapping) else _NOTHING


def _parameters_of(job: Job) -> Parameters:
    if type(job) in _AS_THEY_ARE or isinstance(job, Mapping):
        return job  # type: ignore[return-value]
    named = _by_name(job)
    if named is not None:
        return named
    # Text is a sequence too: a lone string would be taken for one parameter per character.
    if isinstance(job, Sequence) and not isinstance(job, _TEXT):
        return job
    raise TypeError(
        "a job must be a mapping, a sequence, a dataclass instance, a named tuple or a row, not"
        f" {type(job).__qualname__}; submit a single value as a tuple: (value,)"
    )


def _by_name(job: Any) -> Mapping[str, Any] | None:
    """The fields of a job that has names; None if it has none.

    Rows are known by what they offer, so that no library has to be imported: `_mapping` is SQLAlchemy's, `keys` that of
    `sqlite3.Row` and of anything that `dict` takes.
    """
    kind = type(job)
    if isinstance(job, type):
        return None
    if hasattr(kind, "_mapping"):
        mapping: Mapping[str, Any] = job._mapping
        return mapping
    if dataclasses.is_dataclass(job):
        # Not dataclasses.asdict(): it copies deeply, and psycopg may know how to adapt a nested dataclass.
        return {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    if hasattr(kind, "__attrs_attrs__"):
        return {field.name: getattr(job, field.name) for field in kind.__attrs_attrs__}
    if isinstance(job, tuple) and hasattr(kind, "_fields"):
        return dict(zip(kind._fields, job, strict=True))
    if callable(getattr(kind, "keys", None)) and hasattr(kind, "__getitem__"):
        return {name: job[name] for name in _once(job.keys())}
    return None


def _once(names: Iterable[Any]) -> list[Any]:
    listed = list(names)
    # The row would give the first one's value for both.
    if twice := [name for name in listed if listed.count(name) > 1]:
        raise ValueError(f"the job has two fields named {twice[0]!r}; give them names of their own")
    return listed
