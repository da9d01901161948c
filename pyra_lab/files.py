"""Files: where they are, atomic writes, locks, and the progress bar."""

import contextlib
import functools
import os
import warnings
from pathlib import Path

from tqdm.auto import tqdm

from pyra import first_line

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "data" / "paper").is_dir() else None
DATA = CHECKOUT / "data" if CHECKOUT else PACKAGE / "data"  # the shipped backbone and the paper's tables


def home():
    """Where runs/ and data/ are by default: the checkout, or the current folder where pyra_lab is installed without one."""
    return CHECKOUT or Path.cwd()


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_atomically(path, write):
    """write(partial path), then rename: whenever the process is killed, `path` is complete or as it was before. Raises OSError."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk, in Python and in torch
        full = "" if isinstance(error, FileNotFoundError) else ": is the disk full?"
        raise OSError(f"{path} can't be written ({first_line(error)}){full}") from error
    finally:
        partial.unlink(missing_ok=True)


@functools.cache  # once
def warn_of_no_locks():
    warnings.warn("this file system, or this system, has no locks (flock): take care that no two processes do the same run", stacklevel=4)


def lock(file, wait=True):
    """Locks an open file. Returns True; None where another process holds the lock and wait is False; False, with a warning, where there are no locks."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return None
    except (ImportError, OSError):
        warn_of_no_locks()
        return False


def lock_file(path):
    """The file whose lock is that of the path: itself, or .lock in a folder, since Windows opens no folders."""
    return Path(path) / ".lock" if os.path.isdir(path) else Path(path)


@contextlib.contextmanager
def file_lock(path):
    """Waits for the lock of a path and holds it: yields True, or False at once where there are no locks (Windows, some network file systems).

    path: a folder, or a file that is created where there is none. The kernel releases the lock when its holder ends, however it
    ends. The empty file stays: removing it would let two processes in at once.
    """
    with open(lock_file(path), "ab") as file:
        yield lock(file)


def shorten(items, most=5):
    """The first few of a list, as text, and how many more there are."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def progress(*args, show=True, **kwargs):
    """tqdm's bar, in a notebook as a widget: gone when it is complete, unless leave says otherwise; with TQDM_DISABLE=1, or without show, none."""
    hidden = not show or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")  # tqdm's widget does not look at the environment
    return tqdm(*args, **{"leave": False, "disable": hidden, **kwargs})
