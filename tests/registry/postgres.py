"""A PostgreSQL server of the tests' own, on a free port, gone when they end. ``scripts/postgres`` installs it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "postgres"


def binaries() -> Path:
    """The folder of the newest server that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    path = found[-1] if found else shutil.which("initdb")
    assert path, "there is no PostgreSQL; scripts/postgres installs it"
    return Path(path).parent


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Start a server with its data in ``folder``; gives SQLAlchemy's URL."""
    data, programs = folder / "data", binaries()
    as_user = ["runuser", "-u", USER, "--"] if os.getuid() == 0 else []  # the server refuses to run as root
    folder.mkdir()
    if as_user:
        shutil.chown(folder, USER)
    port = free_port()
    initdb = [programs / "initdb", "-D", data, "-U", USER, "--auth=trust", "--encoding=UTF8"]
    server = [programs / "postgres", "-D", data, "-p", str(port), "-c", f"unix_socket_directories={folder}"]
    subprocess.run([*as_user, *map(str, initdb)], check=True, capture_output=True, cwd=folder)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*as_user, *map(str, server)], stdout=log, stderr=log, cwd=folder)
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
        for _ in range(60):
            if subprocess.run(ready, capture_output=True).returncode == 0:
                break
            assert process.poll() is None, (folder / "log").read_text()
        yield f"postgresql+psycopg://{USER}@127.0.0.1:{port}/postgres"
    finally:
        stop = [str(programs / "pg_ctl"), "-D", str(data), "-m", "fast", "stop"]
        subprocess.run([*as_user, *stop], check=True, capture_output=True, cwd=folder)
        process.wait(30)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
