"""Predictions, of a run and of its exported file without PyTorch: the pixels of training, whatever is sent, and rows for what can't be read."""

import csv
import http.client
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ONE_STEP, ROOT, rows, write_tree
from PIL import Image
from torchvision.transforms import v2

from pyra_lab import Config, cli, deploy, images, load_run, predict, run, serving
from pyra_lab.images import NORMS
from pyra_lab.tasks import load_split

pytestmark = pytest.mark.usefixtures("small_backbone")
WITHOUT_TORCH = "import sys\nfor name in ('torch', 'pyra', 'pyra_lab', 'einops'): sys.modules[name] = None\n"  # importing them then fails


@pytest.fixture(scope="module")
def trained(small_backbone, task, tmp_path_factory):
    """A finished run, and its exported file beside a copy of serving.py."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("served")
    result = run(Config(task=task, **ONE_STEP), tmp_path_factory.mktemp("runs"), progress=False)
    deploy.export_onnx(load_run(result), folder / "model.onnx", *NORMS["half"], result.classes)
    (folder / "serving.py").write_text(Path(serving.__file__).read_text())
    return result, folder


def photo(kind):
    """A picture of 31 x 20 pixels as a camera, a scanner or a drawing program writes it -> bytes."""
    noise, out = np.random.default_rng(0).integers(0, 256, (20, 31, 4), dtype=np.uint8), io.BytesIO()
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise[..., :3]).save(out, "JPEG", exif=exif)
    elif kind == "16 bits":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(out, "PNG")
    else:
        Image.fromarray({"transparent": noise, "RGB": noise[..., :3], "grey": noise[..., 0]}[kind]).save(out, "PNG")
    return out.getvalue()


KINDS = ("RGB", "grey", "turned", "16 bits", "transparent")


def test_pixels_are_those_of_training_to_the_bit(tmp_path):
    """As a task of folders decodes them, and as a stream evaluates: also of a file without PyTorch, an open file, and the same as a PIL image."""
    for kind in KINDS:
        for part in ("train", "test"):
            for name in ("a", "b"):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / part / name / f"{kind}.png").write_bytes(photo(kind))
    expected, _ = load_split(f"folder:{tmp_path}", "test", 24)
    files = [tmp_path / "test" / "a" / f"{kind}.png" for kind in sorted(KINDS)]
    for file, pixels in zip(files, expected.numpy()):
        opened = Image.open(file)
        for given in (file, str(file), io.BytesIO(file.read_bytes()), opened, np.asarray(images.read_image(file)).transpose(2, 0, 1)):
            assert np.array_equal(serving.to_pixels(given, 24), pixels), file
        crop = v2.Compose([v2.Resize(27, v2.InterpolationMode.BICUBIC), v2.CenterCrop(24)])(images.read_image(file))
        assert np.array_equal(serving.to_pixels(file, 24, crop=True), np.asarray(crop).transpose(2, 0, 1)), file


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_predictions_are_the_models_own(trained, kind):
    """For a folder, files, PIL images and tensors alike; probabilities add up; the accuracy is the record's."""
    result, folder = trained
    source = result if kind == "run" else folder / "model.onnx"
    test = Path(result.config["task"].removeprefix("folder:")) / "test"
    found = predict(source, test, top=None, batch_size=7, device="cpu", progress=False)
    assert [row.image for row in found] == [str(file) for file in sorted(test.glob("*/*"), key=lambda file: file.parts)]
    assert np.mean([Path(row.image).parent.name == row.classes[0] for row in found]) == pytest.approx(result.accuracy_last)
    pixels, _ = load_split(result.config["task"], "test", 24)
    with torch.no_grad():
        logits = load_run(result)(images.normalize(pixels, "half"))
    for row, p in zip(found, logits.softmax(dim=1)):
        assert row.probabilities == pytest.approx(p.sort(descending=True).values.tolist(), abs=0.02)  # in bf16, where that is fast
        assert sum(row.probabilities) == pytest.approx(1) and sorted(row.classes) == ["blue", "green", "red"]
    for given in (pixels, list(pixels), [Image.open(row.image) for row in found], [Path(row.image) for row in found]):
        again = predict(source, given, top=1, device="cpu", progress=False)
        assert [row.classes for row in again] == [row.classes[:1] for row in found]
    assert predict(source, pixels[0], top=2, device="cpu", progress=False)[0].classes == found[0].classes[:2]
    diverged = serving.Predictor(lambda pixels: np.full((len(pixels), 3), np.nan), 24, ("blue", "green", "red"), False)
    assert serving.predict(diverged, pixels[:1].numpy(), progress=False) == [serving.Prediction("0", (), (), "the model's logits are not finite")]
    with pytest.raises(ValueError, match="an .onnx file holds its weights and runs on the CPU: device and weights are for a run"):
        predict(folder / "model.onnx", pixels, device="cuda", progress=False)


def test_what_cannot_be_read_is_a_row(trained, tmp_path, capsys, monkeypatch):
    """By the command, of a run's id; hidden files and those of other kinds are left out."""
    result, folder = trained
    write_tree(tmp_path / "photos", {"a": 2, "@eaDir": 1, "__pycache__": 1})
    for name, content in {"a/broken.jpg": photo("turned")[:300], "text.png": b"hello", ".hidden.png": b"", "notes.txt": b"", "empty.gif": b""}.items():
        (tmp_path / "photos" / name).write_bytes(content)
    monkeypatch.setenv("PYRA_RUNS", str(Path(result.folder).parent))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 60)).save(tmp_path / "photos" / "huge.png")
    (tmp_path / "photos" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"hello")  # a name that isn't UTF-8
    write_tree(tmp_path / "elsewhere", {"@b": 1})
    for link, target in (("linked", "elsewhere"), ("around", "photos"), ("again", "photos/a")):  # no image comes twice
        (tmp_path / "photos" / link).symlink_to(tmp_path / target)
    with pytest.raises(FileNotFoundError, match="there is no folder .*/nowhere to write out.csv in"):
        cli.main(["predict", Path(result.folder).name, str(tmp_path / "photos"), "--out", str(tmp_path / "nowhere" / "out.csv"), "--device", "cpu"])
    with pytest.warns(UserWarning, match=r"photos: 1 left out: files that aren't images \(\.txt\)$"):
        cli.main(["predict", Path(result.folder).name, str(tmp_path / "photos"), "--out", str(tmp_path / "out.csv"), "--top", "2", "--device", "cpu"])
    assert capsys.readouterr().out == f"8 images in {tmp_path}/out.csv, 5 of which can't be read: the column error says why\n"
    table = list(csv.DictReader((tmp_path / "out.csv").open()))
    named = [row for row in table if "linked" in row["image"] or "caf" in row["image"]]
    assert [bool(row["error"]) for row in named] == [True, False] and named[0]["image"].endswith(r"/caf\udce9.png")
    table = [row for row in table if row not in named]
    with pytest.raises(ValueError, match="it is 1 x 4000 pixels, a strip: its sides may differ by a factor of 100"):
        serving.crop_centre(Image.new("RGB", (1, 4000)), 24)
    assert [Path(row["image"]).name for row in table] == ["0.png", "1.png", "broken.jpg", "empty.gif", "huge.png", "text.png"]
    assert list(table[0]) == ["image", "class", "probability", "class_2", "probability_2", "error"]
    assert [bool(row["class_2"]) for row in table] == [not row["error"] for row in table] == [True] * 2 + [False] * 4
    assert "exceeds limit" in table[4]["error"] and "like no format that Pillow knows" in table[5]["error"]


def test_a_process_without_pytorch(trained, tmp_path):
    """The copied file alone, as a command, gives what `predict` gives of the exported file."""
    result, folder = trained
    test = Path(result.config["task"].removeprefix("folder:")) / "test"
    script = WITHOUT_TORCH + f"import runpy; sys.argv = ['serving.py', 'model.onnx', {str(test)!r}, '--out', {str(tmp_path / 'out.csv')!r}]\n"
    done = subprocess.run([sys.executable, "-c", script + "runpy.run_path('serving.py', run_name='__main__')"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = io.StringIO()
    serving.write_csv(predict(folder / "model.onnx", test, progress=False), out)
    assert (tmp_path / "out.csv").read_text() == out.getvalue()


def test_a_process_without_pytorch_says_what_it_leaves_out(trained, tmp_path):
    """In one line, without a place in the code."""
    write_tree(tmp_path / "photos", {"a": 1})
    for name in ("photo.heic", "notes.txt", ".hidden"):
        (tmp_path / "photos" / name).write_text("none")
    done = subprocess.run([sys.executable, "serving.py", "model.onnx", str(tmp_path / "photos")], cwd=trained[1], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert done.stderr == f"serving: note: {tmp_path}/photos: 2 left out: files that aren't images (.heic, .txt)\n"


def bomb():
    """A PNG file of a few bytes whose picture would take gigabytes."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9000)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


def test_the_service(trained):
    """In a process of its own without PyTorch it answers each upload, as `predict` does or with the reason and what to do, and says how to ask."""
    _, folder = trained
    (folder / "http_server.py").write_text((ROOT / "pyra_lab" / "http_server.py").read_text())
    script = WITHOUT_TORCH + "import runpy; sys.argv = ['http_server.py', 'model.onnx', '--port', '0']; sys.path.insert(0, '.'); "
    with subprocess.Popen([sys.executable, "-c", script + "runpy.run_path('http_server.py', run_name='__main__')"], cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as service:
        try:
            host, port = re.fullmatch(r"curl --data-binary @photo.jpg http://(.+):(\d+)/\n", service.stdout.readline()).groups()

            def ask(method, body=b"", **headers):
                connection = http.client.HTTPConnection(host, int(port), timeout=30)
                connection.request(method, "/", body, {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in headers.items()})
                answer = connection.getresponse()
                assert answer.getheader("Content-Type") == "application/json"
                return answer.status, json.loads(answer.read())

            for kind in KINDS:
                expected, = predict(folder / "model.onnx", io.BytesIO(photo(kind)), progress=False)
                status, found = ask("POST", photo(kind))
                assert status == 200 and found == {"classes": list(expected.classes), "probabilities": pytest.approx(expected.probabilities)}
            for body, headers, status, why in [
                (b"not an image", {}, 400, "like no format that Pillow knows"), (photo("turned")[:300], {}, 400, "not an image that can be read"),
                (bomb(), {}, 400, "exceeds limit"), (b"", {}, 411, "send an image's bytes"), (b"", dict(Content_Length="many"), 411, "Content-Length"),
                (b"", dict(Content_Length=str(10**9)), 413, "an image of at most 20 MB"),
                (photo("RGB"), dict(Content_Type="multipart/form-data; boundary=x"), 415, "curl --data-binary @photo.jpg, without -F"),
            ]:
                found = ask("POST", body, **headers)
                assert found[0] == status and why in found[1]["error"] and len(found[1]) == 1, (found, why)
            status, found = ask("GET")
            assert status == 200 and sorted(found["classes"]) == ["blue", "green", "red"]
            assert found["usage"] == f"curl --data-binary @photo.jpg http://{host}:{port}/"
            assert ask("PUT", photo("RGB")) == (501, {"error": "Unsupported method ('PUT')"})
            assert ask("POST", photo("RGB"))[0] == 200  # it is still there
            again = subprocess.run([sys.executable, "http_server.py", "model.onnx", "--port", port], cwd=folder, capture_output=True, text=True)
            assert again.returncode == 1 and re.fullmatch(rf"http_server: 127.0.0.1, port {port}, can't be listened at: .+ with --host and --port\n", again.stderr)
        finally:
            service.terminate()


@rows("source, given, message", [
    ("no-such-run", "photo.png", "no finished run, run folder, adapter, .onnx file or hub name 'no-such-run'"),
    ("model.onnx", "nowhere", "there is no file or folder 'nowhere'"),
    ("model.onnx", "empty", "empty holds no images"),
    ("model.onnx", np.zeros((3, 4, 4)), "an image must be a file, a PIL image or uint8 .3, h, w., not float64"),
    ("other.onnx", "photo.png", "other.onnx can't be loaded as an ONNX model"),
    ("missing.onnx", "photo.png", "there is no file .*missing.onnx"),
])
def test_what_is_refused(source, given, message, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYRA_RUNS", str(tmp_path))
    (tmp_path / "photo.png").write_bytes(photo("RGB"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.onnx").write_bytes(b"none")
    os.link(trained[1] / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        found = predict(source, given, progress=False)
        raise ValueError(found[0].error)  # an array of the wrong kind is a row
