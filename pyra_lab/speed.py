"""Speed and memory, measured fairly: models take turns, so that a machine's drift affects them alike.

`benchmark` compares models; `fit_schedule` finds the merging schedule that reaches a measured speed-up; `benchmark_table` and
`training_table` are the rows that the command line and the notebooks print.
"""

import contextlib
import copy
import functools
import itertools
import math
import operator
import os
import statistics
import time
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

import pyra
from pyra_lab import files
from pyra_lab.batches import sample_indices
from pyra_lab.config import Config
from pyra_lab.deploy import pack
from pyra_lab.devices import DTYPES, autocast, check_device, default_device, has_fast_bfloat16
from pyra_lab.epochs import cast_frozen, make_optimizer
from pyra_lab.images import normalize
from pyra_lab.methods import build_model, fold
from pyra_lab.preparation import find_source, image_size

COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune")


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """What `benchmark` measures of a model."""

    images_per_second: float  # median over the rounds
    lowest: float
    highest: float
    speedup: float  # over the first model: the median of the ratios within each round, so that a machine's drift cancels
    latency: float  # ms per batch, median over the rounds
    peak_memory: int | None  # bytes of weights, a batch of images and everything computed; None if compiled for a CPU or to CUDA graphs


def peak_memory(work, device):
    """The most bytes that tensors take while work() runs, beyond those before; on a CPU without the scratch space of libraries."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler of a PyTorch for CUDA prints an error where there is no GPU
    with torch.autograd.profiler.profile(profile_memory=True) as profile:  # torch.profiler's, without its summary, which takes far longer than work()
        work()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]  # bytes allocated, negative where freed
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def check_timing(batch_size, rounds=1, seconds=1.0, dtypes=(), device=None, compile=None):
    """Raises ValueError for what `benchmark` and the functions built on it can't measure."""
    if not all(type(n) is int and n > 0 for n in (batch_size, rounds)) or not seconds > 0:
        raise ValueError(f"batch_size and rounds must be at least 1 and seconds greater than 0, not {batch_size}, {rounds} and {seconds}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if compile not in COMPILE_MODES:
        raise ValueError(f"compile must be one of {', '.join(map(str, COMPILE_MODES))}, not {compile!r}")
    check_device(device)


def time_interleaved(calls, device, seconds, rounds):
    """Times several functions in turn: {name: function} -> {name: seconds per call, one number per round}.

    Each round calls every function for seconds / rounds, at least once, and waits for the device.
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


def summarise_rounds(took, batch_size, memory):
    """Seconds per batch (see time_interleaved) and bytes of memory, by name -> {name: Speed}."""
    first = next(iter(took.values()))
    speeds = {}
    for name, t in took.items():
        median, speedup = statistics.median(t), statistics.median(map(operator.truediv, first, t))
        speeds[name] = Speed(batch_size / median, batch_size / max(t), batch_size / min(t), speedup, 1000 * median, memory[name])
    return speeds


def benchmark(models, batch_size=16, dtype="float32", device=None, seconds=3.0, rounds=7, compile=None, images=None):
    """Measures the speed of several models in turn: {name: Speed}.

    models: {name: module that maps images (b, 3, h, w) to logits}; fold LoRA in first.
    seconds: per model, divided into `rounds`; at least one batch per round (see `time_interleaved`).
    images: real ones, normalised, (n, 3, h, w), repeated up to the batch size, for models whose number of tokens depends on
    the image; default: noise.
    compile: None, or torch.compile's mode, such as "default" or "reduce-overhead" (CUDA graphs); compiling isn't timed.
    The models are moved to device and dtype and stay there, in eval mode. Raises ValueError.
    """
    check_timing(batch_size, rounds, seconds, [dtype], device, compile)
    device = torch.device(device or default_device())
    dtype, calls, memory = DTYPES[dtype], {}, {}
    if compile:
        torch.compiler.reset()  # or what earlier calls compiled would be tried first at each batch
    for name, model in models.items():
        model.eval().to(device, dtype)
        size = getattr(pyra.unwrap(model), "img_size", 224)
        size = [size] * 2 if isinstance(size, int) else size
        batch = torch.randn(batch_size, 3, *size) if images is None else images[torch.arange(batch_size) % len(images)]
        # fullgraph: an operation that can't be compiled raises, instead of making the model slow
        forward = torch.compile(model, mode=compile, fullgraph=True, dynamic=False) if compile else model
        calls[name] = functools.partial(forward, batch.to(device, dtype))
    # to torch.compile our models are variants of one function, and it stops after eight
    patch = torch._dynamo.config.patch(recompile_limit=max(8, len(models))) if compile else contextlib.nullcontext()
    with torch.inference_mode(), patch:
        for name, model in models.items():
            if compile or device.type == "cuda":
                for _ in range(3 if compile else 1):  # the first call compiles, the second and third record and replay a CUDA graph
                    calls[name]()
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *calls[name].args))
            held += sum(getattr(module, "packed_bytes", 0) for module in model.modules())
            # a CUDA graph allocates nothing when it is replayed, and the profiler, which counts on a CPU, would make the model compile again
            countable = not compile or device.type == "cuda" and compile == "default"
            memory[name] = held + peak_memory(calls[name], device) if countable else None
        return summarise_rounds(time_interleaved(calls, device, seconds, rounds), batch_size, memory)


def images_to_time(config, count):
    """Test images of the config's task for `benchmark`, normalised and chosen at random: (at most count, 3, h, w)."""
    config = config.resolved()
    pixels, _ = find_source(config).load("test", image_size(config))
    return normalize(pixels[sample_indices(len(pixels), count)], config.norm)


# ---- A schedule for a speed-up ---------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    schedule: list  # pairs merged, one entry per block
    mac_ratio: float  # MACs of the unmerged model over those of the merged one
    speedup: float  # measured, over the unmerged model
    images_per_second: float
    miss: float  # measured / target - 1; larger than the tolerance where no schedule came closer


def interpolate_monotone(points, target):
    """The x at which an increasing curve through the points {x: (y, weight)} reaches the height `target`.

    Where noise makes the points decrease, neighbours are averaged until they increase (isotonic regression). The curve is
    linear between the points, and proportional to x beyond the first and the last.
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


def check_target(speedup, images_per_second, latency, tolerance, tries):
    """Raises ValueError unless one target is given that asks for merging."""
    if tries < 1 or not tolerance > 0:
        raise ValueError(f"tries must be at least 1 and tolerance greater than 0, not {tries} and {tolerance}")
    targets = [target for target in (speedup, images_per_second, latency) if target is not None]
    if len(targets) != 1 or isinstance(targets[0], (bool, str)) or not 0 < targets[0] < math.inf:
        raise ValueError(f"give exactly one of speedup, images_per_second and latency, a positive number, not {targets}")
    if speedup is not None and speedup <= 1:
        raise ValueError(f"speedup must be greater than 1, not {speedup}")


class Measured(NamedTuple):
    """What `fit_schedule` has measured of a schedule so far."""

    schedule: list
    rounds: int
    speedup: float  # the mean over these rounds
    images_per_second: float


@pyra.on_model
def most_macs_ratio(model, remaining=4):
    """How many times fewer MACs the strongest merging leaves: half of the tokens in every block, down to `remaining` patches."""
    counts = [n + model.specials for n in pyra.counts_along(model.num_patches, len(model.blocks), math.inf, remaining)]
    return pyra.macs_of_counts(model, counts[:1] * len(counts)) / pyra.macs_of_counts(model, counts)


@pyra.on_model
def fit_schedule(model, speedup=None, images_per_second=None, batch_size=16, dtype="float32", device=None, tolerance=0.03, seconds=3.0,
                 tries=10, latency=None):
    """Finds the merging schedule that makes a model as fast as asked for on this device: the supplement's "minor adjustments
    based on actually tested throughput". Returns a Fitted; the model stays as it is.

    speedup: over the unmerged model; or images_per_second; or latency, in ms per batch. Each try takes the mildest schedule of Eq. (1)'s family for a number
    of MACs and times it in turn with the unmerged model for `seconds` each, in more rounds once the target is near. The next
    try is where an increasing curve through all measurements meets the target. Where no try comes within the tolerance, the
    closest is returned with a warning. ToMe is timed, in PyTorch; PYRA is slower by one or two per cent, and onnxruntime often gains more.
    Raises ValueError for a target that is below the unmerged model's speed, or beyond what merging can reach.
    """
    check_timing(batch_size, seconds=seconds, dtypes=[dtype], device=device)
    check_target(speedup, images_per_second, latency, tolerance, tries)
    in_ms = latency is not None
    say = lambda images_per_second: f"{1000 * batch_size / images_per_second:.4g} ms per batch" if in_ms else f"{images_per_second:.4g} images/s"
    plain = fold(pyra.add_tome(copy.deepcopy(model), 0))
    if speedup is not None:
        target, unmerged, asked, of = speedup, 1.0, f"{speedup:g}x", operator.attrgetter("speedup")
    else:
        target, of = 1000 * batch_size / latency if in_ms else images_per_second, operator.attrgetter("images_per_second")
        asked = say(target)
        unmerged = of(benchmark({"plain": plain}, batch_size, dtype, device, seconds)["plain"])
    if target <= unmerged:
        raise ValueError(f"the target must be {'less' if in_ms else 'greater'} than the {say(unmerged)} of the model without merging, not {asked}")
    ratio, most = target / unmerged, most_macs_ratio(plain)
    if ratio > most:
        fastest = "" if speedup is not None else f": the fastest reachable is about {say(unmerged * most)}"
        raise ValueError(f"target {asked} is unreachable: it needs {ratio:.3g}x fewer MACs, and merging gives at most {most:.3g}x{fastest}")

    tried, rounds = {}, 5  # {ratio of MACs: Measured}
    for _ in files.progress(range(tries), desc="fitting the schedule"):
        schedule = pyra.solve_macs(plain, ratio)
        merging = pyra.add_tome(copy.deepcopy(plain), schedule)
        ratio = pyra.count_macs(plain) / pyra.count_macs(merging)
        speed = benchmark({"plain": plain, "merged": merging}, batch_size, dtype, device, seconds * rounds / 15, rounds)["merged"]
        before = tried.get(ratio, Measured(schedule, 0, 0.0, 0.0))  # a schedule that comes up again gets more rounds
        n = before.rounds + rounds
        tried[ratio] = Measured(schedule, n, (before.rounds * before.speedup + rounds * speed.speedup) / n,
                                (before.rounds * before.images_per_second + rounds * speed.images_per_second) / n)
        misses = {x: of(measured) / target - 1 for x, measured in tried.items()}
        if abs(misses[ratio]) <= tolerance and n >= 15:
            break
        if abs(misses[ratio]) <= 3 * tolerance:
            rounds = 15
        points = {1.0: (unmerged, 1)} | {x: (of(measured), measured.rounds) for x, measured in tried.items()}
        ratio = min(max(1.01, interpolate_monotone(points, target)), most)
    ratio = min(tried, key=lambda x: (tried[x].rounds < 15, abs(misses[x])))
    if abs(misses[ratio]) > tolerance:
        listed = ", ".join(f"{x:.2f}: {of(measured):.4g}" for x, measured in sorted(tried.items()))
        warnings.warn(f"no schedule came within {tolerance:.0%} of {asked}, the closest misses it by {misses[ratio]:+.1%}; "
                      f"measured, by ratio of MACs: {listed}", stacklevel=2)
    best = tried[ratio]
    return Fitted(best.schedule, ratio, best.speedup, best.images_per_second, misses[ratio])


# ---- Tables on random weights ----------------------------------------------------------------------------------------


def benchmark_table(backbone, batch_size, rate="high", device=None, seconds=3.0, rounds=7, compile=None, dtypes=tuple(DTYPES), img_size=None):
    """Inference: rows of plain, ToMe and PYRA, on a CPU also packed (deploy.pack), and of timm's model where timm is installed.

    backbone: a name that `pyra.create_model` knows. img_size: pixels of a side; None: what the name says. A row is a dict with dtype, model,
    mac_ratio and the fields of a Speed. Raises ValueError.
    """
    check_timing(batch_size, rounds, seconds, dtypes, device, compile)
    try:
        import timm
    except ImportError:
        timm = None
    device = device or default_device()
    size = {} if img_size is None else dict(img_size=img_size)
    with torch.device("meta"):
        model = pyra.create_model(backbone, **size)
        r = pyra.merge_schedule(rate, model=model)
    rows = []
    for dtype in dtypes:
        models = {name: pyra.create_model(backbone, num_classes=1000, **size) for name in ("plain", "tome", "pyra")}
        pyra.add_tome(models["tome"], r)
        pyra.add_pyra(models["pyra"], r)
        if device == "cpu" and not compile and torch.backends.mkldnn.is_available() and (dtype == "float32" or has_fast_bfloat16(device)):
            models |= {f"{name}, packed": pack(copy.deepcopy(model).to(DTYPES[dtype])) for name, model in models.items()}
        ratio = {name: pyra.count_macs(models["plain"]) / pyra.count_macs(model) for name, model in models.items()}
        if timm and timm.is_model(backbone):
            models["timm"], ratio["timm"] = timm.create_model(backbone, num_classes=1000, **size), 1.0
        speeds = benchmark(models, batch_size, dtype, device, seconds, rounds, compile)
        rows += [dict(dtype=dtype, model=name, mac_ratio=ratio[name], **speed._asdict()) for name, speed in speeds.items()]
    return rows


def training_step(model, optimizer, images, checkpoint=False):
    """One step as in training, with labels that are all 0; in bf16 where the frozen weights are."""
    model.checkpoint = checkpoint
    with autocast(images.device, model.pos_embed.dtype):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64, device=images.device)).backward()
    optimizer.step()
    optimizer.zero_grad()


def training_table(backbone, batch_size, rate="high", device=None, seconds=3.0, rounds=7, dtypes=tuple(DTYPES), img_size=None):
    """A training step with LoRA on noise: rows of plain, ToMe and PYRA, without and with `--checkpoint`.

    A row is a dict as in benchmark_table. Its peak_memory includes all of a step: weights, images, what is kept for the
    backward pass, gradients and AdamW's state; its mac_ratio is that of the forward pass. Raises ValueError.
    """
    check_timing(batch_size, rounds, seconds, dtypes, device)
    device = torch.device(device or default_device())
    rows = []
    for dtype in dtypes:
        steps, memory, ratio = {}, {}, {}
        for method in ("plain", "tome", "pyra"):
            config = Config(backbone=backbone, img_size=img_size, method=method, rate=rate, weights="none", dtype=dtype, device=str(device)).resolved()
            model = cast_frozen(build_model(config, 100), DTYPES[dtype]).to(device).train()
            optimizer, noise = make_optimizer(model, config), torch.randn(batch_size, 3, model.img_size, model.img_size, device=device)
            step = functools.partial(training_step, model, optimizer, noise)
            step()  # AdamW makes its state in the first step
            state = [t for of_one in optimizer.state.values() for t in of_one.values() if torch.is_tensor(t)]
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), noise, *state))
            for name, checkpoint in ((method, False), (f"{method}, checkpoint", True)):
                steps[name] = functools.partial(step, checkpoint=checkpoint)
                memory[name] = held + peak_memory(steps[name], device)
                ratio[name] = pyra.count_macs(model)
        speeds = summarise_rounds(time_interleaved(steps, device, seconds, rounds), batch_size, memory)
        rows += [dict(dtype=dtype, model=name, mac_ratio=ratio["plain"] / ratio[name], **speed._asdict()) for name, speed in speeds.items()]
    return rows
