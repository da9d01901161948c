"""Notebooks as they are committed, and as papermill runs them with other parameters; `pytest --nbval` runs them with their own."""

import dataclasses
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import yaml
from PIL import Image

import train

HERE = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))
OTHER_PARAMETERS = {
    "quickstart": [dict(rate=2.5, epochs=1, seed=1, norm="none")],
    "ablation_rank": [dict(s=4, epochs=1, rate=4.0)],
    "ablation_two_stage": [dict(rates=["high"], method="pyra", epochs=1, second_epochs=1)],
    "ablation_lora_dim": [dict(widths=[2, 4], epochs=1, rate=4.0)],
    "features": [dict(epochs=1, images=40, perplexity=10.0)],
    "schedule": [dict(batch_size=2, seconds=0.02, target_speedup=1.5, backbone="vit_tiny_patch16_224")],
    "imagenet_finetune": [dict(epochs=1, processes=2, base_lr=1e-3, workers=1)],
    "compare_peft": [dict(pefts=["fact_tk", "adapter"], methods=["pyra"], with_adapter=["rap"], epochs=1, rates=[4.0], seconds=0.05)],
    "compare_distillation": [dict(epochs=1, rate=4.0, seconds=0.05)],
    "compare_reducers": [dict(methods=["evit", "diffrate"], peft="snf", epochs=1, rates=[4.0], seconds=0.05)],
    "vtab": [dict(methods=["pyra"], rates=[4.0], lrs=[1e-4], seeds=[1, 2])],
    "throughput": [dict(rates=[2.5], batch_sizes=[2], train_batch_size=3, dtypes=["float32"], seconds=0.01, rounds=2)],
    "deploy": [dict(epochs=1, target_speedup=3.0, serve_batch=2, seconds=0.02, seed=1)],
}
WRONG_PARAMETERS = {
    "quickstart": [(dict(task="cifr100"), "Unknown task 'cifr100'.*did you mean cifar100")],
    "ablation_rank": [(dict(rank=4), "there is no parameter 'rank'; there are task, backbone"), (dict(s="zero"), "s must be of type int, not 'zero'"), (dict(s=0), "s must be at least 1")],
    "ablation_two_stage": [(dict(rates=["mid"]), "rate must be 'low', 'high' or a number")],
    "ablation_lora_dim": [(dict(widths=[]), "widths needs an entry"), (dict(widths=[0]), "lora_rank must be at least 1, not 0")],
    "features": [(dict(neighbours=0), "and than the neighbours, of which one is needed"), (dict(images=50), "images must be more than three times perplexity")],
    "schedule": [(dict(target_speedup="fast"), "target_speedup must be of type float")],
    "imagenet_finetune": [(dict(epoch=3), "there is no parameter 'epoch'; did you mean epochs")],
    "compare_peft": [(dict(pefts=["fact"]), "pefts must be of lora, adapter.* not \\['fact'\\]"), (dict(pefts="snf"), "pefts must be of type list, not 'snf'")],
    "compare_reducers": [(dict(batch_size=0), "batch_size and rounds must be at least 1"), (dict(rates=[]), "rates needs an entry"), (dict(methods=["tomme"]), "method must be one of plain, tome, pyra, evit")],
    "compare_distillation": [(dict(teacher="vit_huge"), "teacher must be one of vit_nano_patch4_56")],
    "vtab": [(dict(methods=["pira"]), "method must be one of .*, not 'pira'"), (dict(task_names=[]), "task_names needs an entry"), (dict(lrs=[-1.0]), "modulation_lr must be a finite number"),
             (dict(task_names=["digits", "cifr100"]), "Unknown task 'cifr100'")],
    "throughput": [(dict(rates=["mid"]), "rate must be 'low', 'high' or a number"), (dict(dtypes=["float16"]), "dtype must be one of float32, bfloat16"), (dict(compile="fast"), "compile must be one of None, default"),
                   (dict(rates=[]), "rates needs an entry"), (dict(train_batch_size=0), "batch_size and rounds must be at least 1")],
    "deploy": [(dict(target_speedup=1.0), "target_speedup must be greater than 1"), (dict(path="nowhere"), "nowhere is not a folder")],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_run_once_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_literals_with_a_meaning(path):
    source = next(cell.source for cell in nbformat.read(path, as_version=4).cells if "parameters" in cell.metadata.get("tags", []))
    for line in source.splitlines():
        assert re.fullmatch(r"\w+: \w+ = \S.*  # \S.*", line), line
    assert len(papermill.inspect_notebook(path)) == len(source.splitlines())


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """A task of three classes, one batch to train on: what other parameters do is to be seen, not what is learned."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 15)):
        for name in ("a", "b", "c"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return f"folder:{root}"


def execute(name, parameters, folder):
    path = next(path for path in NOTEBOOKS if path.stem == name)
    return papermill.execute_notebook(path, folder / "out.ipynb", parameters=parameters, kernel_name="python3", progress_bar=False, cwd=folder)


def test_every_notebook_is_tried():
    assert OTHER_PARAMETERS.keys() == WRONG_PARAMETERS.keys() == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("name, parameters", [(name, p) for name, sets in OTHER_PARAMETERS.items() for p in sets], ids=str)
def test_runs_with_other_parameters(name, parameters, small_task, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path / "cache"))
    if name == "vtab":
        parameters = {**parameters, "task_names": [small_task]}
    elif name == "deploy":
        parameters = {**parameters, "path": small_task.removeprefix("folder:")}
    elif name not in ("schedule", "throughput", "imagenet_finetune"):
        parameters = {**parameters, "task": small_task}
    out = execute(name, parameters, tmp_path)
    shown = [output.data["application/json"] for cell in out.cells if cell.cell_type == "code" for output in cell.outputs
             if output.output_type == "display_data" and "application/json" in output.data]
    assert len(shown) == 1 and shown[0]
    for result in shown[0].values():
        if name in ("schedule", "throughput"):
            assert result["speedup"] > 0 and result["mac_ratio"] >= 1
        else:
            accuracies = result["accuracy"] if isinstance(result["accuracy"], list) else [result["accuracy"]]
            assert len(accuracies) == len(parameters.get("seeds", [0])) and all(0 <= accuracy <= 1 for accuracy in accuracies)
    fields = {field.name for field in dataclasses.fields(train.Config)} - {"s", "rate", "device", "dtype", "method", "second_epochs"}
    recorded = [json.loads(file.read_text())["config"] for file in (tmp_path / "runs").glob("*/result.json")]
    assert bool(recorded) == (name not in ("schedule", "throughput"))
    if name == "deploy":
        assert shown[0]["pyra"]["files"] == ["adapter.safetensors", "model.onnx", "model.pt2", "model_card.md", "schedule.json"] == sorted(f.name for f in (tmp_path / "runs" / "deployed").iterdir())
        assert shown[0]["pyra"]["mac_ratio"] > 1 and recorded[0]["rate"] == shown[0]["pyra"]["schedule"]
    for key in parameters.keys() & fields:
        assert all(config[key] == parameters[key] for config in recorded), key
    for key in parameters.keys() & {"s", "rate"}:  # what a method has no use for, its record has the default of
        assert all(config[key] == parameters[key] for config in recorded if config["method"] == "pyra"), key


@pytest.mark.parametrize("name, parameters, sentence", [(name, *case) for name, cases in WRONG_PARAMETERS.items() for case in cases], ids=str)
def test_a_wrong_parameter_fails_at_once_in_one_sentence(name, parameters, sentence, tmp_path, monkeypatch):
    """In the first cell after the parameters, which is executed here as papermill and the kernel would."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    path = next(path for path in NOTEBOOKS if path.stem == name)
    defaults, first = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][:2]
    injected = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in parameters.items())
    namespace = {"In": ["", defaults, injected, first]}
    for source in (defaults, injected):
        exec(source, namespace)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        exec(first, namespace)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_papermill_stops_at_a_wrong_parameter(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    with pytest.raises(papermill.PapermillExecutionError, match="there is no parameter 'rank'; there are task, backbone") as error:
        execute("ablation_rank", dict(rank=4), tmp_path)
    assert error.value.ename == "ValueError" and error.value.exec_count == 3  # parameters, those injected, then the first cell
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", sorted((HERE / "notebooks" / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_paper_settings_are_parameters(path):
    known = papermill.inspect_notebook(path.parents[1] / f"{path.stem}.ipynb")
    for name, value in yaml.safe_load(path.read_text()).items():
        assert type(value).__name__ == known[name]["inferred_type_name"], name


def test_vtab_notebook_lists_its_runs_for_a_cluster(small_task, tmp_path, monkeypatch):
    """First those that choose a learning rate, and ToMe's, which have nothing to wait for."""
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    execute("vtab", dict(task_names=[small_task], seeds=[3], grid_file=str(tmp_path / "grid.jsonl")), tmp_path)
    configs = train.read_grid(tmp_path / "grid.jsonl")
    assert [(c.method, c.modulation_lr, c.train_split, c.eval_split, c.seed) for c in configs] == [
        ("pyra", 1e-4, "train800", "val200", 3), ("pyra", 3e-3, "train800", "val200", 3), ("tome", None, "train800val200", "test", 3)]
    assert not (tmp_path / "runs").exists()


def test_rank_notebook_shows_what_earlier_executions_recorded(small_task, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path / "cache"))
    for s in (2, 3):
        out = execute("ablation_rank", dict(s=s, epochs=1, rate=4.0, task=small_task), tmp_path)
    shown = [output.data["application/json"] for cell in out.cells if cell.cell_type == "code" for output in cell.outputs if "application/json" in output.get("data", {})]
    assert list(shown[0]) == ["ToMe", "s = 2", "s = 3"]
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 3
