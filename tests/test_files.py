"""pyra_lab/files.py: files are written whole, and processes take turns at them."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from pyra_lab import files


def list_names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_write_atomically(tmp_path):
    path = tmp_path / "file"

    def fails(partial):
        assert partial != path
        partial.write_text("half of the n")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        files.write_atomically(path, fails)
    assert list_names(tmp_path) == []
    files.write_atomically(path, lambda partial: partial.write_text("old"))
    assert path.read_text() == "old" and list_names(tmp_path) == ["file"]
    with pytest.raises(OSError, match="no space left"):
        files.write_atomically(path, fails)
    assert path.read_text() == "old" and list_names(tmp_path) == ["file"]
    files.write_atomically(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new" and list_names(tmp_path) == ["file"]


def test_a_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    """Windows: neither fcntl nor folders that can be opened. Runs start, though two processes may do the same one."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    files.warn_of_no_locks.cache_clear()
    with pytest.warns(UserWarning, match=r"no locks \(flock\): take care that no two processes do the same run") as warned:
        for path in (tmp_path, str(tmp_path), tmp_path / "file"):
            with files.file_lock(path) as locked:
                assert locked is False
    assert len(warned) == 1
    assert list_names(tmp_path) == [".lock", "file"] and all(file.is_file() for file in tmp_path.iterdir())


def hold_lock(path, messages):
    with files.file_lock(path) as locked:
        messages.put(locked)
        signal.pause()  # until it is killed


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_file_lock_excludes_other_processes_until_its_holder_ends(tmp_path, kind):
    path = tmp_path / "lock" if kind == "file" else tmp_path
    context = multiprocessing.get_context("fork")
    messages = context.Queue()
    first, second = (context.Process(target=hold_lock, args=(path, messages)) for _ in range(2))
    first.start()
    assert messages.get(timeout=60) is True
    descriptor = os.open(files.lock_file(path), os.O_RDWR | os.O_CREAT)
    assert files.lock(descriptor, wait=False) is None  # held by another
    second.start()
    second.join(0.3)
    assert second.is_alive() and messages.empty()  # it waits
    os.kill(first.pid, signal.SIGKILL)
    assert messages.get(timeout=60) is True
    os.kill(second.pid, signal.SIGKILL)
    first.join(60), second.join(60)
    assert files.lock(descriptor, wait=False) is True
    os.close(descriptor)


def test_progress_is_hidden_where_it_is_not_wanted():
    """As text, and as the widget that notebooks show."""
    code = ("import tqdm.notebook, tqdm.std; from pyra_lab import files\n"
            "for files.tqdm in (tqdm.std.tqdm, tqdm.notebook.tqdm):\n"
            "    shown = [files.progress(range(2), **o).disable for o in ({}, {'show': True}, {'show': False})]\n"
            "    print('\\n' + str(shown))")
    for environment, hidden in (({}, [False, False, True]), ({"TQDM_DISABLE": "1"}, [True, True, True])):
        env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | environment
        shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout  # the bars, too
        assert [line for line in shown.splitlines() if line.startswith("[")] == [str(hidden)] * 2
