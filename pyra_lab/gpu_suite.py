"""What a GPU does with merging, in a few minutes: python -m pyra_lab benchmark --suite gpu --out FILE.json --minutes 6.

SECTIONS, the most informative per second first, each within its share of the time; what no time is left for is listed. A section is a function
(plan, device) that yields tasks: what is measured (a dict), and a function that measures it and returns rows. All random weights and noise.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyra
from pyra_lab import batches, epochs, files
from pyra_lab.config import Config
from pyra_lab.devices import check_device, default_device
from pyra_lab.methods import build_model
from pyra_lab.speed import summarise_rounds, time_interleaved, training_table


class Plan(NamedTuple):
    """How large everything is."""

    names: tuple = ("vit_base_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224")
    rate: str | float = "high"
    batches: tuple = (256, 16, 1, 64)
    compile: dict = dict(mode="reduce-overhead")
    seconds: float = 0.5  # per function that is timed
    rounds: int = 5
    side: int = 8192  # of the matrices whose product is the limit for everything else
    train_batch: int = 64
    images: int = 1000  # of the task
    epochs: int = 100
    tokens: tuple = (197, 157, 93, 51, 27)  # after some of PYRA-high's blocks
    shape: tuple = (256, 12, 64)  # batch, heads, head dim of attention and merging alone


SMOKE = Plan(("vit_nano_patch4_56",), "high", (1,), dict(disable=True), 0.001, 1, 64, 2, 4, 2, (19,), (2, 3, 8))  # on a CPU: that it runs, no more


def models_of(plan, device, name):
    """{what: model in bf16 and evaluation mode} of plain, ToMe and PYRA, and timm's where it is installed."""
    with torch.device(device):
        models = {kind: pyra.create_model(name, num_classes=1000) for kind in ("plain", "tome", "pyra")}
        r = pyra.merge_schedule(plan.rate, model=models["plain"])
        pyra.add_tome(models["tome"], r)
        pyra.add_pyra(models["pyra"], r)
        try:
            import timm
            if timm.is_model(name):
                models["timm"] = timm.create_model(name, num_classes=1000)
        except ImportError:
            pass
    return {kind: model.to(torch.bfloat16).eval() for kind, model in models.items()}


def time_calls(plan, device, calls, batch):
    """{name: Speed} of functions that each take a batch, in turn."""
    for call in calls.values():
        for _ in range(2):  # to record a graph, and to run it
            call()
    return summarise_rounds(time_interleaved(calls, device, plan.seconds, plan.rounds), batch, dict.fromkeys(calls))


def first_call(device, call):
    """Seconds that the first call takes, in which it may compile."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def microseconds(plan, device, calls):
    """{name: function} -> {name: microseconds per call}; for one that fails, its error."""
    fine, failed = {}, {}
    for name, call in calls.items():
        try:
            call()
            fine[name] = call
        except Exception as error:  # a kernel that refuses these shapes
            failed[name] = files.first_line(error, 120)
    return {name: 1000 * speed.latency for name, speed in time_calls(plan, device, fine, 1).items()} | failed


# ---- The card --------------------------------------------------------------------------------------------------------


def card(plan, device):
    def describe():
        row = dict(device=device.type, torch=torch.__version__, python=sys.version.split()[0])
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            row |= dict(name=found.name, memory=found.total_memory, processors=found.multi_processor_count, cuda=torch.version.cuda)
            row |= dict(cudnn=torch.backends.cudnn.version(), capability=list(torch.cuda.get_device_capability(device)))
        return [row]

    def driver():
        asked = "driver_version,clocks.sm,clocks.max.sm,power.limit,memory.used"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True, check=True, timeout=30)
        return [dict(lines=done.stdout.splitlines())]

    yield {}, describe
    if device.type == "cuda":
        yield dict(what="driver"), driver


def product(plan, device):
    """Billions of products and sums per second, in bf16 and float32: of large matrices, and of a linear map of ViT-B's."""
    def rate(n, k, m, dtype):
        a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((n, k), (k, m)))
        speed = time_calls(plan, device, {"product": lambda: a @ b}, 1)["product"]
        return [dict(shape=[n, k, m], dtype=str(dtype).removeprefix("torch."), tflops=2 * n * k * m / speed.latency / 1e9)]

    tokens = plan.shape[0] * plan.tokens[0]
    yield dict(what="large"), lambda: rate(plan.side, plan.side, plan.side, torch.bfloat16)
    yield dict(what="linear map"), lambda: rate(tokens, plan.side * 768 // 8192, plan.side * 3072 // 8192, torch.bfloat16)
    yield dict(what="large"), lambda: rate(plan.side // 2, plan.side // 2, plan.side // 2, torch.float32)


# ---- The forward pass ------------------------------------------------------------------------------------------------


def eager(plan, device, model, images):
    return functools.partial(model, images)


def captured(plan, device, model, images):
    """The kernels of eager mode as a CUDA graph, which the CPU launches in one call; elsewhere eager mode."""
    if device.type != "cuda":
        return functools.partial(model, images)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what libraries set up in a first call can't be recorded
        for _ in range(3):
            model(images)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def compiled(plan, device, model, images):
    return functools.partial(torch.compile(model, fullgraph=True, dynamic=False, **plan.compile), images)


@torch.inference_mode()
def forward_rows(plan, device, models, prepare, batch):
    size = models["plain"].img_size
    images = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)
    macs = {kind: pyra.count_macs(models["plain" if kind == "timm" else kind]) for kind in models}
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=16):  # to torch.compile our models are variants of one function
        calls = {kind: prepare(plan, device, model, images) for kind, model in models.items()}
        first = {kind: first_call(device, call) for kind, call in calls.items()}
        speeds = time_calls(plan, device, calls, batch)
    rows = []
    for kind, speed in speeds.items():
        ratio = macs["plain"] / macs[kind]
        row = dict(what=kind, **speed._asdict(), mac_ratio=ratio, share=speed.speedup / ratio, tflops=2e-12 * macs[kind] * speed.images_per_second)
        rows.append({**row, "first_call": first[kind]})
    return rows


def forward(prepare):
    """The section of a way to run the forward pass."""
    def tasks(plan, device):
        for name in plan.names:
            models = functools.cache(functools.partial(models_of, plan, device, name))
            for batch in plan.batches:
                yield dict(model=name, batch=batch), lambda batch=batch, models=models: forward_rows(plan, device, models(), prepare, batch)

    return tasks


@torch.inference_mode()
def kernels(plan, device, kind, most=20):
    """What the time of a batch goes into: the longest kernels, and all others together."""
    name, batch, cuda = plan.names[0], plan.batches[0], device.type == "cuda"
    model = models_of(plan, device, name)[kind]
    images = torch.randn(batch, 3, model.img_size, model.img_size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        model(images)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints an error where there is no GPU
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(3):
            model(images)
        if cuda:
            torch.cuda.synchronize(device)
    took = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU  # an operation of the CPU counts the kernels that it launched as its own, again
    events = sorted((event for event in profile.key_averages() if event.device_type == wanted and took(event)), key=took, reverse=True)
    total = sum(map(took, events))
    rows = [dict(kernel=event.key[:90], calls=event.count / 3, ms=took(event) / 3e3, share=took(event) / total) for event in events[:most]]
    return rows + [dict(kernel="all others", calls=sum(e.count for e in events[most:]) / 3, ms=sum(map(took, events[most:])) / 3e3)]


def profiled(plan, device):
    for kind in ("pyra", "plain"):
        yield dict(model=plan.names[0], batch=plan.batches[0], what=kind), functools.partial(kernels, plan, device, kind)


# ---- Training --------------------------------------------------------------------------------------------------------


def training(plan, device):
    """A step with LoRA in bf16: images/s and all memory, without and with --checkpoint."""
    def rows(name):
        table = training_table(name, plan.train_batch, plan.rate, str(device), plan.seconds, plan.rounds, ["bfloat16"])
        return [dict(what=row.pop("model"), share=row["speedup"] / row["mac_ratio"], **row) for row in table]

    for name in plan.names:
        yield dict(model=name, batch=plan.train_batch), functools.partial(rows, name)


def task_seconds(plan, device, kind, most=8):
    """A VTAB-sized run's training from the first of its epochs: the whole, where it has no more than `most`; else extrapolated."""
    config = Config(backbone=plan.names[0], method=kind, rate=plan.rate, weights="none", epochs=plan.epochs, batch_size=plan.train_batch, device=str(device),
                    dtype="bfloat16").resolved()
    model = build_model(config, 100).to(device)
    images = torch.randint(256, (plan.images, 3, model.img_size, model.img_size), dtype=torch.uint8)
    data = batches.held_in_memory(lambda split, size: (images, torch.arange(plan.images) % 100), config, model.img_size, device)
    optimizer, _ = epochs.prepare_training(model, config, None)
    entries, took = epochs.train(model, optimizer, config, data, 100, config.epochs, config.warmup, progress=False), []
    for entry, _ in zip(entries, range(most)):
        took.append(entry["seconds"])
    whole = sum(took) + (plan.epochs - len(took)) * statistics.median(took[1:])
    return [dict(seconds=whole, epochs=plan.epochs, images=plan.images, measured_epochs=len(took), extrapolated=len(took) < plan.epochs, each=took)]


def task(plan, device):
    for kind in ("pyra", "plain"):
        yield dict(model=plan.names[0], batch=plan.train_batch, what=kind), functools.partial(task_seconds, plan, device, kind)


# ---- Parts -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def attention_rows(plan, device, n):
    """Microseconds of proportional attention over n tokens: with sizes as a mask, by each kernel, and as two more channels; and without sizes."""
    b, h, d = plan.shape
    qkv = pyra.QKV(*torch.randn(3, b, n, h, d, device=device, dtype=torch.bfloat16).transpose(2, 3))
    size = torch.randint(1, 9, (b, n, 1), device=device).float()
    augmented = lambda: F.scaled_dot_product_attention(*pyra.append_log_size(qkv, size), scale=d**-0.5)[..., :d]
    masked = lambda: F.scaled_dot_product_attention(*qkv[:3], attn_mask=size.log().to(torch.bfloat16).mT[:, None])
    plain = lambda: F.scaled_dot_product_attention(*qkv[:3])

    def by(kernel, call):
        def run():
            with sdpa_kernel(kernel):
                return call()
        return run

    calls = {"no sizes": plain, "mask": masked, "channels": augmented}
    if device.type == "cuda":
        calls |= {f"mask, {kernel.name}": by(kernel, masked) for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)}
        calls |= {f"{what}, {kernel.name}": by(kernel, call) for what, call in (("no sizes", plain), ("channels", augmented))
                  for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)}
    exact = F.scaled_dot_product_attention(*(t.float() for t in qkv[:3]), attn_mask=size.log().mT[:, None])
    error = {what: (call().float() - exact).abs().max().item() for what, call in (("mask", masked), ("channels", augmented))}
    return [dict(microseconds=microseconds(plan, device, calls), max_error=error)]


def attention(plan, device):
    for n in plan.tokens:
        yield dict(tokens=n), functools.partial(attention_rows, plan, device, n)


def merge_rows(plan, device, n, grad):
    """Microseconds of merging a fifth of n tokens into others, by index_add and by a product; and of matching, with two sorts and with one."""
    b, h, d = plan.shape
    x, metric, r = torch.randn(b, n, h * d, device=device, dtype=torch.bfloat16), torch.randn(b, n, d, device=device, dtype=torch.bfloat16), n // 5
    order, dst = pyra.match(metric, r)
    stay, src = (pyra.take(x, index).requires_grad_(grad) for index in order.split([n - r, r], dim=1))
    best = torch.rand(b, (n + 1) // 2, device=device)

    def one_sort():  # as match, which sorts what stays, but that by counting
        src, _ = best.argsort(dim=-1, descending=True, stable=True).tensor_split([r], dim=1)
        stays = torch.ones_like(best, dtype=torch.int64).scatter(1, src, 0)
        place = torch.where(stays > 0, stays.cumsum(1) - 1, best.shape[1] - r)
        return src, src.new_empty(b, best.shape[1] - r + 1).scatter(1, place, torch.arange(best.shape[1], device=device).expand(b, -1))[:, :-1]

    def two_sorts():
        src, stays = best.argsort(dim=-1, descending=True, stable=True).tensor_split([r], dim=1)
        return src, stays.sort(dim=-1).values

    def back(call):
        return lambda: torch.autograd.grad(call().sum(), (stay, src))

    adds = {"index_add": lambda: stay.flatten(0, 1).index_add(0, pyra.rows(dst, n - r), src.flatten(0, 1)).view_as(stay),
            "product": lambda: stay + pyra.one_hot_product(dst, n - r, src, add=True)}
    if grad:
        return [dict(microseconds=microseconds(plan, device, {name: back(call) for name, call in adds.items()}))]
    same = all(map(torch.equal, one_sort(), two_sorts()))
    with torch.inference_mode():
        calls = adds | {"match": lambda: pyra.match(metric, r), "two sorts": two_sorts, "one sort": one_sort}
        return [dict(microseconds=microseconds(plan, device, calls), sorts_agree=same)]


def merging(plan, device):
    for n in plan.tokens:
        for grad in (False, True):
            yield dict(tokens=n, gradient=grad), functools.partial(merge_rows, plan, device, n, grad)


# ---- All of it -------------------------------------------------------------------------------------------------------

SECTIONS = {  # name -> the section, and its part of the time; what one leaves is there for those after it
    "card": (card, 0.02), "product": (product, 0.03), "eager": (forward(eager), 0.12), "graph": (forward(captured), 0.12), "profile": (profiled, 0.05),
    "task": (task, 0.08), "training": (training, 0.08), "attention": (attention, 0.05), "merge": (merging, 0.05), "compiled": (forward(compiled), 0.40),
}


def read_suite(path):
    """The rows that run_suite wrote. Raises FileNotFoundError, or ValueError for another file."""
    try:
        rows = json.loads(Path(path).expanduser().read_text())
        assert rows[0]["section"] == "suite"
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no file that benchmark --suite has written") from error
    return rows


def run_suite(out, minutes, smoke=False, device=None, tell=print):
    """Does the SECTIONS and returns the rows, dicts, which the JSON file `out` holds too: it is written again after each row.

    A task starts as long as the time left to its section would do for the longest of them so far. One that fails is a row with its error, and one
    that there is no time for a row that says so. smoke: tiny sizes, to see that all runs. tell: gets each row as a line. Raises ValueError, OSError.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be greater than 0, not {minutes}")
    check_device(device)
    plan, device, rows = SMOKE if smoke else Plan(), torch.device(device or default_device()), []
    command = f"python -m pyra_lab benchmark --suite gpu --minutes {minutes:g}" + " --smoke" * smoke

    def note(**row):
        line = json.dumps(row)
        rows.append(json.loads(line))  # as the file has them: lists, no tuples
        tell(line)
        files.write_atomically(out, lambda partial: partial.write_text(json.dumps(rows, indent=1) + "\n"))

    note(section="suite", command=command, plan=plan._asdict())
    began, part = time.perf_counter(), 0.0
    for section, (tasks, share) in SECTIONS.items():
        part, longest = part + share, 0.0
        for what, measure in tasks(plan, device):
            start = time.perf_counter()
            if start + longest > began + 60 * minutes * part:
                note(section=section, **what, left_out="no time was left")
                continue
            try:
                for row in measure():
                    note(section=section, **{**what, **row})
            except Exception as error:  # the rest may work
                note(section=section, **what, error=f"{type(error).__name__}: {files.first_line(error)}")
            longest = max(longest, time.perf_counter() - start)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    note(section="end", seconds=time.perf_counter() - began)
    return rows
