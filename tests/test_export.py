"""What leaves PyTorch: torch.export's programs and ONNX files, with merging and modulation inside and any batch size."""

import copy
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import pyra
import tasks
from small import one_thread  # noqa: F401 (a fixture)

MEAN, STD = tasks.NORMS["half"]


def tiny(method, s=1, **kwargs):
    """A small ViT with LoRA in eval mode, every parameter random: no two similarities tie, which two runtimes might settle differently."""
    torch.manual_seed(0)
    model = pyra.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5, **kwargs)
    pyra.add_lora(model, rank=2)
    if method == "tome":
        pyra.add_tome(model, [4, 3, 2])
    elif method == "pyra":
        pyra.add_pyra(model, [4, 3, 2], s=s)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


def pixels(b):
    return torch.randint(256, (b, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(b))


# ----------------------------------------------------------------------------------------------------------------------
# torch.export


@pytest.mark.parametrize("method, kwargs", [("plain", {}), ("tome", dict(global_pool="avg")), ("pyra", {}), ("pyra", dict(distilled=True, s=2))])
@torch.no_grad()
def test_torch_export(method, kwargs):
    """One program for every batch size; its blocks have the tokens that token_counts promises."""
    model = pyra.merge_lora(tiny(method, **kwargs))
    program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("b")},))
    for b in (1, 2, 7):
        images = tasks.normalize(pixels(b), "half")
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)
    gelus = [node.meta["val"].shape for node in program.graph.nodes if node.target is torch.ops.aten.gelu.default]  # (b, n, hidden), one a block
    assert [n for _, n, _ in gelus] == pyra.token_counts(model)[1:]


# ----------------------------------------------------------------------------------------------------------------------
# Packed for a CPU


@pytest.mark.parametrize("method, kwargs", [("plain", {}), ("tome", dict(global_pool="avg")), ("pyra", dict(distilled=True, s=2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_pack(method, kwargs, dtype):
    """The same logits for any batch, and the same count of operations."""
    if not torch.backends.mkldnn.is_available() or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("no oneDNN, or none that computes in bfloat16 here")
    model = pyra.merge_lora(tiny(method, **kwargs)).to(dtype)
    packed = pyra.pack(copy.deepcopy(model))
    assert pyra.count_macs(packed) == pyra.count_macs(model)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.blocks.modules())
    for b in (1, 2, 7):
        images = tasks.normalize(pixels(b), "half").to(dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(packed(images), model(images), rtol=1e-5, atol=1e-5)
        else:  # rounding may settle a match differently
            assert packed(images).dtype == dtype and (packed(images) - model(images)).abs().median() < 0.1 * model(images).abs().max()


@torch.no_grad()
def test_packed_is_not_exported(tmp_path):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    packed = pyra.pack(pyra.merge_lora(tiny("pyra")))
    with pytest.raises(ValueError, match="export it before pack"):
        pyra.export_onnx(packed, tmp_path / "model.onnx", (0.5,) * 3, (0.5,) * 3)
    assert not list(tmp_path.iterdir())


def test_pack_refuses_what_is_not_plain():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN here")
    model = tiny("pyra")
    for _ in range(2):  # with LoRA, then packed already
        with pytest.raises(ValueError, match="pack is for a model on a CPU, with oneDNN, and with plain linear maps"):
            pyra.pack(model)
        model = pyra.pack(pyra.merge_lora(tiny("pyra")))


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.fixture(scope="module", params=[("tome", dict(distilled=True)), ("pyra", dict(global_pool="avg"))], ids=["tome", "pyra"])
def exported(request, tmp_path_factory):
    """A model, in training mode and with LoRA, the file that export_onnx made of it, and a copy from before, in eval mode."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    method, kwargs = request.param
    model = tiny(method, **kwargs).train()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    original = copy.deepcopy(model).eval()
    pyra.export_onnx(model, path, MEAN, STD)
    return model, path, original


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("b", [1, 2, 5])
@torch.no_grad()
def test_onnx_equals_pytorch(exported, b):
    _, path, original = exported
    logits, = session(path).run(["logits"], {"images": pixels(b).numpy()})
    expected = original(tasks.normalize(pixels(b), "half"))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_serving_an_image_file(exported, tmp_path):
    """The lines that a server needs: decode, resize, run."""
    _, path, original = exported
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)).save(tmp_path / "photo.png")

    image = Image.open(tmp_path / "photo.png").convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    images = np.asarray(image).transpose(2, 0, 1)[None]  # uint8 (1, 3, 32, 32)
    logits, = session(path).run(None, {"images": images})

    expected = original(tasks.normalize(torch.from_numpy(images.copy()), "half"))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_onnx_graph(exported):
    """Standard operators alone, LoRA folded in, a free batch axis, and no sum that onnxruntime's threads could lose."""
    import onnx

    _, path, _ = exported
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert axes == {"images": ["b", 3, 32, 32], "logits": ["b", 5]}
    assert {node.domain for node in graph.node} == {""}
    count = Counter(node.op_type for node in graph.node)
    assert count["ScatterND"] == 0  # with reduction="add" and several threads onnxruntime 1.32 now and then loses an update
    assert count["ScatterElements"] >= 6  # in each of three blocks x and size are summed
    assert not any("lora" in initializer.name for initializer in graph.initializer)


def test_export_onnx_leaves_the_model_and_one_file(exported):
    model, path, original = exported
    before, after = original.state_dict(), model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert model.training and not model.merged
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_an_onnx_file_names_no_source_file(exported):
    """The exporter notes a stack trace with every node: paths of the exporting machine, and a third of a small file."""
    _, path, _ = exported
    assert os.path.dirname(pyra.__file__).encode() not in path.read_bytes()


@pytest.mark.parametrize("changes, message", [
    (dict(mean=(0.5, 0.5)), "mean must be three numbers from 0 to 1"),
    (dict(mean=(123.7, 116.3, 103.5)), "mean must be three numbers from 0 to 1"),
    (dict(mean="abc"), "mean must be three numbers from 0 to 1"),
    (dict(std=0.5), "std must be three numbers from 0 to 1"),
    (dict(std=(0.5, 0.5, float("nan"))), "std must be three numbers from 0 to 1"),
    (dict(std=(0.5, 0.5, "0.5")), "std must be three numbers from 0 to 1"),
    (dict(std=(0.5, 0.0, 0.5)), "std must be greater than 0"),
    (dict(path="nowhere/model.onnx"), "there is no folder for 'nowhere/model.onnx'"),
])
def test_export_onnx_refuses(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pyra.export_onnx(tiny("plain"), **{**dict(path=tmp_path / "model.onnx", mean=MEAN, std=STD), **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("add", [lambda model: baselines.add_ats(model, 5), baselines.add_ltmp], ids=["ats", "ltmp"])
def test_export_onnx_refuses_what_depends_on_the_image(add, tmp_path):
    with pytest.raises(ValueError, match="keeps as many tokens as an image needs"):
        pyra.export_onnx(add(tiny("plain")), tmp_path / "model.onnx", MEAN, STD)


def test_export_onnx_names_the_package_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        pyra.export_onnx(tiny("plain"), tmp_path / "model.onnx", MEAN, STD)
