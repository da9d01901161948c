"""A trained model as others get it: a folder with exported files, adapter, record and card; and its way to the Hugging Face hub and back."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

import pyra
from pyra_lab import deploy, files, report, serving, tasks
from pyra_lab.backbones import SHIPPED
from pyra_lab.batches import sample_indices
from pyra_lab.config import Config, arguments, changed
from pyra_lab.devices import has_fast_bfloat16
from pyra_lab.images import NORMS, normalize
from pyra_lab.methods import fold
from pyra_lab.preparation import find_source, image_size
from pyra_lab.records import complete, kept_epoch, read_result
from pyra_lab.speed import summarise_rounds, time_interleaved
from pyra_lab.training import config_of, load_run

EXPORTED = {"float32": "model.onnx", "int8": "model.int8.onnx"}  # format -> exported file
FORMATS = tuple(EXPORTED)
ALONE = ("http_server.py", "serving.py")  # files of this package that run beside an exported file, without it
RELEASED = tuple(sorted((*ALONE, *EXPORTED.values(), "README.md", "adapter.safetensors", "result.json")))


# ---- The record and the model, without this machine ------------------------------------------------------------------


def published(result, weights=None):
    """The Result without this machine's paths; weights: the name by which others find the backbone's, where a file was trained from."""
    config = complete(result.config)
    kind, colon, path = config["task"].partition(":")
    short = lambda path: path and path != SHIPPED and Path(path).suffix in pyra.SUFFIXES and Path(path).name or path
    config |= dict(task=f"{kind}:{Path(path).name}" if kind in ("folder", "stream") else config["task"], data_root=None,
                   weights=weights or short(config["weights"]), teacher_weights=short(config["teacher_weights"]))
    return dataclasses.replace(result, config=config, folder="")


def load_with(result, weights=None):
    """load_run, with other weights for the backbone if given: a file or a name on the hub. Raises FileNotFoundError, ValueError."""
    wanted, exported = weights or result.config["weights"], Path(result.folder) / "model.onnx"
    otherwise = f", or predict with {exported}, which needs none" if exported.is_file() else ""
    if weights is None and wanted != SHIPPED and Path(wanted).suffix in pyra.SUFFIXES and not os.path.isfile(wanted):
        raise FileNotFoundError(f"the backbone's weights are not here, which were {wanted} where this model was trained: "
                                f"pass weights (--weights FILE), a file of the same or its name on the hub{otherwise}")
    try:
        return load_run(dataclasses.replace(result, config={**result.config, "weights": wanted}))
    except ValueError as error:  # the hub did not give them
        raise ValueError(f"{error}{otherwise}") from error


# ---- The card --------------------------------------------------------------------------------------------------------


def mistakes(result, names, most=3):
    """The classes that are taken for each other most often, as text; "–" where the record has no confusion matrix, or there are none."""
    matrix = result.metrics.get("confusion_matrix") or []
    pairs = sorted(((count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count), key=lambda pair: -pair[0])
    return ", ".join(f"{names[i]} taken for {names[j]} ({count})" for count, i, j in pairs[:most]) or "–"


def front_matter(config, metrics, name):
    """What the hub reads of a card, as YAML."""
    task, scores = config.task.partition(":")[2] or config.task, {key: metrics.get(key) for key in ("accuracy", "balanced_accuracy")}
    measured = {"task": {"type": "image-classification"}, "dataset": {"name": task, "type": task, "split": config.eval_split},
                "metrics": [{"type": key, "value": round(value, 4)} for key, value in scores.items() if value is not None]}
    front = {"library_name": "pyra-vit", "pipeline_tag": "image-classification", "tags": ["image-classification", "vision-transformer", "token-merging"]}
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.weights) and Path(config.weights).suffix not in pyra.SUFFIXES and config.weights != "none"
    if on_hub:
        front["base_model"] = config.weights if "/" in config.weights else f"timm/{config.weights}"
    front["model-index"] = [{"name": name, "results": [measured]}]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"])  # JSON is YAML


def usage(formats):
    """What a card says of exported files; nothing where there are none."""
    if not formats:
        return ""
    file = [EXPORTED[known] for known in FORMATS if known in formats][-1]  # int8 where there is one
    return f"""Without PyTorch, in this folder; a file or a folder of images as a table, or an HTTP service that answers with classes and probabilities:

```
pip install numpy pillow onnxruntime
python serving.py {file} images/ --top 3 --out predictions.csv
python http_server.py {file} --port 8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/
```

{"`model.onnx` is the same in float32: slower on most CPUs, without int8's rounding." + chr(10) * 2 if len(formats) > 1 else ""}"""


def card(result, name=None, measured=(), weights=None, formats=FORMATS):
    """The model card of a run: Markdown behind Hugging Face's front matter, without this machine's paths.

    name: user/name on the hub; measured: rows of a table to show, dicts of {column: value}; weights: as in `published`; formats: of the
    exported files.
    """
    size, result = image_size(config_of(result)), published(result, weights)
    config, metrics, split = config_of(result), result.metrics, result.config["eval_split"]
    task, names, norm = config.task.partition(":")[2] or config.task, result.classes or range(result.num_classes), NORMS[config.norm]
    method = report.title(config.method, config.peft, " and ")
    scores = [f"{key.replace('_', ' ')} {metrics[key]:.1%}" for key in ("accuracy", "balanced_accuracy") if metrics.get(key) is not None]
    worst = sorted((value, i) for i, value in enumerate(metrics.get("accuracy_per_class") or []) if value is not None)[:3]
    facts = {
        "classes": f"{result.num_classes}" + (f": {files.shorten(result.classes, 50)}" if result.classes else ", without names"),
        "backbone": f"{config.backbone}, weights {config.weights}, {result.backbone_parameters:,} parameters, adapted with {method}",
        "trained": ", ".join(f"{part} {count:,}" for part, count in result.trained.items() if count) + " parameters",
        "cost": f"{result.macs / 1e6:,.1f} M multiply-adds per image; tokens {', '.join(f'{n:.4g}' for n in result.token_counts)}",
        "input": f"RGB, {size} x {size}, upright, on white where transparent, "
                 + ("the centre of 8/7 of that size" if config.task.startswith("stream:") else "resized straight to a square") + ", bicubic; "
                 f"mean {', '.join(map(str, norm[0]))}, std {', '.join(map(str, norm[1]))}, which is inside the ONNX files",
        f"on {split}": f"{', '.join(scores)}; {kept_epoch(result)}, seed {config.seed}; measured in {config.dtype}: in other number types a few answers differ",
        "weakest classes": ", ".join(f"{names[i]} ({value:.0%})" for value, i in worst) or "–",
        "most frequent mistakes": mistakes(result, names),
        "versions": ", ".join(f"{key} {value}" for key, value in result.versions.items()),
    }
    command = shlex.join(["python", "-m", "pyra_lab", "run", *arguments(config)])
    if config.task.startswith("data:"):  # not a task that a command can name
        command = f"from pyra_lab import Config, run\nrun(Config(**{changed(dataclasses.replace(config, task=Config.task))}), data=(train, test))"
    return f"""{front_matter(config, metrics, name or task)}

# {name or task}

Sorts images into the {result.num_classes} classes of {task}: a {config.backbone} adapted with {method} by [pyra-vit](https://arxiv.org/abs/2403.09192).

{report.markdown_table([{"": key, " ": value} for key, value in facts.items()])}
{f"{chr(10)}## Measured{chr(10) * 2}{report.markdown_table(measured)}{chr(10)}" if measured else ""}
## Use

{usage(formats)}With pyra-vit installed:

```python
from pyra_lab import predict

predict({name or "path/of/this/folder"!r}, "images/")
```

## Training

```
{command}
```

## Limits

It knows these classes only, and gives one of them to every image. Accuracy is that on the {split} split of its own data; images of another kind
may fare worse, and the probabilities are not calibrated. The licences of the backbone's weights and of the images apply to this model too.
"""


# ---- The folder ------------------------------------------------------------------------------------------------------


def calibration_images(result, count=32):
    """Images that a run was trained on, uint8 (n, 3, h, w), chosen at random. Raises FileNotFoundError or ValueError where they are no longer there."""
    config = config_of(result)
    source, size = find_source(config), image_size(config)
    if source.task.group == "Stream":
        images = tasks.stream_split(source.task, config.train_split, lambda image: serving.crop_centre(image, size))
        return np.stack([images[i][0] for i in sample_indices(len(images), count).tolist()])
    pixels, _ = source.load(config.train_split, size)
    return pixels[sample_indices(len(pixels), count)].numpy()


def write_release(result, folder, formats=("float32",), name=None, weights=None, measured=(), images=None):
    """Writes a run's model as others get it. Returns the names of its files.

    result: of a finished run. formats: of the exported files, "float32" (model.onnx) and "int8" (model.int8.onnx); none for a method that
    ONNX can't hold. images: to calibrate int8 with; by default some that were trained on. The folder gets serving.py, which predicts with
    them without PyTorch, http_server.py, which serves them, adapter.safetensors and result.json, which `predict` reads, and README.md, the
    card. What an earlier call wrote there and this one doesn't is removed. name, weights, measured: as in `card`. Raises ValueError or
    FileNotFoundError, or ImportError without onnx's packages, before anything is written.
    """
    for given in formats:
        if given not in FORMATS:
            raise ValueError(f"formats must be some of {', '.join(FORMATS)}, not {given!r}")
    if "int8" in formats and images is None:
        images = calibration_images(result)
    model, streamed = load_with(result), result.config["task"].startswith("stream:")
    folder, needed = Path(folder).expanduser(), ("onnx", "onnxscript", "onnxruntime")[:3 if "int8" in formats else 2]
    if missing := [name for name in needed if formats and importlib.util.find_spec(name) is None]:
        raise ImportError(f"exported files need {' and '.join(missing)}: pip install {' '.join(missing)}, or export with --formats none")
    if formats:
        deploy.check_export(model, "model.onnx", *NORMS[result.config["norm"]], result.classes)
    if (folder / "config.json").is_file() or folder.resolve() == Path(result.folder).resolve():
        raise ValueError(f"{folder} is a run's folder: export to another")
    released = (folder / "adapter.safetensors").is_file() and (folder / "result.json").is_file()  # an earlier call's, perhaps of another model
    if not released and (others := [name for name in RELEASED if (folder / name).exists()]):
        raise ValueError(f"{folder} holds a {others[0]} that export did not write: export to another folder")
    written = {"README.md", "adapter.safetensors", "result.json", *(EXPORTED[given] for given in formats), *(ALONE if formats else ())}
    record, text = dataclasses.asdict(published(result, weights)), card(result, name, measured, weights, formats)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial", dir=folder) as partial:  # what fails leaves the folder as it was
        partial = Path(partial)
        if formats:
            full = partial / (EXPORTED["float32"] if "float32" in formats else "model.partial.onnx")
            deploy.export_onnx(model, full, *NORMS[result.config["norm"]], result.classes, streamed)
            if "int8" in formats:
                deploy.quantize_onnx(full, partial / EXPORTED["int8"], images)
            for file in ALONE:
                shutil.copyfile(Path(serving.__file__).with_name(file), partial / file)
        shutil.copyfile(Path(result.folder) / "adapter.safetensors", partial / "adapter.safetensors")
        (partial / "result.json").write_text(json.dumps(record, indent=1))
        (partial / "README.md").write_text(text, encoding="utf-8")
        for file in sorted({*RELEASED} - written if released else ()):
            (folder / file).unlink(missing_ok=True)
        for file in sorted(written):
            os.replace(partial / file, folder / file)
    return sorted(written)


def in_number_types(result, folder):
    """A released model as a CPU would serve it -> {dtype: (function of uint8 images (b, 3, h, w), bytes)}, bfloat16 where that is fast."""
    found, norm = {}, result.config["norm"]
    for dtype, name in EXPORTED.items():
        if (file := Path(folder) / name).is_file():
            found[dtype] = serving.load(file, torch.get_num_threads()).forward, file.stat().st_size
    if has_fast_bfloat16("cpu"):
        model = fold(load_with(result)).to(torch.bfloat16).eval()
        size = sum(p.nbytes for p in model.parameters())
        with contextlib.suppress(ValueError):  # a PEFT that can't be folded in
            model = deploy.pack(model)
        found["bfloat16"] = lambda pixels: model(normalize(torch.from_numpy(pixels), norm, torch.bfloat16)).float().numpy(), size
    return {dtype: found[dtype] for dtype in ("float32", "bfloat16", "int8") if dtype in found}


@torch.inference_mode()
def compare_formats(models, images, labels, batch_size=16, seconds=3.0, rounds=7):
    """How models do when they are served on this CPU: rows of dicts, one per model and number type, all timed in turn.

    models: {title: (Result, folder of write_release)}. images, labels: to measure the accuracy on, uint8 (n, 3, h, w) and (n,). float32
    and int8 run in onnxruntime, bfloat16 in PyTorch, packed; each with as many threads as torch has here. A row has model, dtype, accuracy
    in [0, 1], images_per_second at batch_size, speedup over the first row, latency of one image in ms, and bytes of the file or weights.
    """
    images, labels, rows, calls = np.asarray(images), np.asarray(labels), {}, {}
    for title, (result, folder) in models.items():
        for dtype, (forward, size) in in_number_types(result, folder).items():
            logits = np.concatenate([forward(images[start : start + batch_size]) for start in range(0, len(images), batch_size)])
            rows[title, dtype] = dict(model=title, dtype=dtype, accuracy=float((logits.argmax(axis=1) == labels).mean()), bytes=size)
            calls[title, dtype] = forward
    many, one = (time_interleaved({key: functools.partial(forward, images[np.arange(b) % len(images)]) for key, forward in calls.items()},
                                  torch.device("cpu"), seconds, rounds) for b in (batch_size, 1))
    for key, speed in summarise_rounds(many, batch_size, dict.fromkeys(many)).items():
        rows[key] |= dict(images_per_second=speed.images_per_second, speedup=speed.speedup, latency=1000 * statistics.median(one[key]))
    return list(rows.values())


# ---- The hub ---------------------------------------------------------------------------------------------------------


def push(folder, name, private=True):
    """Uploads a folder of write_release to the Hugging Face hub as user/name, with the token that `hf auth login` has stored. Returns its address.

    Only what write_release writes is uploaded; what it wrote for an earlier model and not for this one is removed there.
    Raises FileNotFoundError, ValueError.
    """
    from huggingface_hub import HfApi
    folder = Path(folder).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"a name on the hub is user/name, not {name!r}")
    if missing := [file for file in ("README.md", "adapter.safetensors", "result.json") if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: write it with python -m pyra_lab export")
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
        left = [name for name in RELEASED if not (folder / name).is_file()]  # of an earlier model
        HfApi().upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=list(RELEASED), delete_patterns=left)
    except Exception as error:  # the hub's client raises a dozen kinds: no token, no network, no permission
        raise ValueError(f"{name} was not uploaded: {files.first_line(error)}") from error
    return f"https://huggingface.co/{name}"


def pull(name):
    """The Result of a model on the hub, its adapter beside its record in the hub's cache. Raises ValueError."""
    from huggingface_hub import hf_hub_download
    try:
        paths = [Path(hf_hub_download(name, file)) for file in ("adapter.safetensors", "result.json")]
    except Exception as error:
        raise ValueError(f"{name!r} is no run or folder here, and the hub did not give it: {files.first_line(error)}") from error
    return read_result(paths[-1].parent)
