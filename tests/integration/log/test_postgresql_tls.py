"""The log on a PostgreSQL that takes only connections with TLS and a client certificate of an authority."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from broker.domain.lifecycle import State
from broker.log.postgresql.blocking import Blocking
from broker.log.postgresql.connection import VANISHED_SEC, connect
from broker.log.postgresql.log import PostgresLog
from broker.log_url import address
from broker.seams import Broken, Unknown
from tests.conftest import unused_port
from tests.integration.core_support import running
from tests.integration.mqtt.test_sockets import Authority
from tests.postgres import UNPRIVILEGED, USER, Postgres


class Guarded:
    """A server with `hostssl … cert` in its pg_hba.conf: the name in the certificate is the user."""

    def __init__(self, home: Path) -> None:
        (home / "other").mkdir()
        self.authority, self.other = Authority(home), Authority(home / "other", "another authority")
        self.port = unused_port()
        certificate, key = self.authority.issue("server")
        self.server = Postgres(
            listen_addresses="127.0.0.1",
            port=str(self.port),
            ssl="on",
            ssl_cert_file="server.crt",
            ssl_key_file="server.key",
            ssl_ca_file="ca.pem",
        )
        files = {"server.crt": certificate, "server.key": key, "ca.pem": self.authority.file}
        data = self.server.home / "data"
        for name, file in files.items():
            self._own(Path(shutil.copy(file, data / name)))
        (data / "pg_hba.conf").write_text(
            f"local all all trust\nhostssl all {USER} 127.0.0.1/32 cert\nhost all all 127.0.0.1/32 reject\n"
        )

    def _own(self, file: Path) -> None:
        """The server refuses a key that others may read or that is not its own."""
        file.chmod(0o600)
        if os.geteuid() == 0:
            account = pwd.getpwnam(UNPRIVILEGED)
            os.chown(file, account.pw_uid, account.pw_gid)

    def url(self, **options: str) -> str:
        query = urlencode({"sslmode": "verify-full", "sslrootcert": self.authority.file} | options)
        return f"postgresql://{USER}@127.0.0.1:{self.port}/guarded?{query}"

    def as_client(self, name: str = USER, by: Authority | None = None) -> dict[str, str]:
        certificate, key = (by or self.authority).issue(name, file=f"client-{name}")
        return {"sslcert": certificate, "sslkey": key}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    found = Guarded(tmp_path)
    found.server.start()
    try:
        found.server._run("createdb", "-h", found.server.home, "-p", str(found.port), "-U", USER, "guarded")
        yield found
    finally:
        found.server.remove()


async def test_a_broker_with_a_certificate_keeps_its_log_there_and_nobody_else_comes_in(
    guarded: Guarded,
) -> None:
    url = guarded.url(**guarded.as_client())
    storage = PostgresLog(address(url), "node_1", 10.0)
    try:
        async with running(storage) as bench:
            await bench.device()
            command = await bench.order()
            await bench.becomes(command.id, State.PUBLISHED)
            assert await bench.types(command.id) == ["created", "published"]
    finally:
        await storage.close()
    reader = Blocking(address(url))  # the command line's way
    ((count,),) = reader.execute("SELECT count(*) FROM events WHERE type = 'created'").fetchall()
    reader.close()
    assert count == 1
    sql = await connect(address(url))
    options = sql._transport.get_extra_info("socket").getsockopt  # type: ignore[attr-defined]
    assert options(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    if sys.platform == "linux":
        assert options(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1_000 * VANISHED_SEC
    sql.terminate()
    for refused in (
        {},
        {"sslmode": "disable"} | guarded.as_client(),
        guarded.as_client("somebody"),
        guarded.as_client(by=guarded.other),
    ):
        with pytest.raises((Broken, Unknown)):
            await connect(address(guarded.url(**refused)))


async def test_a_broker_does_not_talk_to_a_server_whose_certificate_another_authority_signed(
    guarded: Guarded,
) -> None:
    with pytest.raises(Broken, match=r"CERTIFICATE_VERIFY_FAILED"):
        await connect(address(guarded.url(sslrootcert=guarded.other.file, **guarded.as_client())))
