"""Get a file over HTTP or out of a package of the package index: whole and checked, or not at all."""

import gzip
import hashlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from common.files import atomic_write
from common.script import one_line

ANSWER_SECONDS = 3.0  # a network that has not begun to answer by then counts as reaching nothing
STALL_SECONDS = 15.0  # longest silence in the middle of a download
CHUNK = 1 << 18  # bytes


class DownloadError(OSError):
    """A source did not give the file; the message says why in one line."""


class _PassingError(DownloadError):
    """A failure that the next try may not meet: the server is busy, or the answer broke off."""


def save(chunks: Iterable[bytes], path: Path, sha256: str | None = None) -> None:
    """Write the chunks to path, all or nothing; DownloadError on a wrong SHA-256, OSError from the disk."""
    digest = hashlib.sha256()
    try:
        with atomic_write(path, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            if sha256 not in (None, found := digest.hexdigest()):
                raise DownloadError(f"{path.name} has the wrong SHA-256, {found[:12]}...")
    except DownloadError as error:
        if isinstance(error.__cause__, DownloadError):  # atomic_write words each OSError anew; ours says more
            raise error.__cause__ from None
        raise


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file of any size, at most CHUNK at a time."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def download(
    url: str, path: Path, sha256: str | None = None, timeout: float = ANSWER_SECONDS, retries: int = 3
) -> None:
    """Fetch url into path behind a progress bar; DownloadError if it cannot be had, OSError from the disk.

    A server whose answer has not begun after `timeout` seconds is not asked again. What may pass (busy,
    broken off, stalled) is tried `retries` more times, after 0.5, 1, 2, ... seconds.
    """
    for attempt in range(retries + 1):
        try:
            with answer(url, timeout) as response:
                save(_body(response, path.name), path, sha256)
            return
        except _PassingError:
            if attempt == retries:
                raise
            time.sleep(0.5 * 2**attempt)


def answer(url: str, timeout: float = ANSWER_SECONDS) -> requests.Response:
    """Return the server's answer, body unread; DownloadError unless it begins in time and its status is 200.

    The limit holds for everything together: a silent name server, several silent addresses, TLS, redirects.
    No timeout of the HTTP library covers that, so a thread asks, and is left behind when it takes longer.
    """
    host = urlsplit(url).netloc or url
    box: queue.SimpleQueue[requests.Response | Exception] = queue.SimpleQueue()

    def ask() -> None:
        headers = {"Accept-Encoding": "identity"}  # so that Content-Length counts the bytes of the file
        try:
            box.put(requests.get(url, stream=True, timeout=(timeout, STALL_SECONDS), headers=headers))
        except Exception as error:  # whatever a hostile answer provokes must not be lost with the thread
            box.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = box.get(timeout=timeout)
    except queue.Empty:
        raise DownloadError(f"no answer from {host} in {timeout:g} seconds") from None
    if isinstance(response, Exception):
        raise DownloadError(f"no answer from {host}: {_root_cause(response)}") from response
    if (status := response.status_code) != 200:
        response.close()
        kind = _PassingError if status >= 500 or status in (408, 429) else DownloadError
        raise kind(f"{host} answered {status} {response.reason}")
    return response


def _root_cause(error: BaseException) -> str:
    """Say in one line what lies below the layers of an HTTP library's exception."""
    while below := error.__cause__ or error.__context__:
        error = below
    return one_line(error)[:200]


def _body(response: requests.Response, name: str) -> Iterator[bytes]:
    """Yield an answer's chunks behind a progress bar; _PassingError if it breaks off, stalls or is short."""
    length = response.headers.get("Content-Length", "")
    coded = response.headers.get("Content-Encoding", "identity") != "identity"  # then the length is another
    expected = int(length) if length.isdecimal() and not coded else None
    received = 0
    with tqdm(total=expected, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        try:
            for chunk in response.iter_content(CHUNK):
                yield chunk
                received += len(chunk)
                bar.update(len(chunk))
        except requests.RequestException as error:
            raise _PassingError(f"broke off after {received:,} bytes: {_root_cause(error)}") from error
    if received == 0 or expected not in (None, received):
        raise _PassingError(f"broke off after {received:,} bytes")


def fetch_package(
    spec: str, member: str, path: Path, sha256: str | None = None, sdist: bool = False, timeout: float = 600.0
) -> None:
    """Copy one file of the package NAME==VERSION to path; timeout in seconds, errors as of download."""
    with unpacked_package(spec, path.parent / ".packages", sdist, timeout) as folder:
        source = (folder / member).resolve()
        if not source.is_relative_to(folder.resolve()):
            raise ValueError(f"member ({member}) must stay inside the package")
        if not source.is_file():
            raise DownloadError(f"{spec} holds no file {member}")
        save(read_chunks(source), path, sha256)


@contextmanager
def unpacked_package(spec: str, scratch: Path, sdist: bool = False, timeout: float = 600.0) -> Iterator[Path]:
    """Unpack NAME==VERSION into a folder below scratch, which is removed afterwards; none of its code runs.

    A wheel is unpacked by uv (or pip), which knows the index and the certificates that this machine uses. An
    sdist it would build, running its setup script; so we only ask uv for the address and unpack it here.
    """
    name, _, version = spec.partition("==")
    if not re.fullmatch(r"\w[\w.-]*", name) or not re.fullmatch(r"\w[\w.+!]*", version):
        raise ValueError(f"spec ({spec}) must read NAME==VERSION")
    scratch.mkdir(parents=True, exist_ok=True)
    for left_behind in scratch.iterdir():  # by a killed run; one that lives is not an hour old
        with suppress(FileNotFoundError):  # and may end just now
            if time.time() - left_behind.stat().st_mtime > 3600:
                shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=scratch) as temporary:
        folder = Path(temporary)
        yield _unpack_sdist(name, version, folder) if sdist else _unpack_wheel(spec, folder, timeout)


def _unpack_wheel(spec: str, folder: Path, timeout: float) -> Path:
    if uv := _find_uv():
        command = [uv, "pip", "install", "--python", sys.executable]
    elif find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install"]
    else:
        raise DownloadError("neither uv nor pip is installed")
    command += ["--no-deps", "--only-binary", ":all:", "--target", str(folder), spec]
    _run([*command, "--quiet", "--dry-run"], timeout, impatient=True)  # tells soon if an index is reached
    _run(command, timeout)
    return folder


def _unpack_sdist(name: str, version: str, folder: Path) -> Path:
    if not (uv := _find_uv()):
        raise DownloadError("uv, which finds source archives, is not installed")
    wanted, lock = folder / "requirements.in", folder / "pylock.toml"
    wanted.write_text(f"{name}=={version}\n")
    # With --no-deps, uv does not run the setup script to learn what the package needs.
    compile_lock = [uv, "pip", "compile", "--quiet", "--no-deps", "--python", sys.executable]
    _run([*compile_lock, str(wanted), "--output-file", str(lock)], 60, impatient=True)
    (package,) = tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]
    source = package.get("sdist", {})
    if "url" not in source:
        raise DownloadError(f"{name}=={version} has no source archive")
    download(source["url"], folder / "archive", source.get("hashes", {}).get("sha256"))
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    try:
        with tarfile.open(folder / "archive") as tar:
            tar.extractall(unpacked, filter="data")  # refuses what would land outside
        return unpacked / os.listdir(unpacked)[0]  # NAME-VERSION
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, IndexError) as error:
        raise DownloadError(f"the archive of {name}=={version} is no good: {one_line(error)}") from error


def _find_uv() -> str | None:
    return os.environ.get("UV") or shutil.which("uv")  # `uv run` sets $UV


def _run(command: list[str], timeout: float, impatient: bool = False) -> None:
    """Run uv or pip; DownloadError with its error and the cause, the last of the lines that follow.

    Impatient, it gives up on a silent index after ANSWER_SECONDS; otherwise a terminal shows its progress.
    """
    limits = {f"{tool}_TIMEOUT": f"{ANSWER_SECONDS:g}" for tool in ("UV_HTTP", "UV_HTTP_CONNECT", "PIP")}
    limits |= {"UV_HTTP_RETRIES": "0", "PIP_RETRIES": "0"}
    show = sys.stderr.isatty() and not impatient
    try:
        done = subprocess.run(
            command,
            env=os.environ | limits if impatient else None,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if show else subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise DownloadError(f"{command[0]} took longer than {timeout:g} seconds") from None
    except OSError as error:
        raise DownloadError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = ((done.stderr or "").strip() or f"{command[0]} failed").splitlines()
        first = next((line for line in lines if line.lower().startswith("error")), lines[0])
        raise DownloadError(" ".join(" ... ".join(dict.fromkeys((first, lines[-1]))).split())[:300])
