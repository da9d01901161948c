"""Config: all that a run depends on, as a dataclass, a command line and an id."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pyra
from pyra_lab.augmentation import AUGMENTS
from pyra_lab.backbones import BACKBONES, MODULATION_LRS, SHIPPED, default_img_size
from pyra_lab.devices import DTYPES, check_device_name, default_device, has_fast_bfloat16
from pyra_lab.images import NORMS
from pyra_lab.layouts import SPLITS, overlap
from pyra_lab.methods import METHODS, OPTIONAL, PEFTS
from pyra_lab.vtab import ALIASES

KEEP = ("last", "best")


def option(default, help, choices=None):
    """A field. choices: the values that it may have, a table whose rows may have a help text of their own."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """All that a run depends on. None means: as the paper's Tables 2-4 say for the backbone, or as the device allows."""

    # what
    task: str = option("sprites_location", "a task of VTAB-1k, folder:/path/to/images, stream:/path/to/imagenet, sprites_... or digits")
    backbone: str = option("vit_nano_patch4_56", "timm's name; with .mae: average pooling", BACKBONES)
    weights: str | None = option(None, "a file or a name on the Hugging Face hub; 'none': random; by default the backbone's own")
    method: str = option("pyra", "how operations are saved; every method is held to those of ToMe at `rate`", METHODS)
    rate: str | float | list = option(
        "high", "low, high, a ratio (F/f of Eq. (1), an approximation; pyra.solve_macs meets one), or the schedule, a list with the pairs of each block")
    img_size: int | None = option(None, "pixels of a side; by default the backbone's: 224 for most")
    s: int = option(1, "rank of PYRA's generators")
    peft: str = option("lora", "what is trained besides reducer and head", PEFTS)
    lora_rank: int | None = option(None, "LoRA's h; by default the paper's for the backbone")
    lora_targets: str = option("qkv", "the maps of a block that get LoRA: qkv, proj, fc1, fc2, separated by commas")
    lora_alpha: float | None = option(None, "LoRA's update is scaled by alpha / h; by default by 1, as in the paper")
    peft_dim: int | None = option(None, "the bottleneck of adapter and convpass, by default LoRA's h; FacT's rank, by default its paper's for the task")
    peft_scale: float | None = option(None, "scale of convpass and FacT; by default their papers' for the task")
    teacher: str | None = option(
        None, "PE-Dist: a larger backbone, first adapted to the task with LoRA, whose logits are learned too; by default none", BACKBONES)
    teacher_weights: str | None = option(None, "the teacher's weights, as `weights`; by default the teacher's own")
    # how
    epochs: int = option(100, "epochs")
    second_epochs: int | None = option(
        None, "train `epochs` without merging, then this many with it (0: attach only; the first 10 % warm up); by default one stage")
    rise: float = option(0.0, "share of the epochs over which merging rises from no pairs to the whole schedule, linearly (tome, tofu, pyra_row, pitome, dtem)")
    any_rate: bool = option(False, "merge a random share of the pairs in each step, so that one adapter serves every rate up to `rate` (methods as for rise)")
    train_rate: str | float | list | None = option(
        None, "train at this rate, then merge at `rate` without further training (methods as for rise); by default train at `rate`")
    warmup: int | None = option(None, "epochs of linear warm-up; by default a tenth of the epochs")
    batch_size: int | None = option(None, "images per step, over all devices; by default the paper's for the backbone")
    micro_batch: int | None = option(None, "images that a device takes at once, with gradients summed over a step; by default all")
    lr: float = option(1e-3, "learning rate of PEFT and head")
    layer_decay: float = option(0.65, "with peft full: the learning rate's factor from each block to the one below")
    modulation_lr: float | None = option(None, "learning rate of w_r and w_d; by default 1e-4, or 1e-5 for MAE's backbones; Table 4 tunes it per task")
    weight_decay: float = option(1e-4, "AdamW's weight decay")
    drop_path: float = option(0.1, "stochastic depth of the last block, rising linearly from 0")
    dropout: float = option(0.1, "on LoRA's input, or inside another PEFT")
    augment: str = option("none", "what is done to the images to train on, at random", AUGMENTS)
    keep: str = option("last", "the epoch whose weights are kept: last, or best: the best on val200, evaluated every eval_every epochs (0: after each)", KEEP)
    norm: str | None = option(None, "normalisation: imagenet, half (0.5), clip or none; by default the backbone's, see data/README.md", NORMS)
    seed: int = option(0, "seed of initialisation, order and dropout")
    # on what
    train_split: str = option("train800val200", "images to train on; train800 when selecting on val200", SPLITS)
    eval_split: str = option("test", "images to evaluate on; val200 for any kind of selection", SPLITS)
    eval_every: int = option(0, "epochs between evaluations; 0: only after the last")
    data_root: str | None = option(None, "folder of the tasks; by default PYRA_DATA or data/")
    device: str | None = option(None, "cpu, cuda, cuda:1 ... or mps (Apple's GPU); by default cuda where there is one")
    dtype: str | None = option(None, "bfloat16 (the frozen weights too) or float32; by default bfloat16 where it is fast", DTYPES)
    compile: bool = option(False, "torch.compile the forward pass of training")
    checkpoint: bool = option(False, "compute each block again in the backward pass: less memory, a third more time")
    workers: int = option(8, "processes per device that read the images of a stream: task")

    def __post_init__(self):
        check_types(self)
        check_ranges(self)
        check_combinations(self)

    def resolved(self):
        """The same config with each None replaced by what it stands for, and each field that does not matter to its method and PEFT by the default.

        So a plain run is found again whatever the rate, and a ToMe run whatever s and modulation_lr. Raises ValueError.
        """
        known, method, peft = BACKBONES[self.backbone], METHODS[self.method], PEFTS[self.peft]
        for row in (method, peft):
            if unknown := row.uses - OPTIONAL:
                raise ValueError(f"{row.title} uses {', '.join(sorted(unknown))}: uses may name {', '.join(sorted(OPTIONAL))}")
        device = self.device or default_device()
        task = ALIASES.get(self.task, self.task)
        defaults = dict(
            weights=known["weights"], norm=known["norm"], lora_rank=known["lora_rank"], batch_size=known["batch_size"],
            warmup=self.epochs // 10, device=device, dtype="bfloat16" if has_fast_bfloat16(device) else "float32",
            peft_dim=known["lora_rank"], modulation_lr=1e-4 if 1e-4 in MODULATION_LRS.get(self.backbone, [1e-4]) else 1e-5,
            teacher_weights=self.teacher and BACKBONES[self.teacher]["weights"],
        )
        if peft.defaults is not None:
            defaults |= peft.defaults(task)
        values = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        unused = OPTIONAL - method.uses - peft.uses
        values |= {f.name: f.default for f in dataclasses.fields(self) if f.name in unused}
        values["task"] = task
        values.setdefault("lora_targets", ",".join(name for name in pyra.LORA_TARGETS if name in self.lora_targets.split(",")))  # in any order the same
        values |= {"train_rate": None} if self.train_rate == self.rate else {}
        values |= {"img_size": None} if self.img_size == default_img_size(self.backbone) else {}
        # a path means the same whatever folder we are in: a notebook's kernel starts elsewhere than papermill's
        kind, _, path = self.task.partition(":")
        if kind in ("folder", "stream") and path.strip():  # without a path it is refused where the task is found
            values["task"] = f"{kind}:{Path(path).expanduser().resolve()}"
        for name in ("weights", "teacher_weights"):
            file = getattr(self, name)
            if file and file != SHIPPED and os.path.isfile(expanded := os.path.expanduser(file)):
                values[name] = os.path.abspath(expanded)  # a link is not followed: Hugging Face's cache links to files without a suffix
        root = self.data_root or os.environ.get("PYRA_DATA")
        if root:
            values["data_root"] = str(Path(root).expanduser().resolve())
        return dataclasses.replace(self, **values)

    def id(self):
        """A name for the run: what it is, and a hash of all fields that it depends on and that differ from the default."""
        config = self.resolved()
        fields = changed(config)
        fields["device"] = fields["device"].split(":")[0]  # which of several GPUs doesn't matter
        fields.pop("workers", None)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]
        plain = lambda name: re.sub(r"\W+", "_", name).strip("_")  # a method may be anybody's
        return f"{plain(config.task)[-40:]}-{config.backbone}-{plain(config.method)}-seed{config.seed}-{digest}"


# ---- What a Config refuses, each in a sentence -----------------------------------------------------------------------


def check_types(config):
    for name in ("rate", "train_rate"):
        object.__setattr__(config, name, pyra.to_python(getattr(config, name)))
    for f in dataclasses.fields(config):
        value, kinds = getattr(config, f.name), f.type
        if type(value) is int and isinstance(0.0, kinds):
            object.__setattr__(config, f.name, float(value))
        elif not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
            expected = getattr(kinds, "__name__", str(kinds)).replace("NoneType", "None")
            raise ValueError(f"{f.name} must be of type {expected}, not {value!r}")
        choices = f.metadata["choices"]
        if choices is not None and value not in (*choices, *([None] if f.default is None else [])):
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f"did you mean {near[0]}? (run --help lists them)" if near else f"it must be one of {', '.join(choices)}"
            raise ValueError(f"{f.name} {value!r} is unknown; {hint}")


LEAST = dict(epochs=1, img_size=1, second_epochs=0, warmup=0, batch_size=1, micro_batch=1, s=1, lora_rank=1, peft_dim=1, eval_every=0, workers=0)
FINITE = ("lr", "modulation_lr", "weight_decay")


def check_ranges(config):
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) is not None}
    for name, least in LEAST.items():
        if given.get(name, least) < least:
            raise ValueError(f"{name} must be at least {least}, not {given[name]}")
    for name in FINITE:
        if not 0 <= given.get(name, 0) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {given[name]}")
    for name in ("drop_path", "dropout", "rise"):
        if not 0 <= given[name] < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, not {given[name]}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"seed must be at least 0 and less than 2^31, not {config.seed}")
    for name in ("peft_scale", "lora_alpha"):
        if not 0 < given.get(name, 1) < math.inf:
            raise ValueError(f"{name} must be a finite number greater than 0, not {given[name]}")
    if not 0 < config.layer_decay <= 1:
        raise ValueError(f"layer_decay must be greater than 0 and at most 1, not {config.layer_decay}")
    if config.warmup is not None and config.warmup >= config.epochs:
        raise ValueError(f"warmup ({config.warmup}) must be less than epochs ({config.epochs})")
    targets = config.lora_targets.split(",")
    if not set(targets) <= set(pyra.LORA_TARGETS) or len(set(targets)) < len(targets):
        raise ValueError(f"lora_targets must be different names out of {', '.join(pyra.LORA_TARGETS)}, separated by commas, not {config.lora_targets!r}")
    patch = pyra.read_name(config.backbone.split(".")[0]).get("patch_size", 16)
    if config.img_size is not None and config.img_size % patch:
        raise ValueError(f"img_size must be a multiple of {patch}, the patches of {config.backbone}, not {config.img_size}")
    for name in ("rate", "train_rate"):
        if isinstance(rate := given.get(name, []), str) and rate not in pyra.MAC_RATIOS:
            raise ValueError(f"{name} must be 'low', 'high' or a number greater than 1, not {rate!r}")
        if isinstance(rate, float):
            pyra.check_flops_ratio(rate, name)
    check_device_name(config.device)  # whether it is here is checked where it is used: a grid for a cluster's GPUs is made where there are none


def check_combinations(config):
    method, peft, streamed = METHODS[config.method], PEFTS[config.peft], config.task.startswith("stream:")
    if config.second_epochs is not None and (not method.second_stage or peft.trains_backbone):
        supported = ", ".join(name for name, row in METHODS.items() if row.second_stage)
        raise ValueError(f"two-stage training (second_epochs) supports {supported} with a PEFT, not method {config.method} with peft {config.peft}")
    if (config.rise or config.any_rate) and config.compile and "rise" in method.uses:
        raise ValueError("rise and any_rate merge other numbers of tokens again and again, for each of which compile would compile anew: leave out compile")
    if method.before_peft and peft.trains_backbone:
        raise ValueError(f"method {config.method} prunes a frozen backbone, and peft {config.peft} would train it")
    if streamed and (method.in_memory or config.teacher):
        raise ValueError(f"{'a teacher' if config.teacher else f'method {config.method}'} needs the images in memory, and {config.task} is read from its files")
    if config.teacher_weights and not config.teacher:
        raise ValueError("teacher_weights were given, but no teacher")
    augment = AUGMENTS[config.augment]
    if augment.streamed and not streamed:
        raise ValueError(f"augment {config.augment} is for stream:/path tasks, and {config.task} is held in memory: take strong, or light")
    if augment.area and not augment.streamed and streamed:
        raise ValueError(f"augment {config.augment} is for tasks held in memory, and {config.task} is read from its files: take mae")
    if augment.area and config.teacher:
        raise ValueError(f"a teacher's logits are of the images as they are: leave out augment {config.augment}, or the teacher")
    if config.keep == "best":
        if streamed:
            raise ValueError(f"keep best selects on val200, and {config.task} has no images besides those to train and to test on: keep the last epoch")
        if overlap("val200", config.train_split):
            raise ValueError(f"keep best selects on val200, and train_split {config.train_split} trains on it: take train800")
        if config.rise and "rise" in method.uses:
            raise ValueError("keep best can't compare epochs that merge different numbers of tokens: leave out rise, or keep the last epoch")
        if method.dial is not None:
            raise ValueError(f"keep best can't choose an epoch of method {config.method}, which meets its budget after the last one only")


# ---- Command line <-> Config -----------------------------------------------------------------------------------------


def read_value(text, kinds):
    """A command line's text as a value of a field's type; any other text stays text, which Config refuses."""
    for read in (int, float, json.loads, {"True": True, "False": False, "None": None}.__getitem__):
        try:
            value = read(text)
        except (ValueError, KeyError):
            continue
        if isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool):
            return value
    return text


def help_of(f):
    """A field's help: its meaning, its choices with theirs, or the field before it that has the same ones, and its default."""
    text, rows = f.metadata["help"], f.metadata["choices"] or {}
    first = next((other.name for other in dataclasses.fields(Config) if other.metadata["choices"] is rows), f.name)
    if first != f.name:
        text += f"; as --{first}"
    elif any(name not in text for name in rows):
        helped = [f"{name}: {row.help}" for name, row in rows.items() if hasattr(row, "help")] if isinstance(rows, dict) else []
        text += ". " + "; ".join(helped or rows)
    if f.default is not None:
        text += f" (default: {f.default})"
    return text.replace("%", "%%")


MOST = ("task", "backbone", "weights", "norm", "method", "rate", "epochs", "augment", "keep", "train_split")  # what most runs need


class Parser(argparse.ArgumentParser):
    """One whose errors are a ValueError: a sentence in place of the whole usage."""

    def error(self, message):
        unknown, known = re.match(r"unrecognized arguments: (--[^\s=]+)", message), re.findall(r"--\w+", self.format_usage())
        near = difflib.get_close_matches(unknown[1], known, 1) if unknown else []
        message = f"there is no option {unknown[1]}" if unknown else message
        raise ValueError(message + (f"; did you mean {near[0]}" if near else f"; {self.prog} --help lists the options"))


def parse(argv, prog="python -m pyra_lab run"):
    """Command line -> Config; a list is written as JSON, [16,16,...]."""
    parser = Parser(prog=prog, description="One run: trains and evaluates a config, or finds the record of it.", allow_abbrev=False)
    fields = dataclasses.fields(Config)
    needed, rest = parser.add_argument_group("what most runs need"), parser.add_argument_group("the rest")
    for f in sorted(fields, key=lambda f: MOST.index(f.name) if f.name in MOST else len(MOST)):
        flag = dict(nargs="?", const="True") if f.type is bool else {}  # --checkpoint is --checkpoint True
        (needed if f.name in MOST else rest).add_argument(f"--{f.name}", metavar="True" if f.type is bool else "…", **flag, help=help_of(f))
    given = vars(parser.parse_args(argv))
    return Config(**{f.name: read_value(given[f.name], f.type) for f in fields if given[f.name] is not None})


def changed(config):
    """The fields that differ from their default, as {name: value}."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


def arguments(config):
    """Config -> command line, such that parse(arguments(config)) == config."""
    return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in changed(config).items()]
