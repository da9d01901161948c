"""The small, random models and tasks that several test files share."""

import inspect
import contextlib
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import pyra
from pyra_lab import backbones

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real images and weights, where they are at hand
TINY = dict(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2.0, num_classes=5)  # 36 patches
R = [10, 6, 3]
HIGH = [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3]
WITH_TESTS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # for processes that import these helpers
BACKBONE = "vit_tests_patch4_24"  # TINY, as a backbone that a Config may name: see add_backbone
SMALL = dict(backbone=BACKBONE, weights="none", rate=R, epochs=3, warmup=1, batch_size=8, lr=5e-3, modulation_lr=2e-3, eval_every=2,
             device="cpu", dtype="float32")
ONE_STEP = {**SMALL, "epochs": 1, "warmup": 0, "batch_size": 64, "dropout": 0.0, "drop_path": 0.0, "eval_every": 0}  # all 21 images at once
BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # slower than float32 on some CPUs, but at home
DTYPE_PARAMS = ["float32", pytest.param("bfloat16", marks=pytest.mark.skipif(not BF16, reason="this CPU emulates bfloat16"))]
UNREAD = "blocks.2.reducer"  # gets no gradient: nothing that the last block merges reaches the class token


@torch.no_grad()
def randomise(model, seed=0):
    """Random values that depend on a parameter's name and the seed alone, so that equal names hold equal values."""
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        norm_weight = "norm" in name and name.endswith("weight")
        p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if norm_weight else 0.2) + float(norm_weight))
    return model


def tiny(seed=0, **kwargs):
    """A small ViT in eval mode, every parameter random, biases and norms too."""
    return randomise(pyra.VisionTransformer(**{**TINY, **kwargs}), seed).eval()


VARIANTS = dict(  # what today's families differ in
    dinov2=dict(reg_tokens=4), dinov3=dict(reg_tokens=4, rope=True, eps=1e-5, act="swiglu"), clip=dict(pre_norm=True, eps=1e-5, act="quick_gelu"),
    siglip=dict(class_token=False, global_pool="map", act="gelu_tanh"), gap=dict(class_token=False, global_pool="avg", fc_norm=False),
    deit=dict(distilled=True), dinov3_avg=dict(reg_tokens=4, rope=True, eps=1e-5, global_pool="avg", fc_norm=False),
)


def variant(family, method="plain", lora=False, r=R, seed=0, **kwargs):
    """A small model of a family in eval mode, every parameter random."""
    model = pyra.VisionTransformer(**{**TINY, **VARIANTS[family], **kwargs})
    model = pyra.add_lora(model, rank=2) if lora else model
    return randomise({"plain": lambda model, r: model, "tome": pyra.add_tome, "pyra": pyra.add_pyra}[method](model, r), seed).eval()


def adapted(method="pyra", seed=0, lora=True, s=1, **kwargs):
    """A small ViT with LoRA and a reducer, in eval mode, every parameter random."""
    model = pyra.VisionTransformer(**{**TINY, **kwargs})
    if lora:
        pyra.add_lora(model, rank=2)
    if method == "tome":
        pyra.add_tome(model, R[:len(model.blocks)])
    elif method == "pyra":
        pyra.add_pyra(model, R[:len(model.blocks)], s=s)
    return randomise(model, seed).eval()


def same(a, b, rtol=1e-5):
    """Whether a and b differ by less than rtol of b's largest entry."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max() <= rtol * b.double().abs().max()


def block_outputs(model, images):
    """Each block's Tokens and the logits."""
    outputs = []
    hooks = [block.register_forward_hook(lambda _, __, tokens: outputs.append(tokens)) for block in model.blocks]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return outputs, logits


def gradients(model, images):
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images), device=images.device) % logits.shape[1]).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attend_as_on_a_gpu(qkv, size=None):
    """pyra.attend as it is on a GPU in 16 bits."""
    return pyra.attend(qkv) if size is None else F.scaled_dot_product_attention(*pyra.append_log_size(qkv, size), scale=qkv.q.shape[-1] ** -0.5)[..., :qkv.q.shape[-1]]


def assert_golden(file, method, device="cpu", rtol=1e-5):
    """Logits, loss, tokens, sizes, sources and gradients are those of the published code."""
    with np.load(ROOT / "tests" / "golden" / f"{file}.npz") as arrays:
        golden = {k: torch.from_numpy(arrays[k]).to(device) for k in arrays.files}
    img_size, patch_size, dim, depth, heads, rank, classes, distilled = golden["meta"].tolist()
    model = pyra.VisionTransformer(img_size=img_size, patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=heads,
                                   num_classes=classes, distilled=bool(distilled))
    pyra.add_lora(model, rank)
    if method == "tome":
        pyra.add_tome(model, golden["r"].tolist())
    elif method == "pyra":
        pyra.add_pyra(model, golden["r"].tolist())
    weights = {}
    for name, value in golden.items():
        if name.startswith("w/"):
            name = name.removeprefix("w/").replace(".lora_", ".attn.qkv.lora_").replace(".w_", ".reducer.w_")
            if method == "pyra" or ".reducer." not in name:
                weights[name] = value
    model.load_state_dict(weights, strict=True)
    model.eval().to(device)

    tokens, logits = block_outputs(model, golden["x"])
    loss = F.cross_entropy(logits, golden["y"])
    loss.backward()
    assert same(logits, golden[f"{method}/logits"], rtol)
    assert same(loss, golden[f"{method}/loss"], rtol)
    for i in range(depth):
        assert same(tokens[i].x, golden[f"{method}/block{i}"], rtol), f"block {i}"
    if method != "plain":
        assert torch.equal(tokens[-1].size, golden[f"{method}/size"])
        assert torch.equal(tokens[-1].source, golden[f"{method}/source"].long())

    expected = {k.removeprefix(f"{method}/grad/"): v for k, v in golden.items() if k.startswith(f"{method}/grad/")}
    found = {k.replace(".attn.qkv.lora_", ".lora_").replace(".reducer.w_", ".w_"): p.grad
             for k, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert same(found[name], grad, rtol) if grad.any() else not found[name].any(), name


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def batch(b=3, img_size=24, seed=0):
    return torch.randn(b, 3, img_size, img_size, generator=torch.Generator().manual_seed(100 + seed))


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return pyra.create_model(name, **kwargs)


def count_flops(model, images):
    """PyTorch's count of multiply-accumulates, with attention written as two matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def write_class_folders(root, train=7, test=8, classes=("red", "green", "blue"), seed=0):
    """A folder task: noise of 8 x 8 pixels, each class a little stronger in one channel. Returns the task's name."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test)):
        for channel, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3))
                pixels[..., channel] += 15
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return f"folder:{root}"


def spy(patch, module, name):
    """Calls of module.name go through as before; returns the list of their (arguments, result)."""
    original, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(module, name, wrapper)
    return calls


def forbidden(*args, **kwargs):
    raise AssertionError("this must not be called")


def python(*args, **kwargs):
    """Runs this Python with args -> the completed process, its output as text."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


def write_image(path, colour=(10, 20, 30), size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_tree(folder, counts):
    """A tree with one folder per class: {class: number of images}. Red is an image's number, green the length of its class's name."""
    for name, count in counts.items():
        for i in range(count):
            write_image(folder / name / f"{i}.png", (i, len(name), 0))


def write_lists(folder, classes=3, counts=(6, 3, 6)):
    """A task in VTAB-1k's layout: counts of train800, val200 and test; image i of a split has label i % classes. Returns its folder."""
    lists = {}
    for split, count in zip(("train800", "val200", "test"), counts):
        lists[split] = [f"images/{split}/{i:06d}.png {i % classes}\n" for i in range(count)]
        for i in range(count):
            write_image(folder / f"images/{split}/{i:06d}.png", (i * 20, 40 * (i % classes), len(split)))
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def quiet(call, *args, **kwargs):
    """call(*args, **kwargs) without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def add_backbone(setitem=dict.__setitem__):
    """Adds BACKBONE to the tables; its rate has to be a list or a number, as the paper's lists are for 196 patches."""
    setitem(pyra.SIZES, BACKBONE, {name: size for name, size in TINY.items() if name != "num_classes"})
    setitem(backbones.BACKBONES, BACKBONE, dict(weights="none", norm="half", lora_rank=4, batch_size=8))
    setitem(backbones.MODULATION_LRS, BACKBONE, [1e-4])


def adapter(result):
    return load_file(Path(result.folder) / "adapter.safetensors")


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def files_in(folder):
    """Names of all files but locks and TensorBoard's, in sub-folders too."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".lock", "events.out.")))


def assert_nearly_same(a, b, before):
    """Two adapters, trained from `before` with other roundings: AdamW makes a whole step even of a gradient that is only rounding, so a
    few parameters may differ by as much as they moved, but their mean does not."""
    assert a.keys() == b.keys() == before.keys()
    for name in before:
        assert (a[name] - b[name]).abs().mean() <= 0.02 * (b[name] - before[name]).abs().mean(), name


def assert_same_run(result, reference):
    """Two runs gave the same, bit for bit."""
    assert identical(adapter(result), adapter(reference))
    assert without_seconds(result.history) == without_seconds(reference.history)
    for name in ("accuracy_last", "accuracy_best", "best_epoch", "macs", "token_counts", "trained", "plan", "metrics"):
        assert getattr(result, name) == getattr(reference, name), name


class Interrupted(BaseException):
    pass


@contextlib.contextmanager
def interrupted_at(number):
    """Raises Interrupted in training step `number`, from 0, before the optimizer changes anything; the block must not go further."""
    done = []

    def hook(optimizer, args, kwargs):
        if isinstance(optimizer, torch.optim.AdamW):
            if len(done) == number:
                raise Interrupted
            done.append(1)

    handle = register_optimizer_step_pre_hook(hook)
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def watch_steps():
    """Yields a list that gets the optimizer's groups in each training step, as [(name, lr, weight_decay, parameters)]."""
    steps = []

    def hook(optimizer, args, kwargs):
        if isinstance(optimizer, torch.optim.AdamW):
            steps.append([(g["name"], g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield steps
    finally:
        handle.remove()


class Batches(list):
    """(whether the model trains, normalised images) of each batch; models: those that were called."""

    def __init__(self):
        self.models = []


@contextlib.contextmanager
def watch_batches():
    """Yields the Batches that models embed from now on, in order."""
    seen, original = Batches(), pyra.VisionTransformer.embed

    def embed(model, images):
        seen.append((model.training, images))
        if not any(model is other for other in seen.models):
            seen.models.append(model)
        return original(model, images)

    pyra.VisionTransformer.embed = embed
    try:
        yield seen
    finally:
        pyra.VisionTransformer.embed = original


def rows(names, values):
    """Like pytest.mark.parametrize, but one test for all rows, as tables of refusals want it: runs them all and lists those that fail.

    Each row has a tmp_path and a monkeypatch of its own.
    """
    names = [name.strip() for name in names.split(",")]

    def decorate(test):
        fixtures = [name for name in inspect.signature(test).parameters if name not in names]

        def run(**given):
            failed = []
            for number, row in enumerate(values):
                own = dict(zip(names, row if len(names) > 1 else [row]))
                if "tmp_path" in given:
                    own["tmp_path"] = given["tmp_path"] / str(number)
                    own["tmp_path"].mkdir()
                with pytest.MonkeyPatch.context() as patch:
                    if "monkeypatch" in given:
                        own["monkeypatch"] = patch
                    try:
                        test(**{**given, **own})
                    except (Exception, pytest.fail.Exception) as error:  # the latter is what pytest.raises fails with
                        failed.append((number, row, error))
            if failed:
                lines = [f"row {number}, {str(row)[:200]}\n{type(error).__name__}: {error}" for number, row, error in failed]
                raise AssertionError("\n\n".join([f"{len(failed)} of {len(values)} rows failed", *lines])) from failed[0][2]

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in fixtures])
        return run

    return decorate
