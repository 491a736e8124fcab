"""Connections of our own: made per process, lent to one batch at a time."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import psycopg

from microbatch.protocols import Batch

from .connecting import Making, Steps, failed_to_connect
from .flight import Prepared
from .log import tell
from .session import Facts, Session, asking, before

_PATIENCE = 5.0  # seconds for an answer where no batch sets a deadline

Connect: TypeAlias = Callable[[], Steps[psycopg.Connection[Any]]]


class OwnConnections:
    """As many connections as there are batches in flight at once, kept for the next ones; *connect* makes one."""

    def __init__(self, connect: Connect) -> None:
        self.where = ""  # the server of the latest connection, for the log
        self._connect = connect
        # By process id. Inherited ones stay here untouched: closing one would end the parent's session,
        # using one would mix the answers of two processes.
        self._stocks: dict[int, _Stock] = {}

    def __str__(self) -> str:
        return "own connections"

    @contextmanager
    def lend(self, batch: Batch[Any], *, fresh: bool = False, connect: Connect | None = None) -> Iterator[Session]:
        """A connection for *batch* alone; made if none is idle, closed afterwards if it is not clean.

        A *fresh* one is made in the place of an idle one; *connect* makes it in the place of the usual way.
        """
        stock = self._stock()
        give_up = before(batch.deadline)
        if fresh and (idle := stock.take()) is not None:
            idle.close()
        link = self._link(stock, give_up, fresh, connect)
        stock.lend(batch.id, link)
        try:
            link.session.give_up = give_up
            yield link.session
        finally:
            if not stock.take_back(batch.id, link):
                self._discard(batch, link)

    def is_ready(self) -> bool:
        """Whether a connection is idle, or in the making."""
        return self._stock().is_ready()

    @contextmanager
    def visit(self) -> Iterator[Session | None]:
        """A connection to look at, made if none is idle."""
        stock = self._stock()
        link = self._link(stock, None)
        try:
            link.session.give_up = _soon()
            yield link.session
        finally:
            if link.is_clean():
                stock.add(link)
            else:
                link.close()

    def close(self, leave: Callable[[Session], None]) -> None:
        """Close the idle connections of this process; *leave* gets one of them to say goodbye."""
        stock = self._stock()
        has_left = False
        while making := stock.resume():
            making.close()
        while link := stock.take():
            try:
                if not has_left:
                    has_left = True
                    link.session.give_up = _soon()
                    leave(link.session)
            finally:
                link.close()

    def __del__(self) -> None:
        # Of a processor that is forgotten. Its connections are held elsewhere until here: what is collected together
        # is finalised in any order, and a connection or a socket that is not closed by then complains.
        stock = self._stocks.get(os.getpid())
        if stock is not None and not sys.is_finalizing():
            _held.discard(stock)
            while making := stock.resume():
                making.close()
            while link := stock.take():
                link.close()

    def abandon(self, batch: Batch[Any]) -> None:
        """Cut the connection that *batch* is using, if it still does."""
        self._stock().cut(batch.id)

    def _stock(self) -> _Stock:
        # One step under the interpreter's lock: two threads that come first in a child get the same stock.
        stock = self._stocks.setdefault(os.getpid(), _Stock())
        _held.add(stock)
        return stock

    def _link(self, stock: _Stock, give_up: float | None, fresh: bool = False, connect: Connect | None = None) -> Link:
        """One that is idle, or a new one. What comes too late for this batch is kept for another."""
        link = (None if fresh else stock.take()) or self._made(stock, give_up, connect or self._connect)
        if give_up is not None and give_up <= time.monotonic():
            stock.add(link)
            raise psycopg.OperationalError("no time is left before the batch's deadline")
        return link

    def _made(self, stock: _Stock, give_up: float | None, connect: Connect) -> Link:
        failure: Exception = psycopg.errors.ConnectionTimeout("no connection was made within the batch's deadline")
        try:
            making = stock.resume() or Making(_steps(connect()))
            link = making.finish(give_up)
            if link is not None:
                info = link.connection.info
                self.where = f"host {info.host}, port {info.port}, database {info.dbname}"
                return link
            stock.pause(making)
        except Exception as error:
            failure = failed_to_connect(error) or error
        # Outside any handler: as its context psycopg's own error would come along.
        raise failure

    def _discard(self, batch: Batch[Any], link: Link) -> None:
        defect = link.defect()
        link.close()
        tell(logging.INFO, "batch %s lost its connection (%s); the next one connects", batch.id, defect)


def _steps(connect: Steps[psycopg.Connection[Any]]) -> Steps[Link]:
    connection = yield from connect
    try:
        facts = yield from asking(connection, _PATIENCE)
        return Link(connection, facts)
    except BaseException:
        connection.close()
        raise


class Link:
    """A connection with a second handle on its socket."""

    def __init__(self, connection: psycopg.Connection[Any], facts: Facts) -> None:
        self.connection = connection
        self.session = Session(connection, facts, prepared=Prepared())
        self.was_cut = False
        # A descriptor of our own, because libpq closes its own when the link breaks, and by the time another
        # thread has read its number it may stand for a stranger's file.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))

    def is_clean(self) -> bool:
        """Whether the next batch may begin on it; False if a transaction is left open or the link is gone."""
        return self.session.is_clean()

    def cut(self) -> None:
        """Shut the socket down under whoever waits on it."""
        self.was_cut = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was faster
            pass

    def defect(self) -> str:
        if self.was_cut:
            return "cut at its deadline"
        if self.session.is_retired:
            return "the server takes no writes"
        return "link lost" if self.connection.closed else "transaction left open"

    def close(self) -> None:
        self.connection.close()
        self._socket.close()


class _Stock:
    """The connections of one process."""

    def __init__(self) -> None:
        # Guards the containers, and that a link is cut only while the batch it is cut for holds it.
        self._lock = threading.RLock()
        self._idle: list[Link] = []
        self._lent: dict[str, Link] = {}
        self._paused: list[Making[Link]] = []

    def is_ready(self) -> bool:
        return bool(self._idle or self._paused)

    def resume(self) -> Making[Link] | None:
        with self._lock:
            return self._paused.pop() if self._paused else None

    def pause(self, making: Making[Link]) -> None:
        with self._lock:
            self._paused.append(making)

    def take(self) -> Link | None:
        # The latest one first: those that a quiet time leaves over stay at the bottom.
        with self._lock:
            return self._idle.pop() if self._idle else None

    def add(self, link: Link) -> None:
        with self._lock:
            self._idle.append(link)

    def lend(self, batch_id: str, link: Link) -> None:
        with self._lock:
            self._lent[batch_id] = link

    def take_back(self, batch_id: str, link: Link) -> bool:
        """Whether the link goes back among the idle; otherwise the caller closes it."""
        clean = link.is_clean()
        with self._lock:
            self._lent.pop(batch_id, None)
            if clean and not link.was_cut:
                self._idle.append(link)
                return True
            return False

    def cut(self, batch_id: str) -> None:
        # Under the lock, for it does not block, and a moment later the link may be another batch's.
        with self._lock:
            link = self._lent.get(batch_id)
            if link is not None:
                link.cut()


# The stocks whose processors are alive; in a forked child the parent's, too, whose connections nobody here may touch.
_held: set[_Stock] = set()


def _soon() -> float:
    return time.monotonic() + _PATIENCE
