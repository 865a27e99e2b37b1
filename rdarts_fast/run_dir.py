"""The run folder: what a search or a retraining leaves on disk, and how it survives being killed.

    config.json         the settings, written once
    environment.json    what it ran on
    space.json          the search space, in a search's folder
    metrics.jsonl       one JSON object a line, one line an epoch
    genotype.json       the found genotype, once there is one
    result.json         what the run ended with, once it has ended
    checkpoints/        last.pt, and others by name
    lock                held by the one process that writes; its text says which

One process writes (`RunDir`), any number read (`Run`), and readers need no lock. A file is written
under a name that starts with `.unfinished-`, synced and renamed, so under its own name it is always
whole; metrics.jsonl alone grows in place, and a line in it counts once its newline is there.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import secrets
import shutil
import socket
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
GENOTYPE = "genotype.json"
RESULT = "result.json"
SPACE = "space.json"
CHECKPOINTS = "checkpoints"
LOCK = "lock"
CHECKPOINT_FORMAT = 1

UNFINISHED = ".unfinished-"
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_PLAIN = (bool, int, float, str, type(None))
_Read = TypeVar("_Read")


class RunDir:
    """A run folder held for writing, until `close`, the end of a `with`, or the process's death."""

    def __init__(self, folder: Path, lock: io.FileIO) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def create(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        checkpoint: Mapping[str, Any] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> RunDir:
        """Make a new run folder and hold it.

        checkpoint: the state before the first step. texts: more files, by name. The whole folder
        appears at once, by a rename; where anything fails, nothing is left behind. Missing parents
        are made. Raises UserError where the folder exists and is not empty, or cannot be made (the
        message names the errno).
        """
        folder = Path(folder)
        files = {CONFIG: _json_text(config).encode(), METRICS: b""}
        files[ENVIRONMENT] = _json_text(environment).encode()
        files |= {name: text.encode() for name, text in (texts or {}).items()}
        if checkpoint is not None:
            files[_checkpoint_name("last")] = _checkpoint_bytes(checkpoint)
        with _explained("create", folder):
            place = Path(os.path.realpath(folder))  # a rename replaces a folder, not a link to one
            _check_free(folder, place)
            return cls(folder, _create(folder, place, files))

    @classmethod
    def open(cls, folder: Path) -> RunDir:
        """Hold an existing run folder and remove what a killed process left unfinished in it.

        Raises UserError where it is no run, or is held (the message names the process and host).
        """
        folder = Path(folder)
        _check_run(folder)
        with _explained("write in", folder):
            lock = _take_lock(folder, folder)
            try:
                (folder / CHECKPOINTS).mkdir(exist_ok=True)
                for place in (folder, folder / CHECKPOINTS):
                    for leftover in place.glob(f"{UNFINISHED}*"):
                        leftover.unlink()
            except BaseException:
                lock.close()
                raise
        return cls(folder, lock)

    def close(self) -> None:
        """Let go of the folder. A second call does nothing."""
        if self._lock.closed:
            return
        with suppress(OSError):
            self._lock.truncate(0)
            # Closing alone would not do: a forked child may hold a copy of the descriptor.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl and sync it; floats keep every bit.

        Half a line that a killed process left is dropped first. Raises ValueError where a number is
        not finite, UserError where the line cannot be written; the file is then as before.
        """
        line = _line(record)
        with self._writing(METRICS) as path:
            _append_line(path, line)

    def cut_metrics(self, count: int) -> None:
        """Keep the first `count` whole lines of metrics.jsonl, atomically.

        Raises UserError where there are fewer.
        """
        if count < 0:
            raise ValueError(f"cut_metrics: expected a count of at least 0, got {count}")
        with self._writing(METRICS) as path:
            data = path.read_bytes() if path.exists() else b""
            lines = _whole_lines(data)
            if len(lines) < count:
                found = f"{path} has {len(lines)} epochs, the checkpoint needs {count}"
                raise UserError(f"{found}: this run cannot be resumed")
            kept = b"".join(lines[:count])
            if kept != data:
                _replace(path, kept)

    def mark_metrics(self, name: str, flags: Callable[[list[dict[str, Any]]], list[bool]]) -> None:
        """Give the records of metrics.jsonl that `flags` chooses the entry NAME, true, atomically.

        flags: takes all records, returns as many flags.
        """
        with self._writing(METRICS) as path:
            records = _read_metrics(path)
            chosen = zip(records, flags(records), strict=True)
            new = [record for record, flag in chosen if flag and not record.get(name)]
            for record in new:
                record[name] = True
            if new:
                _replace(path, b"".join(_line(record) for record in records))

    def save_checkpoint(self, state: Mapping[str, Any], name: str = "last") -> None:
        """Write checkpoints/NAME.pt: killed at any moment, it holds the old state or the new one.

        state: tensors, numbers, strings, None, and lists, tuples and dicts of these; "format" is
        added. Raises TypeError naming an entry of another type (it could be saved but not loaded),
        UserError where the file cannot be written; the previous checkpoint is then untouched.
        """
        data = _checkpoint_bytes(state)
        with self._writing(_checkpoint_name(name)) as path:
            _replace(path, data)

    def load_checkpoint(self, name: str = "last") -> dict[str, Any]:
        """Read checkpoints/NAME.pt, tensors on the CPU.

        Raises UserError where it is missing, truncated, damaged or another program's.
        """
        return _load_checkpoint(self.folder / _checkpoint_name(name))

    def prune_checkpoints(self, kept: Collection[str]) -> None:
        """Remove the checkpoints of epochs (epoch-NNN.pt) but those named."""
        names = {_checkpoint_name(name) for name in kept}
        with self._writing(CHECKPOINTS) as folder:
            for path in folder.glob("epoch-[0-9]*.pt"):
                if f"{CHECKPOINTS}/{path.name}" not in names:
                    path.unlink()

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as NAME, atomically. Raises ValueError where a number is not finite."""
        self.write_text(name, _json_text(value))

    def write_text(self, name: str, text: str) -> None:
        """Write `text` as NAME in the folder, atomically."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write `data` as NAME in the folder, atomically."""
        if Path(name).name != name or not Path(name).suffix:
            raise ValueError(f"expected a file name such as 'genotype.json', got {name!r}")
        with self._writing(name) as path:
            _replace(path, data)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        if self._lock.closed:
            raise RuntimeError(f"{self.folder} is closed: it may be another process's by now")
        path = self.folder / name
        with _explained("write", path):
            # Whoever removed the folder or the lock file has let another process in.
            if not os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self._lock.fileno())):
                raise UserError(f"{self.folder} was replaced while this process wrote to it")
            yield path


@dataclass(frozen=True)
class Run:
    """What a run folder held when it was read."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]  # one an epoch; "abandoned" where a rollback has undone it
    genotype: Genotype | None  # None as long as the run has found none
    result: dict[str, Any] | None  # None as long as the run has not ended

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder, without a lock: another process may be writing to it.

        Raises UserError where it is no run, or names the file that is damaged.
        """
        folder = Path(folder)
        _check_run(folder)
        return cls(
            folder=folder,
            config=read_object(folder / CONFIG),
            environment=read_object(folder / ENVIRONMENT),
            metrics=_read_metrics(folder / METRICS),
            genotype=_read_genotype(folder / GENOTYPE),
            result=read_object(folder / RESULT) if (folder / RESULT).exists() else None,
        )

    @classmethod
    def salvage(cls, folder: Path) -> tuple[Run, list[str]]:
        """Read what is whole of a run folder, and say in a line each what is not.

        Raises UserError where it is no run or its settings cannot be read.
        """
        folder = Path(folder)
        _check_run(folder)
        notes: list[str] = []
        config = read_object(folder / CONFIG)

        def whole(read: Callable[[Path], _Read], name: str) -> _Read | None:
            try:
                return read(folder / name)
            except (UserError, RecursionError) as error:
                notes.append(str(error))
                return None

        environment = whole(read_object, ENVIRONMENT) or {}
        metrics = whole(lambda path: _whole_records(path, notes), METRICS) or []
        genotype = whole(_read_genotype, GENOTYPE)
        result = whole(read_object, RESULT) if (folder / RESULT).exists() else None
        return cls(folder, config, environment, metrics, genotype, result), notes

    @property
    def holder(self) -> str | None:
        """The process that writes to the folder as its lock names it, None where none does. A
        process that was killed still stands there.
        """
        with suppress(OSError):
            return (self.folder / LOCK).read_text(errors="replace").partition("\n")[0] or None
        return None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics without what a rollback has undone: one record an epoch, in order."""
        return [record for record in self.metrics if not record.get("abandoned")]

    def load_checkpoint(self, name: str = "last") -> dict[str, Any]:
        """Read checkpoints/NAME.pt as it is now, tensors on the CPU. Raises as RunDir's does."""
        return _load_checkpoint(self.folder / _checkpoint_name(name))


@contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, type(error).__name__)
        if error.errno in _DISK_FULL:
            text = f"disk full: cannot {action} {path} ({code}): free some space"
        elif error.errno in _NO_PERMISSION:
            text = f"no permission to {action} {path} ({code}): choose another folder"
        else:
            text = f"cannot {action} {path}: {error.strerror or error} ({code})"
        raise UserError(text) from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder of many runs, made where it is not there, against a second process.

    Raises UserError where it is held (the message names the process and host).
    """
    with _explained("write in", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(folder, folder)
    try:
        yield
    finally:
        lock.close()


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically, its folder made. Raises UserError where it cannot be written,
    naming the errno.
    """
    with _explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text.encode())


# Making a folder


def _check_free(folder: Path, place: Path) -> None:
    if not place.exists():
        return
    if not place.is_dir():
        raise UserError(f"cannot create {folder}: a file of that name exists")
    if (place / CONFIG).exists():
        raise UserError(f"{folder} already holds a run: resume it, or choose another folder")
    if any(place.iterdir()):
        raise UserError(f"{folder} exists and is not empty: choose another folder")
    if place.samefile("."):  # replacing it would leave the caller's shell in a deleted folder
        raise UserError(f"{folder} is the current folder: name a new one inside it")


def _create(folder: Path, place: Path, files: Mapping[str, bytes]) -> io.FileIO:
    """Build the folder under a hidden name, rename it to `place`, and return its lock, held."""
    parents: list[Path] = []
    built = _unfinished(place)
    lock = None
    try:
        _make_parents(folder, place.parent, parents)
        built.mkdir()
        if place.exists():
            built.chmod(stat.S_IMODE(place.stat().st_mode))
        lock = _take_lock(built, folder)
        (built / CHECKPOINTS).mkdir()
        for name, data in files.items():
            _write_new(built / name, data)
        _sync_folder(built / CHECKPOINTS)
        _sync_folder(built)
        _rename(folder, built, place)
        built = place
        _sync_folder(place.parent)
    except BaseException:
        if lock:
            lock.close()
        shutil.rmtree(built, ignore_errors=True)
        for parent in reversed(parents):
            with suppress(OSError):  # not empty: another process has begun to use it
                parent.rmdir()
        raise
    return lock


def _make_parents(folder: Path, parent: Path, made: list[Path]) -> None:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot create {folder}: {parent} is not a folder")
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)
        _sync_folder(path.parent)


def _rename(folder: Path, built: Path, place: Path) -> None:
    try:
        os.rename(built, place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"{folder} was made by another process just now: choose another folder"
            ) from error
        if error.errno == errno.EBUSY:
            raise UserError(f"{folder} is a mount point: name a folder inside it") from error
        raise


# The lock


def _take_lock(folder: Path, shown: Path) -> io.FileIO:
    """Lock `folder`, which errors call `shown`."""
    path = folder / LOCK
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 - held until the run ends
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _not_locked(shown, path, error) from error
        file.truncate(0)
        _write_all(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BaseException:
        file.close()
        raise
    return file


def _not_locked(shown: Path, path: Path, error: OSError) -> UserError:
    if error.errno not in _HELD_ELSEWHERE:
        found = f"{shown}: its file system cannot lock files ({error.strerror})"
        return UserError(f"{found}: choose another disk")
    holder = path.read_text(errors="replace").partition("\n")[0] or "another process"
    return UserError(f"{shown} is in use by {holder}: wait until it ends, or stop it")


# Bytes that last


def _unfinished(path: Path) -> Path:
    return path.parent / f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}"


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _write_new(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def _replace(path: Path, data: bytes) -> None:
    temporary = _unfinished(path)
    try:
        _write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a rename is on disk only once its folder is."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system has nothing to sync in a folder
            raise
    finally:
        os.close(file)


def _append_line(path: Path, line: bytes) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = _size_of_whole_lines(file)
        try:
            os.ftruncate(file, size)
            os.lseek(file, size, os.SEEK_SET)
            _write_all(file, line)
            os.fsync(file)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def _size_of_whole_lines(file: int) -> int:
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return os.pread(file, size, 0).rfind(b"\n") + 1


# Reading


def _check_run(folder: Path) -> None:
    with _explained("read", folder):
        if not folder.exists():
            raise UserError(f"no such run folder: {folder}")
        if folder.name.startswith(UNFINISHED) or not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises UserError where it does not."""
    with _explained("read", path):
        data = path.read_bytes()
    return _parse_object(str(path), data)


def _parse_object(where: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: damaged, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: damaged, expected an object, got {type(value).__name__}")
    return value


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    with _explained("read", path):
        data = path.read_bytes() if path.exists() else b""
    lines = enumerate(_whole_lines(data), start=1)
    return [_parse_object(f"{path} line {number}", line) for number, line in lines]


def _whole_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the records that are whole; a line for each other goes to `notes`."""
    with _explained("read", path):
        data = path.read_bytes()
    records = []
    for number, line in enumerate(_whole_lines(data), start=1):
        try:
            records.append(_parse_object(f"{path} line {number}", line))
        except (UserError, RecursionError) as error:
            notes.append(str(error))
    if not data.endswith(b"\n") and data:
        notes.append(f"{path}: half a line at the end, of an epoch that was not finished")
    return records


def _whole_lines(data: bytes) -> list[bytes]:
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _read_genotype(path: Path) -> Genotype | None:
    with _explained("read", path):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        return Genotype.from_json(data.decode(errors="replace"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


# Checkpoints


def _checkpoint_name(name: str) -> str:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"expected a checkpoint's name such as 'last', got {name!r}")
    return f"{CHECKPOINTS}/{name}.pt"


def _check_plain(where: str, value: Any) -> None:
    """Raise TypeError at an entry that a weights_only load would refuse, numpy's numbers too."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(where, key)
            _check_plain(f"{where}[{key!r}]", entry)
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(f"{where}[{index}]", entry)
    elif not isinstance(value, torch.Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{where}: a checkpoint holds plain values, not {type(value).__name__}")


def _checkpoint_bytes(state: Mapping[str, Any]) -> bytes:
    if state.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        raise ValueError(f'expected "format": {CHECKPOINT_FORMAT}, got {state["format"]!r}')
    _check_plain("state", dict(state))
    # In memory first: on a full disk torch's own writer raises an error without errno.
    buffer = io.BytesIO()
    torch.save({**state, "format": CHECKPOINT_FORMAT}, buffer)
    return buffer.getvalue()


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: nothing to resume from") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        # torch's reader does not check the archive's checksums: flipped bits would load as weights.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign archive makes torch raise almost anything
        raise UserError(
            f"{path} is truncated, damaged, or not a checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f'{path} is not a checkpoint of this program: it has no "format"')
    if state["format"] != CHECKPOINT_FORMAT:
        found = f"{path} has format {state['format']}, this version reads {CHECKPOINT_FORMAT}"
        raise UserError(f"{found}: use the version that wrote it")
    return state
