"""Write files and folders completely or not at all.

Everything is first written into a hidden folder next to its destination, then synced to the disk and renamed. So a
reader sees either the old file or the new one. A failure (a full disk, a folder without permission, a name that is too
long) raises one TextlocError, and the destination stays unchanged. If a process is killed, its hidden folder is removed
by the next process that writes to the same folder.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from textloc_utils.settings import TextlocError

PART = ".part-"  #: prefix of the hidden folders' names
#: A hidden folder without a writer is removed when it is older than this many seconds. A newer one may not be locked
#: yet.
SETTLED = 60


def write_bytes(path: str | os.PathLike, data: bytes, *, advice: str = "") -> Path:
    """Write a file, completely or not at all, and return its path. Missing parent folders are created."""
    with whole_file(path, advice=advice) as part:
        part.write_bytes(data)
    return Path(path)


def write_text(path: str | os.PathLike, text: str, *, advice: str = "") -> Path:
    """Write text as UTF-8 with unchanged line ends, like :func:`write_bytes`."""
    return write_bytes(path, text.encode(), advice=advice)


def write_json(path: str | os.PathLike, value: object) -> Path:
    """Write a value as indented JSON with a line end, like :func:`write_bytes`."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_state(path: str | os.PathLike, state: dict) -> Path:
    """Write tensors and plain values with ``torch.save``, followed by a digest, like :func:`write_bytes`.

    Raises TypeError, and writes nothing, for a value that :func:`read_state` would refuse (for example a numpy number).
    """
    import torch

    data = io.BytesIO()
    torch.save(state, data)
    data.seek(0)
    try:
        torch.load(data, map_location="meta", weights_only=True)
    except Exception as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]
        raise TypeError(f"{path}: the state holds a value that cannot be read back: {reason}") from None
    return write_bytes(path, data.getvalue() + hashlib.sha256(data.getbuffer()).digest())


def read_state(path: str | os.PathLike) -> dict:
    """Read what :func:`write_state` wrote, onto the CPU. Raises TextlocError for a file that was changed since then."""
    import torch

    try:
        data = Path(path).read_bytes()
        body, digest = data[:-32], data[-32:]
        # torch itself does not notice damaged numbers.
        if hashlib.sha256(body).digest() != digest:
            raise ValueError
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception:  # a file with a correct digest may still come from another library
        raise TextlocError(f"{path} is damaged; delete it, and the run starts from the beginning") from None


def sealed(about: Mapping) -> dict:
    """Return the mapping with the digest of its other entries as ``seal``. An unchanged mapping equals its sealed copy.

    Examples
    --------
    >>> about = sealed({"layers": [1, 2]})
    >>> about == sealed(about), about | {"layers": [1, 3]} == sealed(about | {"layers": [1, 3]})
    (True, False)
    """
    content = {key: value for key, value in about.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as a hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, advice: str = "") -> Iterator[Path]:
    """Yield a temporary path with the same name. When the block ends, the file written there replaces ``path``.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with whole_file(Path(folder.name, "words.txt")) as part:
    ...     _ = part.write_text("STOP")
    >>> Path(folder.name, "words.txt").read_text(), len(os.listdir(folder.name))
    ('STOP', 1)
    """
    path = Path(path)
    with whole_files(path.parent, path.name, advice=advice) as aside:
        yield aside / path.name


@contextlib.contextmanager
def whole_files(folder: str | os.PathLike, *names: str, advice: str = "") -> Iterator[Path]:
    """Yield an empty folder to write to. When the block ends, its files are moved to ``folder``.

    The files in ``names`` are moved last, in this order. The last one should be the file that lists the others. All
    files in ``names`` must have been written. The error message of a failure ends with ``advice``.
    """
    folder = Path(folder)
    with _beside(folder, folder / names[-1] if names else folder, advice) as aside:
        yield aside
        others = sorted(path.name for path in aside.iterdir() if path.name not in names)
        for name in (*others, *names):
            _sync(aside / name)
        for name in (*others, *names):
            os.replace(aside / name, folder / name)
        _sync(folder)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder to fill. When the block ends, it replaces ``path`` and everything that was there.

    A process that is killed between the two renames leaves the old folder under a hidden name. The next call first
    moves it back.
    """
    path = Path(os.path.realpath(path))
    old = path.with_name(f".{path.name}.old")
    with _beside(path.parent, path) as aside:
        if old.is_dir():
            shutil.rmtree(old) if path.exists() else old.rename(path)
        new = aside / path.name
        new.mkdir()
        yield new
        for part in sorted(new.rglob("*"), reverse=True):
            _sync(part)
        _sync(new)
        if path.is_dir():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.is_dir():
                old.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder in the system's folder for temporary files. It is removed when the block ends.

    If a process is killed, its folder is removed by the next call. The parent folder is used only by this user and by
    this package.
    """
    place = Path(tempfile.gettempdir(), f"textloc-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    with _beside(place, place) as aside:
        yield aside


@contextlib.contextmanager
def only_run(folder: str | os.PathLike) -> Iterator[None]:
    """Create and lock a folder, so that no other run uses it. The system releases the lock when this process ends.

    Raises TextlocError if another run has the lock. A new folder that is still empty at the end is removed. On a file
    system without locks, nothing is locked.
    """
    folder = Path(folder)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except BlockingIOError:
        raise TextlocError(f"another run writes to {folder}; wait for it, stop it, or choose another folder") from None
    except OSError as error:
        raise TextlocError(f"cannot write to {folder} ({error.strerror})") from None
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def _beside(folder: Path, path: Path, advice: str = "") -> Iterator[Path]:
    """Yield a locked hidden folder in ``folder``. It is removed at the end, and ``folder``, too, if new and empty."""
    made = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    aside, lock = None, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(folder)
        aside = Path(tempfile.mkdtemp(prefix=PART, dir=folder))
        lock = _locked(aside)
        yield aside
    except Exception as error:
        reason = _reason(error, folder.absolute())
        if reason is None:
            raise
        raise TextlocError(f"cannot write {path} ({reason})" + (f"; {advice}" if advice else "")) from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for each in made:
            with contextlib.suppress(OSError):  # the folder is not empty
                each.rmdir()


def _locked(folder: Path) -> int | None:
    """Lock a folder and return the descriptor. The lock is held until it is closed or the process ends.

    Returns None on a file system without locks. Raises BlockingIOError if another process has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _remove_left_behind(folder: Path) -> None:
    """Remove the hidden folders of killed processes: folders that are older than SETTLED and not locked."""
    for part in folder.glob(f"{PART}*"):
        with contextlib.suppress(OSError):  # its writer is still working, or has just finished
            if part.is_dir() and time.time() - part.stat().st_mtime > SETTLED:
                descriptor = _locked(part)
                if descriptor is not None:
                    shutil.rmtree(part, ignore_errors=True)
                    os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _reason(error: Exception, folder: Path) -> str | None:
    """The system's reason why writing failed. None for an error of another kind or in another folder.

    Errors of safetensors hold the number of the system's error in their text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        named = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else folder
        ours = named.is_relative_to(folder) or folder.is_relative_to(named)
        return os.strerror(error.errno) if ours else None
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else None
