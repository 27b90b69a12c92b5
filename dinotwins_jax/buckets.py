"""Workdirs in a bucket, gs://BUCKET/RUN: a mirror of the small files here, the checkpoints in the bucket.

Objects have no locks, no appending and no renaming, so a command works in a temporary directory, the
mirror: what it reads is downloaded, what it has written is uploaded, each file as a whole. Orbax reads and
writes the checkpoints in the bucket itself, from every process of a run.
"""

import contextlib
import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SCHEME = "gs://"
REQUIREMENT = "gcsfs"  # brings google-cloud-storage
MOUNT = "mount the bucket (gcsfuse BUCKET FOLDER) and give the folder"
LOCK = "lock"  # of lease.py; never mirrored
_START_S, _LATER_S = 15.0, 120.0  # seconds: how long a request is tried again

_mirrors: dict[Path, "Mirror"] = {}  # of this process, by their directories


class NoBucket(OSError):
    """A bucket that cannot be used; the message is one line."""


def is_remote(place: str | os.PathLike) -> bool:
    """Whether a workdir is an address in a bucket; any other address is not supported."""
    return os.fspath(place).startswith(SCHEME)


@contextlib.contextmanager
def at_hand(place: str | os.PathLike, *, writes: bool = False) -> Iterator[Path]:
    """Context manager that gives the directory of a workdir on this machine.

    Args:
      place: a directory, which is given back as it is; or gs://BUCKET/RUN, for which it is a mirror with
        the files, but not the folders, of the run.
      writes: upload what is written there, at the latest at the end.
    Raises:
      NoBucket: there is no such bucket, no permission or no network. Errors that leave the context name
        the address, not the mirror.
    """
    if not is_remote(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="dinotwins-", ignore_cleanup_errors=True) as folder:
        mirror = Mirror(os.fspath(place), Path(folder).resolve(), writes)
        mirror.download()
        mirror.check_writes()
        _mirrors[mirror.folder] = mirror
        try:
            yield mirror.folder
        except BaseException as error:
            with contextlib.suppress(NoBucket):  # what stopped the command takes precedence
                mirror.upload()
            _name_address(error)
            raise
        else:
            mirror.upload()
        finally:
            del _mirrors[mirror.folder]


def mirror_of(path: Path) -> "Mirror | None":
    """The mirror that a path is in; None for a path of this machine."""
    if not _mirrors:
        return None
    path = Path(path).absolute()
    return next((_mirrors[part] for part in (path, *path.parents) if part in _mirrors), None)


def upload(path: Path, every_s: float = 0.0) -> None:
    """Uploads what has changed in the mirror that a path is in, if it is in one.

    Args:
      every_s: seconds; nothing is done if less time has passed since the last upload.
    """
    mirror = mirror_of(path)
    if mirror and time.monotonic() - mirror.uploaded >= every_s:
        mirror.upload()


def download(folder: Path) -> None:
    """Downloads a folder of a workdir, with all that it holds, if it is in a mirror."""
    if mirror := mirror_of(folder):
        mirror.download(Path(folder).relative_to(mirror.folder).as_posix())


def shown(text: str) -> str:
    """A text with the addresses of buckets for the directories of their mirrors."""
    for folder, mirror in _mirrors.items():
        text = text.replace(str(folder), mirror.url)
    return text


def is_file_of_workdir(name: str) -> bool:
    """Whether an object is mirrored: not the lock, a folder's marker, or what would lie outside."""
    return (
        name != LOCK and not name.endswith("/") and not {"..", "/", ""} & {*Path(name).parts, name}
    )


class Mirror:
    """The files of gs://BUCKET/RUN in a directory of this machine."""

    def __init__(self, url: str, above: Path, writes: bool):
        """
        Args:
          url: the address.
          above: the directory in which the mirror is made.
          writes: whether it uploads.
        """
        self.url = url.rstrip("/")
        bucket, _, name = self.url.removeprefix(SCHEME).partition("/")
        if not bucket or not name:
            raise NoBucket(f"{url}: give a bucket and a folder in it, such as gs://bucket/run")
        self.folder = above / Path(name).name
        self.folder.mkdir()
        self.uploaded = 0.0  # time.monotonic()
        self.in_use_by = ""  # the process that has taken the workdir, set by lease.py
        self._writes = writes
        self._prefix = f"{name}/"
        self._known: dict[str, tuple[int, int]] = {}  # name -> size and time of what the bucket has
        self._client, self._bucket = _connected(self.url, bucket)

    def object(self, name: str):
        """The object of a file of the workdir, a google.cloud.storage.Blob."""
        return self._bucket.blob(self._prefix + name)

    def download(self, folder: str = "") -> None:
        """Downloads the files beside `folder`s, or all in one folder; those already here are kept."""
        from google.api_core.exceptions import NotFound

        within = f"{self._prefix}{folder}/" if folder else self._prefix
        options = {"prefix": within, "delimiter": None if folder else "/"}
        with self.speaking():
            for blob in self._client.list_blobs(self._bucket, retry=_retry(_START_S), **options):
                name = blob.name.removeprefix(self._prefix)
                path = self.folder / name
                if not is_file_of_workdir(name) or path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(NotFound):  # removed since
                    blob.download_to_filename(path, retry=_retry(_LATER_S))
                    self._known[name] = _stamp(path)

    def upload(self) -> None:
        """Uploads the files that this process has changed and removes those that it has removed.

        Raises:
          NoBucket: the bucket cannot be written, or another process has taken the workdir.
        """
        if not self._writes:
            return
        if self.in_use_by:
            raise NoBucket(
                f"{self.url} was taken over by {self.in_use_by}: this process writes no more"
            )
        here = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and path.suffix != ".tmp" and name != LOCK:
                here[name] = _stamp(path)
        with self.speaking():
            for name in sorted(here):
                if self._known.get(name) != here[name]:
                    path = self.folder / name
                    self.object(name).upload_from_filename(path, retry=_retry(_LATER_S))
                    self._known[name] = here[name]
            for name in sorted(self._known.keys() - here.keys()):
                self.remove(name)
                del self._known[name]
        self.uploaded = time.monotonic()

    def remove(self, name: str, **conditions) -> None:
        """Removes an object, if it is there."""
        from google.api_core.exceptions import NotFound

        with contextlib.suppress(NotFound):
            self.object(name).delete(retry=_retry(_LATER_S), **conditions)

    def check_writes(self) -> None:
        """Raises NoBucket at once if what is to be written cannot be."""
        if not self._writes:
            return
        with self.speaking():
            name = f"writable-{os.urandom(4).hex()}"
            self.object(name).upload_from_string(b"", retry=_retry(_START_S))
            self.remove(name)

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Context manager that turns errors of the client into NoBucket."""
        with _speaking(self.url):
            yield


def _connected(url: str, bucket: str):
    """(client, bucket) of google.cloud.storage."""
    if importlib.util.find_spec("gcsfs") is None:
        raise NoBucket(f"{url} needs gcsfs: pip install {REQUIREMENT}; or {MOUNT}")
    import fsspec
    from google.cloud import storage

    os.environ.setdefault(
        "EPATH_USE_TF", "false"
    )  # one way to the bucket, with TensorFlow or without
    # Orbax lists what TensorStore has written beside gcsfs: a cached listing would lack it.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    # At every request, where it may not ask for the kind of the bucket, which changes nothing here.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    with _speaking(url):
        client = storage.Client()
        return client, client.bucket(bucket)


def _retry(seconds: float):
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(seconds)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _speaking(url: str) -> Iterator[None]:
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except DefaultCredentialsError:
        raise NoBucket(
            f"{url}: no Google credentials here: gcloud auth application-default login, or {MOUNT}"
        ) from None
    except exceptions.NotFound:
        bucket = url.removeprefix(SCHEME).partition("/")[0]
        raise NoBucket(f"{url}: there is no bucket '{bucket}', or no right to see it") from None
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise NoBucket(f"{url}: no permission to read and write there ({_first(error)})") from None
    except (exceptions.GoogleAPIError, GoogleAuthError, RequestException, ConnectionError) as error:
        raise NoBucket(f"{url} cannot be reached ({_first(error)})") from None


def _first(error: Exception) -> str:
    """First line of the innermost of an error's reasons."""
    inner = (error.__cause__, getattr(error, "reason", None), *error.args)
    for reason in inner:
        if isinstance(reason, Exception):
            return _first(reason)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _name_address(error: BaseException) -> None:
    """Names the address in the text of an error where it names the mirror."""
    error.args = tuple(shown(part) if isinstance(part, str) else part for part in error.args)
    if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
        error.filename = shown(os.fspath(error.filename))
