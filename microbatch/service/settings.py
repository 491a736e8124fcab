"""What the service is told: by keywords, else by the environment, else a default."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from microbatch.errors import MicrobatchError
from microbatch.options import options_from_env, seconds, whole

PREFIX = "MICROBATCH_"
DEFAULT_TABLE = "payment_transactions"
DEFAULT_COLUMNS = ("user_id", "amount", "status")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServiceError(MicrobatchError, ValueError):
    """The service cannot start as it is told to; the message names the setting and the remedy."""


@dataclass(frozen=True)
class Settings:
    """See `create_app`.

    Attributes:
        batcher: options of `MicroBatcher` by name.
    """

    dsn: str | None = field(default=None, repr=False)
    table: str | None = None
    columns: tuple[str, ...] | None = None
    store: str = "postgres"
    status_ttl: float = 3600.0
    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False
    max_client_jobs: int | None = None
    batcher: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.store not in ("postgres", "memory"):
            raise ServiceError(f"store must be 'postgres' or 'memory', not {self.store!r}")
        seconds("status_ttl", self.status_ttl, positive=True)
        if self.max_client_jobs is not None:
            whole("max_client_jobs", self.max_client_jobs, least=1)
        for name in ("token", "admin_token"):
            _check_token(name, getattr(self, name))


def settings_from(environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
    """Settings out of *given*, where a None is no answer, then the environment.

    Raises:
        ServiceError, ValueError, TypeError: a wrong value; the message names the setting or the variable.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in given.items() if value is not None}
    own = {item.name for item in fields(Settings)} - {"batcher"}
    found = {name: _value(name, environ) for name in own if environ.get(PREFIX + name.upper(), "").strip()}
    # Whoever asks for a place while there is none is told at once: its thread is needed for others.
    batcher = {"when_full": "raise", **options_from_env(PREFIX, environ)}
    batcher.update({name: value for name, value in given.items() if name not in own})
    found.update({name: value for name, value in given.items() if name in own})
    for name in ("columns", "allowed_hosts"):
        if name in found:
            found[name] = tuple(found[name])
    return Settings(**found, batcher=batcher)


def _value(name: str, environ: Mapping[str, str]) -> Any:
    variable = PREFIX + name.upper()
    text = environ[variable].strip()
    try:
        return _CONVERT.get(name, str)(text)
    except ValueError as error:
        raise ServiceError(f"{variable}={text!r}: {error}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("say 1 or 0")


_CONVERT: dict[str, Callable[[str], Any]] = {
    "columns": _names,
    "allowed_hosts": _names,
    "insecure": _flag,
    "status_ttl": float,
    "max_client_jobs": int,
}


def _check_token(name: str, token: str | None) -> None:
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        # Not shown: it may be a real one with a typing error.
        raise ServiceError(f"{name} must be printable ASCII characters without spaces, and at least one")
