"""Datacubes at a URL, in an object store or on a web server: read through fsspec, never written.

A `Remote` is as much of a path as the readers of a datacube need: URL and storage options. It travels to
workers in other processes as it is, and holds no credentials unless it was given some; those stay where
fsspec and the library of the object store look for them on each machine (environment, configuration files).
"""

import asyncio
import re
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, is_url

if TYPE_CHECKING:
    from zarr.storage import FsspecStore

_EXTRA = ("s3", "s3a", "http", "https")  # what the extra `remote` brings
_TRANSPORT = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "azure", "adlfs", "fsspec")
_MANGLED = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # what Path makes of a URL
_TOGETHER = 8


@dataclass(frozen=True)
class Remote:
    """A store at a URL.

    Attributes
    ----------
    url : str
        Such as ``s3://bucket/scan.zarr`` or ``https://host/scan.zarr``; anything fsspec knows.
    options : dict
        Storage options of fsspec, such as ``{"anon": True}`` or ``{"endpoint_url": "http://..."}``.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return re.split(r"[/:]", self.url)[-1]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def protocol(self) -> str:
        return re.split(r"::|:", self.url, maxsplit=1)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}  # no open connections

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Bytes `start` to `end` of a file of the store; None if there is no such file.

        Raises
        ------
        OSError, ImportError, ValueError
            If the store cannot be reached or asked, in a sentence.
        """
        try:
            system, root = self._system
            return system.cat_file(f"{root}/{key}", start=start, end=end)
        except FileNotFoundError as err:
            if "bucket" in str(err).lower():
                raise FileNotFoundError(f"{self.url} cannot be opened: {err}") from err
            return None
        except Exception as err:  # each library of an object store has errors of its own
            raise self.explain(err) from err

    def has(self, key: str) -> bool:
        """Whether there is such a file; reads its first byte, for not every server lists folders."""
        return self.read(key, 0, 1) is not None

    def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Those of some small files that are there, read at the same time."""
        names = list(keys)
        with ThreadPoolExecutor(_TOGETHER) as pool:
            found = list(pool.map(self.read, names))
        return {name: data for name, data in zip(names, found, strict=True) if data is not None}

    def exists(self) -> bool:
        """Whether a Zarr store is there and can be read."""
        return self.has("zarr.json") or self.has(".zgroup")

    def check_ranges(self, key: str) -> None:
        """Refuse a web server that answers a request for a part of a file with the whole.

        Raises
        ------
        ValueError
            If it does; single patterns could not be read.
        """
        if len(self.read(key, 0, 1) or b"x") != 1:
            raise ValueError(
                f"the server of {self.url} sends whole files where a part was asked for (no HTTP range "
                "requests), so single patterns cannot be read; use one that can, such as nginx or Apache "
                "(Python's http.server cannot), or copy the store here"
            )

    def stored_bytes(self) -> int | None:
        """Size of all files together; None where the server does not say."""
        system, root = self._system
        try:
            return int(system.du(root)) or None
        except Exception:  # a web server without lists of files
            return None

    def zarr_store(self) -> "FsspecStore":
        """The store for Zarr, read only."""
        from zarr.storage import FsspecStore

        try:
            return FsspecStore.from_url(self.url, storage_options=self.options, read_only=True)
        except Exception as err:
            raise self.explain(err) from err

    @cached_property
    def _system(self) -> tuple[Any, str]:
        """fsspec's file system, and the path of the store in it."""
        from fsspec.core import url_to_fs

        system, root = url_to_fs(self.url, **self.options)
        return system, root.rstrip("/")

    def explain(self, err: BaseException) -> Exception:
        """The error to raise for one of a library's: what happened, and what to do."""
        reason = " ".join(str(err).split()) or type(err).__name__
        status = getattr(err, "status", None)
        if isinstance(err, ImportError):
            return ImportError(self._missing(reason))
        if isinstance(err, ValueError) and "rotocol" in reason:
            return ValueError(f"{self.url} cannot be opened: {reason}; known are s3://, gs://, https:// ...")
        if isinstance(err, PermissionError) or status in (401, 403) or "redential" in type(err).__name__:
            return PermissionError(
                f"{self.url} may not be read from {socket.gethostname()}: {reason}. Credentials come from "
                "the environment or the files of its library (for s3: AWS_PROFILE, AWS_ACCESS_KEY_ID, "
                "~/.aws); for a public bucket: --storage-option anon=true"
            )
        if is_transport(err):
            return ConnectionError(f"{self.url} cannot be reached from {socket.gethostname()}: {reason}")
        return err if isinstance(err, Exception) else RuntimeError(reason)

    def _missing(self, reason: str) -> str:
        package = next((w for w in re.findall(r"[a-z0-9]+fs\b|aiohttp", reason)), None)
        if self.protocol in _EXTRA:
            how = "pip install 'fcunet[remote]'"
        else:
            how = f"pip install {package}" if package else "see the message of fsspec"
        return f"to read {self.url} {package or 'another package'} is needed; type: {how} ({reason})"


Place = Path | Remote


def is_transport(err: BaseException) -> bool:
    """Whether an error is of the way to the data, not of the data."""
    return isinstance(err, OSError | asyncio.TimeoutError) or type(err).__module__.split(".")[0] in _TRANSPORT


def place(store: Any, options: Mapping[str, Any] | None = None) -> Place:
    """Where a store is: a path here, or a `Remote` if it was named by a URL.

    Raises
    ------
    ValueError
        For a URL that went through `pathlib`, which drops a slash.
    """
    if isinstance(store, Remote):
        return store
    if isinstance(store, str) and is_url(store):
        return Remote(store.rstrip("/"), dict(options or {}))
    path = Path(store)
    if _MANGLED.match(str(path)) and not path.exists():
        raise ValueError(f"{path} was a URL until it became a Path; give it as text: 's3://bucket/NAME.zarr'")
    return path


def scan_of(config: Config) -> Place:
    """Where the datacube of a run is.

    Raises
    ------
    ValueError
        If none was given.
    """
    if config.store is None:
        raise ValueError(
            "no datacube was given; name one: fcunet run SCAN.zarr, or Config(store='SCAN.zarr')"
        )
    return place(config.store, config.storage_options)


def local(path: Any, why: str) -> Path:
    """`path` as one on this machine.

    Raises
    ------
    ValueError
        If it is a URL; `why` says what must be local and what to do.
    """
    url = _MANGLED.sub(lambda found: f"{found[0]}/", str(path))
    if is_url(url):
        raise ValueError(f"{url} is a URL; {why}")
    return Path(path)
