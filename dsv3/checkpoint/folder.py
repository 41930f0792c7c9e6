"""One writer per folder.

Two jobs that write into one folder destroy each other's files in silence: both call the unfinished
shard by the same name, and the one that is stopped removes it under the other's hands. It happens
to whoever starts a job again because it seems to hang. So every writer claims its folder first.

The claim is a lock that the kernel keeps on a small file, ``.dsv3-lock``, and that ends with the
process, however it ends: a killed job leaves no obstacle. The file itself only says who holds it.
Its owner removes it before letting go; whoever has opened it meanwhile sees that the name no
longer leads to the file it has locked, and starts over. Where a file system keeps no locks (some
network disks), the file's being there is the claim, and after a kill it must be removed by hand;
the error says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.files import parse_json, unwritable

LOCK_FILE = ".dsv3-lock"
# What a file system answers that keeps no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_TRIES = 100


@contextlib.contextmanager
def claim(folder: str | Path, task: str) -> Iterator[Path]:
    """Be the only writer of ``folder`` while the block runs; the folder is made if need be.

    task: what the writer does, in words ("convert --tp 2"); the refusal of a second one shows it.
    A folder that was made here and is still empty when the block raises is removed again. Raises
    DSV3Error when another process, or another thread of this one, holds the folder, and when it
    cannot be made or written into. It is not reentrant: who holds a folder calls functions that
    do not claim it themselves.
    """
    folder = Path(folder)
    made, handle = False, None
    try:
        for _ in range(_TRIES):
            made |= _make(folder)
            handle = _lock(folder, task)
            if handle is not None:
                break
        else:
            raise FileNotFoundError(errno.ENOENT, "it vanishes again and again")
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from None
    try:
        yield folder
    except BaseException:
        _let_go(folder, handle)
        if made:
            with contextlib.suppress(OSError):  # what lies in it is not ours to remove
                folder.rmdir()
        raise
    _let_go(folder, handle)


def _make(folder: Path) -> bool:
    """Make the folder; False when it is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise DSV3Error(
                "not a folder", where=folder, fix="Name an empty or new folder"
            ) from None
        return False
    return True


def _lock(folder: Path, task: str) -> int | None:
    """The locked file; None when it went with its owner, so that the caller must try again.

    Raises DSV3Error when another has it.
    """
    path = folder / LOCK_FILE
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            handle, new = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            handle, new = os.open(path, flags), False
    except FileNotFoundError:
        return None
    try:
        by_hand = None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, handle, "Wait for it to end") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            by_hand = f"If it has ended, remove {path}; this file system keeps no locks"
        if by_hand and not new:
            raise _in_use(folder, handle, by_hand)
        if not _leads_to(path, handle):
            os.close(handle)
            return None
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the note
            os.ftruncate(handle, 0)
            os.pwrite(
                handle,
                json.dumps(
                    {"process": os.getpid(), "host": os.uname().nodename, "task": task}
                ).encode(),
                0,
            )
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(handle)
        raise
    return handle


def _leads_to(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _in_use(folder: Path, handle: int, fix: str) -> DSV3Error:
    try:
        note = parse_json(os.pread(handle, 4096, 0).decode("utf-8"))
        holder = f"process {note['process']} on {note['host']}: {note['task']}"
    except (OSError, ValueError, TypeError, KeyError):
        holder = "a process that has not yet written its name"
    return DSV3Error(
        "another job writes into this folder",
        where=folder,
        found=holder,
        fix=f"{fix}, or name another folder",
    )


def _let_go(folder: Path, handle: int) -> None:
    """Remove the file while it is still locked, then unlock it by closing."""
    with contextlib.suppress(OSError):
        if _leads_to(folder / LOCK_FILE, handle):
            os.unlink(folder / LOCK_FILE)
    with contextlib.suppress(OSError):
        os.close(handle)
