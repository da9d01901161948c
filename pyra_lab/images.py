"""Images as tensors: reading, resizing and normalising them, and the cache of what was decoded.

A split fits in memory as uint8, so it is decoded once and kept as a .npy file: no loader stands between it and the device.
"""

import io
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from tqdm import tqdm

from pyra_lab import files

# Name -> (mean, standard deviation): ImageNet's statistics; the 0.5 that SigLIP and the in21k ViTs were trained with; OpenAI's; [0, 1] as it is.
NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3), "none": ((0.0,) * 3, (1.0,) * 3),
         "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}


def normalize(images, norm, dtype=torch.float32):
    """uint8 images (n, 3, h, w) on any device -> float images on it; `norm` is one of NORMS.

    Raises ValueError for another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is not one of {', '.join(NORMS)}")
    mean, std = (rearrange(torch.tensor(v, device=images.device), "c -> 1 c 1 1") for v in NORMS[norm])
    return ((images.float() / 255 - mean) / std).to(dtype)


def check_img_size(img_size):
    """Raises ValueError for a size that isn't a positive integer."""
    if not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size {img_size!r} is not a positive whole number of pixels")


VERSION = 2  # of what read_image makes of a file: a higher one has everything decoded again
# Pillow opens these too, but they hold measurements, drawings or films rather than pictures with a known black and white.
NO_PICTURES = {"EPS", "FITS", "IPTC", "MCIDAS", "MPEG", "SPIDER"}
TURNS = dict(zip(range(2, 9), (getattr(Image.Transpose, name) for name in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))))  # by EXIF orientation


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
    """How a loaded image has to be transposed for its EXIF orientation, or None. EXIF data that can't be read say nothing."""
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


def read_image(file):
    """A file -> PIL image, RGB, as to_rgb makes it; of several frames or pages the first. Raises ValueError, naming the file, if it can't be read."""
    try:
        with Image.open(file) as image:
            if image.format not in list_formats() | {"MPO"}:
                raise ValueError(f"{image.format} files are not used")
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise nearly everything
        unknown = isinstance(error, UnidentifiedImageError)
        why = "it begins like no format that Pillow knows" if unknown else getattr(error, "strerror", None) or files.first_line(error).rstrip(".")
        raise ValueError(f"{file} is not an image that can be read: {why}") from error


def resize(image, size):
    """An RGB PIL image -> uint8 (3, size, size), resized straight to a square, bicubic, as the published code does."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return rearrange(np.asarray(image), "h w c -> c h w")


def map_threads(function, items, title):
    """Yields function(item) for every item, in order, behind a progress bar. Threads share the work, as Pillow releases the GIL."""
    with ThreadPoolExecutor(min(16, files.cores())) as pool, tqdm(desc=title, total=len(items), leave=False, delay=2) as bar:
        try:
            for start in range(0, len(items), 512):  # a few at a time: results that wait for a slow disk stay few
                for result in pool.map(function, items[start : start + 512]):
                    yield result
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- Decoding, once --------------------------------------------------------------------------------------------------


def npy_header(shape):
    """How a .npy file of uint8 begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    return header.getvalue()


def map_cached(file, shape):
    """The images in a .npy file, mapped; None where there is no such file, or an incomplete one (a crash, a full disk)."""
    header = npy_header(shape)
    try:
        with open(file, "rb") as opened:
            if opened.read(len(header)) != header or os.fstat(opened.fileno()).st_size != len(header) + np.prod(shape, dtype=np.int64):
                return None
            return np.memmap(opened, np.uint8, "c", len(header), shape)  # copy-on-write: its owner may write, the file never changes
    except OSError:
        return None


def decode(paths, size, cached, partial, title):
    """Writes image files as a .npy file of uint8 (n, 3, size, size). It gets its name when it is complete, so nobody reads half a file."""
    try:
        with open(partial, "wb") as out:
            out.write(npy_header((len(paths), 3, size, size)))
            for image in map_threads(lambda path: resize(read_image(path), size), paths, f"decoding {title}"):
                out.write(image.tobytes())  # not through a mapping: on a full disk, that kills the process
        os.replace(partial, cached)
    finally:
        partial.unlink(missing_ok=True)


def load_cached(paths, size, title, key, cache=None):
    """Image files -> uint8 array (n, 3, size, size), decoded once: later calls with the same title, size and key map the cached file.

    title: task/split, for the progress bar and the cache file's name; key: changes when a file changes; cache: a folder, by default
    the environment variable PYRA_CACHE, or else runs/cache in the checkout (installed: in the current folder). Of several processes
    that ask at the same time one decodes and the others wait. Raises ValueError for an unreadable image and for a full disk.
    """
    folder = Path(os.path.expanduser(cache or os.environ.get("PYRA_CACHE") or files.home() / "runs" / "cache"))
    cached = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', title)[-100:]}-{size}-{key}.npy"
    shape = (len(paths), 3, size, size)
    images = map_cached(cached, shape)
    if images is not None:
        return images
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.file_lock(cached.with_suffix(".lock")) as locked:
            images = map_cached(cached, shape)  # another process may have decoded them while this one waited
            if images is None:
                # under a lock the name is always the same, so that the next process overwrites what a killed one left
                partial = cached.with_suffix(".partial" if locked else f".{uuid.uuid4().hex}.partial")
                partial.unlink(missing_ok=True)
                needed = len(paths) * 3 * size**2
                if shutil.disk_usage(folder).free < needed:
                    raise ValueError(f"{folder} has no space for {needed / 1e9:.1f} GB of decoded images: free some, or set PYRA_CACHE")
                decode(paths, size, cached, partial, title)
                images = map_cached(cached, shape)
    except OSError as error:
        raise ValueError(f"{folder} can't take the decoded images ({error.strerror or error}): fix that, or set PYRA_CACHE") from error
    return images
