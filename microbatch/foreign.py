"""What others bring: exceptions and results, asked and copied so that none of them harms anything else.

An object may lie about its class, and raise from every attribute, comparison and text it has. So its type is asked,
which the interpreter answers alone, and what an exception carries is read where `BaseException` keeps it.
"""

from __future__ import annotations

import copy
from types import MemberDescriptorType
from typing import Any

from .errors import OutcomeUnknown

_of_type: Any = vars(type)
_own: Any = vars(BaseException)
_CARRIED = ("__cause__", "__context__", "__suppress_context__", "__traceback__")


def type_name(value: object) -> str:
    """The name of its class, whatever its metaclass says."""
    return _text_of(type(value), "__name__")


def full_name(value: object) -> str:
    """The same with its module, unless it is one of Python's own."""
    kind = type(value)
    return f"{_text_of(kind, '__module__')}.{_text_of(kind, '__qualname__')}".removeprefix("builtins.")


def _text_of(kind: type, name: str) -> str:
    text = _of_type[name].__get__(kind)
    return str.__str__(text) if issubclass(type(text), str) else "?"


def attribute(value: object, name: str) -> Any:
    """None where it has none, or refuses to say."""
    try:
        return getattr(value, name, None)
    except BaseException:
        return None


def is_error(value: object) -> bool:
    return issubclass(type(value), BaseException)


def is_ordinary(error: BaseException) -> bool:
    """Whether it is an `Exception`, by its type."""
    return issubclass(type(error), Exception)


def is_unknown(error: BaseException) -> bool:
    """Whether it is an `OutcomeUnknown`, by its type."""
    return issubclass(type(error), OutcomeUnknown)


def batch_id_of(error: BaseException) -> str | None:
    """The batch that an `OutcomeUnknown` names."""
    found = attribute(error, "batch_id") if is_unknown(error) else None
    return found if issubclass(type(found), str) else None


def name_batch(error: BaseException, batch_id: str) -> None:
    """Let an `OutcomeUnknown` that names no batch name this one, if it can be written to."""
    if is_unknown(error) and batch_id_of(error) is None:
        try:
            error.batch_id = batch_id  # type: ignore[attr-defined]
        except BaseException:
            pass


def copied(error: BaseException) -> BaseException:
    """A copy of the same type, arguments and attributes; the same instance, traceback trimmed, if it resists."""
    try:
        twin = copy.copy(error)
        alike = type(twin) is type(error) and twin is not error and bool(_get("args", twin) == _get("args", error))
        if alike:
            _fill(twin, error)
    except BaseException:
        alike = False
    if not alike:
        return BaseException.with_traceback(error, None)
    for name in _CARRIED:
        # Past what its class may have put in front of them.
        _own[name].__set__(twin, _get(name, error))
    return twin


def _get(name: str, error: BaseException) -> Any:
    return _own[name].__get__(error)


def _fill(twin: BaseException, error: BaseException) -> None:
    """What `copy` leaves out: slots, and attributes that a `__reduce__` forgets. Notes become the twin's own."""
    given, own = _get("__dict__", error), _get("__dict__", twin)
    own.update({name: value for name, value in given.items() if name not in own})
    if type(notes := own.get("__notes__")) is list:
        own["__notes__"] = notes[:]
    for kind in type(error).__mro__:
        for member in vars(kind).values():
            if type(member) is MemberDescriptorType and _value(member, twin) is None:
                value = _value(member, error)
                if value is not None:
                    member.__set__(twin, value)


def _value(member: MemberDescriptorType, error: BaseException) -> Any:
    try:
        return member.__get__(error)
    except AttributeError:
        return None  # an empty slot
