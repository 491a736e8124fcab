"""Job ids that nobody can guess, and that any worker process can read: random, time, owner, signature."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

_RANDOM, _TIME, _OWNER, _SIGNATURE = 16, 6, 6, 14  # bytes; a multiple of 3, so that no bit of the text is spare
_SIGNED = _RANDOM + _TIME + _OWNER

# By process, because a fork copies everything else.
_owners: dict[int, bytes] = {}


@dataclass(frozen=True, slots=True)
class JobId:
    """One id: its *text* as everybody sees it; *made* in seconds since 1970, by the clock of its machine."""

    text: str
    made: float
    owner: bytes

    @property
    def is_own(self) -> bool:
        """Whether this process made it."""
        return hmac.compare_digest(self.owner, _owner())


class Ids:
    """Makes and reads ids; all processes that share *secret* understand each other's."""

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        # Of any length, and not what anything else might be signed with.
        self._key = hashlib.blake2b(secret, person=b"microbatch ids").digest()
        self._clock = clock

    def new(self) -> JobId:
        """An id with 128 random bits, of this process and this moment."""
        milliseconds = int(self._clock() * 1000).to_bytes(_TIME, "big")
        signed = secrets.token_bytes(_RANDOM) + milliseconds + _owner()
        return _parsed(signed + self._signature(signed))

    def read(self, text: str) -> JobId | None:
        """The id, None if it was not made with this secret."""
        try:
            raw = base64.urlsafe_b64decode(text.encode("ascii"))
        except (UnicodeEncodeError, binascii.Error):
            return None
        if len(raw) != _SIGNED + _SIGNATURE or not hmac.compare_digest(raw[_SIGNED:], self._signature(raw[:_SIGNED])):
            return None
        found = _parsed(raw)
        # The decoder overlooks foreign characters: one id, one text.
        return found if found.text == text else None

    def age(self, job_id: JobId) -> float:
        """Seconds since it was made, by this machine's clock."""
        return self._clock() - job_id.made

    def _signature(self, signed: bytes) -> bytes:
        return hashlib.blake2b(signed, key=self._key, digest_size=_SIGNATURE).digest()


def _parsed(raw: bytes) -> JobId:
    made = int.from_bytes(raw[_RANDOM : _RANDOM + _TIME], "big") / 1000
    owner = raw[_RANDOM + _TIME : _SIGNED]
    return JobId(base64.urlsafe_b64encode(raw).decode(), made, owner)


def _owner() -> bytes:
    # One step under the interpreter's lock: two threads that come first in a child get the same one.
    return _owners.setdefault(os.getpid(), secrets.token_bytes(_OWNER))
