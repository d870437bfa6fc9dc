"""`scripts/setup` with a company's own certificate: a real package index with TLS, and a real uv."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.system.support import ROOT, WITHIN_SEC
from tests.system.test_dist import uv

WHEEL = "tiny-1.0-py3-none-any.whl"
PROJECT = """
[project]
name = "nothing"
version = "1.0"

[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
# The set-up installs its project last; here it is one without a file.
BACKEND = """
from zipfile import ZipFile

def build_editable(to, config_settings=None, metadata_directory=None):
    with ZipFile(f"{to}/nothing-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(f"nothing-1.0.dist-info/{name}", text)
    return "nothing-1.0-py3-none-any.whl"

FILES = {
    "METADATA": "Metadata-Version: 2.1\\nName: nothing\\nVersion: 1.0\\n",
    "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "RECORD": "",
}
"""


def certificates(home: Path) -> Path:
    """A company's certificate, and in `home` a server's that it signed."""
    (home / "names").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes"]
    signed = ["-CA", "company.pem", "-CAkey", "company.key", "-CAcreateserial", "-extfile", "names"]
    for command in (
        [
            *new,
            "-x509",
            "-keyout",
            "company.key",
            "-out",
            "company.pem",
            "-days",
            "2",
            "-subj",
            "/CN=Company",
        ],
        [*new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost"],
        ["openssl", "x509", "-req", "-in", "server.csr", *signed, "-out", "server.pem", "-days", "2"],
    ):
        subprocess.run(command, cwd=home, capture_output=True, check=True)
    return home / "company.pem"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
        """Says nothing."""


class Index(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a client that does not know the certificate hangs up."""


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """The URL of a package index with one package, whose server has the company's certificate."""
    home = tmp_path / "index"
    shelf = home / "files" / "simple" / "tiny"
    shelf.mkdir(parents=True)
    certificates(home)
    with zipfile.ZipFile(shelf / WHEEL, "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256((shelf / WHEEL).read_bytes()).hexdigest()
    (shelf / "index.html").write_text(f'<a href="{WHEEL}#sha256={digest}">{WHEEL}</a>')
    (tmp_path / "lock").write_text(f"tiny==1.0 --hash=sha256:{digest}\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.pem", home / "server.key")
    with Index(("127.0.0.1", 0), partial(Quiet, directory=str(home / "files"))) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"https://localhost:{server.server_address[1]}/simple"
        finally:
            server.shutdown()
            thread.join(10)


def set_up(home: Path, index: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the set-up of a project without anything, with none of the settings of this machine."""
    (home / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", home / "scripts")
    (home / "pyproject.toml").write_text(PROJECT)
    (home / "backend.py").write_text(BACKEND)
    path = f"{Path(uv()).parent}{os.pathsep}/usr/bin{os.pathsep}/bin"
    given = {"PATH": path, "HOME": str(home), "PYTHON": sys.executable, "UV_DEFAULT_INDEX": index}
    return subprocess.run(
        [home / "scripts" / "setup", "lock"],
        capture_output=True,
        text=True,
        timeout=WITHIN_SEC,
        env=given | variables,
    )


@pytest.mark.parametrize("variable", ["PIP_CERT", "SSL_CERT_FILE"])
def test_the_set_up_honours_a_companys_certificate(tmp_path: Path, index: str, variable: str) -> None:
    done = set_up(tmp_path, index, **{variable: str(tmp_path / "index" / "company.pem")})

    assert (done.returncode, done.stderr) == (0, "Updating .venv to lock\n")
    assert list((tmp_path / ".venv" / "lib").glob("python*/site-packages/tiny.py"))


def test_the_set_up_tries_the_systems_certificates_and_names_the_missing_setting(
    tmp_path: Path, index: str
) -> None:
    done = set_up(tmp_path, index)

    assert done.returncode != 0
    assert done.stderr.count("invalid peer certificate") == 2
    assert "Trying again with the certificates of this system" in done.stderr
    assert "SSL_CERT_FILE" in done.stderr
