"""What leaves PyTorch: torch.export's programs, models packed for a CPU, and ONNX files for any batch size."""

import copy
import os
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import randomise, rows
from PIL import Image

import pyra
from pyra_lab import deploy, images, methods, serving
from pyra_lab.pefts import fact
from pyra_lab.reducers import ats, ltmp

MEAN, STD = images.NORMS["half"]
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")


def small(method, s=1, **kwargs):
    """A small ViT with LoRA in eval mode, every parameter random: no two similarities are equal, which two runtimes might order differently."""
    model = pyra.VisionTransformer(**{**dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5), **kwargs})
    pyra.add_lora(model, rank=2)
    if method == "tome":
        pyra.add_tome(model, [4, 3, 2])
    elif method == "pyra":
        pyra.add_pyra(model, [4, 3, 2], s=s)
    return randomise(model).eval()


def pixels(b):
    return torch.randint(256, (b, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(b))


@pytest.mark.parametrize("method, kwargs", [("plain", {}), ("tome", dict(global_pool="avg")), ("pyra", dict(distilled=True, s=2))])
@torch.no_grad()
def test_torch_export(method, kwargs):
    """One program for every batch size; its blocks have the tokens that token_counts promises."""
    model = methods.fold(small(method, **kwargs))
    program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("b")},))
    for b in (1, 7):
        x = images.normalize(pixels(b), "half")
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    gelus = [node.meta["val"].shape for node in program.graph.nodes if node.target is torch.ops.aten.gelu.default]  # (b, n, hidden), one per block
    assert [n for _, n, _ in gelus] == pyra.token_counts(model)[1:]


# ----------------------------------------------------------------------------------------------------------------------
# Packed for a CPU


@ONEDNN
@pytest.mark.parametrize("method, kwargs, dtype", [
    ("plain", dict(global_pool="avg"), torch.float32), ("pyra", dict(distilled=True, s=2), torch.float32), ("pyra", {}, torch.bfloat16)], ids=str)
@torch.no_grad()
def test_pack(method, kwargs, dtype):
    """The same logits for any batch, the same MACs, and as many bytes of weights as before."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN doesn't compute in bfloat16 here")
    model = methods.fold(small(method, **kwargs)).to(dtype)
    packed = deploy.pack(copy.deepcopy(model))
    assert pyra.count_macs(packed) == pyra.count_macs(model)
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.blocks.modules())
    held = sum(p.nbytes for p in packed.parameters()) + sum(getattr(module, "packed_bytes", 0) for module in packed.modules())
    assert held == sum(p.nbytes for p in model.parameters())
    for b in (1, 7):
        x = images.normalize(pixels(b), "half").to(dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-5)
        else:  # rounding may match other tokens
            assert packed(x).dtype == dtype and (packed(x) - model(x)).abs().median() < 0.1 * model(x).abs().max()


@ONEDNN
def test_pack_refuses_what_is_not_plain(tmp_path):
    model = small("pyra")
    for _ in range(2):  # with LoRA, then packed already
        with pytest.raises(ValueError, match="pack needs oneDNN and a model on a CPU with plain linear layers"):
            deploy.pack(model)
        model = deploy.pack(methods.fold(small("pyra")))
    with pytest.raises(ValueError, match="export it before pack"):
        deploy.export_onnx(model, tmp_path / "model.onnx", MEAN, STD)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.fixture(scope="module", params=["tome", "pyra"])
def exported(request, tmp_path_factory):
    """A model, in training mode and with LoRA, the file that export_onnx made of it, and a copy from before, in eval mode."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    variants = dict(tome=dict(reg_tokens=4, rope=True, act="swiglu", global_pool="avg"), pyra=dict(class_token=False, global_pool="map", act="gelu_tanh"))
    model = small(request.param, **variants[request.param]).train()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    original = copy.deepcopy(model).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        deploy.export_onnx(model, path, MEAN, STD)
    assert not [w for w in caught if "LeafSpec" in str(w.message)]  # PyTorch's own, which nobody here can act on
    return model, path, original


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def test_onnx_equals_pytorch(exported, tmp_path):
    """For any batch, and by the lines that a server needs: decode, resize, run."""
    _, path, original = exported
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    image = Image.open(tmp_path / "photo.png").convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    photo = np.asarray(image).transpose(2, 0, 1)[None]  # uint8 (1, 3, 32, 32)
    for x in (photo, pixels(1).numpy(), pixels(2).numpy(), pixels(5).numpy()):
        logits, = session(path).run(["logits"], {"images": x})
        expected = original(images.normalize(torch.from_numpy(x.copy()), "half"))
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


def test_onnx_of_images_that_are_not_square(tmp_path):
    """Exported, served and calibrated with images of that shape."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model, file = small("tome", img_size=(32, 48)), tmp_path / "model.onnx"
    deploy.export_onnx(model, file, MEAN, STD)
    predictor, image = serving.load(file), Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    row, = serving.predict(predictor, image, top=None)
    x = torch.from_numpy(np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1).copy())[None]
    expected = model(images.normalize(x, "half"))[0].softmax(dim=0)
    assert predictor.size == (32, 48) and row.probabilities == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    assert deploy.quantize_onnx(file, tmp_path / "int8.onnx", x.numpy()) < 1
    with pytest.raises(ValueError, match=r"images must be uint8 \(n, 3, 32, 48\), not uint8 \(1, 3, 48, 32\)"):
        deploy.quantize_onnx(file, tmp_path / "int8.onnx", x.mT.contiguous().numpy())
    with pytest.raises(ValueError, match="crop cuts squares out of images, and the model takes 32 x 48 pixels"):
        deploy.export_onnx(model, file, MEAN, STD, crop=True)


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
    assert count["ScatterND"] == 0  # with reduction="add" and several threads onnxruntime 1.32 sometimes loses an update
    assert count["ScatterElements"] >= 6  # in each of three blocks x and size are summed
    assert not any("lora" in initializer.name for initializer in graph.initializer)


def test_export_onnx_leaves_the_model_and_one_file(exported):
    """A file without names of source files: the exporter notes a stack trace with every node, with paths of this machine."""
    model, path, original = exported
    before, after = original.state_dict(), model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert model.training and not model.folded
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert os.path.dirname(pyra.__file__).encode() not in path.read_bytes()


@torch.no_grad()
def test_onnx_folds_any_peft_that_can_be(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model = pyra.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=5)
    model = randomise(fact.add_fact(model, "tt", 2)).eval()
    deploy.export_onnx(model, tmp_path / "model.onnx", MEAN, STD)
    logits, = session(tmp_path / "model.onnx").run(None, {"images": pixels(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images.normalize(pixels(2), "half")), rtol=0, atol=1e-4)


@torch.no_grad()
def test_int8(tmp_path):
    """Standard operators, a third of the size or less, classes and any batch as before; smoothed, outliers of few channels do little harm."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnx

    model = pyra.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=5)
    model = pyra.add_tome(randomise(model).eval(), [4, 3])
    for block in model.blocks:
        block.norm2.weight[5] *= 300  # an outlier, as large ViTs have them ...
        block.mlp.fc1.weight[:, 5] /= 300
    full, plain, smoothed = (tmp_path / f"{name}.onnx" for name in ("full", "plain", "smoothed"))
    deploy.export_onnx(model, full, MEAN, STD, "abcde")
    before = full.read_bytes()
    assert deploy.quantize_onnx(full, plain) is None
    distance = deploy.quantize_onnx(full, smoothed, pixels(16).numpy())
    assert full.read_bytes() == before and sorted(file.name for file in tmp_path.iterdir()) == ["full.onnx", "plain.onnx", "smoothed.onnx"]
    expected = model(images.normalize(pixels(7), "half")).numpy()
    off = {}
    for path in (full, plain, smoothed):
        logits, = session(path).run(None, {"images": pixels(7).numpy()})
        assert logits.shape == (7, 5) and serving.load(path).classes == tuple("abcde")
        off[path] = np.sqrt(((logits - expected) ** 2).mean() / (expected**2).mean())
    assert off[full] < 1e-4 < off[smoothed] < 0.1 and off[smoothed] < off[plain] / 2 and 0 < distance < 0.1
    quantized = onnx.load(smoothed).graph
    count = Counter(node.op_type for node in quantized.node)
    assert count["MatMulInteger"] == 4 * 2 + 1 and {node.domain for node in quantized.node} == {""}
    assert smoothed.stat().st_size < 0.5 * full.stat().st_size
    with pytest.raises(ValueError, match=r"images must be uint8 \(n, 3, 32, 32\), not float32 \(7, 5\)"):
        deploy.quantize_onnx(full, plain, expected)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        deploy.quantize_onnx(tmp_path / "none.onnx", plain)


@rows("changes, message", [
    (dict(classes=("a", "b")), "classes must name all of the model's 5 classes, not 2"),
    (dict(mean=(123.7, 116.3, 103.5)), "mean must be three numbers from 0 to 1"),
    (dict(std=(0.5, 0.5, float("nan"))), "std must be three numbers from 0 to 1"),
    (dict(std=(0.5, 0.0, 0.5)), "std must be greater than 0"),
    (dict(path="nowhere/model.onnx"), "there is no folder for 'nowhere/model.onnx'"),
    (dict(model=ats.add_ats(small("plain"), 5)), "ATS keeps as many tokens as an image needs"),
    (dict(model=ltmp.add_ltmp(small("plain"))), "LTMP keeps as many tokens as an image needs"),
])
def test_export_onnx_refuses(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        deploy.export_onnx(**{**dict(model=small("plain"), path=tmp_path / "model.onnx", mean=MEAN, std=STD), **changes})
    assert not list(tmp_path.iterdir())


def test_export_onnx_names_the_package_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        deploy.export_onnx(small("plain"), tmp_path / "model.onnx", MEAN, STD)
