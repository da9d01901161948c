"""One run: a Config -> a model -> training -> evaluation -> a record that is found again.

    python train.py --task sprites_location --method pyra --epochs 10          # 1 device
    torchrun --nproc_per_node 4 train.py --task cifar100 --backbone vit_base_patch16_224     # 4, data-parallel
    python train.py --help                                                     # every field, with its default
    python train.py benchmark --backbone vit_base_patch16_224                  # images/s of plain, ToMe and PYRA

A run writes runs/<id>/, where the id is a hash of its config: log.jsonl (a line an epoch), state.pt (to resume from),
adapter.safetensors and, last, result.json. A finished run is not repeated; an interrupted one goes on at its last epoch,
on a CPU bit for bit as if nothing had happened (a GPU adds merged tokens up in no fixed order). The id knows the config,
not the files behind it nor this code: after changing images, weights or code, delete the folder.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

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
METHODS = ("plain", "tome", "pyra")
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
    method: str = _option("pyra", "plain (LoRA only), tome or pyra")
    rate: str | float | list = _option("high", "low, high, a ratio F/f for Eq. (1), or the schedule itself, a list with one entry a block")
    s: int = _option(1, "rank of PYRA's generators")
    lora_rank: int | None = _option(None, "LoRA's h")
    # how
    epochs: int = _option(100, "epochs")
    warmup: int | None = _option(None, "epochs of linear warm-up; a tenth of the epochs by default")
    batch_size: int | None = _option(None, "images a step, over all devices")
    lr: float = _option(1e-3, "learning rate of LoRA and head")
    modulation_lr: float = _option(1e-4, "learning rate of w_r and w_d; Table 4 tunes it per task")
    weight_decay: float = _option(1e-4, "AdamW's weight decay")
    drop_path: float = _option(0.1, "stochastic depth of the last block, rising linearly from 0")
    dropout: float = _option(0.1, "on LoRA's input")
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

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kinds = getattr(self, f.name), f.type
            if type(value) is int and isinstance(0.0, kinds):
                object.__setattr__(self, f.name, float(value))
            elif not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool):
                expected = getattr(kinds, "__name__", str(kinds)).replace("NoneType", "None")
                raise ValueError(f"{f.name} must be of type {expected}, not {value!r}")
        for name, least in dict(epochs=1, warmup=0, batch_size=1, s=1, lora_rank=1, eval_every=0).items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("lr", "modulation_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be at least 0 and less than 2^31, not {self.seed}")
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        for name, known in dict(backbone=BACKBONES, method=METHODS, norm=(None, *tasks.NORMS), dtype=(None, *DTYPES),
                                train_split=tasks.SPLITS, eval_split=tasks.SPLITS).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(k for k in known if k)}, not {getattr(self, name)!r}")
        if self.warmup is not None and self.warmup >= self.epochs:
            raise ValueError(f"warmup ({self.warmup}) must be less than epochs ({self.epochs})")
        check_device(self.device)
        if not isinstance(self.rate, list):
            pyra.merge_schedule(self.rate)

    def resolved(self):
        """The same config with every None replaced by what it stands for."""
        known = BACKBONES[self.backbone]
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        defaults = dict(
            weights=known["weights"], norm=known["norm"], lora_rank=known["lora_rank"], batch_size=known["batch_size"],
            warmup=self.epochs // 10, device=device, dtype="bfloat16" if has_fast_bfloat16(device) else "float32",
        )
        values = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        # a path means the same whatever folder we are in: a notebook's kernel starts elsewhere than papermill's
        if self.task.startswith("folder:"):
            values["task"] = f"folder:{Path(self.task.removeprefix('folder:')).expanduser().resolve()}"
        if self.weights and self.weights != SHIPPED and Path(self.weights).is_file():
            values["weights"] = str(Path(self.weights).resolve())
        root = self.data_root or os.environ.get("PYRA_DATA")
        if root:
            values["data_root"] = str(Path(root).expanduser().resolve())
        return dataclasses.replace(self, **values)

    def id(self):
        """A name for the run: what it is, and a hash of everything that it depends on."""
        fields = dataclasses.asdict(self.resolved())
        fields["device"] = fields["device"].split(":")[0]  # which of several GPUs doesn't matter
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:10]
        task = re.sub(r"\W+", "_", fields["task"]).strip("_")[-40:]
        return f"{task}-{fields['backbone']}-{fields['method']}-seed{fields['seed']}-{digest}"


@dataclass(frozen=True)
class Result:
    """What a run found out; result.json holds the same."""

    config: dict  # every field, None replaced
    folder: str  # where the run's files are
    accuracy_last: float  # on eval_split after the last epoch, in [0, 1]
    accuracy_best: float  # the best of all evaluations: optimistic where eval_split is the test split
    best_epoch: int
    history: list  # a dict an epoch: epoch, lr, loss, train_accuracy, seconds, and accuracy where evaluated
    num_classes: int
    classes: list  # names by label; empty where nobody wrote them down
    macs: int  # of one image, LoRA folded in
    token_counts: list  # tokens before the first block and after each
    trained: dict  # trained parameters: lora, modulation, head
    backbone_parameters: int  # without head
    seconds_per_epoch: float  # median, training only
    peak_memory: int | None  # bytes on a CUDA device
    versions: dict


def check_device(device):
    """Raises ValueError unless device is None or one that is here."""
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu, cuda or cuda:<number>, not {device!r}")
    if (device or "").startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {device} was asked for, and PyTorch finds no CUDA device here")
        if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {device} was asked for, and PyTorch finds {torch.cuda.device_count()} CUDA devices here")


def has_fast_bfloat16(device):
    """Whether matrix products in bf16 are faster there than in fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ----------------------------------------------------------------------------------------------------------------------
# The model of a config


def create_backbone(config, num_classes):
    pool = "avg" if config.backbone.endswith(".mae") else "token"
    return pyra.create_model(config.backbone, num_classes=num_classes, drop_path_rate=config.drop_path, global_pool=pool)


def build_model(config, num_classes):
    """The pre-trained backbone with what the config's method adds, on the CPU in float32, initialised by the config's seed."""
    config = config.resolved()
    torch.manual_seed(config.seed)
    model = create_backbone(config, num_classes)
    if config.weights != "none":
        pyra.load_pretrained(model, HERE / SHIPPED if config.weights == SHIPPED else config.weights)
    pyra.add_lora(model, config.lora_rank, config.dropout)
    if config.method != "plain":
        r = config.rate
        if not isinstance(r, list):
            r = pyra.merge_schedule(r, len(model.blocks), model.num_patches)
            r[-1] = min(r[-1], (model.num_patches - sum(r[:-1])) // 2)  # Eq. (1) asks too much of the last block; so does the paper's constant 16
        if config.method == "tome":
            pyra.add_tome(model, r)
        else:
            pyra.add_pyra(model, r, config.s)
    return model


def load_run(result):
    """The trained model of a Result: its backbone, with its adapter."""
    config = Config(**{**result.config, "device": None})  # the run's device need not be here
    return pyra.load_adapter(build_model(config, result.num_classes), Path(result.folder) / "adapter.safetensors").eval()


def count_trained(model):
    counts = {"lora": 0, "modulation": 0, "head": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            counts["lora" if "lora_" in name else "modulation" if ".reducer." in name else "head"] += p.numel()
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# One run


def lr_factor(epoch, warmup, epochs):
    """Of every group's learning rate in that epoch: linear warm-up, then a cosine down to 0.01."""
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


def write_atomically(path, write):
    """write(partial path), then the partial file gets its name: whenever we are killed, `path` is whole or absent."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@torch.inference_mode()
def evaluate(model, images, labels, norm, dtype, batch_size=128):
    """Top-1 accuracy in [0, 1]; images uint8, on any device, in memory or mapped."""
    device = next(model.parameters()).device
    model.eval()
    correct = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tasks.normalize(x.to(device), norm))
        correct += (logits.argmax(dim=1).cpu() == y.cpu()).sum().item()
    return correct / len(labels)


def run(config, runs=None, progress=True):
    """Trains and evaluates one config, or finds the record of it. Returns its Result.

    runs: folder of all runs; the environment variable PYRA_RUNS, or runs/ beside this file. Under torchrun every process
    takes its share of each batch; the first writes, and all must see the folder. Raises ValueError or FileNotFoundError for
    a config that can't run, before any training; FloatingPointError where the loss stops being finite: state.pt then holds the epoch before.
    """
    config = config.resolved()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(runs or os.environ.get("PYRA_RUNS") or HERE / "runs").expanduser().resolve() / config.id()
    if (folder / "result.json").is_file():
        return Result(**{**json.loads((folder / "result.json").read_text()), "folder": str(folder)})
    task = tasks.find_task(config.task, config.data_root)
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the {world} processes")
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    model = build_model(config, task.num_classes).to(device)
    images, labels = tasks.load_split(config.task, config.train_split, model.img_size, config.data_root)
    test_images, test_labels = tasks.load_split(config.task, config.eval_split, model.img_size, config.data_root)
    batch = min(config.batch_size, len(labels) // world * world)
    if batch == 0:
        raise ValueError(f"{config.train_split} has {len(labels)} images, fewer than the {world} processes")
    images, labels = images.to(device), labels.to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if dtype == torch.bfloat16:  # what is frozen needs no float32 copy; what is trained keeps one
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
    groups = pyra.param_groups(model, config.lr, config.modulation_lr, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    forward = torch.compile(model) if config.compile else model

    history, state_file = [], folder / "state.pt"
    if state_file.is_file():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", lambda p: p.write_text(json.dumps(dataclasses.asdict(config), indent=1)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    share = slice(rank * batch // world, (rank + 1) * batch // world)
    bar = tqdm(range(config.epochs), desc=config.id(), initial=len(history), disable=not progress or rank > 0, leave=False)
    for epoch in range(len(history), config.epochs):
        start = time.perf_counter()
        model.train()
        for group, peak in zip(optimizer.param_groups, peak_lrs):
            group["lr"] = peak * lr_factor(epoch, config.warmup, config.epochs)
        # what is random in an epoch depends on seed and epoch alone: all processes agree on the order, and resuming needs no state
        epoch_seed = config.seed * 100_003 + epoch
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch_seed))
        torch.manual_seed(epoch_seed * 1_009 + rank)  # dropout and drop path differ between processes
        steps = len(labels) // batch  # as in the published code, an incomplete last batch is left out
        total_loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch][share].to(device)
            y = labels[index]
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = forward(tasks.normalize(images[index], config.norm))
            loss = F.cross_entropy(logits.float(), y)
            loss.backward()
            if world > 1:
                for p in trained.values():
                    dist.all_reduce(p.grad)
                    p.grad /= world
            optimizer.step()
            optimizer.zero_grad()
            total_loss += loss.detach()
            correct += (logits.argmax(dim=1) == y).sum()
        sums = torch.stack([total_loss, correct])
        if world > 1:
            dist.all_reduce(sums)
        mean_loss = sums[0].item() / steps / world  # .item() waits for the device
        if not math.isfinite(mean_loss):
            before = f"; {state_file} holds the epoch before" if history else ""
            raise FloatingPointError(f"{folder.name}: the loss was {mean_loss} in epoch {epoch}{before}")
        entry = dict(epoch=epoch, lr=optimizer.param_groups[0]["lr"], loss=mean_loss, train_accuracy=sums[1].item() / steps / batch,
                     seconds=time.perf_counter() - start)
        last = epoch + 1 == config.epochs
        if last or (config.eval_every and (epoch + 1) % config.eval_every == 0):
            entry["accuracy"] = evaluate(model, test_images, test_labels, config.norm, dtype)
        history.append(entry)
        if rank == 0:
            state = dict(model={name: p.detach() for name, p in trained.items()}, optimizer=optimizer.state_dict(), history=history)
            write_atomically(state_file, lambda p: torch.save(state, p))
            write_atomically(folder / "log.jsonl", lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in history)))
        bar.set_postfix({key: f"{entry[key]:.3f}" for key in ("loss", "accuracy") if key in entry}, refresh=False)
        bar.update()
    bar.close()

    evaluated = [entry for entry in history if "accuracy" in entry]
    best = max(evaluated, key=lambda entry: entry["accuracy"])
    result = Result(
        config=dataclasses.asdict(config), folder=str(folder), num_classes=task.num_classes, classes=list(task.classes), history=history,
        accuracy_last=evaluated[-1]["accuracy"], accuracy_best=best["accuracy"], best_epoch=best["epoch"],
        macs=pyra.count_macs(model), token_counts=pyra.token_counts(model), trained=count_trained(model),
        backbone_parameters=sum(p.numel() for name, p in model.named_parameters() if not pyra.is_adapter(name)),
        seconds_per_epoch=statistics.median(entry["seconds"] for entry in history),
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        versions=dict(torch=torch.__version__, python=sys.version.split()[0]),
    )
    if rank == 0:
        pyra.save_adapter(model, folder / "adapter.safetensors")
        write_atomically(folder / "result.json", lambda p: p.write_text(json.dumps(dataclasses.asdict(result), indent=1)))
    if world > 1:
        dist.barrier()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Speed


@torch.inference_mode()
def benchmark(models, batch_size=16, dtype="float32", device=None, seconds=3.0, rounds=7):
    """Images/s of several models in turn: {name: (median, lowest, highest)} over the rounds.

    models: {name: module that maps images (b, 3, h, w) to logits}; fold LoRA in first. Each round times every model for
    seconds / rounds or at least one batch, so that a machine's drift meets them all: quote ratios of one call's medians.
    The models are moved to device and dtype and stay there. Raises ValueError.
    """
    if batch_size < 1 or rounds < 1:
        raise ValueError(f"batch_size and rounds must be at least 1, not {batch_size} and {rounds}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, images = DTYPES[dtype], {}
    for name, model in models.items():
        model.eval().to(device, dtype)
        size = getattr(model, "img_size", 224)
        images[name] = torch.randn(batch_size, 3, size, size, device=device, dtype=dtype)

    def timed(name, batches):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(batches):
            models[name](images[name])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    batches = {}
    for name in models:
        timed(name, 2)  # warm-up
        batches[name] = max(1, round(seconds / rounds / timed(name, 1)))
    speeds = {name: [] for name in models}
    for _ in range(rounds):
        for name in models:
            speeds[name].append(batch_size * batches[name] / timed(name, batches[name]))
    return {name: (statistics.median(s), min(s), max(s)) for name, s in speeds.items()}


def benchmark_table(backbone, batch_size, rate="high", device=None, seconds=3.0, rounds=7):
    """Rows of plain, ToMe and PYRA on random weights, and of timm's model where timm is installed, in fp32 and bf16."""
    try:
        import timm
    except ImportError:
        timm = None
    with torch.device("meta"):
        depth = len(pyra.create_model(backbone).blocks)
    rows = []
    for dtype in DTYPES:
        models = {"plain": pyra.create_model(backbone), "tome": pyra.create_model(backbone), "pyra": pyra.create_model(backbone)}
        pyra.add_tome(models["tome"], pyra.merge_schedule(rate, depth))
        pyra.add_pyra(models["pyra"], pyra.merge_schedule(rate, depth))
        ratio = {name: pyra.count_macs(models["plain"]) / pyra.count_macs(model) for name, model in models.items()}
        if timm and timm.is_model(backbone):
            models["timm"], ratio["timm"] = timm.create_model(backbone), 1.0
        speeds = benchmark(models, batch_size, dtype, device, seconds, rounds)
        for name, (median, low, high) in speeds.items():
            rows.append(dict(dtype=dtype, model=name, images_per_second=median, low=low, high=high,
                             speedup=median / speeds["plain"][0], mac_ratio=ratio[name]))
    return rows


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
    parser = argparse.ArgumentParser(description="One run of PYRA; `train.py benchmark --help` for speed.", allow_abbrev=False)
    fields = dataclasses.fields(Config)
    for f in fields:
        shown = "the paper's for the backbone, or the device's" if f.default is None else f.default
        parser.add_argument(f"--{f.name}", metavar="", help=f"{f.metadata['help']} (default: {shown})")
    given = vars(parser.parse_args(argv))
    return Config(**{f.name: read_value(given[f.name], f.type) for f in fields if given[f.name] is not None})


def main(argv):
    if argv[:1] == ["benchmark"]:
        parser = argparse.ArgumentParser(prog="train.py benchmark", description="Images/s on random weights, models in turn.")
        parser.add_argument("--backbone", default="vit_base_patch16_224", choices=list(pyra.SIZES), metavar="NAME")
        parser.add_argument("--batch_size", type=int, default=16)
        parser.add_argument("--rate", default="high")
        parser.add_argument("--device")
        parser.add_argument("--seconds", type=float, default=10.0, help="for each model and dtype")
        parser.add_argument("--rounds", type=int, default=7)
        args = parser.parse_args(argv[1:])
        check_device(args.device)
        print(f"{'dtype':9} {'model':6} {'images/s':>9} {'lowest':>8} {'highest':>8} {'speed-up':>9} {'MAC ratio':>10}")
        for row in benchmark_table(args.backbone, args.batch_size, read_value(args.rate, str | float), args.device, args.seconds, args.rounds):
            print("{dtype:9} {model:6} {images_per_second:9.1f} {low:8.1f} {high:8.1f} {speedup:9.2f} {mac_ratio:10.2f}".format(**row))
        return
    result = run(parse(argv))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"accuracy on {result.config['eval_split']}: {result.accuracy_last:.4f} after the last epoch; record in {result.folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(f"train.py: {pyra.reason(error)}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on at the last epoch")
