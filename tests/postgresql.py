"""A PostgreSQL server of the tests' own: unprivileged, in a temporary folder, on a socket that nobody else can open."""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 120.0


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl, where PostgreSQL is installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@dataclass(frozen=True)
class Server:
    """A running server; `folder` holds its data and its socket."""

    folder: Path
    bin: Path
    user: str

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{self.user}@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"db_{uuid.uuid4().hex}"
        self.run("psql", "-h", str(self.folder), "-d", "postgres", "-qc", f"CREATE DATABASE {name}")
        return self.url(name)

    def stop(self, how: str) -> None:
        """fast: it ends its work; immediate: as a crash, the write-ahead log has to tell what was committed."""
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", how, "-w", "stop")

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c deadlock_timeout=100ms"
        log = str(self.folder / "log")
        self.run(
            "pg_ctl", "-D", str(self.folder / "data"), "-w", "-t", f"{START_S:g}", "-l", log, "-o", options, "start"
        )

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.bin / program), *arguments],
            user=self.user,  # the server refuses to be root's
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=START_S,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PGUSER": self.user},
        )


@contextmanager
def postgresql() -> Iterator[Server]:
    """A server; afterwards nothing of it is left."""
    found = binaries()
    assert found is not None
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="hr-pg-"))
    server = Server(folder, found, user)
    try:
        shutil.chown(folder, user)
        # Nobody else may enter the folder, so nobody else reaches the socket.
        server.run("initdb", "-D", str(folder / "data"), "-A", "trust", "-E", "UTF8", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
