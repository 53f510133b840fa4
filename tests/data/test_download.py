"""Downloads from a server on this machine's loopback: all of the file, or nothing."""

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conadv_lab.data import cifar
from conadv_lab.data.download import download_file

CONTENT = bytes(range(256)) * 9000  # more than two chunks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/short" else CONTENT)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as address:
        yield address


@pytest.mark.parametrize("path", ["/whole", "/unsized"])
def test_downloads_the_file_under_its_name(home, tmp_path, path):
    target = tmp_path / "new folder" / "file.bin"
    download_file(home + path, target, MD5)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o444 == 0o444


def test_takes_a_local_address(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(CONTENT)
    download_file(source.as_uri(), target, MD5)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "md5", "message"),
    [
        ("/short", MD5, r"was cut short: 1,152,000 of 2,304,000 bytes arrived"),
        ("/missing", MD5, r"cannot be downloaded to .*: HTTP Error 404: Not Found"),
        ("/whole", "0" * 32, rf"has MD5 {MD5}; expected 0{{32}}"),
    ],
)
def test_a_failure_leaves_nothing_new(home, tmp_path, path, md5, message):
    target = tmp_path / "file.bin"
    with pytest.raises(ValueError, match=message) as error:
        download_file(home + path, target, md5)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    target.write_text("older")
    with pytest.raises(ValueError, match=message):
        download_file(home + path, target, md5)
    assert target.read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as address:
        pass
    with pytest.raises(ValueError, match=r"cannot be downloaded to .*refused"):
        download_file(address + "/whole", tmp_path / "file.bin", MD5)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be downloaded to"):
        download_file("file:///nowhere", tmp_path / "file" / "target", MD5)


def test_interrupted_download_leaves_nothing(home, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("conadv_lab.data.download._fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download_file(home + "/whole", tmp_path / "file.bin", MD5)
    assert list(tmp_path.iterdir()) == []


def test_load_cifar_downloads_only_when_asked_and_once(home, tmp_path, monkeypatch):
    """What is served is no archive: the download succeeds, and reading it fails with the archive's name."""
    python, binary = cifar._SETS["cifar10"]
    monkeypatch.setitem(
        cifar._SETS, "cifar10", (replace(python, url=f"{home}/served.tar.gz", md5=MD5), binary)
    )
    with pytest.raises(ValueError, match=r"^no cifar10 in"):
        cifar.load_cifar(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"served.tar.gz cannot be read as a .tar.gz"):
        cifar.load_cifar(tmp_path, download=True)
    assert (tmp_path / "served.tar.gz").read_bytes() == CONTENT
    monkeypatch.setattr(cifar, "download_file", None)
    with pytest.raises(ValueError, match=r"served.tar.gz cannot be read as a .tar.gz"):
        cifar.load_cifar(tmp_path, download=True)
