"""Notebooks as they are committed, and as papermill runs them with other parameters; `pytest --nbval` runs them with their own."""

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
OTHER_PARAMETERS = {
    "quickstart": [dict(task="digits", rate=2.5, epochs=1, seed=1, norm="none")],
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


@pytest.mark.parametrize("name, parameters", [(name, p) for name, sets in OTHER_PARAMETERS.items() for p in sets], ids=str)
def test_runs_with_other_parameters(name, parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "runs"))
    path = next(path for path in NOTEBOOKS if path.stem == name)
    out = papermill.execute_notebook(path, tmp_path / "out.ipynb", parameters=parameters, kernel_name="python3", progress_bar=False, cwd=tmp_path)
    shown = [output.data["application/json"] for cell in out.cells if cell.cell_type == "code" for output in cell.outputs
             if output.output_type == "display_data" and "application/json" in output.data]
    assert len(shown) == 1
    for result in shown[0].values():
        assert 0 <= result["accuracy"] <= 1 and result["images_per_second"] > 0
    recorded = [json.loads(file.read_text())["config"] for file in (tmp_path / "runs").glob("*/result.json")]
    assert recorded and all(config[key] == value for config in recorded for key, value in parameters.items())


def test_a_wrong_parameter_fails_in_one_sentence(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="Unknown task 'cifr100'.*did you mean cifar100"):
        path = next(path for path in NOTEBOOKS if path.stem == "quickstart")
        papermill.execute_notebook(path, tmp_path / "out.ipynb", parameters=dict(task="cifr100"), kernel_name="python3", progress_bar=False, cwd=tmp_path)
