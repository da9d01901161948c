"""Two processes under torchrun: each takes its share of every batch, and together they do what one does."""

import dataclasses
import json
import os
import pathlib
import re

import pytest
import torch
from helpers import BACKBONE, ROOT, SMALL, WITH_TESTS, adapter, assert_nearly_same, files_in, python, trained

from pyra_lab import Config, evaluation, processes, records, run
from pyra_lab.config import arguments
from pyra_lab.methods import build_model

TWO = {  # dropout and drop path are on where one process takes two micro-batches: it draws the same
    "pyra": dict(dropout=0.0, drop_path=0.0),
    "two micro-batches": dict(micro_batch=4),
    "ats": dict(method="ats", dropout=0.0, drop_path=0.0),
    "diffrate": dict(method="diffrate", dropout=0.0, drop_path=0.0),
    "teacher and two stages": dict(method="tome", second_epochs=2, teacher=BACKBONE, teacher_weights="none", dropout=0.0, drop_path=0.0),
    "fine-tuning of a stream": dict(method="pyra", peft="full", augment="mae", workers=0, micro_batch=4, lr=1e-3),
}


def torchrun(*args, **kwargs):
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *args, **kwargs)


def config_of_two(name, task):
    fields = {**SMALL, "epochs": 2, "eval_every": 0, **TWO[name]}
    return Config(task=task.replace("folder:", "stream:") if "augment" in fields else task, **fields)


@pytest.fixture(scope="module")
def two_processes(small_backbone, task, tmp_path_factory):
    """The folder in which two processes have done all of TWO, one after the other, on whole batches."""
    folder = tmp_path_factory.mktemp("two")
    configs = [dataclasses.asdict(dataclasses.replace(config_of_two(name, task), micro_batch=None)) for name in TWO]
    (folder / "two.py").write_text(f"""
import json, helpers, torch
from pyra_lab import Config, run
torch.set_num_threads(1)
helpers.add_backbone()
for config in json.loads({json.dumps(configs)!r}):
    run(Config(**config), {str(folder / 'runs')!r}, progress=False)
""")
    done = torchrun(folder / "two.py", cwd=folder, env={**os.environ, **WITH_TESTS})
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.parametrize("name", TWO)
def test_two_processes_equal_one(two_processes, task, tmp_path, name):
    config = config_of_two(name, task)
    one = run(config, tmp_path, progress=False)
    folder = two_processes / dataclasses.replace(config, micro_batch=None).id()
    two = records.read_result(folder)
    assert two.config == {**one.config, "micro_batch": None}
    assert files_in(folder) == files_in(pathlib.Path(one.folder))
    assert [entry["loss"] for entry in two.history] == pytest.approx([entry["loss"] for entry in one.history], rel=1e-4)
    assert [entry["train_accuracy"] for entry in two.history] == pytest.approx([entry["train_accuracy"] for entry in one.history], abs=1 / 16 + 1e-9)
    assert abs(two.accuracy_last - one.accuracy_last) <= 1 / 24 + 1e-9
    assert two.token_counts == pytest.approx(one.token_counts, abs=0.5) and len(two.metrics["accuracy_per_class"]) == 3
    if name == "two micro-batches":  # other draws for a batch in one piece: the equality above says something
        whole = run(dataclasses.replace(config, micro_batch=None), tmp_path, progress=False)
        assert whole.history[0]["loss"] != pytest.approx(one.history[0]["loss"], rel=1e-4)
    elif name != "fine-tuning of a stream":
        assert_nearly_same(adapter(two), adapter(one), trained(build_model(config, 3, one.plan)))


def test_torchrun_of_the_command_line(task, tmp_path):
    config = Config(task=task, backbone="vit_nano_patch4_28", weights="none", method="plain", epochs=1, batch_size=8, dropout=0.0, drop_path=0.0, device="cpu", dtype="float32")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYRA_RUNS": str(tmp_path / "two")}
    done = torchrun("-m", "pyra_lab", "run", *arguments(config), cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("accuracy on test", done.stdout)) == 1
    two, one = records.read_result(tmp_path / "two" / config.id()), run(config, tmp_path / "one", progress=False)
    assert two.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=1e-4) and abs(two.accuracy_last - one.accuracy_last) <= 1 / 24 + 1e-9


def test_a_single_process_changes_nothing_and_metrics_know_the_order_of_images(monkeypatch):
    alone, x = processes.ALONE, torch.arange(3)
    assert alone.first and alone.sum(x) is x and torch.equal(alone.gather(x), x) and alone.broadcast("x") == "x" and alone.wait() is None
    assert processes.from_environment() == alone

    class Two(processes.Processes):
        """The first of two, each of which has every other image: what is gathered has its part first."""

        def gather(self, tensor):
            return torch.cat([tensor, (logits if tensor.ndim == 2 else labels)[1::2]])

    logits, labels = torch.eye(5), torch.arange(5)
    monkeypatch.setitem(evaluation.METRICS, "labels", lambda logits, labels: labels.tolist())
    metrics = evaluation.evaluate(torch.nn.Identity(), [(logits[::2], labels[::2])], processes=Two(0, 2))
    assert metrics["labels"] == [0, 1, 2, 3, 4] and metrics["accuracy"] == 1
