"""mod_wsgi in Apache: two applications in sub-interpreters of one process, each with a batcher of its own."""

from __future__ import annotations

import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from programs import SCRIPTS, Program

from .processes import ROOT, end_by, serve
from .report import Finding

PROGRAM = shutil.which("apache2") or "/usr/sbin/apache2"
MODULES = Path("/usr/lib/apache2/modules")
MISSING = "apt-get install apache2 libapache2-mod-wsgi-py3"

CONFIGURATION = """
ServerRoot "{path}"
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {path}/pid
ErrorLog {path}/apache.log
User nobody
Group nogroup
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule setenvif_module {modules}/mod_setenvif.so
LoadModule wsgi_module {modules}/mod_wsgi.so
WSGISocketPrefix {path}/socket
WSGIDaemonProcess chaos processes=2 threads=4 python-path={scripts}:{root} graceful-timeout=15 shutdown-timeout=20
WSGIProcessGroup chaos
SetEnvIf Request_URI "." number=odd
SetEnvIf Request_URI "[02468]$" number=even
WSGIApplicationGroup %{{ENV:number}}
WSGIScriptAlias / {scripts}/web.py/
<Directory {scripts}>
    Require all granted
</Directory>
"""


class Apache(Program):
    def __init__(self, path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        # Its workers are nobody's.
        path.chmod(0o777)
        (path / "ledger").touch()
        (path / "ledger").chmod(0o666)
        configuration = path / "apache.conf"
        configuration.write_text(
            CONFIGURATION.format(path=path, port=self.port, modules=MODULES, scripts=SCRIPTS, root=ROOT)
        )
        self._begin([PROGRAM, "-D", "FOREGROUND", "-f", str(configuration)], path, {})


def restart(server: Any, clients: Any) -> None:
    """New workers under load; then the end."""
    server.send(signal.SIGHUP)
    clients.wait_for(len(clients.answered) + 200)
    server.send(signal.SIGTERM)


ENDINGS: dict[str, Callable[[Any, Any], None]] = {
    "SIGTERM": end_by(signal.SIGTERM),
    "SIGWINCH": end_by(signal.SIGWINCH),  # its graceful stop
    "SIGHUP": restart,
}


def cases() -> Iterator[tuple[str, Callable[[Path], Finding]]]:
    for name, ending in ENDINGS.items():
        yield f"mod_wsgi, {name}", lambda path, ending=ending: case(path, ending)


def case(path: Path, ending: Callable[[Any, Any], None]) -> Finding:
    with Apache(path) as server:
        finding = serve(server, ending, code=None)
        batchers = Counter(pid for word, pid, *_ in server.lines() if word == "batcher")
    if 2 not in batchers.values():
        finding.problems.append(f"no process had two interpreters with a batcher each: {dict(batchers)}")
    return finding
