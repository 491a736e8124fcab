"""The processor's lines in the log."""

from __future__ import annotations

from microbatch.logs import Log

_log = Log("microbatch.postgres")


def tell(level: int, message: str, *args: object) -> None:
    """Log one line. A handler that raises must not replace a batch's own error: it may be an "unknown"."""
    try:
        _log.log(level, message, *args)
    except Exception:
        pass
