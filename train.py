"""One run: a Config -> a model -> training -> evaluation -> a record that is found again.

    python train.py --task sprites_location --method pyra --epochs 10          # 1 device
    torchrun --nproc_per_node 4 train.py --task cifar100 --backbone vit_base_patch16_224     # 4, data-parallel
    python train.py --help                                                     # every field, with its default
    python train.py benchmark --backbone vit_base_patch16_224                  # images/s of plain, ToMe and PYRA
    python train.py grid grid.jsonl --workers 2                                # many runs: a config a line, as JSON
    python train.py slurm grid.jsonl --max 16                                  # the same on a cluster: writes grid.sbatch

A run writes runs/<id>/, where the id is a hash of its config: log.jsonl (a line an epoch), state.pt (to resume from),
adapter.safetensors, what else it found or told, and, last, result.json. A finished run is not repeated; an interrupted one goes on at its last epoch,
on a CPU bit for bit as if nothing had happened (a GPU adds merged tokens up in no fixed order). The id knows the config,
not the files behind it nor this code: after changing images, weights or code, delete the folder.

What trains is LoRA, the generators and the head (the paper's recipe), another PEFT in LoRA's place, or with --peft full the
whole backbone (MAE's). With --teacher a larger backbone is adapted first, and tells the run its logits (PE-Dist).
What it trains on is held in memory, or, for a task stream:/path/to/imagenet, read from its files by --workers.
"""

import argparse
import ast
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import baselines
import pyra
import tasks

HERE = Path(__file__).resolve().parent
SHIPPED = "data/vit_nano_patch4_56.safetensors"  # beside this file

# What the paper's Tables 2 and 3 say of each backbone, and the weights and normalisation that go with it. The published
# code feeds ImageNet's mean and std to the in21k ViTs too, though they were trained with 0.5; so does our default.
BACKBONES = {
    "vit_nano_patch4_56": dict(weights=SHIPPED, norm="half", lora_rank=8, batch_size=64),
    "vit_tiny_patch16_224": dict(weights="vit_tiny_patch16_224.augreg_in21k", norm="imagenet", lora_rank=8, batch_size=64),
    "vit_small_patch16_224": dict(weights="vit_small_patch16_224.augreg_in21k", norm="imagenet", lora_rank=4, batch_size=64),
    "vit_base_patch16_224": dict(weights="vit_base_patch16_224.orig_in21k", norm="imagenet", lora_rank=8, batch_size=64),
    "vit_large_patch16_224": dict(weights="vit_large_patch16_224.orig_in21k", norm="imagenet", lora_rank=12, batch_size=32),
    "vit_base_patch16_224.mae": dict(weights="vit_base_patch16_224.mae", norm="imagenet", lora_rank=8, batch_size=32),
    "vit_large_patch16_224.mae": dict(weights="vit_large_patch16_224.mae", norm="imagenet", lora_rank=12, batch_size=32),
    "deit_small_patch16_224": dict(weights="deit_small_patch16_224.fb_in1k", norm="imagenet", lora_rank=4, batch_size=128),
    "deit_base_patch16_224": dict(weights="deit_base_patch16_224.fb_in1k", norm="imagenet", lora_rank=8, batch_size=128),
    "deit_small_distilled_patch16_224": dict(weights="deit_small_distilled_patch16_224.fb_in1k", norm="imagenet", lora_rank=4, batch_size=128),
    "deit_base_distilled_patch16_224": dict(weights="deit_base_distilled_patch16_224.fb_in1k", norm="imagenet", lora_rank=8, batch_size=128),
}
# Table 4: the learning rates of W_r and W_D that the paper chooses from, task by task. It lists ViT-B, ViT-L, MAE's ViT-L and DeiT-B.
MODULATION_LRS = {name: [1e-6, 3e-6, 1e-5, 3e-5] if name.endswith(".mae") else [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3] for name in BACKBONES}
METHODS = ("plain", "tome", "pyra", "evit", "tofu", "ats", "ltmp", "diffrate", "diffrate_search", "rap")  # the search is a run of its own, DiffRate's first
PER_IMAGE = ("ats", "ltmp")  # how many tokens they keep depends on the image
SETTLED = (*PER_IMAGE, "diffrate_search")  # training leaves them somewhere near their budget, and `settle` brings them to it
PEFTS = ("lora", "adapter", "convpass", "fact_tt", "fact_tk", "snf", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """All that a run depends on. None means: as the paper's Tables 2-4 say for the backbone, or as the device allows."""

    # what
    task: str = _option("sprites_location", "a task of VTAB-1k, folder:/path/to/images, sprites_... or digits (see tasks.py)")
    backbone: str = _option("vit_nano_patch4_56", "timm's name; with .mae: average pooling")
    weights: str | None = _option(None, "a file or a timm name on the Hugging Face hub; 'none': random")
    method: str = _option("pyra", "plain (LoRA only), tome, pyra; or with as many operations evit, tofu, ats, ltmp, diffrate, or rap, which prunes channels (chosen on val200)")
    rate: str | float | list = _option("high", "low, high, a ratio F/f for Eq. (1), or the schedule itself, a list with one entry a block")
    s: int = _option(1, "rank of PYRA's generators")
    peft: str = _option("lora", "lora, adapter, convpass, fact_tt, fact_tk or snf; or full: the whole backbone is trained")
    lora_rank: int | None = _option(None, "LoRA's h")
    peft_dim: int | None = _option(None, "the bottleneck of adapter and convpass, by default LoRA's h; FacT's rank, by default its paper's for the task")
    peft_scale: float | None = _option(None, "of convpass and FacT; by default their papers' for the task")
    teacher: str | None = _option(None, "PE-Dist: the backbone that is adapted to the task first, with LoRA, and whose logits are learned too")
    teacher_weights: str | None = _option(None, "the teacher's weights, as `weights`")
    # how
    epochs: int = _option(100, "epochs")
    second_epochs: int | None = _option(None, "two stages: without merging for `epochs`, then with it for so many more, 0 or more, a tenth of them warm-up; None: one stage")
    warmup: int | None = _option(None, "epochs of linear warm-up; a tenth of the epochs by default")
    batch_size: int | None = _option(None, "images a step, over all devices")
    micro_batch: int | None = _option(None, "images a device takes at once, gradients add up over a step; all by default")
    lr: float = _option(1e-3, "learning rate of LoRA and head")
    layer_decay: float = _option(0.65, "with peft full: the learning rate's factor from a block to the one below")
    modulation_lr: float | None = _option(None, "learning rate of w_r and w_d; by default 1e-4, or 1e-5 for MAE's backbones; Table 4 tunes it per task")
    weight_decay: float = _option(1e-4, "AdamW's weight decay")
    drop_path: float = _option(0.1, "stochastic depth of the last block, rising linearly from 0")
    dropout: float = _option(0.1, "on LoRA's input, or inside another PEFT")
    augment: str = _option("none", "none, or mae: MAE's crops, RandAugment, erasing, mixup, cutmix and smoothing (stream: tasks)")
    norm: str | None = _option(None, "imagenet, half (0.5) or none")
    seed: int = _option(0, "seed of initialisation, order and dropout")
    # on what
    train_split: str = _option("train800val200", "images to train on; train800 when selecting on val200")
    eval_split: str = _option("test", "images to evaluate on; val200 for any kind of selection")
    eval_every: int = _option(0, "epochs between evaluations; 0: only after the last")
    data_root: str | None = _option(None, "folder of the tasks; PYRA_DATA or data/ by default")
    device: str | None = _option(None, "cpu, cuda, cuda:1 ...")
    dtype: str | None = _option(None, "bfloat16 (the frozen weights too) or float32")
    compile: bool = _option(False, "torch.compile the training step's forward")
    checkpoint: bool = _option(False, "compute each block again in the backward pass: less memory, a third more time")
    workers: int = _option(8, "processes a device that read the images of a stream: task")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kinds = getattr(self, f.name), f.type
            if type(value) is int and isinstance(0.0, kinds):
                object.__setattr__(self, f.name, float(value))
            elif not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
                expected = getattr(kinds, "__name__", str(kinds)).replace("NoneType", "None")
                raise ValueError(f"{f.name} must be of type {expected}, not {value!r}")
        for name, least in dict(epochs=1, second_epochs=0, warmup=0, batch_size=1, micro_batch=1, s=1, lora_rank=1, peft_dim=1, eval_every=0, workers=0).items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("lr", "modulation_lr", "weight_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be at least 0 and less than 2^31, not {self.seed}")
        if self.peft_scale is not None and not 0 < self.peft_scale < math.inf:
            raise ValueError(f"peft_scale must be a finite number greater than 0, not {self.peft_scale}")
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be greater than 0 and at most 1, not {self.layer_decay}")
        for name, known in dict(backbone=BACKBONES, teacher=(None, *BACKBONES), method=METHODS, peft=PEFTS, augment=("none", "mae"), norm=(None, *tasks.NORMS), dtype=(None, *DTYPES),
                                train_split=tasks.SPLITS, eval_split=tasks.SPLITS).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(k for k in known if k and k != 'diffrate_search')}, not {getattr(self, name)!r}")
        if self.warmup is not None and self.warmup >= self.epochs:
            raise ValueError(f"warmup ({self.warmup}) must be less than epochs ({self.epochs})")
        if self.second_epochs is not None and (self.method not in ("tome", "pyra", "evit", "tofu") or self.peft == "full"):
            raise ValueError(f"second_epochs is for merging attached to what is adapted already, not for method {self.method} with peft {self.peft}")
        if self.method == "rap" and self.peft == "full":
            raise ValueError("method rap prunes a backbone that stays frozen, and peft full would train it")
        if self.task.startswith("stream:") and (self.method in ("rap", "ats") or self.teacher):
            raise ValueError(f"{'a teacher' if self.teacher else f'method {self.method}'} needs the images in memory, and {self.task} is read from its files")
        if self.teacher_weights and not self.teacher:
            raise ValueError("teacher_weights were given, but no teacher")
        if self.augment != "none" and not self.task.startswith("stream:"):
            raise ValueError(f"augment {self.augment} is for stream:/path tasks, whose files are read anew each epoch, not for {self.task}")
        check_device_name(self.device)  # whether it is here is asked where it is used: a grid for a cluster's GPUs is made where there are none
        if not isinstance(self.rate, list):
            pyra.merge_schedule(self.rate)

    def resolved(self):
        """The same config with every None replaced by what it stands for, and what its method has no use for by the default.

        So a plain run is found again whatever the rate, and a ToMe run whatever s and modulation_lr.
        """
        known = BACKBONES[self.backbone]
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        defaults = dict(
            weights=known["weights"], norm=known["norm"], lora_rank=known["lora_rank"], batch_size=known["batch_size"],
            warmup=self.epochs // 10, device=device, dtype="bfloat16" if has_fast_bfloat16(device) else "float32",
            peft_dim=known["lora_rank"], modulation_lr=1e-4 if 1e-4 in MODULATION_LRS[self.backbone] else 1e-5,
            teacher_weights=self.teacher and BACKBONES[self.teacher]["weights"],
        )
        task = tasks.ALIASES.get(self.task, self.task)
        if self.peft == "convpass":
            defaults |= dict(peft_scale=baselines.convpass_settings(task)["scale"])
        if self.peft in ("fact_tt", "fact_tk"):
            settings = baselines.fact_settings(task, self.peft.removeprefix("fact_"))
            defaults |= dict(peft_dim=settings["rank"], peft_scale=settings["scale"])
        values = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        unused = ["rate"] if self.method == "plain" else []
        unused += ["s", "modulation_lr"] if self.method != "pyra" else []
        unused += ["dropout"] if self.peft in ("snf", "full") else []
        unused += ["lora_rank"] if self.peft != "lora" else []
        unused += ["peft_dim"] if self.peft in ("lora", "snf", "full") else []
        unused += ["peft_scale"] if self.peft not in ("convpass", "fact_tt", "fact_tk") else []
        unused += ["layer_decay"] if self.peft != "full" else []
        values |= {f.name: f.default for f in dataclasses.fields(self) if f.name in unused}
        values["task"] = task
        # a path means the same whatever folder we are in: a notebook's kernel starts elsewhere than papermill's
        kind, _, path = self.task.partition(":")
        if kind in ("folder", "stream"):
            values["task"] = f"{kind}:{Path(path).expanduser().resolve()}"
        for name in ("weights", "teacher_weights"):
            file = getattr(self, name)
            if file and file != SHIPPED and Path(file).is_file():
                values[name] = str(Path(file).resolve())
        root = self.data_root or os.environ.get("PYRA_DATA")
        if root:
            values["data_root"] = str(Path(root).expanduser().resolve())
        return dataclasses.replace(self, **values)

    def id(self):
        """A name for the run: what it is, and a hash of everything that it depends on and that isn't the default."""
        config = self.resolved()
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
        fields["device"] = fields["device"].split(":")[0]  # which of several GPUs doesn't matter
        fields.pop("workers", None)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]
        task = re.sub(r"\W+", "_", config.task).strip("_")[-40:]
        return f"{task}-{config.backbone}-{config.method}-seed{config.seed}-{digest}"


@dataclass(frozen=True)
class Result:
    """What a run found out; result.json holds the same."""

    config: dict  # every field, None replaced
    folder: str  # where the run's files are
    accuracy_last: float  # on eval_split after the last epoch, in [0, 1]
    accuracy_best: float  # the best of all evaluations: optimistic where eval_split is the test split; where a reducer is settled after training the last
    best_epoch: int  # counted from 0; -1: before any training
    history: list  # a dict an epoch: epoch, lr, loss, train_accuracy, seconds, and accuracy where evaluated
    num_classes: int
    classes: list  # names by label; empty where nobody wrote them down
    macs: int  # of one image, LoRA and FacT folded in; where they depend on the image (ats, ltmp), the mean over eval_split
    token_counts: list  # tokens before the first block and after each; idem
    trained: dict  # trained parameters: peft, reducer, head, backbone
    backbone_parameters: int  # without head
    seconds_per_epoch: float  # median, training only; 0 without any
    peak_memory: int | None  # bytes on a CUDA device
    versions: dict
    found: list | None = None  # what was searched for: rap's (heads, units), ats's counts, diffrate's (prune, merge), one a block


def check_device_name(device):
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, not {device!r}")


def check_device(device):
    """Raises ValueError unless device is None or one that is here."""
    check_device_name(device)
    if (device or "").startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {device} was asked for, and PyTorch finds no CUDA device here")
        if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device} was asked for, and PyTorch finds {torch.cuda.device_count()} CUDA devices here")


def has_fast_bfloat16(device):
    """Whether matrix products in bf16 are faster there than in fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ----------------------------------------------------------------------------------------------------------------------
# The model of a config


def create_backbone(config, num_classes):
    pool = "avg" if config.backbone.endswith(".mae") else "token"
    return pyra.create_model(config.backbone, num_classes=num_classes, drop_path_rate=config.drop_path, global_pool=pool)


def add_peft(model, config):
    """What the config trains beside reducer and head, on the model."""
    if config.peft == "lora":
        pyra.add_lora(model, config.lora_rank, config.dropout)
    elif config.peft == "adapter":
        baselines.add_adapter(model, config.peft_dim, config.dropout)
    elif config.peft == "convpass":
        init = baselines.convpass_settings(config.task)["init"]
        baselines.add_convpass(model, config.peft_dim, config.peft_scale, init, config.dropout)
    elif config.peft in ("fact_tt", "fact_tk"):
        baselines.add_fact(model, config.peft.removeprefix("fact_"), config.peft_dim, config.peft_scale, config.dropout)
    elif config.peft == "snf":
        baselines.add_snf(model)
    else:
        torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)  # as MAE's fine-tuning has it
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith("head_dist."))  # the class head alone is trained and asked


def schedule_of(rate, model):
    """Pairs that a config's rate merges in each block of the model."""
    if isinstance(rate, list):
        return rate
    r = pyra.merge_schedule(rate, len(model.blocks), model.num_patches)
    r[-1] = min(r[-1], (model.num_patches - sum(r[:-1])) // 2)  # Eq. (1) asks too much of the last block; so does the paper's constant 16
    return r


def target_macs(config, model):
    """What the config's rate, merging, leaves to do for an unpruned model: every other reducer gets the same budget. Raises ValueError."""
    return pyra.macs_of_counts(model, pyra.counts_of_schedule(model, pyra.check_schedule(model, schedule_of(config.rate, model))))


def add_reducer(model, config, found=None):
    """The config's token reducer, on the model."""
    if config.method == "tome":
        pyra.add_tome(model, schedule_of(config.rate, model))
    elif config.method == "pyra":
        pyra.add_pyra(model, schedule_of(config.rate, model), config.s)
    elif config.method == "tofu":
        baselines.add_tofu(model, schedule_of(config.rate, model))
    elif config.method == "evit":
        try:
            layers, keep_rate = None, baselines.evit_keep_rate(model, target_macs(config, model))
        except ValueError:  # the paper's three layers can't do with so little
            layers = [len(model.blocks) * i // 12 for i in (1, 3, 5, 7, 9)]
            keep_rate = baselines.evit_keep_rate(model, target_macs(config, model), layers)
        baselines.add_evit(model, keep_rate, layers)
    elif config.method == "ats":
        baselines.add_ats(model, found)
    elif config.method == "ltmp":
        baselines.add_ltmp(model)
    elif config.method == "diffrate_search":
        baselines.add_diffrate(model)
    elif config.method == "diffrate":
        baselines.freeze_diffrate(baselines.add_diffrate(model), found)


def pretrained(config, num_classes):
    """The config's backbone with its weights and nothing else, initialised by the config's seed."""
    torch.manual_seed(config.seed)
    model = create_backbone(config, num_classes)
    if config.weights != "none":
        pyra.load_pretrained(model, HERE / SHIPPED if config.weights == SHIPPED else config.weights)
    return model


def build_model(config, num_classes, found=None):
    """The pre-trained backbone with what the config's method adds, on the CPU in float32, initialised by the config's seed.

    found: of a finished run with method rap, ats or diffrate, its Result's.
    """
    config = config.resolved()
    model = pretrained(config, num_classes)
    if config.method == "rap":
        baselines.prune_channels(model, found)
    add_peft(model, config)
    add_reducer(model, config, found)
    return model


def merged(model):
    """The model with the PEFT folded in, where it can be: LoRA and FacT."""
    return baselines.merge_fact(pyra.merge_lora(model))


def first_stage(config):
    """Of a config with two stages: LoRA without merging."""
    return dataclasses.replace(config, method="plain", second_epochs=None)


def diffrate_search(config):
    """Of a config with DiffRate: the shorter run that finds its rates."""
    return dataclasses.replace(config, method="diffrate_search", epochs=max(1, config.epochs // 10), warmup=0)


def teacher_run(config):
    """Of a config with a teacher: the larger backbone, adapted with LoRA."""
    student = config.resolved()  # normalisation and so on are the student's; on which device, the machine says that runs it
    return dataclasses.replace(student, device=config.device, dtype=config.dtype, backbone=student.teacher, weights=student.teacher_weights, teacher=None,
                               teacher_weights=None, method="plain", second_epochs=None, peft="lora", lora_rank=None, batch_size=None, micro_batch=None)


def needed(config):
    """The runs that a config's run starts from: runs of their own, which many may share."""
    runs = [first_stage(config)] if config.second_epochs is not None else []
    runs += [diffrate_search(config)] if config.method == "diffrate" else []
    return runs + ([teacher_run(config)] if config.teacher else [])


def start_from(model, result):
    """Gives the model the LoRA and head that a run without merging has trained: the second of two stages."""
    trained = safetensors.torch.load_file(Path(result.folder) / "adapter.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".reducer." not in name:
                p.copy_(trained[name])


def load_run(result):
    """The trained model of a Result: its backbone, with its adapter."""
    config, folder = Config(**{**result.config, "device": None}), Path(result.folder)  # the run's device need not be here
    return pyra.load_adapter(build_model(config, result.num_classes, result.found), folder / "adapter.safetensors").eval()


def count_trained(model):
    counts = {"peft": 0, "reducer": 0, "head": 0, "backbone": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            part = "backbone" if not pyra.is_adapter(name) else "reducer" if ".reducer." in name else "peft" if "lora_" in name or "peft_" in name else "head"
            counts[part] += p.numel()
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# Batches: where a step's images come from


def in_batches(images, labels, norm, device=None, batch_size=128):
    """uint8 images (n, 3, h, w), in memory or mapped -> batches of (normalised images, labels) on the device."""
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        yield tasks.normalize(x.to(device), norm), y.to(device)


def chunks_of_epoch(n, batch, parts, seed, rank, world):
    """The indices, out of n, that this process takes: a list of tensors, `parts` of them a step, in an order that the seed draws.

    An incomplete last batch is left out, as in the published code.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    steps = order[: n // batch * batch].view(-1, batch)
    mine = steps[:, rank * batch // world : (rank + 1) * batch // world]
    return [chunk for step in mine for chunk in step.tensor_split(parts)]


class Seeded(torch.utils.data.Dataset):
    """Images whose augmentation depends on seed and index alone: the same however many processes and workers read them."""

    def __init__(self, images, seed):
        self.images, self.seed = images, seed

    def __getitem__(self, index):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 10_000_019 + int(index)) % 2**63)
            return self.images[index]


def mae_transform(size, norm, train):
    """PIL image -> (3, size, size), as MAE fine-tunes and evaluates: train=False crops the centre, 7/8 of the image."""
    from torchvision.transforms import v2

    (mean, std), bicubic = tasks.NORMS[norm], v2.InterpolationMode.BICUBIC
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if not train:
        return v2.Compose([v2.Resize(round(size * 8 / 7), bicubic), v2.CenterCrop(size), *tensor])
    # timm's magnitudes run from 0 to 10: 11 bins; "rand-m9" draws two of the operations
    randaugment = v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=11, interpolation=bicubic, fill=[round(255 * m) for m in mean])
    return v2.Compose([v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip(), randaugment, *tensor,
                       v2.RandomErasing(0.25, value="random")])


def mixup_or_cutmix(num_classes):
    """(images, labels) -> (mixed images, labels (b, num_classes) as probabilities), MAE's mixup 0.8 or cutmix 1.0 in turn."""
    from torchvision.transforms import v2

    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)])


def sample_indices(n, count=128):
    """Indices of so many of n images, drawn: a list of images may be sorted by class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]


def drawn_images(config, split, img_size, count=128):
    """Normalised images of a split, drawn: (at most count, 3, h, w), on the CPU."""
    images, _ = tasks.load_split(config.task, split, img_size, config.data_root)
    return tasks.normalize(images[sample_indices(len(images), count)], config.norm)


class Data(NamedTuple):
    n: int  # training images
    train: Callable  # (seed, chunks of indices) -> batches of (normalised images, labels, the teacher's logits or None)
    test: Callable  # (rank, world) -> this process's batches of the images to evaluate on
    sample: Callable  # () -> a few training images, as when evaluating, to try a budget on


def held_in_memory(config, img_size, device, told=None):
    """The Data of a task that fits: decoded once, the training images on the device. told: a teacher's logits, (n, classes)."""
    images, labels = tasks.load_split(config.task, config.train_split, img_size, config.data_root)
    test_images, test_labels = tasks.load_split(config.task, config.eval_split, img_size, config.data_root)
    images, labels = images.to(device), labels.to(device)

    def train(seed, chunks):
        for index in chunks:
            index = index.to(device)
            yield tasks.normalize(images[index], config.norm), labels[index], None if told is None else told[index]

    def test(rank, world):
        return in_batches(test_images[rank::world], test_labels[rank::world], config.norm, device)

    def sample():
        return tasks.normalize(images[sample_indices(len(images)).to(device)], config.norm)

    return Data(len(labels), train, test, sample)


def streamed(config, img_size, device):
    """The Data of a stream: task: worker processes read, augment and normalise while the device computes."""
    transform = mae_transform(img_size, config.norm, train=False)
    images = tasks.stream_split(config.task, config.train_split, mae_transform(img_size, config.norm, train=True) if config.augment == "mae" else transform)
    test_images = tasks.stream_split(config.task, config.eval_split, transform)

    def read(dataset, chunks):
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=config.workers,
                                             pin_memory=device.type == "cuda")
        for x, y in loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def train(seed, chunks):
        return ((x, y, None) for x, y in read(Seeded(images, seed), chunks))

    def test(rank, world):
        return read(test_images, torch.arange(rank, len(test_images), world).split(128))

    def sample():
        return next(read(tasks.stream_split(config.task, config.train_split, transform), [sample_indices(len(images))]))[0]

    return Data(len(images), train, test, sample)


# ----------------------------------------------------------------------------------------------------------------------
# One run


def lr_factor(epoch, warmup, epochs):
    """Of every group's learning rate in that epoch: linear warm-up, then a cosine down to 0.01."""
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


def mae_lr_factor(epoch, warmup, epochs):
    """The same in MAE's fine-tuning, where it changes at every step (epoch has a fraction): linear from 0, then a cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


@torch.inference_mode()
def evaluate(model, batches, dtype=torch.float32):
    """Top-1 accuracy in [0, 1] over batches of (normalised images, labels); under torchrun each process brings its share."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)  # correct, all
    for x, y in batches:
        with torch.autocast(counts.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x)
        counts += torch.stack([(logits.argmax(dim=1) == y).sum(), torch.tensor(len(y), device=counts.device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


@torch.no_grad()
def over(function, config, split, img_size, device):
    """function(images) for a split, and its labels: (n, ...) float32 and (n,), on the device."""
    x, labels = tasks.load_split(config.task, split, img_size, config.data_root)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return torch.cat([function(batch).float() for batch, _ in in_batches(x, labels, config.norm, device)]), labels.to(device)


def search_channels(config, num_classes, device):
    """Method rap: what to keep of the backbone, the best of 20 prunings by a linear head on their features, fitted to train800, on val200."""
    model = pretrained(config, num_classes)

    def score(pruned):
        features = lambda x: pruned.pool(pruned.forward_tokens(x))
        pruned.eval().to(device)
        fit, held_out = (over(features, config, split, model.img_size, device) for split in ("train800", "val200"))
        return baselines.probe_loss(*fit, *held_out, num_classes)

    return baselines.search_pruning(model, pyra.count_macs(model) / target_macs(config, model), score, seed=config.seed)


@torch.inference_mode()
def token_counts(model, config, batches):
    """Tokens before the first block and after each, (depth + 1, images): of one image for all, or where they depend on it of all in batches, in eval mode."""
    if config.method not in PER_IMAGE:
        return torch.tensor(pyra.token_counts(model))[:, None]
    model.eval()
    counts = []
    for x in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            counts.append(baselines.forward_counted(model, x)[1])
    return torch.cat(counts, dim=1)


def scaled_counts(model, config, exponent):
    """ATS draws some patches more than once, so it draws 2**exponent times as many as the merging schedule would leave."""
    counts = baselines.ats_counts(model, schedule_of(config.rate, model))
    return [None if n is None else model.specials + max(1, round((n - model.specials) * 2**exponent)) for n in counts]


def adjustable(model, config):
    """(apply, low, high): after apply(x), x in [low, high], a model with a reducer in SETTLED, as it is now, does the more operations the greater x is.

    One x for all blocks: ats's exponent, what is added to ltmp's merging thresholds, or how far DiffRate's logits lean towards keeping all.
    """
    if config.method == "ats":
        return lambda x: baselines.add_ats(model, scaled_counts(model, config, x)), 0, 4
    if config.method == "ltmp":
        thresholds = [(block.reducer.merge_threshold, block.reducer.merge_threshold.item()) for block in model.blocks]
        return lambda x: [threshold.fill_(min(max(learned + x, 0), 1)) for threshold, learned in thresholds], -1, 1
    logits = [(p, p.clone(), block.reducer.candidates / model.num_patches) for block in model.blocks for p in block.reducer.parameters()]
    return lambda x: [p.copy_(learned + x * share) for p, learned, share in logits], -40, 40


@torch.no_grad()
def meet_budget(apply, low, high, model, config, images):
    """The x of `adjustable` that leaves the operations that the merging schedule leaves, the mean over normalised images. By bisection; leaves the model near it."""
    target = target_macs(config, model)
    for _ in range(12):  # a threshold to 0.0005: MACs are steep in it
        x = (low + high) / 2
        apply(x)
        macs = baselines.mean_macs(model, token_counts(model, config, images.split(64)))
        low, high = (x, high) if macs < target else (low, x)
    return x


@torch.no_grad()
def settle(model, config, images):
    """After training, which changes what ATS draws and what LTMP finds similar, and DiffRate's search: brings the model to its budget.

    images: normalised, some that it was trained on. Returns what there is to record: ats's counts, DiffRate's (prune, merge), one a block; for ltmp None.
    """
    apply, low, high = adjustable(model, config)
    x = [meet_budget(apply, low, high, model, config, images)]
    if dist.is_initialized():  # a sum in another order may tip another process's bisection
        dist.broadcast_object_list(x)
    apply(x[0])
    if config.method == "ats":
        return scaled_counts(model, config, x[0])
    return [list(pair) for pair in baselines.diffrate_rates(model)] if config.method == "diffrate_search" else None


def search_counts(config, num_classes, device):
    """Method ats, before training: how many tokens to sample in each block for the pre-trained model to meet its budget."""
    model = pretrained(config, num_classes).to(device)
    images = drawn_images(config, config.train_split, model.img_size).to(device)
    return scaled_counts(model, config, meet_budget(*adjustable(model, config), model, config, images))


def search(config, num_classes, device, folder):
    """What method rap or ats searches for before training: once, by the first process, then it stands in the run's folder."""
    file = folder / "found.json"
    if int(os.environ.get("RANK", 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with tasks.alone(folder):
            if not file.is_file():
                found = {"rap": search_channels, "ats": search_counts}[config.method](config, num_classes, device)
                pyra.write_atomically(file, lambda p: p.write_text(json.dumps(found)))
    if dist.is_initialized():
        dist.barrier()
    return json.loads(file.read_text())


def teacher_logits(config, runs, device, progress):
    """PE-Dist: the logits of the larger backbone, LoRA-adapted to the task by a run of its own, for the images to train on: (n, classes)."""
    teacher = teacher_run(config).resolved()
    result = run(teacher, runs, progress)
    file = Path(result.folder) / f"logits-{config.train_split}.pt"  # no augmentation: they are the same in every epoch, and for every student
    with tasks.alone(Path(result.folder)):
        if not file.is_file():
            model = merged(load_run(result)).to(device)
            logits, _ = over(model, teacher, config.train_split, model.img_size, device)
            pyra.write_atomically(file, lambda p: torch.save(logits.cpu(), p))
    return torch.load(file, map_location=device, weights_only=True)


def runs_folder(runs=None):
    return Path(runs or os.environ.get("PYRA_RUNS") or HERE / "runs").expanduser().resolve()


def read_result(folder):
    """The Result recorded in a run's folder, or None. Raises ValueError where the record is damaged."""
    file = Path(folder) / "result.json"
    if not file.is_file():
        return None
    try:
        return Result(**{**json.loads(file.read_text()), "folder": str(folder)})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({pyra.reason(error)}): delete it, and the run goes on from its last epoch") from error


def recorded(config, vary, runs=None):
    """All recorded Results whose configs equal `config` in every field but those named in `vary`, such as ("s", "seed")."""
    found = []
    for file in sorted(runs_folder(runs).glob("*/result.json")):
        try:
            result = read_result(file.parent)
        except ValueError as error:  # somebody else's, perhaps
            warnings.warn(str(error), stacklevel=2)
            continue
        theirs = {**{f.name: f.default for f in dataclasses.fields(Config)}, **result.config}  # an older record lacks newer fields
        try:
            like = dataclasses.replace(config, **{name: theirs[name] for name in vary}).resolved()
        except ValueError:  # what varies there, such as the method, does not go with this config
            continue
        if all(theirs[k] == v for k, v in dataclasses.asdict(like).items() if k not in ("device", "workers")):
            found.append(result)
    return found


def check_run(config):
    """What can be said of a config on this machine before its run: finds its task. Raises ValueError or FileNotFoundError."""
    check_device(config.device)
    task = tasks.find_task(config.task, config.data_root)
    with torch.device("meta"):
        model = create_backbone(config, task.num_classes)
        target_macs(config, model)
        if config.method in ("tome", "pyra", "tofu", "evit"):
            add_reducer(model, config)
    return task


def run(config, runs=None, progress=True):
    """Trains and evaluates one config, or finds the record of it. Returns its Result.

    runs: folder of all runs; the environment variable PYRA_RUNS, or runs/ beside this file. Under torchrun every process
    takes its share of each batch; the first writes, and all must see the folder. A second process with the same config waits
    for the first, and finds its record. Raises ValueError or FileNotFoundError for a config that can't run, before any
    training; FloatingPointError where the loss stops being finite: state.pt then holds the epoch before.
    """
    config = config.resolved()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = runs_folder(runs) / config.id()
    if world == 1 and (result := read_result(folder)):  # of several processes one might find it and the next not yet
        return result
    task = check_run(config)
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {world} processes")
    device = torch.device(config.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # days: the first process may wait for a run that others are at, and the rest wait for it
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=7))

    found = None
    if config.method == "diffrate":  # a run of its own finds the rates
        found = run(diffrate_search(config), runs, progress).found
    elif config.method in ("rap", "ats"):
        found = search(config, task.num_classes, device, folder)
    model = build_model(config, task.num_classes, found)
    told = teacher_logits(config, runs, device, progress) if config.teacher else None
    if config.second_epochs is not None:  # before this run's images are on the device: that one's are the same
        start_from(model, run(first_stage(config), runs, progress))
    data = streamed(config, model.img_size, device) if task.group == "Stream" else held_in_memory(config, model.img_size, device, told)
    if data.n < world:
        raise ValueError(f"{config.train_split} has {data.n} images, fewer than the {world} processes")
    with contextlib.ExitStack() as stack:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(tasks.alone(folder)):
                for left in folder.glob("*.partial"):  # by a process that was killed while it wrote
                    left.unlink()
        if world > 1:
            dist.barrier()
        if result := read_result(folder):  # somebody else has done it while we waited
            return result
        return fit(config, model.to(device), found, task, data, folder, rank, world, progress)


def make_optimizer(model, config):
    """AdamW of what the config trains. What is frozen goes to the config's dtype: it needs no float32 copy, and what is trained keeps one."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(DTYPES[config.dtype])
    groups = baselines.param_groups(model, lr=config.lr, modulation_lr=config.modulation_lr, weight_decay=config.weight_decay,
                                    layer_decay=config.layer_decay if config.peft == "full" else None)
    return torch.optim.AdamW(groups, fused=True)


def resume(state_file, config, model, trained, optimizer, found):
    """Back to the end of the last epoch that was saved: model and optimizer as they were. Returns history and found. Raises ValueError."""
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{state_file} is damaged ({pyra.reason(error)}): delete it to start this run again") from error
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    before = state.get("found", found)
    if before != found and config.method not in SETTLED:
        raise ValueError(f"{state_file} was trained with other numbers than {config.method} finds now: delete it to start this run again")
    if before != found and config.method == "ats":  # settled after the last epoch, but not recorded
        baselines.add_ats(model, before)
    return state["history"], before


def fit(config, model, found, task, data, folder, rank, world, progress):
    """The part of `run` that computes: from the last epoch that was saved to the record."""
    device, dtype = model.pos_embed.device, DTYPES[config.dtype]
    epochs, warmup = config.epochs, config.warmup
    if config.second_epochs is not None:
        epochs, warmup = config.second_epochs, config.second_epochs // 10
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    full = config.peft == "full"
    optimizer = make_optimizer(model, config)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    model.checkpoint = config.checkpoint
    counted = config.method in ("ltmp", "diffrate_search")  # how many tokens stay is learned too
    budget = target_macs(config, model) if counted else None
    forward = functools.partial(baselines.forward_counted, model) if counted else model
    if config.compile:
        forward = torch.compile(forward)
    mix = mixup_or_cutmix(task.num_classes) if config.augment == "mae" else None

    history, state_file = [], folder / "state.pt"
    if state_file.is_file():
        history, found = resume(state_file, config, model, trained, optimizer, found)
    elif rank == 0:
        pyra.write_atomically(folder / "config.json", lambda p: p.write_text(json.dumps(dataclasses.asdict(config), indent=1)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    batch = min(config.batch_size, data.n // world * world)
    steps, parts = data.n // batch, math.ceil(batch // world / (config.micro_batch or batch))
    if config.method == "diffrate_search":  # DiffRate's rate supposes thousands of steps; fewer have to come as far
        peak_lrs = [lr * max(1, 300 / (steps * epochs)) if group["name"].endswith("_logits") else lr for lr, group in zip(peak_lrs, optimizer.param_groups)]
    bar = tqdm(total=epochs, desc=config.id(), initial=len(history), disable=not progress or rank > 0, leave=False)
    for epoch in range(len(history), epochs):
        start = time.perf_counter()
        model.train()
        # what is random in an epoch depends on seed and epoch alone: all processes agree on the order, and resuming needs no state
        epoch_seed = config.seed * 100_003 + epoch
        chunks = data.train(epoch_seed, chunks_of_epoch(data.n, batch, parts, epoch_seed, rank, world))
        total_loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for step in tqdm(range(steps), desc=f"epoch {epoch + 1}", disable=bar.disable, leave=False, delay=30):
            factor = mae_lr_factor(epoch + step / steps, warmup, epochs) if full else lr_factor(epoch, warmup, epochs)
            for group, peak in zip(optimizer.param_groups, peak_lrs):
                group["lr"] = peak * factor
            for part in range(parts):
                x, y, told = next(chunks)
                # drop path, dropout and mixing: two processes draw what one process with two micro-batches would
                torch.manual_seed(((epoch_seed * 1_000_003 + step) * 1_009 + rank * parts + part) % 2**63)
                if mix:
                    x, y = mix(x, y)
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits, counts = forward(x) if counted else (forward(x), None)
                if told is None:
                    loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1 if mix else 0.0)
                else:
                    loss = baselines.distillation_loss(logits.float(), told, y)
                if counted:
                    loss = loss + baselines.budget_loss(model, counts, budget)
                loss = loss * (len(x) / batch)
                loss.backward()
                total_loss += loss.detach()
                correct += (logits.argmax(dim=1) == (y.argmax(dim=1) if mix else y)).sum()
            if world > 1:
                for p in trained.values():
                    dist.all_reduce(p.grad)
            optimizer.step()
            optimizer.zero_grad()
            baselines.clamp_thresholds(model)
        sums = torch.stack([total_loss, correct])
        if world > 1:
            dist.all_reduce(sums)
        mean_loss = sums[0].item() / steps  # .item() waits for the device
        if not math.isfinite(mean_loss):
            before = f"; {state_file} holds the epoch before" if history else ""
            raise FloatingPointError(f"{folder.name}: the loss was {mean_loss} in epoch {epoch}{before}")
        entry = dict(epoch=epoch, lr=optimizer.param_groups[0]["lr"], loss=mean_loss, train_accuracy=sums[1].item() / steps / batch,
                     seconds=time.perf_counter() - start)
        if epoch + 1 == epochs and config.method in SETTLED:
            found = settle(model, config, data.sample())
        if epoch + 1 == epochs or (config.eval_every and (epoch + 1) % config.eval_every == 0):
            entry["accuracy"] = evaluate(model, data.test(rank, world), dtype)
        history.append(entry)
        if rank == 0:
            state = dict(model={name: p.detach() for name, p in trained.items()}, optimizer=optimizer.state_dict(), history=history, found=found)
            pyra.write_atomically(state_file, lambda p: torch.save(state, p))
            pyra.write_atomically(folder / "log.jsonl", lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in history)))
        bar.set_postfix({key: f"{entry[key]:.3f}" for key in ("loss", "accuracy") if key in entry}, refresh=False)
        bar.update()
    bar.close()

    evaluated = [entry for entry in history if "accuracy" in entry]
    if not history:  # a second stage of no epochs
        evaluated = [dict(epoch=-1, accuracy=evaluate(model, data.test(rank, world), dtype))]
    result = sum_up(config, model, found, task, data, history, evaluated, folder)
    if rank == 0:
        pyra.save_adapter(model, folder / "adapter.safetensors")
        pyra.write_atomically(folder / "result.json", lambda p: p.write_text(json.dumps(dataclasses.asdict(result), indent=1)))
    if world > 1:
        dist.barrier()
    return result


def sum_up(config, model, found, task, data, history, evaluated, folder):
    """The Result of a trained model: its accuracies, from `evaluated`, and what it costs."""
    if config.method in SETTLED:  # before its last epoch it was not held to the budget
        evaluated = evaluated[-1:]
    best = max(evaluated, key=lambda entry: entry["accuracy"])
    device = model.pos_embed.device
    counts = token_counts(model, config, (x for x, _ in data.test(0, 1))).double()
    means = counts.mean(dim=1).tolist()
    reduced = baselines.mean_macs(model, counts)
    macs = reduced + (0 if config.peft.startswith("fact") else baselines.peft_macs(model, means))
    if config.method in (*SETTLED, "diffrate") and not 0.95 < reduced / target_macs(config, model) < 1.05:
        warnings.warn(f"{folder.name} does {reduced / target_macs(config, model):.2f} times the operations that it was to do", stacklevel=4)
    return Result(
        config=dataclasses.asdict(config), folder=str(folder), num_classes=task.num_classes, classes=list(task.classes), history=history,
        accuracy_last=evaluated[-1]["accuracy"], accuracy_best=best["accuracy"], best_epoch=best["epoch"],
        macs=round(macs), token_counts=[int(n) if n.is_integer() else n for n in means], found=found, trained=count_trained(model),
        backbone_parameters=sum(p.numel() for name, p in model.named_parameters() if not pyra.is_adapter(name) and not name.startswith("head_dist.")),
        seconds_per_epoch=statistics.median(entry["seconds"] for entry in history) if history else 0.0,
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        versions=dict(torch=torch.__version__, python=sys.version.split()[0]),
    )


# ----------------------------------------------------------------------------------------------------------------------
# What notebooks need besides


def check_parameters(namespace, may_be_empty=()):
    """Refuses what papermill was told and the notebook doesn't know: papermill itself only warns, and runs the default.

    namespace: the notebook's globals(), where the parameters cell has written `name: type = default`. may_be_empty: the lists
    that may. Raises ValueError.
    """
    known = namespace["__annotations__"]
    injected = [source for source in namespace.get("In", []) if source.startswith("# Parameters\n")]
    given = [target.id for source in injected for line in ast.parse(source).body for target in line.targets]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"there is no parameter {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"))
    for name, kind in known.items():  # what is a str here may be more to Config, which looks closer
        value, expected = namespace[name], getattr(kind, "__name__", kind)
        allowed = {"int": int, "float": (int, float), "bool": bool, "list": list}.get(expected, object)
        if value == [] and name not in may_be_empty:
            raise ValueError(f"{name} needs an entry")
        if value is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and expected in ("int", "float"))):
            raise ValueError(f"{name} must be of type {expected}, not {value!r}" + ("; papermill takes a list with -y 'name: [1, 2]'" if expected == "list" else ""))


def paper_table(name):
    """Rows of a table of the paper's supplement, data/paper/<name>.csv, as {column: text}."""
    with open(HERE / "data" / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


class OverSeeds(NamedTuple):
    """As text "87.2 ± 1.4", or as a format such as .2f has the numbers; of one alone "87.2"."""

    mean: float
    std: float
    n: int

    def __format__(self, spec):
        return f"{self.mean:{spec or '.1f'}}" + (f" ± {self.std:{spec or '.1f'}}" if self.n > 1 else "")

    def __str__(self):
        return f"{self}"


def over_seeds(values):
    """Mean and standard deviation of several runs' numbers; the deviation of one is 0."""
    return OverSeeds(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def accuracy_over_seeds(results):
    """Last-epoch accuracies in %, as over_seeds has it."""
    return over_seeds([100 * result.accuracy_last for result in results])


def group_means(accuracies, groups):
    """{task: accuracy}, {task: its group} -> {group: its tasks' mean, ..., "Average": the groups' mean}: so the paper averages, and not over the 19 tasks."""
    means = {group: statistics.mean(a for name, a in accuracies.items() if groups[name] == group) for group in dict.fromkeys(groups[name] for name in accuracies)}
    return {**means, "Average": statistics.mean(means.values())}


# ----------------------------------------------------------------------------------------------------------------------
# Speed


class Speed(NamedTuple):
    images_per_second: float  # the median of the rounds
    lowest: float
    highest: float
    speedup: float  # over the first of the models: the median of the ratios within each round, which a machine's drift can't touch
    latency: float  # ms a batch, of the median round
    peak_memory: int | None  # bytes that weights, one batch of images and what is computed take at most; None if compiled for a CPU or to CUDA graphs


COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune")


def peak_memory(work, device):
    """Bytes that tensors take at most while work() runs, beyond those that were there before; without a library's own scratch space on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler of a PyTorch for CUDA prints an error where there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # bytes taken, or given back as less than 0
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def check_timing(batch_size, rounds=1, seconds=1.0, dtypes=(), device=None, compile=None):
    """Raises ValueError, in a sentence, for what `benchmark` and its kin can't measure."""
    if not all(type(n) is int and n > 0 for n in (batch_size, rounds)) or not seconds > 0:
        raise ValueError(f"batch_size and rounds must be at least 1 and seconds greater than 0, not {batch_size}, {rounds} and {seconds}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if compile not in COMPILE_MODES:
        raise ValueError(f"compile must be one of {', '.join(map(str, COMPILE_MODES))}, not {compile!r}")
    check_device(device)


def in_turn(calls, device, seconds, rounds):
    """Seconds that each of several functions takes: {name: function} -> {name: one number a round}.

    Each round times every function for seconds / rounds or at least one call, and the device is waited for, so that a
    machine's drift meets them all alike.
    """
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(name, times):
        wait()
        start = time.perf_counter()
        for _ in range(times):
            calls[name]()
        wait()
        return (time.perf_counter() - start) / times

    times = {name: max(1, round(seconds / rounds / timed(name, 1))) for name in calls}
    took = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls:
            took[name].append(timed(name, times[name]))
    return took


def speeds_of(took, batch_size, memory):
    """in_turn's seconds for a batch and bytes of memory, by name -> {name: Speed}."""
    first = next(iter(took.values()))
    return {name: Speed(batch_size / statistics.median(t), batch_size / max(t), batch_size / min(t), statistics.median(map(operator.truediv, first, t)),
                        1000 * statistics.median(t), memory[name]) for name, t in took.items()}


def benchmark(models, batch_size=16, dtype="float32", device=None, seconds=3.0, rounds=7, compile=None, images=None):
    """How fast several models are, measured in turn: {name: Speed}.

    models: {name: module that maps images (b, 3, h, w) to logits}; fold LoRA in first.
    seconds: for each model, in so many rounds; at least one batch a round (see `in_turn`).
    images: real ones, normalised, (n, 3, h, w), repeated up to the batch, where their number of tokens depends on them (ATS, LTMP); else noise.
    compile: None, or torch.compile's mode, such as "default" or "reduce-overhead" (CUDA graphs); compiling isn't timed.
    The models are moved to device and dtype and stay there, in eval mode. Raises ValueError.
    """
    check_timing(batch_size, rounds, seconds, [dtype], device, compile)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, calls, memory = DTYPES[dtype], {}, {}
    if compile:
        torch.compiler.reset()  # what earlier calls compiled would be tried first at each batch
    for name, model in models.items():
        model.eval().to(device, dtype)
        size = getattr(model, "img_size", 224)
        batch = torch.randn(batch_size, 3, size, size) if images is None else images[torch.arange(batch_size) % len(images)]
        # fullgraph: what can't be compiled is an error, not a slow model
        forward = torch.compile(model, mode=compile, fullgraph=True, dynamic=False) if compile else model
        calls[name] = functools.partial(forward, batch.to(device, dtype))
    # to torch.compile our models are variants of one function, and it gives up after eight
    patch = torch._dynamo.config.patch(recompile_limit=max(8, len(models))) if compile else contextlib.nullcontext()
    with torch.inference_mode(), patch:
        for name, model in models.items():
            if compile or device.type == "cuda":
                for _ in range(3 if compile else 1):  # compiles, and the second and third run record and replay a CUDA graph
                    calls[name]()
            packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, pyra.PackedLinear))
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *calls[name].args)) + packed * dtype.itemsize
            # a CUDA graph allocates nothing when it is replayed, and the profiler, which counts on a CPU, would have a model compiled once more
            countable = not compile or device.type == "cuda" and compile == "default"
            memory[name] = held + peak_memory(calls[name], device) if countable else None
        return speeds_of(in_turn(calls, device, seconds, rounds), batch_size, memory)


def images_to_time(config, count):
    """Normalised test images of the config's task, drawn, for `benchmark` of models whose tokens depend on the image: (at most count, 3, h, w)."""
    config = config.resolved()
    with torch.device("meta"):
        img_size = create_backbone(config, 1).img_size
    return drawn_images(config, "test", img_size, count)


class Fitted(NamedTuple):
    schedule: list  # pairs merged, one entry a block
    mac_ratio: float  # what counting operations predicts
    speedup: float  # what was measured, over the same model unmerged
    images_per_second: float
    miss: float  # of the target: measured / target - 1; beyond the tolerance where no schedule came closer


def rising_through(points, target):
    """The x at which the rising curve through the points {x: (y, weight)} has the height `target`.

    Where noise makes the points fall, neighbours are averaged until they rise (isotonic regression); between those left the
    curve is straight, and beyond the last it goes on in proportion.
    """
    pools = []
    for x, (y, weight) in sorted(points.items()):
        pools.append((x, y, weight))
        while len(pools) > 1 and pools[-1][1] <= pools[-2][1]:
            (x0, y0, w0), (x1, y1, w1) = pools[-2:]
            pools[-2:] = [((x0 * w0 + x1 * w1) / (w0 + w1), (y0 * w0 + y1 * w1) / (w0 + w1), w0 + w1)]
    for (x0, y0, _), (x1, y1, _) in zip(pools, pools[1:]):
        if y0 <= target <= y1:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    x, y, _ = pools[-1] if target > pools[-1][1] else pools[0]
    return x * target / y


def fit_schedule(model, speedup=None, images_per_second=None, batch_size=16, dtype="float32", device=None, tolerance=0.03, seconds=3.0, tries=10):
    """The merging schedule that makes a model as fast as asked for, as measured here: the supplement's "minor adjustments
    based on actually tested throughput". Returns a Fitted; the model stays as it is.

    speedup: over the same model unmerged; or images_per_second. Each try measures a schedule, the mildest of Eq. (1)'s family
    for its MACs, in turn with the unmerged model (see benchmark) for `seconds` each, in more rounds once the target is near; the next one
    is where the rising curve through all that was measured meets the target. Where none of the tries is within the tolerance,
    a warning says so, and the closest is returned. ToMe is measured; PYRA costs the same to a per cent or two.
    Raises ValueError for a target that takes no merging, or fewer operations than the most merging leaves.
    """
    target = images_per_second if speedup is None else speedup
    check_timing(batch_size, seconds=seconds, dtypes=[dtype], device=device)
    if tries < 1 or not tolerance > 0:
        raise ValueError(f"tries must be at least 1 and tolerance greater than 0, not {tries} and {tolerance}")
    if (speedup is None) == (images_per_second is None) or isinstance(target, (bool, str)) or not 0 < target < math.inf:
        raise ValueError(f"one of speedup and images_per_second must be a positive number, not {speedup!r} and {images_per_second!r}")
    if speedup is not None and speedup <= 1:
        raise ValueError(f"speedup must be greater than 1, not {speedup}")
    plain = pyra.merge_lora(pyra.add_tome(copy.deepcopy(model), 0))
    unmerged = 1.0 if images_per_second is None else benchmark({"plain": plain}, batch_size, dtype, device, seconds)["plain"].images_per_second
    if target <= unmerged:
        raise ValueError(f"the model does {unmerged:.4g} images/s without merging, more than the {target:g} asked for")
    ratio, most = target / unmerged, pyra.most_macs_ratio(plain)
    if ratio > most:
        raise ValueError(f"the target of {target:g} is out of reach here: it takes {ratio:.3g} times fewer operations, and merging saves {most:.3g} times at most")
    tried, rounds = {}, 5  # tried: ratio of operations -> schedule, rounds measured, and the means of speed-up and images/s over them
    for _ in tqdm(range(tries), desc="fitting the schedule", leave=False):
        schedule = pyra.solve_macs(plain, ratio)
        merging = pyra.add_tome(copy.deepcopy(plain), schedule)
        ratio = pyra.count_macs(plain) / pyra.count_macs(merging)
        speed = benchmark({"plain": plain, "merged": merging}, batch_size, dtype, device, seconds * rounds / 15, rounds)["merged"]
        _, n, *means = tried.get(ratio, (schedule, 0, 0.0, 0.0))  # one that comes up again is measured better, not anew
        means = [(n * mean + rounds * now) / (n + rounds) for mean, now in zip(means, (speed.speedup, speed.images_per_second))]
        tried[ratio] = (schedule, n + rounds, *means)
        measured = {x: (t[2] if images_per_second is None else t[3], t[1]) for x, t in tried.items()}  # what the target is of, and its weight
        misses = {x: y / target - 1 for x, (y, _) in measured.items()}
        if abs(misses[ratio]) <= tolerance and n + rounds >= 15:
            break
        if abs(misses[ratio]) <= 3 * tolerance:
            rounds = 15
        ratio = min(max(1.01, rising_through({1.0: (unmerged, 1), **measured}, target)), most)
    ratio = min(tried, key=lambda x: (tried[x][1] < 15, abs(misses[x])))
    schedule, _, speedup, images_per_second = tried[ratio]
    if abs(misses[ratio]) > tolerance:
        listed = ", ".join(f"{x:.2f}: {y:.4g}" for x, (y, _) in sorted(measured.items()))
        warnings.warn(f"no schedule came within {tolerance:.0%} of {target:g}, the closest misses it by {misses[ratio]:+.1%}; ratios of operations, and what they measured: {listed}", stacklevel=2)
    return Fitted(schedule, ratio, speedup, images_per_second, misses[ratio])


def benchmark_table(backbone, batch_size, rate="high", device=None, seconds=3.0, rounds=7, compile=None, dtypes=tuple(DTYPES)):
    """Rows of plain, ToMe and PYRA on random weights, on a CPU also packed (pyra.pack), and of timm's model where timm is installed.

    A row is a dict with dtype, model, mac_ratio and a Speed's fields. Raises ValueError.
    """
    check_timing(batch_size, rounds, seconds, dtypes, device, compile)
    try:
        import timm
    except ImportError:
        timm = None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        r = schedule_of(rate, pyra.create_model(backbone))
    rows = []
    for dtype in dtypes:
        models = {"plain": pyra.create_model(backbone), "tome": pyra.create_model(backbone), "pyra": pyra.create_model(backbone)}
        pyra.add_tome(models["tome"], r)
        pyra.add_pyra(models["pyra"], r)
        if device == "cpu" and not compile and torch.backends.mkldnn.is_available() and (dtype == "float32" or has_fast_bfloat16(device)):
            models |= {f"{name}, packed": pyra.pack(copy.deepcopy(model).to(DTYPES[dtype])) for name, model in models.items()}
        ratio = {name: pyra.count_macs(models["plain"]) / pyra.count_macs(model) for name, model in models.items()}
        if timm and timm.is_model(backbone):
            models["timm"], ratio["timm"] = timm.create_model(backbone), 1.0
        speeds = benchmark(models, batch_size, dtype, device, seconds, rounds, compile)
        rows += [dict(dtype=dtype, model=name, mac_ratio=ratio[name], **speed._asdict()) for name, speed in speeds.items()]
    return rows


def training_step(model, optimizer, images, checkpoint=False):
    """A step as `fit` does it, towards labels that are all 0; in bf16 where the frozen weights are."""
    model.checkpoint = checkpoint
    with torch.autocast(images.device.type, torch.bfloat16, enabled=model.pos_embed.dtype == torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64, device=images.device)).backward()
    optimizer.step()
    optimizer.zero_grad()


def training_table(backbone, batch_size, rate="high", device=None, seconds=3.0, rounds=7, dtypes=tuple(DTYPES)):
    """What a step of training takes with LoRA on random weights and noise: rows of plain, ToMe and PYRA, as they are and with `--checkpoint`.

    A row is a dict as benchmark_table's. Its peak_memory is that of all that is there in a step: weights, images, what is
    kept for the backward pass, gradients and AdamW's state; its mac_ratio is that of the forward pass. Raises ValueError.
    """
    check_timing(batch_size, rounds, seconds, dtypes, device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for dtype in dtypes:
        steps, memory, ratio = {}, {}, {}
        for method in ("plain", "tome", "pyra"):
            config = Config(backbone=backbone, method=method, rate=rate, weights="none", dtype=dtype, device=str(device)).resolved()
            model = build_model(config, 100).to(device).train()
            optimizer, images = make_optimizer(model, config), torch.randn(batch_size, 3, model.img_size, model.img_size, device=device)
            step = functools.partial(training_step, model, optimizer, images)
            step()  # AdamW's state is made
            state = [t for of_one in optimizer.state.values() for t in of_one.values() if torch.is_tensor(t)]
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), images, *state))
            for name, checkpoint in ((method, False), (f"{method}, checkpoint", True)):
                steps[name] = functools.partial(step, checkpoint=checkpoint)
                memory[name] = held + peak_memory(steps[name], device)
                ratio[name] = pyra.count_macs(model)
        speeds = speeds_of(in_turn(steps, device, seconds, rounds), batch_size, memory)
        rows += [dict(dtype=dtype, model=name, mac_ratio=ratio["plain"] / ratio[name], **speed._asdict()) for name, speed in speeds.items()]
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Many runs


def read_grid(file):
    """A file with a config a line, as JSON with the fields that aren't the default: {"task": "dtd", "method": "tome"} -> Configs.

    Raises ValueError that names the line.
    """
    configs, known = [], {f.name for f in dataclasses.fields(Config)}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                values = json.loads(line)
                if not isinstance(values, dict) or values.keys() - known:
                    raise ValueError(f"{min(values.keys() - known)!r} is no field of a config" if isinstance(values, dict) else "not a JSON object")
                configs.append(Config(**values))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {pyra.reason(error)}") from error
    if not configs:
        raise ValueError(f"{file} lists no runs")
    return configs


def write_grid(configs, file):
    """The file that read_grid reads."""
    lines = [json.dumps({f.name: getattr(c, f.name) for f in dataclasses.fields(c) if getattr(c, f.name) != f.default}) + "\n" for c in configs]
    pyra.write_atomically(Path(file), lambda partial: partial.write_text("".join(lines), encoding="utf-8"))


def in_order(configs):
    """{id: config}, each once, behind all the runs that any of them starts from."""
    first = [other for config in configs for other in needed(config)]
    return {**(in_order(first) if first else {}), **{config.id(): config for config in configs}}


def claim(folder):
    """The log of a run, opened and locked for the process that is to do the run; None where one is at it.

    The lock is on the open file, which is that process's output: it lasts as long as the process, whatever becomes of who started it.
    """
    file = folder.parent / "logs" / f"{folder.name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    log = open(file, "ab")
    taken = tasks.lock(log, wait=False) is None
    if not taken and folder.is_dir():  # somebody may have started this run by hand, without our log
        descriptor = os.open(folder, os.O_RDONLY)
        taken = tasks.lock(descriptor, wait=False) is None
        os.close(descriptor)
    if taken:
        log.close()
    return None if taken else log


def last_line(file):
    lines = Path(file).read_bytes()[-10_000:].decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_grid(configs, workers=None, runs=None, progress=True):
    """Runs what isn't recorded yet, each run in a process of its own, `workers` at a time. Returns the Results, None where a run failed.

    workers: by default one a CUDA device, or one on the CPU; they take the devices in turn and share the cores (or OMP_NUM_THREADS says).
    What `check_run` refuses is not begun. A run that ends in a sentence would do so again; one that ends in any other way is tried twice more.
    What failed is said on stderr, with its log, runs/logs/<id>.log, and the others go on. Several runners may share a folder: none starts what
    another is at. Where the runner ends, its processes end (on Linux; elsewhere, after kill -9, they finish the run that they are at), and the
    same call goes on at their last epochs.
    """
    runs, gpus = runs_folder(runs), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [gpu.strip() for gpu in gpus if gpu.strip()] or [str(i) for i in range(torch.cuda.device_count())]
    workers = max(1, len(gpus)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // workers)), **os.environ, "PYRA_RUNS": str(runs), "PYRA_RUNNER": str(os.getpid())}
    free, running, tries, failed = list(range(workers)), {}, collections.Counter(), {}

    def done(name):
        return (runs / name / "result.json").is_file()

    def fail(name, why):
        failed[name], log = why, runs / "logs" / f"{name}.log"
        tqdm.write(f"failed: {name}: {why}" + (f"; its log: {log}" if log.is_file() else ""), file=sys.stderr)

    def start(name, slot):
        config = dataclasses.replace(todo[name], device=(todo[name].device or "").split(":")[0] or None)  # the one device that the process sees
        command = [sys.executable, str(HERE / "train.py"), *arguments(config)]
        visible = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        with claim(runs / name) or contextlib.nullcontext() as log:
            if log:
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**environment, **visible})

    for name, config in {config.id(): config for config in configs}.items():
        try:
            if not done(name):
                check_run(config.resolved())
        except (ValueError, OSError) as error:
            fail(name, pyra.reason(error))
    todo = in_order([config for config in configs if config.id() not in failed])
    needs = {name: [first.id() for first in needed(config)] for name, config in todo.items()}
    waiting = [name for name in todo if not done(name)]
    shown, bar = "", tqdm(desc="runs", total=len(todo), initial=len(todo) - len(waiting), smoothing=0, disable=not progress)
    try:
        while True:
            for name, (process, slot) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    free.append(slot)
                    tries[name] += 1
                    last = last_line(runs / "logs" / f"{name}.log")
                    if done(name):
                        continue
                    if process.returncode > 0 and last.startswith("train.py: "):
                        fail(name, last.removeprefix("train.py: "))
                    elif tries[name] == 3:
                        fail(name, f"killed by signal {-process.returncode}, three times" if process.returncode < 0 else last)
                    else:
                        waiting.append(name)
            for name in list(waiting):
                if not free:
                    break
                if done(name):
                    waiting.remove(name)
                elif any(first in failed for first in needs[name]):
                    waiting.remove(name)
                    fail(name, "a run that it starts from failed")
                elif all(map(done, needs[name])):
                    try:
                        process = start(name, free[0])
                    except OSError as error:  # a full disk, say
                        waiting.remove(name)
                        fail(name, pyra.reason(error))
                        continue
                    if process:
                        waiting.remove(name)
                        running[name] = process, free.pop(0)
            counts = f"{len(running)} running, {len(failed)} failed"
            if counts != shown or len(waiting) + len(running) < bar.total - bar.n:  # drawn when something happens: a log keeps every line
                shown, bar.n = counts, bar.total - len(waiting) - len(running)
                bar.set_postfix_str(counts)
            if not waiting and not running:
                break
            time.sleep(0.3)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
        bar.close()
    results = []
    for config in configs:
        try:
            results.append(read_result(runs / config.id()))
        except ValueError as error:
            fail(config.id(), pyra.reason(error))
            results.append(None)
    return results


def end_with(runner):
    """Has this process killed when the process `runner`, which started it, ends, however it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != runner:  # it ended before we asked
            sys.exit("train.py: the runner that started this run is gone")


def write_slurm(configs, file, runs=None, most=None):
    """Writes a script for Slurm's sbatch that does what run_grid does: an array with a task a run, `most` at a time."""
    runs, lines = runs_folder(runs), [shlex.join(arguments(c) or [f"--task={c.task}"]) for c in in_order(configs).values()]
    count = min(len(lines), 1000)  # Slurm's default limit is 1001: in a longer list a task does every thousandth run
    exports = {"PYRA_RUNS": str(runs), **{name: os.environ[name] for name in ("PYRA_DATA", "PYRA_CACHE") if os.environ.get(name)}}
    script = f"""#!/bin/bash
#SBATCH --job-name=pyra
#SBATCH --array=0-{count - 1}{f"%{most}" if most else ""}
#SBATCH --output="{runs}/logs/%x-%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
# {len(lines)} runs. What is recorded is not repeated and what was interrupted goes on at its last epoch: submit this again as often as you like.
# What your cluster asks for goes in front of this file's name: sbatch --gres=gpu:1 --cpus-per-task=4 --time=2:00:00 {Path(file).name}
cd {shlex.quote(os.getcwd())}
{shlex.join(["export", *(f"{name}={value}" for name, value in exports.items())])}
sed -n "$((SLURM_ARRAY_TASK_ID + 1))~{count}p" <<'END' | xargs -L 1 {shlex.join([sys.executable, str(HERE / "train.py")])}
"""
    (runs / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its logs
    pyra.write_atomically(Path(file), lambda partial: partial.write_text(script + "\n".join(lines) + "\nEND\n", encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def read_value(text, kinds):
    """A command line's text as a value of a field's type; text that is none stays text, for Config to refuse."""
    for read in (int, float, json.loads, {"True": True, "False": False, "None": None}.__getitem__):
        try:
            value = read(text)
        except (ValueError, KeyError):
            continue
        if isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool):
            return value
    return text


def parse(argv):
    """Command line -> Config; a list is written as JSON, [16,16,...]."""
    parser = argparse.ArgumentParser(description="One run of PYRA; `train.py benchmark --help` for speed, `train.py grid --help` for many.", allow_abbrev=False)
    fields = dataclasses.fields(Config)
    for f in fields:
        shown = "the paper's for the backbone, or the device's" if f.default is None else f.default
        flag = dict(nargs="?", const="True") if f.type is bool else {}  # --checkpoint is --checkpoint True
        parser.add_argument(f"--{f.name}", metavar="", **flag, help=f"{f.metadata['help']} (default: {shown})")
    given = vars(parser.parse_args(argv))
    return Config(**{f.name: read_value(given[f.name], f.type) for f in fields if given[f.name] is not None})


def arguments(config):
    """Config -> command line, such that parse(arguments(config)) == config."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in values.items()]


def main(argv):
    if argv[:1] == ["benchmark"]:
        parser = argparse.ArgumentParser(prog="train.py benchmark", description="Images/s and memory on random weights, models in turn.")
        parser.add_argument("--backbone", default="vit_base_patch16_224", choices=list(pyra.SIZES), metavar="NAME")
        parser.add_argument("--batch_size", type=int, default=16)
        parser.add_argument("--rate", default="high")
        parser.add_argument("--device")
        parser.add_argument("--seconds", type=float, default=10.0, help="for each model and dtype")
        parser.add_argument("--rounds", type=int, default=7)
        parser.add_argument("--dtype", choices=list(DTYPES), help="both by default")
        parser.add_argument("--compile", metavar="MODE", help="torch.compile's mode: default, or reduce-overhead for CUDA graphs")
        parser.add_argument("--training", action="store_true", help="steps of training with LoRA, as they are and with --checkpoint, instead of inference")
        args = parser.parse_args(argv[1:])
        if args.training and args.compile:
            raise ValueError("--training is measured without --compile")
        common = (args.backbone, args.batch_size, read_value(args.rate, str | float), args.device, args.seconds, args.rounds)
        dtypes = [args.dtype] if args.dtype else DTYPES
        print(f"{'dtype':9} {'model':17} {'images/s':>9} {'lowest':>8} {'highest':>8} {'speed-up':>9} {'MAC ratio':>10} {'ms/batch':>9} {'peak MB':>8}")
        for row in training_table(*common, dtypes) if args.training else benchmark_table(*common, args.compile, dtypes):
            row["peak"] = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f}"
            print("{dtype:9} {model:17} {images_per_second:9.1f} {lowest:8.1f} {highest:8.1f} {speedup:9.2f} {mac_ratio:10.2f} {latency:9.1f} {peak:>8}".format(**row))
        return
    if argv[:1] in (["grid"], ["slurm"]):
        parser = argparse.ArgumentParser(prog=f"train.py {argv[0]}", description="Many runs, from a file with a config a line: {\"task\": \"dtd\", \"seed\": 1}")
        parser.add_argument("grid", help="the file")
        if argv[0] == "grid":
            parser.add_argument("--workers", type=int, help="runs at a time (default: one a CUDA device, or one)")
            args = parser.parse_args(argv[1:])
            results = run_grid(read_grid(args.grid), args.workers)
            print(f"{len(results) - results.count(None)} of {len(results)} runs are recorded in {runs_folder()}")
            sys.exit(int(None in results))
        parser.add_argument("--max", type=int, help="tasks of the array that Slurm runs at a time (default: all)")
        args = parser.parse_args(argv[1:])
        if args.max is not None and args.max < 1:
            raise ValueError(f"--max must be at least 1, not {args.max}")
        script = Path(args.grid).with_suffix(".sbatch")
        write_slurm(read_grid(args.grid), script, most=args.max)
        print(f"sbatch {shlex.quote(str(script))}")
        return
    result = run(parse(argv))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"accuracy on {result.config['eval_split']}: {result.accuracy_last:.4f} after the last epoch; record in {result.folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    runner = os.environ.pop("PYRA_RUNNER", None)
    if runner:
        end_with(int(runner))
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError) as error:
        if runner:  # its log keeps where, too
            traceback.print_exc()
        hint = "; with --micro_batch a device takes fewer images at once" if isinstance(error, torch.OutOfMemoryError) else ""
        sys.exit(f"train.py: {pyra.reason(error)}{hint}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on at the last epoch")
