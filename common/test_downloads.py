"""Checks of downloads, against a server of this machine that fails in every way we could think of."""

import base64
import gzip
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import downloads
from common.downloads import DownloadError, download, fetch_package, save, unpacked_package

BODY = bytes(range(256)) * 5000  # 1.28 MB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()
Respond = Callable[[BaseHTTPRequestHandler], None]
Route = bytes | Respond
Routes = Mapping[str, Route | list[Route]]


@contextmanager
def serve(routes: Routes) -> Iterator[tuple[str, list[str]]]:
    """Serve each path with bytes, a function of the handler, or a list of these, one for each request.

    Gives the address and the list, still growing, of the paths asked for.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            route = routes.get(self.path, status(404))
            if isinstance(route, list):
                route = route.pop(0) if len(route) > 1 else route[0]
            (route if callable(route) else sends(route))(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def status(code: int, **headers: Any) -> Respond:
    return sends(b"", code=code, **headers)


def sends(body: bytes, then_wait: float = 0, code: int = 200, **headers: Any) -> Respond:
    """Answer with this body and headers (Content_Length=...), and hang up then_wait seconds later."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        time.sleep(then_wait)

    return respond


def raw(answer: bytes) -> Respond:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(answer)

    return respond


def silence(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(2)


HALF = sends(BODY[: len(BODY) // 2], Content_Length=str(len(BODY)))


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between the tries, which are not slept."""
    slept: list[float] = []
    really = time.sleep
    monkeypatch.setattr(
        "common.downloads.time.sleep", lambda s: slept.append(s) if s in (0.5, 1, 2, 4) else really(s)
    )
    return slept


def assert_fails(url: str, path: Path, message: str, seconds: float = 1.5, **settings: object) -> None:
    """The download ends in one line with this in it, soon, and leaves nothing."""
    start = time.monotonic()
    with pytest.raises(DownloadError, match=message) as caught:
        download(url, path, **settings)  # type: ignore[arg-type]
    assert time.monotonic() - start < seconds
    assert "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_a_file_arrives_whole_with_its_folder_made(tmp_path: Path) -> None:
    codings = []

    def respond(handler: BaseHTTPRequestHandler) -> None:
        codings.append(handler.headers["Accept-Encoding"])
        sends(BODY)(handler)

    with serve({"/file": respond}) as (url, asked):
        download(f"{url}/file", tmp_path / "new" / "file", SHA256)
    assert codings == ["identity"]  # or the progress bar would not know the size
    assert (tmp_path / "new" / "file").read_bytes() == BODY
    assert os.listdir(tmp_path / "new") == ["file"]
    assert asked == ["/file"]


def test_redirects_missing_lengths_and_unasked_for_compression_are_followed(tmp_path: Path) -> None:
    packed = gzip.compress(BODY)
    routes = {
        "/moved": status(302, Location="/unsized"),
        "/unsized": raw(b"HTTP/1.0 200 OK\r\n\r\n" + BODY),
        "/packed": sends(packed, Content_Encoding="gzip"),
        "/twice": sends(BODY, Content_Length=f"{len(BODY)}, {len(BODY)}"),
    }
    with serve(routes) as (url, _):
        for path in ("moved", "packed", "twice"):
            download(f"{url}/{path}", tmp_path / path, SHA256)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 204, 304])
def test_an_answer_that_will_not_change_is_asked_for_once(tmp_path: Path, code: int) -> None:
    with serve({"/file": status(code)}) as (url, asked):
        assert_fails(f"{url}/file", tmp_path / "file", f"answered {code}")
    assert len(asked) == 1


@pytest.mark.parametrize("passing", [status(500), status(503), status(429), HALF, sends(b"")])
def test_what_may_pass_is_tried_again_with_growing_pauses(
    tmp_path: Path, pauses: list[float], passing: Route
) -> None:
    with serve({"/file": [passing, passing, BODY]}) as (url, asked):
        download(f"{url}/file", tmp_path / "file", SHA256)
        assert (len(asked), pauses) == (3, [0.5, 1])
    with serve({"/file": passing}) as (url, asked):
        (tmp_path / "file").unlink()
        assert_fails(f"{url}/file", tmp_path / "file", "answered|broke off after", retries=2)
        assert len(asked) == 3


def test_a_body_that_stalls_is_tried_again(
    tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.1)
    stalls = sends(BODY[:1000], then_wait=1, Content_Length=str(len(BODY)))
    with serve({"/file": [stalls, BODY]}) as (url, asked):
        download(f"{url}/file", tmp_path / "file", SHA256)
        assert len(asked) == 2


def test_a_chunked_body_that_breaks_off_is_noticed(tmp_path: Path) -> None:
    broken = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    with serve({"/file": broken}) as (url, _):
        assert_fails(f"{url}/file", tmp_path / "file", "broke off after", retries=0)


def test_a_short_body_is_noticed_even_if_the_library_counts_no_bytes() -> None:
    response = SimpleNamespace(headers={"Content-Length": "6"}, iter_content=lambda _: iter([b"12", b"345"]))
    with pytest.raises(DownloadError, match="broke off after 5 bytes"):
        list(downloads._body(response, "file"))  # type: ignore[arg-type]


def test_a_wrong_checksum_is_final_and_keeps_the_file_of_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with serve({"/file": b"<html>please log in</html>"}) as (url, asked):
        with pytest.raises(DownloadError, match=r"^file has the wrong SHA-256, [0-9a-f]{12}\.\.\.$"):
            download(f"{url}/file", tmp_path / "file", SHA256)
        assert len(asked) == 1
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_server_that_never_answers_is_given_up_in_time(tmp_path: Path) -> None:
    with serve({"/file": silence}) as (url, asked):
        assert_fails(f"{url}/file", tmp_path / "file", r"no answer from .* in 0\.3 seconds", 0.6, timeout=0.3)
        assert len(asked) == 1
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts nothing, as behind a dead firewall
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
        assert_fails(url, tmp_path / "file", "no answer", 0.6, timeout=0.3)


def test_a_silent_name_server_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    assert_fails("http://example.invalid/file", tmp_path / "file", "no answer", 0.6, timeout=0.3)


def test_the_default_patience_is_three_seconds(tmp_path: Path) -> None:
    assert downloads.ANSWER_SECONDS == 3
    assert download.__defaults__ == (None, 3.0, 3)


def test_a_refused_connection_is_final(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
    assert_fails(url, tmp_path / "file", "Connection refused")


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"",
        b"\x16\x03\x01\x02\x00\x01" * 100,
        b"HTTP/1.1 999999 Eh\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(200)) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[bad\r\n\r\n",
        b"HTTP/1.1 302 Found\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nnot gzip at all",
        b"HTTP/1.1 200 O\x00K\xff\r\nContent-Length: nan\r\n\r\n",
    ],
    ids=str,
)
def test_a_hostile_answer_is_one_line_and_no_file(tmp_path: Path, answer: bytes, pauses: list[float]) -> None:
    with serve({"/file": raw(answer)}) as (url, _):
        assert_fails(f"{url}/file", tmp_path / "file", "answer|broke off")


def test_a_circle_of_redirects_ends(tmp_path: Path) -> None:
    with serve({"/file": status(302, Location="/file")}) as (url, _):
        assert_fails(f"{url}/file", tmp_path / "file", "redirects")


@pytest.mark.parametrize(
    "url", ["", "nonsense", "ftp://x/y", "file:///etc/passwd", "http://", "http://a..b/"]
)
def test_an_impossible_address_is_one_line(tmp_path: Path, url: str) -> None:
    assert_fails(url, tmp_path / "file", "no answer from")


class _FullDisk(io.BytesIO):
    def __init__(self, handle: int, *_: object, **__: object) -> None:
        os.close(handle)

    def write(self, _: object) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_named_is_final_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.files.os.fdopen", _FullDisk)
    with serve({"/file": BODY}) as (url, asked):
        with pytest.raises(OSError, match="No space left on device") as caught:
            download(f"{url}/file", tmp_path / "file")
        assert len(asked) == 1
    assert not isinstance(caught.value, DownloadError)  # another source would meet the same disk
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    half = sends(BODY[: len(BODY) // 2], then_wait=5, Content_Length=str(len(BODY)))
    with serve({"/file": half}) as (url, _):
        code = f"import pathlib, common.downloads as d; d.download('{url}/file', pathlib.Path('file'))"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
        while process.poll() is None and not any(tmp_path.iterdir()):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=5)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in stderr
    assert list(tmp_path.iterdir()) == []


def test_downloads_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    bodies = {f"/{letter}": letter.encode() * 3_000_000 for letter in "abcd"}
    with serve(bodies) as (url, _):
        threads = [threading.Thread(target=download, args=(url + path, tmp_path / "file")) for path in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "file").read_bytes() in bodies.values()
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_chunks_keeps_its_own_words(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"one"
        raise DownloadError("the source dried up")

    with pytest.raises(DownloadError, match=r"^the source dried up$"):
        save(chunks(), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# Packages. The index is a folder of the same server; the packages would write `ran` if any of their code ran.


def wheel(name: str, members: dict[str, bytes]) -> bytes:
    """A wheel of version 1.0 whose code writes a file named ran when it is imported."""
    info = f"{name}-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for path, data in members.items()
    ]
    members[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in members.items():
            archive.writestr(path, data)
    return buffer.getvalue()


def sdist(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, data in members.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def index(archives: dict[str, bytes]) -> Routes:
    """The routes of a package index that holds these archives, by file name."""
    routes: dict[str, Route] = {f"/files/{name}": data for name, data in archives.items()}
    for name, data in archives.items():
        link = f'<a href="/files/{name}#sha256={hashlib.sha256(data).hexdigest()}">{name}</a>'
        routes[f"/simple/{name.split('-')[0].replace('_', '-')}/"] = sends(
            link.encode(), Content_Type="text/html"
        )
    return routes


@contextmanager
def package_index(
    archives: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    with serve(index(archives)) as (url, asked):
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{url}/simple")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv_cache"))
        yield asked


needs_uv = pytest.mark.skipif(downloads._find_uv() is None, reason="uv is not installed")


@needs_uv
def test_a_file_of_a_wheel_is_copied_and_the_rest_removed_unrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    members = {"toy/__init__.py": runs, "toy.pth": b"import " + runs, "toy/data/text.txt": BODY}
    with package_index({"toy-1.0-py3-none-any.whl": wheel("toy", members)}, tmp_path, monkeypatch):
        path = tmp_path / "data" / "text.txt"
        fetch_package("toy==1.0", "toy/data/text.txt", path, SHA256)
        assert path.read_bytes() == BODY
        with pytest.raises(DownloadError, match="text has the wrong SHA-256"):
            fetch_package("toy==1.0", "toy/data/text.txt", tmp_path / "data" / "text", "0" * 64)
        with pytest.raises(DownloadError, match=r"^toy==1\.0 holds no file toy/other$"):
            fetch_package("toy==1.0", "toy/other", path)
        with pytest.raises(ValueError, match=r"^member \(\.\./text\.txt\) must stay inside the package$"):
            fetch_package("toy==1.0", "../text.txt", path)
    assert not (tmp_path / "ran").exists()
    assert sorted(os.listdir(tmp_path / "data")) == [".packages", "text.txt"]
    assert os.listdir(tmp_path / "data" / ".packages") == []


@needs_uv
def test_a_file_of_an_sdist_is_copied_without_running_its_setup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    backend = b'[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n'
    members = {"toy-1.0/setup.py": runs, "toy-1.0/evil.py": runs, "toy-1.0/pyproject.toml": backend}
    members |= {
        "toy-1.0/PKG-INFO": b"Metadata-Version: 1.0\nName: toy\nVersion: 1.0\n",
        "toy-1.0/text.txt": BODY,
    }
    with package_index({"toy-1.0.tar.gz": sdist(members)}, tmp_path, monkeypatch):
        fetch_package("toy==1.0", "text.txt", tmp_path / "data" / "text.txt", SHA256, sdist=True)
        with pytest.raises(DownloadError, match=r"[Ww]heels?|solution"):  # as it must be asked for by name
            fetch_package("toy==1.0", "text.txt", tmp_path / "data" / "text.txt")
    assert (tmp_path / "data" / "text.txt").read_bytes() == BODY
    assert not (tmp_path / "ran").exists()
    assert os.listdir(tmp_path / "data" / ".packages") == []


@needs_uv
def test_a_package_without_an_sdist_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        package_index({"toy-1.0-py3-none-any.whl": wheel("toy", {})}, tmp_path, monkeypatch),
        pytest.raises(DownloadError, match=r"^toy==1\.0 has no source archive$"),
    ):
        fetch_package("toy==1.0", "text", tmp_path / "text", sdist=True)


@needs_uv
@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (sdist({"toy-1.0/text.txt": b"text", "../../../evil": b"evil"}), "outside the destination"),
        (sdist({"toy-1.0/text.txt": b"text"})[:-40], "is no good"),
        (b"not an archive", "is no good"),
        (sdist({}), "is no good"),
    ],
    ids=["escapes", "truncated", "garbage", "empty"],
)
def test_a_hostile_sdist_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bytes, message: str
) -> None:
    with (
        package_index({"toy-1.0.tar.gz": archive}, tmp_path, monkeypatch),
        pytest.raises(DownloadError, match=message),
    ):
        fetch_package("toy==1.0", "text.txt", tmp_path / "data" / "text.txt", sdist=True)
    assert not list(tmp_path.rglob("evil"))
    assert os.listdir(tmp_path / "data") == [".packages"]
    assert os.listdir(tmp_path / "data" / ".packages") == []


@needs_uv
def test_an_index_without_the_package_or_without_an_answer_is_one_line_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with package_index({}, tmp_path, monkeypatch), pytest.raises(DownloadError, match="toy"):
        fetch_package("toy==1.0", "text", tmp_path / "data" / "text")
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 1.0)
    for is_sdist in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{listener.getsockname()[1]}/simple")
            start = time.monotonic()
            with pytest.raises(DownloadError, match=r"timed out|timeout") as caught:
                fetch_package("toy==1.0", "text", tmp_path / "data" / "text", sdist=is_sdist)
            assert time.monotonic() - start < 2
            assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "data" / ".packages") == []


@pytest.mark.parametrize(
    "spec", ["toy", "toy==", "==1.0", "toy>=1.0", "--index-url=x==1", "toy==1.0 other", "a/b==1"]
)
def test_a_spec_that_is_no_name_and_version_is_refused(tmp_path: Path, spec: str) -> None:
    with pytest.raises(ValueError, match=r"^spec \(.*\) must read NAME==VERSION$"):
        fetch_package(spec, "text", tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


def test_tools_that_are_missing_broken_or_slow_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV", str(tmp_path / "gone"))
    with pytest.raises(DownloadError, match="gone cannot be run: No such file"):
        fetch_package("toy==1.0", "text", tmp_path / "text")
    (tmp_path / "slow").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "slow").chmod(0o755)
    monkeypatch.setenv("UV", str(tmp_path / "slow"))
    with pytest.raises(DownloadError, match=r"slow took longer than 0\.1 seconds"):
        fetch_package("toy==1.0", "text", tmp_path / "text", timeout=0.1)
    monkeypatch.delenv("UV")
    monkeypatch.setattr("common.downloads.shutil.which", lambda _: None)
    monkeypatch.setattr(downloads, "find_spec", lambda _: None)
    with pytest.raises(DownloadError, match=r"^neither uv nor pip is installed$"):
        fetch_package("toy==1.0", "text", tmp_path / "text")
    with pytest.raises(DownloadError, match="uv, which finds source archives, is not installed"):
        fetch_package("toy==1.0", "text", tmp_path / "text", sdist=True)


def test_what_a_killed_run_left_unpacked_is_removed_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, age in (("old", 4000), ("young", 1000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    monkeypatch.setattr(downloads, "_unpack_wheel", lambda spec, folder, timeout: folder)
    with unpacked_package("toy==1.0", tmp_path) as folder:
        assert sorted(os.listdir(tmp_path)) == sorted([folder.name, "young"])
    assert os.listdir(tmp_path) == ["young"]
