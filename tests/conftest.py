"""Surroundings of every test: one thread per process, folders of our own, nothing of a torchrun around us."""

import functools

import pytest
import torch
from helpers import SMALL, add_backbone, write_class_folders

from pyra_lab import Config, run


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """Models this small only lose by a second thread; no record, cache or data of the machine is seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        patch.setenv("TQDM_DISABLE", "1")  # theirs too: bars would fill their output
        patch.setenv("PYRA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYRA_DATA", str(tmp_path_factory.mktemp("data")))
        for name in ("PYRA_RUNS", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of three classes with 7 images each to train on: two batches of 8, and 5 that an epoch leaves out."""
    return write_class_folders(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def small_backbone():
    """Configs may name helpers.BACKBONE, which is much smaller than the shipped one."""
    with pytest.MonkeyPatch.context() as patch:
        add_backbone(patch.setitem)
        yield


@pytest.fixture(scope="module")
def finished(small_backbone, task, tmp_path_factory):
    """finished(method, dtype) -> (config, its Result): three epochs, uninterrupted, done once for all tests of a file."""

    @functools.cache
    def finished(method="pyra", dtype="float32"):
        config = Config(task=task, **{**SMALL, "method": method, "dtype": dtype})
        return config, run(config, tmp_path_factory.mktemp("finished"), progress=False)

    return finished
