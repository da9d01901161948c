"""A model for others: the folder, its card, and the way to the hub and back, with a folder in the hub's place."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from helpers import ONE_STEP, adapter, files_in, identical, randomise, rows, trained
from safetensors.torch import save_file

import pyra
from pyra_lab import Config, card, cli, deploy, load_run, predict, pull, push, run, write_release
from pyra_lab.release import RELEASED, calibration_images
from pyra_lab.tasks import load_split

pytestmark = pytest.mark.usefixtures("small_backbone")


@pytest.fixture(scope="module")
def result(small_backbone, task, tmp_path_factory):
    """A run whose weights came from a file."""
    file = tmp_path_factory.mktemp("weights") / "secret.safetensors"
    model = randomise(pyra.create_model(ONE_STEP["backbone"], num_classes=0), seed=1)  # at least 0.01 between an image's two best classes
    save_file({name: p.detach() for name, p in model.named_parameters()}, file)
    return run(Config(task=task, **{**ONE_STEP, "weights": str(file)}), tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub with a folder in the hub's place; `asked` lists what it was asked for."""
    asked = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            asked.append((name, private))
            (tmp_path / "hub" / name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, allow_patterns, delete_patterns):
            for name in delete_patterns:
                (tmp_path / "hub" / repo_id / name).unlink(missing_ok=True)
            for file in Path(folder_path).iterdir():
                if file.name in allow_patterns:
                    shutil.copy(file, tmp_path / "hub" / repo_id)

    def download(name, file):
        if not (tmp_path / "hub" / name / file).is_file():
            raise ValueError(f"404: no {name}")
        return str(tmp_path / "hub" / name / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_to_the_hub_and_back(result, hub, tmp_path, monkeypatch, capsys):
    """By the commands; only what belongs to the model is uploaded, and by its name it predicts what the run predicts."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder, photos = tmp_path / "release", Path(result.config["task"].removeprefix("folder:")) / "test"
    cli.main(["export", result.folder, str(folder), "--name", "me/colours"])
    assert files_in(folder) == sorted(RELEASED) and capsys.readouterr().out.startswith("README.md, adapter.safetensors, http_server.py, model.int8.onnx")
    (folder / "private.txt").touch()
    cli.main(["push", str(folder), "me/colours"])
    assert capsys.readouterr().out == "https://huggingface.co/me/colours\n" and hub == [("me/colours", True)]
    assert files_in(tmp_path / "hub/me/colours") == sorted(RELEASED)

    weights = result.config["weights"]
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path / "no runs"))
    expected = predict(result, photos, device="cpu", progress=False)
    assert predict("me/colours", photos, device="cpu", weights=weights, progress=False) == expected
    assert predict(folder, photos, device="cpu", weights=weights, progress=False) == expected
    assert [row.classes[0] for row in predict(folder / "model.onnx", photos, progress=False)] == [row.classes[0] for row in expected]
    with pytest.raises(FileNotFoundError, match="the backbone's weights are not here, which were secret.safetensors where this model was trained: "
                                                r"pass weights \(--weights FILE\), .*, or predict with .*me/colours/model.onnx, which needs none$"):
        predict("me/colours", photos, progress=False)
    with pytest.raises(ValueError, match="'vit_none.tag' is no file here, .* lists where to get it., or predict with .*/release/model.onnx, which needs none$"):
        predict(folder, photos, weights="vit_none.tag", progress=False)
    assert pull("me/colours").metrics == result.metrics
    with pytest.raises(ValueError, match="'me/shapes' is no run or folder here, and the hub did not give it: 404: no me/shapes"):
        predict("me/shapes", photos)
    write_release(result, folder, formats=())  # without ONNX files, which are of another model by then
    push(folder, "me/colours")
    assert files_in(tmp_path / "hub/me/colours") == ["README.md", "adapter.safetensors", "result.json"]


def test_the_card_tells_a_stranger_and_nothing_of_this_machine(result, task, tmp_path, monkeypatch):
    text = card(result, "me/colours", [{"images/s": 12.5, "size, MB": 3}], weights="timm/small")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(front)
    assert front["library_name"] == "pyra-vit" and front["pipeline_tag"] == "image-classification" and front["base_model"] == "timm/small"
    measured = {metric["type"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert measured == {name: round(result.metrics[name], 4) for name in ("accuracy", "balanced_accuracy")}
    for part in ("blue, green, red", f"accuracy {result.accuracy_last:.1%}", "24 x 24", "12.5", "--weights=timm/small", "predict('me/colours'", "pip install numpy pillow onnxruntime",
                 "python http_server.py model.int8.onnx", "curl --data-binary @photo.jpg"):
        assert part in body, part
    assert "model.int8.onnx" not in card(result, formats=("float32",)) and "python serving.py model.onnx images/" in card(result, formats=("float32",))
    assert ".onnx" not in card(result, formats=()) and "Without PyTorch" not in card(result, formats=())
    write_release(result, tmp_path / "bare", formats=())
    assert "Without PyTorch" not in (tmp_path / "bare" / "README.md").read_text()
    for file in ("model.onnx", "model.int8.onnx", "serving.py", "mine.txt"):
        (tmp_path / "bare" / file).touch()
    assert "model.onnx" not in write_release(result, tmp_path / "bare", formats=())  # what an earlier call may have written is of another model
    (tmp_path / "bare" / "mine.txt").unlink()
    with pytest.raises(ValueError, match="is a run's folder: export to another"):
        write_release(result, result.folder, formats=())
    shutil.copytree(result.folder, tmp_path / "other")  # another run's
    with pytest.raises(ValueError, match="other is a run's folder: export to another"):
        write_release(result, tmp_path / "other", formats=())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *args: (_ for _ in ()).throw(OSError("No space left on device")))
        for name in ("bare", "new"):  # an export that fails leaves a folder as it was, and can be repeated
            with pytest.raises(OSError, match="No space left"):
                write_release(result, tmp_path / name, formats=())
        patch.setattr(deploy, "LARGEST", 1000)
        with pytest.raises(ValueError, match="an ONNX file holds at most 2 GB, and the weights take"):
            write_release(result, tmp_path / "new")
    assert files_in(tmp_path / "new") == [] and write_release(result, tmp_path / "new", formats=()) == files_in(tmp_path / "bare")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("three weeks of notes")
    with pytest.raises(ValueError, match="mine holds a README.md that export did not write: export to another folder"):
        write_release(result, tmp_path / "mine", formats=())
    assert files_in(tmp_path / "mine") == ["README.md"]
    own = card(dataclasses.replace(result, config={**result.config, "task": "data:0123"}))  # Datasets have no name that a command could use
    assert "data=(train, test))" in own and "python -m pyra_lab run" not in own
    assert files_in(tmp_path / "bare") == ["README.md", "adapter.safetensors", "result.json"]
    record = json.loads((tmp_path / "bare" / "result.json").read_text())
    folder = task.removeprefix("folder:")
    for text in (text, card(result), json.dumps(record)):
        assert not re.search(f"{folder}|{Path(result.config['weights']).parent}|{result.folder}", text)
    assert identical(trained(load_run(result)), adapter(result))


def test_int8_is_calibrated_on_what_was_trained_on(result, task):
    """Of a folder at the model's size, of a stream as it is evaluated."""
    known = {image.tobytes() for image in load_split(task, "train800val200", 24)[0].numpy()}
    found = calibration_images(result, 5)
    assert found.shape == (5, 3, 24, 24) and {image.tobytes() for image in found} < known
    streamed = dataclasses.replace(result, config={**result.config, "task": task.replace("folder:", "stream:")})
    assert calibration_images(streamed, 5).shape == (5, 3, 24, 24)


@rows("call, message", [
    (lambda result, folder: write_release(result, folder, ("int4",)), "formats must be some of float32, int8, not 'int4'"),
    (lambda result, folder: push(folder, "colours"), "a name on the hub is user/name, not 'colours'"),
    (lambda result, folder: push(folder, "me/colours"), "has no README.md, adapter.safetensors, result.json: write it with python -m pyra_lab export"),
])
def test_what_is_refused(call, message, result, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(result, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
