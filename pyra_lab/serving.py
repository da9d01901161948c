"""What a process without PyTorch needs: images as training sees them, and what an exported model says of them. numpy, Pillow, onnxruntime.

This file imports nothing of ours. Copied beside model.onnx it predicts alone, as a module (http_server.py is built on it) or as a command:

    python serving.py model.onnx images/ --top 3 --out predictions.csv

Training reads its images with these very functions, so that a served model sees the same pixels, to the bit.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# ---- From a file to pixels -------------------------------------------------------------------------------------------

# Pillow opens these too, but they hold measurements, drawings or films rather than pictures with a known black and white.
NO_PICTURES = {"EPS", "FITS", "IPTC", "MCIDAS", "MPEG", "SPIDER"}
TURNS = dict(zip(range(2, 9), (getattr(Image.Transpose, name) for name in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))))  # by EXIF orientation
SYSTEM = {"__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "recycler",
          "system volume information", "lost+found", "found.000", "network trash folder", "temporary items",
          "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # what systems leave among others' files, besides names with a dot in front


def list_formats(signed=False):
    """The names of the formats that this Pillow decodes itself; signed: only those that it knows by how a file begins."""
    Image.init()
    stub = lambda factory: isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    return {name for name, (factory, accept) in Image.OPEN.items() if name not in NO_PICTURES and not stub(factory) and (accept or not signed)}


def list_suffixes():
    """The suffixes of those formats' files, in lower case, with their dots."""
    formats = list_formats() | {"MPO"}  # which opens as JPEG does
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def is_image(file):
    """Whether a file, whatever it is called, begins as an image does."""
    try:
        with Image.open(file, formats=sorted(list_formats(signed=True))):
            return True
    except Exception:
        return False


def find_turn(image):
    """How a loaded image has to be transposed for its EXIF orientation, or None. EXIF data that can't be read is ignored."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def transparent_value(image):
    """What an image that isn't loaded yet declares transparent, in the units of its loaded pixels: a value, a colour, a palette's bytes or None.

    Of PNG files with 2, 4 or 3 x 16 bits per pixel Pillow scales the pixels but not this value.
    """
    value, tile = image.info.get("transparency"), getattr(image, "tile", None)
    raw = tile[0][3] if tile and image.format == "PNG" else None
    if raw in ("L;2", "L;4") and isinstance(value, int):
        return value * 255 // (3 if raw == "L;2" else 15)
    return tuple(part >> 8 for part in value) if raw == "RGB;16B" and value else value


def shrink_16_bits(image, transparent):
    """A grey image of 16 bits per pixel, in any byte order -> 8 bits: the upper ones. Its transparent value becomes white."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF file: 12 bits come as they are, and 0 may mean white
    values = np.asarray(image).astype(np.int32)
    grey = (values >> (4 if tags.get(258) == (12,) else 8)).astype(np.uint8)
    if tags.get(262) == 0:
        grey = 255 - grey
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def flatten(image, transparent):
    """A loaded PIL image of any mode -> RGB, on white; `transparent` is its transparent_value."""
    if image.mode.startswith("I"):
        return shrink_16_bits(image, transparent).convert("RGB")
    if transparent is not None:
        made_by_code = image.format is None and image.mode in ("RGB", "L")  # from a palette, say: Pillow keeps its note, but the code wanted these pixels
        image = image.copy()
        if not made_by_code and isinstance(transparent, {"P": (int, bytes), "L": int, "1": int, "RGB": tuple}.get(image.mode, ())):
            image.info["transparency"] = transparent
        else:
            del image.info["transparency"]
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def to_rgb(image):
    """A PIL image of any mode -> RGB, as a viewer shows it: upright by its EXIF orientation, on white where it is transparent.

    16 bits per channel become their upper 8. Colour profiles are not applied. Raises ValueError for signed or 32-bit integers and for
    floats, as nobody knows which of them are black and white, and for an image without pixels; OSError and others where a file is damaged.
    """
    sixteen = image.mode.startswith("I;") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(f"its values are signed or of 32 bits (mode {image.mode}), without a known black and white: save it with 8 or 16 bits")
    if 0 in image.size:
        raise ValueError("it has no pixels")
    transparent = transparent_value(image)
    image.load()
    turn, rgb = find_turn(image), flatten(image, transparent)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # to_rgb of its own result changes nothing
    return rgb


def first_line(error):
    """Why something failed, in one line without a terminal's commands."""
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text[:300]).rstrip(".")


def read_image(file):
    """A file, by name or open -> PIL image, RGB, as to_rgb makes it; of several frames or pages the first.

    Raises ValueError, naming the file, if it can't be read.
    """
    try:
        with Image.open(file) as image:
            if image.format not in list_formats() | {"MPO"}:
                raise ValueError(f"{image.format} files are not used")
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise nearly everything
        why = "it begins like no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)
        name = "what was sent" if hasattr(file, "read") else file
        raise ValueError(f"{name} is not an image that can be read: {why}") from error


def resize(image, size):
    """An RGB PIL image -> uint8 (3, height, width), resized straight to the size, bicubic, as the published code does. size: see Predictor."""
    height, width = (size, size) if isinstance(size, int) else size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def crop_centre(image, size):
    """An RGB PIL image -> uint8 (3, size, size): the shorter side resized to 8/7 of the size, bicubic, and the centre cut out, as MAE evaluates.

    Raises ValueError for a strip.
    """
    if max(image.size) > 100 * min(image.size):  # a few bytes that would be resized to gigabytes
        raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels, a strip: its sides may differ by a factor of 100")
    short = round(size * 8 / 7)
    scaled = [int(short * side / min(image.size)) for side in image.size]
    if list(image.size) != scaled:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (int(round((side - size) / 2)) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


# ---- From images to predictions --------------------------------------------------------------------------------------


class Predictor(NamedTuple):
    """A model that is ready for pixels."""

    forward: Callable  # uint8 (b, 3, height, width) -> logits (b, classes), both numpy's
    size: int | tuple  # pixels of a side, or (height, width)
    classes: tuple  # names by label
    crop: bool = False  # whether images are cut by crop_centre, as those of a stream: task, and not resized straight to a square


class Prediction(NamedTuple):
    """What a model says of an image. A row without classes has an error, which says why the image could not be read."""

    image: str  # the file, or the number among the images that were given
    classes: tuple  # names, the most probable first
    probabilities: tuple
    error: str | None = None


def list_files(folder):
    """The images in a folder and its sub-folders, links followed, sorted: by suffix, or by how a file without one begins; hidden ones are left out.

    Warns, in one line, of files that are no images to this Pillow.
    """
    suffixes, found, skipped, visited = list_suffixes(), [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in visited:  # a link to a folder around it, or to one that had its turn
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".") and name.casefold() not in SYSTEM]
        for path in (os.path.join(place, name) for name in names if not name.startswith((".", "~$")) and name.casefold() not in SYSTEM):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in suffixes or not suffix and is_image(path):
                found.append(path)
            else:
                skipped[suffix or "without a suffix"] += 1
    if skipped:
        kinds = ", ".join(sorted(skipped)[:5]) + " ..." * (len(skipped) > 5)
        warnings.warn(f"{folder}: {skipped.total():,} left out: files that aren't images ({kinds})", stacklevel=1)
    return sorted(found, key=lambda path: path.split(os.sep))


def list_items(images):
    """What `predict` takes as images -> [(name, a file, a PIL image or an array)]. Raises FileNotFoundError, ValueError."""
    if isinstance(images, (str, os.PathLike)):
        path = os.path.expanduser(images)
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no file or folder {str(images)!r}")
        found = list_files(path) if os.path.isdir(path) else [path]
        if not found:
            raise ValueError(f"{images} holds no images: no file in it is of a format that Pillow reads")
        return [(file, file) for file in found]
    if isinstance(images, Image.Image) or hasattr(images, "read") or getattr(images, "ndim", 0) == 3:
        images = [images]
    items = []
    for image in images:
        if isinstance(image, (str, os.PathLike)):
            items += list_items(image) if os.path.isdir(os.path.expanduser(image)) else [(str(image), os.path.expanduser(image))]
        else:
            items.append((str(len(items)), image))
    return items


def to_pixels(image, size, crop=False):
    """A file, a PIL image or uint8 (3, h, w) -> uint8 (3, height, width), as training makes it. Raises ValueError."""
    if isinstance(image, Image.Image):
        try:
            image = to_rgb(image)
        except Exception as error:  # a damaged file may raise nearly everything
            raise ValueError(f"it can't be read: {first_line(error)}") from error
    elif isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
        image = read_image(image)
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or len(array) != 3 or not array.size:
            raise ValueError(f"an image must be a file, a PIL image or uint8 (3, h, w), not {array.dtype} {array.shape}")
        image = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    return (crop_centre if crop else resize)(image, size)


def answer(name, logits, classes, top):
    """The Prediction of an image from its logits (classes,)."""
    if not np.isfinite(logits).all():
        return Prediction(name, (), (), "the model's logits are not finite")
    exp = np.exp(np.float64(logits) - np.max(logits))
    order = np.argsort(-exp, kind="stable")[:top].tolist()
    return Prediction(name, tuple(classes[i] for i in order), tuple(float(exp[i] / exp.sum()) for i in order))


@contextlib.contextmanager
def progress_bar(total, progress):
    """Yields a function to call with the number of images that are done; a bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        progress = False
    with tqdm(total=total, desc="predicting", unit="image", leave=False) if progress else contextlib.nullcontext() as bar:
        yield bar.update if progress else lambda count: None


def predict(predictor, images, top=3, batch_size=32, progress=True):
    """[Prediction], one per image, in order.

    images: the path of an image or of a folder (with all folders in it), an open file, a PIL image, uint8 (3, h, w) or (n, 3, h, w), or a
    list of these. top: how many classes, the most probable first; None: all. An image that can't be read is a row with its reason.
    Raises FileNotFoundError or ValueError before any image is read.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if not (value is None and name == "top") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be at least 1, not {value!r}")
    items, rows = list_items(images), []

    def read(item):
        try:
            return to_pixels(item[1], predictor.size, predictor.crop)
        except (ValueError, MemoryError) as error:
            return first_line(error)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, progress_bar(len(items), progress) as advance:
        chunks = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        ahead = map(lambda chunk: pool.map(read, chunk), chunks)  # the next images are read while the model computes
        following = next(ahead, None)
        for chunk in chunks:
            pixels, following = list(following), next(ahead, None)
            readable = [array for array in pixels if not isinstance(array, str)]
            logits = iter(predictor.forward(np.stack(readable)) if readable else ())
            rows += [Prediction(name, (), (), array) if isinstance(array, str) else answer(name, next(logits), predictor.classes, top)
                     for (name, _), array in zip(chunk, pixels)]
            advance(len(chunk))
    return rows


def check_out(file):
    """Raises FileNotFoundError or ValueError where a file can't be written: before hours of predictions, not after them."""
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(file)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder} to write {os.path.basename(file)} in")
    if os.path.isdir(os.path.expanduser(file)):
        raise ValueError(f"{file} is a folder, not a file to write")


def save_csv(rows, file):
    """Writes predictions as a CSV file, in UTF-8; characters of file names that it can't hold are written as \\x.."""
    with open(os.path.expanduser(file), "w", newline="", encoding="utf-8", errors="backslashreplace") as out:
        write_csv(rows, out)


def write_csv(rows, out):
    """Predictions as CSV to an open text file: image, class, probability, class_2, probability_2 ..., error."""
    top = max((len(row.classes) for row in rows), default=1) or 1
    ends = [""] + [f"_{place}" for place in range(2, top + 1)]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["image", *(f"{what}{end}" for end in ends for what in ("class", "probability")), "error"])
    for row in rows:
        pairs = [text for name, p in zip(row.classes, row.probabilities) for text in (name, f"{p:.6f}")]
        writer.writerow([row.image, *pairs, *[""] * (2 * top - len(pairs)), row.error or ""])


# ---- An exported model -----------------------------------------------------------------------------------------------


def load(file, threads=0):
    """The Predictor of a file that `pyra_lab.export_onnx` wrote, on the CPU. threads: 0: one per core. Raises FileNotFoundError, ImportError, ValueError."""
    import onnxruntime
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has an exception for each kind of damage
        raise ValueError(f"{file} can't be loaded as an ONNX model: {first_line(error)}") from error
    (images, *others), meta = session.get_inputs(), session.get_modelmeta().custom_metadata_map
    if others or images.type != "tensor(uint8)" or len(images.shape) != 4:
        raise ValueError(f"{file} is not a model that export_onnx wrote: it does not take uint8 images (b, 3, h, w)")
    classes = json.loads(meta.get("classes", "[]")) or [str(label) for label in range(session.get_outputs()[0].shape[1])]
    height, width = images.shape[2:]
    size = height if height == width else (height, width)
    return Predictor(lambda pixels: session.run(None, {images.name: pixels})[0], size, tuple(classes), meta.get("crop") == "True")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Classes and probabilities of images, from an exported model, as CSV", allow_abbrev=False)
    parser.add_argument("model", help="model.onnx")
    parser.add_argument("images", nargs="+", help="images, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes per image (default: %(default)s)")
    parser.add_argument("--out", help="file to write (default: the terminal)")
    args = parser.parse_args(argv)
    if args.out:
        check_out(args.out)
    rows = predict(load(args.model), args.images[0] if len(args.images) == 1 else args.images, args.top)
    save_csv(rows, args.out) if args.out else write_csv(rows, sys.stdout)


if __name__ == "__main__":
    warnings.showwarning = lambda message, *place: print(f"serving: note: {message}", file=sys.stderr)
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"serving: {error}")
