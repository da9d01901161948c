"""Predictions of a trained model for images of your own: by run, by adapter, by name on the hub, or by exported file."""

import difflib
import os
import re
from pathlib import Path

import torch

from pyra_lab import release, serving
from pyra_lab.config import Config
from pyra_lab.devices import DTYPES, autocast, check_device
from pyra_lab.images import normalize
from pyra_lab.methods import fold
from pyra_lab.records import Result, read_result, runs_folder


def find_result(source):
    """A Result, the folder or the id of a run, an adapter in such a folder, or a name on the hub -> Result. Raises FileNotFoundError, ValueError."""
    if isinstance(source, Result):
        return source
    path, name = Path(source).expanduser(), str(source)
    for folder in (path, path.parent if path.suffix == ".safetensors" else path, runs_folder() / name):
        if result := read_result(folder):
            return result
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.exists():
        return release.pull(name)
    near = difflib.get_close_matches(name, [file.parent.name for file in runs_folder().glob("*/result.json")], 1, 0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(f"there is no finished run, run folder, adapter, .onnx file or hub name {name!r} (runs are in {runs_folder()}){hint}")


def predictor(source, device=None, weights=None):
    """The serving.Predictor of a trained model: LoRA folded in, in the number type that is fast on the device. Arguments and errors as in `predict`."""
    if str(source).endswith(".onnx"):
        if weights is not None or device not in (None, "cpu"):
            raise ValueError("an .onnx file holds its weights and runs on the CPU: device and weights are for a run")
        return serving.load(os.path.expanduser(source))
    check_device(device)
    result, config = find_result(source), Config(device=device).resolved()  # for its device and number type
    dtype, norm, streamed = DTYPES[config.dtype], result.config["norm"], result.config["task"].startswith("stream:")
    model = fold(release.load_with(result, weights)).to(config.device, dtype).eval()
    classes = result.classes or map(str, range(result.num_classes))

    def forward(pixels):
        with torch.inference_mode(), autocast(config.device, dtype):
            return model(normalize(torch.from_numpy(pixels).to(config.device), norm)).float().cpu().numpy()

    return serving.Predictor(forward, model.img_size, tuple(classes), streamed)


def predict(source, images, top=3, batch_size=32, device=None, weights=None, progress=True):
    """What a trained model says of images: [serving.Prediction(image, classes, probabilities, error)], one per image, in order.

    source: a Result, the folder or the id of a run, its adapter.safetensors, user/name on the Hugging Face hub, or an exported .onnx file
    (which serving.py predicts with in a process without PyTorch). images: the path of an image or of a folder, a PIL image, uint8
    (3, h, w) or (n, 3, h, w), or a list of these; they are resized as in training. top: how many classes, the most probable first; None:
    all. weights: the backbone's, where they are not where the run found them. An image that can't be read is a row with its reason.
    Raises FileNotFoundError or ValueError before any image is read.
    """
    if isinstance(images, torch.Tensor):
        images = images.cpu()
    return serving.predict(predictor(source, device, weights), images, top, batch_size, progress)
