"""Notebooks as they are committed, and as papermill runs them with other parameters; `pytest --nbval` runs them with their own."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import papermill
import papermill.iorw
import papermill.parameterize
import pytest
import torch
import traitlets.config
import yaml
from helpers import BACKBONE, ROOT, rows, write_class_folders
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import capture_output

from pyra_lab import Config
from pyra_lab.grid import read_grid
from pyra_lab.release import RELEASED

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def check_accuracies(shown, runs, n=1):
    """Each result has one accuracy, or a list with one per seed."""
    for result in shown.values():
        accuracies = result["accuracy"] if isinstance(result["accuracy"], list) else [result["accuracy"]]
        assert len(accuracies) == n and all(0 <= accuracy <= 1 for accuracy in accuracies)


def check_tuned(shown, runs):
    """A modulated method has its learning rate tuned with the first seed, and is then run with the one that was best."""
    check_accuracies(shown, runs, n=2)
    assert {result["modulation_lr"] for name, result in shown.items() if name.startswith("folder:")} == {2e-3}
    assert sorted((c["eval_split"], c["seed"], c["modulation_lr"]) for c in read_configs(runs)) == [("test", 1, 2e-3), ("test", 2, 2e-3), ("val200", 1, 2e-3)]


def check_speeds(shown, runs):
    assert not runs.exists()
    for result in shown.values():
        assert result["speedup"] > 0 and result["mac_ratio"] >= 1


def suite_file(task):
    """A file as benchmark --suite writes it, with a section of each kind, one that failed and one that had no time. Returns its path."""
    speed = dict(model="vit", batch=16, images_per_second=9.0, speedup=3.0, latency=1.0, share=0.9, tflops=4.0)
    rows = [dict(section="suite"), dict(section="card", device="cuda", name="A card"), dict(section="card", what="driver", lines=[]),
            dict(section="product", what="large", dtype="bfloat16", tflops=8.0)]
    rows += [dict(section="eager", what=what, **{**speed, "batch": batch}) for what in ("plain", "tome", "pyra") for batch in (1, 16)]
    rows += [dict(section="graph", model="vit", batch=1, error="RuntimeError: no kernel"), dict(section="training", **speed, what="pyra", peak_memory=3e6),
             dict(section="profile", what="pyra", kernel="gemm", calls=48.0, ms=1.0), dict(section="task", what="pyra", seconds=3.0),
             dict(section="attention", tokens=9, microseconds={"mask": 2.0, "mask, FLASH": "no kernel"}), dict(section="merge", tokens=9, left_out="no time")]
    file = Path(task.removeprefix("folder:")) / "gpu.json"
    file.write_text(json.dumps(rows))
    return str(file)


def check_earlier_ranks(shown, runs):
    """Those that an earlier execution recorded are shown too."""
    check_accuracies(shown, runs)
    assert list(shown) == ["ToMe", "s = 1", "s = 2", "s = 3"] and len(read_configs(runs)) == 4


def check_equal_lengths(shown, runs):
    """One stage trains as long as two: of all pipelines with merging, each is given two epochs."""
    check_accuracies(shown, runs)
    configs = [config for config in read_configs(runs) if config["method"] == "pyra"]
    assert sorted((config["epochs"], config["second_epochs"]) for config in configs if config["second_epochs"] is not None) == [(1, 1), (2, 0)]
    assert [config["epochs"] for config in configs if config["second_epochs"] is None] == [2]


def check_mapped(shown, runs):
    """With the small task, a perplexity that its test images are too few for is refused before anything is trained."""
    check_accuracies(shown, runs)
    trained = read_configs(runs)
    with pytest.raises(ValueError, match="perplexity must be less than the 45 test images to map, not 60: .*, -p perplexity 15"):
        execute_first("features", dict(task=trained[0]["task"], perplexity=60.0))
    assert read_configs(runs) == trained


def check_deployed(shown, runs):
    """A folder for others, one model per rate and the target's, which merges by the schedule that was fitted; all on the same images.

    A rate is how many times fewer operations a model does, and one that no schedule reaches is refused.
    """
    curve = shown.pop("curve")
    check_accuracies(shown, runs)
    assert list(shown) == ["unmerged", "merged"] and all([row["dtype"] for row in shown[name]["formats"]][::len(shown[name]["formats"]) - 1] == ["float32", "int8"]
                                                         for name in shown)
    assert curve["files"] == list(RELEASED) and len(curve["accuracy"]) == len(curve["images_per_second"]) == 2
    records = [json.loads(file.read_text()) for file in runs.glob("*/result.json")]
    assert len(records) == 3 and {record["config"]["train_split"] for record in records} == {"train800"}
    assert [record["config"]["rate"] for record in records if record["config"]["eval_split"] == "test"] == [curve["schedule"]] and curve["mac_ratio"] > 1
    fewer, plain = sorted(record["macs"] for record in records if record["config"]["eval_split"] == "val200")
    assert plain / fewer == pytest.approx(1.3, rel=0.02)
    with pytest.raises(ValueError, match="flops_ratio 9 is out of reach: merging down to 4 patches reaches 5.6"):
        execute_first("deploy", dict(rates=[9.0]))


class Case(NamedTuple):
    parameters: dict  # to run with, other than the defaults
    wrong: list  # (parameters, the error's sentence)
    task: Callable = lambda task: dict(task=task)  # the parameters that give a notebook the small task
    check: Callable = check_accuracies  # (what the last cell shows, folder of runs)
    before: dict | None = None  # what differs in an earlier execution


CASES = {
    "quickstart": Case(dict(backbone=BACKBONE, rate=2.5, epochs=1, seed=1, norm="none"), [(dict(task="cifr100"), "Unknown task 'cifr100'.*did you mean cifar100")]),
    "features": Case(dict(backbone="vit_nano_patch4_28", epochs=1, images=40, perplexity=10.0, lr=1e-3),
                     [(dict(neighbours=0), "neighbours must be at least 1 and less than images, 400, not 0"),
                      (dict(images=50), "images must be more than three times perplexity, 30, not 50")], check=check_mapped),
    "ablation_rank": Case(dict(s=3, epochs=1, rate=4.0),
                          [(dict(rank=4), "there is no parameter 'rank'; the parameters are task, backbone"), (dict(s=0), "s must be at least 1")],
                          check=check_earlier_ranks, before=dict(s=2)),
    "ablation_two_stage": Case(dict(rates=["high"], method="pyra", epochs=1, second_epochs=1),
                               [(dict(rates=["mid"]), "rate must be 'low', 'high' or a number")], check=check_equal_lengths),
    "ablation_lora_dim": Case(dict(backbone=BACKBONE, widths=[2, 4], epochs=1, rate=4.0),
                              [(dict(widths=[]), "widths needs an entry"), (dict(widths=[0]), "lora_rank must be at least 1, not 0")]),
    "compare_peft": Case(dict(backbone=BACKBONE, pefts=["fact_tk", "adapter"], methods=["pyra"], with_adapter=["tofu"], rates=[4.0], seconds=0.05),
                         [(dict(pefts=["fact"]), "peft 'fact' is unknown; did you mean fact_t"),
                          (dict(pefts=["snf"], with_adapter=["rap"]), "with_adapter needs adapter among the pefts")]),
    "compare_reducers": Case(dict(backbone=BACKBONE, methods=["evit", "ats"], peft="snf", rates=[4.0], seconds=0.05),
                             [(dict(batch_size=0), "batch_size and rounds must be at least 1"),
                              (dict(methods=["tomme"]), "method 'tomme' is unknown; did you mean tome")]),
    "beyond": Case(dict(backbone=BACKBONE, methods=["pyra", "pitome"], rising=["pyra_row"], rise=0.4, epochs=3, rate=4.0),
                   [(dict(methods=["tome"]), "methods needs pyra, to which the others are compared"),
                    (dict(rising=["evit"]), "rise must be between 0 and 1, and of rising each one of tome, tofu, pyra_row")],
                   task=lambda task: dict(tasks=[task])),
    "compare_distillation": Case(dict(student=BACKBONE, teacher="vit_nano_patch4_28", rate=4.0, seconds=0.05), [(dict(teacher="vit_huge"), "teacher 'vit_huge' is unknown; ")]),
    "vtab": Case(dict(methods=["pyra_row"], rates=[4.0], lrs=[2e-3], seeds=[1, 2]),
                 [(dict(lrs=[-1.0]), "modulation_lr must be a finite number"), (dict(task_names=["digits", "cifr100"]), "Unknown task 'cifr100'"),
                  (dict(methods=["tomme"]), "method 'tomme' is unknown; did you mean tome")],
                 task=lambda task: dict(task_names=[task]), check=check_tuned),
    "imagenet_finetune": Case(dict(methods=["pyra"], epochs=1, processes=2, base_lr=1e-3, workers=1), [(dict(epoch=3), "there is no parameter 'epoch'; did you mean epochs"),
                                (dict(methods=["tomme"]), "method 'tomme' is unknown; did you mean tome")],
                              task=lambda task: dict(path=task.removeprefix("folder:"))),
    "schedule": Case(dict(backbone="vit_nano_patch4_28", batch_size=2, seconds=0.02, target_speedup=1.3, dtype="bfloat16", device="cpu"),
                     [(dict(target_speedup="fast"), "target_speedup must be of type float")],
                     task=lambda task: {}, check=check_speeds),
    "throughput": Case(dict(backbone=BACKBONE, rates=[2.5], batch_sizes=[2], train_batch_size=3, dtypes=["float32"], seconds=0.01, rounds=2),
                       [(dict(dtypes=["float16"]), "dtype must be one of float32, bfloat16"), (dict(suite="gpu.json"), "there is no file 'gpu.json'"),
                        (dict(suite=__file__), "is no file that benchmark --suite has written")],
                       task=lambda task: dict(suite=suite_file(task)), check=check_speeds),
    "deploy": Case(dict(backbone=BACKBONE, target_speedup=1.7, serve_batch=2, seconds=0.02, seed=1, epochs=1, rates=[1.3], augment="light"),
                   [(dict(target_speedup=1.0), "speedup must be greater than 1"), (dict(target_latency=-1.0), "exactly one of speedup, images_per_second and latency, a positive number"),
                    (dict(path="nowhere"), "nowhere is not a folder")],
                   task=lambda task: dict(path=task.removeprefix("folder:")), check=check_deployed),
}


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def read_configs(runs):
    return [json.loads(file.read_text())["config"] for file in runs.glob("*/result.json")]


# ---- As committed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_run_once_from_top_to_bottom(path):
    notebook, cells = read(path.stem), code_cells(path.stem)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    texts = [output.get("text", "") + "".join(output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/markdown")) for output in shown]
    assert not re.search(r"/(tmp|home|root|work|Users|mnt)/", " ".join(texts))  # of the machine that executed it
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    assert notebook.metadata.kernelspec.name == "python3"


@rows("path", NOTEBOOKS)
def test_parameters_are_literals_with_a_meaning(path):
    source = next(cell.source for cell in code_cells(path.stem) if "parameters" in cell.metadata.get("tags", []))
    for line in source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = \S.*  # \S.*", line), line
    assert len(papermill.inspect_notebook(path)) == len(source.splitlines())


@rows("path", NOTEBOOKS)
def test_has_the_skeleton_and_no_table_made_by_hand(path):
    cells = read(path.stem).cells
    assert 8 <= len(cells) <= 14 and all(f"**{word}**" in cells[0].source for word in ("Question.", "Expected.", "Cost."))
    assert not any("|---" in cell.source for cell in cells if cell.cell_type == "code")


def test_every_notebook_is_tried_and_in_the_readme():
    names = {path.stem for path in NOTEBOOKS}
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert CASES.keys() == names == {name for row in rows for name in re.findall(r"\(notebooks/(\w+)\.ipynb\)", row)}


@rows("path", sorted((ROOT / "notebooks" / "paper").glob("*.yaml")))
def test_paper_settings_are_parameters(path):
    """<name>.yaml, and <name>_more.yaml for another of the paper's settings."""
    notebook, = [notebook for notebook in NOTEBOOKS if f"{path.stem}_".startswith(f"{notebook.stem}_")]
    known = papermill.inspect_notebook(notebook)
    for name, value in yaml.safe_load(path.read_text()).items():
        assert type(value).__name__ == known[name]["inferred_type_name"], name


# ---- With other parameters -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """A task of three classes, one batch to train on."""
    return write_class_folders(tmp_path_factory.mktemp("images"), train=24, test=15)


def last_shown(outputs):
    """What a notebook shows last, for machines, out of the data of its outputs, {MIME type: data}."""
    shown, = [data["application/json"] for data in outputs if "application/json" in data]
    return shown


def execute(name, parameters, folder):
    """What the notebook shows last, after papermill has run it with these parameters, in a kernel."""
    out = papermill.execute_notebook(ROOT / "notebooks" / f"{name}.ipynb", folder / "out.ipynb", parameters=parameters,
                                     kernel_name="python3", progress_bar=False, cwd=folder)
    return last_shown([output.get("data", {}) for cell in out.cells if cell.cell_type == "code" for output in cell.outputs])


@pytest.fixture
def shell():
    """IPython in this process, with figures inline: what a kernel does with a cell, without the seconds that it takes to start."""
    off = traitlets.config.Config({"HistoryManager": {"enabled": False}})
    with matplotlib.rc_context():
        shell = InteractiveShell.instance(config=off)
        select_figure_formats(shell, {"png"})
        plt.switch_backend("module://matplotlib_inline.backend_inline")
        yield shell
        shell.restore_sys_module_state()  # __main__
        plt.close("all")
        plt.switch_backend("agg")
    InteractiveShell.clear_instance()


def execute_here(shell, name, parameters):
    """What the notebook shows last, executed in this process with the parameters that papermill writes into it."""
    path, outputs = str(ROOT / "notebooks" / f"{name}.ipynb"), []
    for cell in papermill.parameterize.parameterize_notebook(papermill.iorw.load_notebook_node(path), parameters).cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                result = shell.run_cell(cell.source, store_history=True)
            result.raise_error()
            outputs += [output.data for output in captured.outputs]
    return last_shown(outputs)


def execute_first(name, parameters):
    """Executes the first cell after the parameters here, as papermill and the kernel would -> its variables."""
    defaults, first = [cell.source for cell in code_cells(name)][:2]
    injected = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in parameters.items())
    namespace = {"In": ["", defaults, injected, first]}
    for source in (defaults, injected, first):
        exec(source, namespace)
    return namespace


@pytest.mark.parametrize("name", CASES)
def test_runs_with_other_parameters(name, small_task, small_backbone, shell, tmp_path, monkeypatch):
    """And each of them arrives: there is a run whose config has its value."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    case = CASES[name]
    parameters = {**case.parameters, **case.task(small_task)}
    if case.before:
        execute(name, {**parameters, **case.before}, tmp_path)
    shown = execute_here(shell, name, parameters)
    assert shown
    case.check(shown, tmp_path / "runs")
    configs = read_configs(tmp_path / "runs")
    for key in parameters.keys() & {field.name for field in dataclasses.fields(Config)} if configs else ():
        assert parameters[key] in [config[key] for config in configs], key


@pytest.mark.parametrize("name, parameters, sentence", [(name, *wrong) for name, case in CASES.items() for wrong in case.wrong], ids=str)
def test_a_wrong_parameter_fails_at_once_in_one_sentence(name, parameters, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        execute_first(name, parameters)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_papermill_stops_at_a_wrong_parameter(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    with pytest.raises(papermill.PapermillExecutionError, match="there is no parameter 'rank'; the parameters are task, backbone") as error:
        execute("ablation_rank", dict(rank=4), tmp_path)
    assert error.value.ename == "ValueError" and error.value.exec_count == 3  # parameters, those injected, then the first cell
    assert not (tmp_path / "runs").exists()


def test_vtab_notebook_lists_its_runs_for_a_cluster(small_task, shell, tmp_path, monkeypatch):
    """First those that choose a learning rate, one for each modulated method, and ToMe's, which have nothing to wait for. A machine without a GPU must be told of the cluster's."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    parameters = dict(task_names=[small_task], methods=["tome", "pyra", "pyra_row"], seeds=[3], grid_file=str(tmp_path / "grid.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for given in ({}, dict(device="cuda"), dict(dtype="bfloat16")):
            with pytest.raises(ValueError, match="this machine has no GPU: pass -p device cuda -p dtype bfloat16"):
                execute_first("vtab", {**parameters, **given})
        for given in (dict(device="cpu"), dict(device="cuda", dtype="bfloat16")):
            assert {config.device for config in execute_first("vtab", {**parameters, **given})["tuning"].values()} == {given["device"]}
    execute_here(shell, "vtab", {**parameters, "device": "cpu"})
    configs = read_grid(tmp_path / "grid.jsonl")
    assert [(c.method, c.modulation_lr, c.train_split, c.eval_split, c.seed) for c in configs] == [
        *((method, lr, "train800", "val200", 3) for method in ("pyra", "pyra_row") for lr in (1e-4, 3e-3)), ("tome", None, "train800val200", "test", 3)]
    assert not (tmp_path / "runs").exists()
