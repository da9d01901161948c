"""Checkpoints: weights as people have them, in files, mappings and modules, and adapters that only fit what they were trained on."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import R, SHARED, VARIANTS, adapted, batch, identical, numbers, randomise, rows, snapshot, tiny, trained, variant
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyra
from pyra_lab.config import Config


# ----------------------------------------------------------------------------------------------------------------------
# Pre-trained weights


def rename(weights, prefix):
    return {prefix + k: v for k, v in weights.items()}


def to_google(weights, heads, prefix="", pre_logits=False):
    """timm's names and layouts -> those of Google's .npz files (`pyra.from_google` backwards)."""
    w = {k: v.numpy() for k, v in weights.items()}
    c = w["cls_token"].shape[-1]
    arrays = {
        "cls": w["cls_token"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    for i in range(len({k.split(".")[1] for k in w if k.startswith("blocks.")})):
        old, new = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = new + "MultiHeadDotProductAttention_1/"
        for norm, place in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{new}{place}/scale"], arrays[f"{new}{place}/bias"] = w[f"{old}{norm}.weight"], w[f"{old}{norm}.bias"]
        for fc, place in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{new}MlpBlock_3/{place}/kernel"] = w[f"{old}mlp.{fc}.weight"].T
            arrays[f"{new}MlpBlock_3/{place}/bias"] = w[f"{old}mlp.{fc}.bias"]
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * c, (j + 1) * c)
            arrays[f"{attention}{part}/kernel"] = w[f"{old}attn.qkv.weight"][rows].T.reshape(c, heads, c // heads)
            arrays[f"{attention}{part}/bias"] = w[f"{old}attn.qkv.bias"][rows].reshape(heads, c // heads)
        arrays[f"{attention}out/kernel"] = w[f"{old}attn.proj.weight"].T.reshape(heads, c // heads, c)
        arrays[f"{attention}out/bias"] = w[f"{old}attn.proj.bias"]
    if pre_logits:
        arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = np.ones((c, c), np.float32), np.ones(c, np.float32)
    return {prefix + k: np.ascontiguousarray(v) for k, v in arrays.items()}


def to_hugging_face(weights, modules=False):
    """timm's names -> those of Hugging Face's ViTForImageClassification: in files, or in modules since transformers 5."""
    names = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings", "dist_token": "vit.embeddings.distillation_token",
             "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.", "norm.": "vit.layernorm.", "head.": "classifier.",
             ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", "blocks.": "vit.layers." if modules else "vit.encoder.layer."}
    names |= {".attn.proj.": ".attention.o_proj."} if modules else {
        ".attn.proj.": ".attention.output.dense.", ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense."}
    parts = ["attention.q_proj", "attention.k_proj", "attention.v_proj"] if modules else [f"attention.attention.{part}" for part in ("query", "key", "value")]
    renamed = {}
    for name, value in weights.items():
        for old, new in names.items():
            name = name.replace(old, new) if old[0] == "." or name.startswith(old) else name
        if ".attn.qkv." in name:
            renamed |= {name.replace("attn.qkv", part): third for part, third in zip(parts, value.chunk(3))}
        else:
            renamed[name] = value
    return renamed


W, AVERAGE = dict(tiny(seed=1).state_dict()), dict(tiny(seed=2).state_dict())
BODY, HEAD = ({k: v for k, v in W.items() if k.startswith("head") == head} for head in (False, True))
LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.2", "hyper_parameters": {"lr": 1e-3}, "loops": {"fit_loop": {"state_dict": {}}},
             "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": "/x"}}, "lr_schedulers": [{"last_epoch": 3}],
             "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}]}
LAYOUTS = [  # file, what it holds
    *[(f"w.{suffix}", W) for suffix in ("safetensors", "pth", "pt", "bin", "ckpt", "pth.tar", "PTH", "npz")],
    *[("w.pth", {key: W, "epoch": 3}) for key in ("model", "state_dict", "model_state_dict", "module", "net")],
    *[("w.pth", rename(W, prefix)) for prefix in ("module.", "_orig_mod.module.", "model.module._orig_mod.", "backbone.vit.", "net.encoder.", "0.")],
    ("w.pth", {**rename(BODY, "model.backbone."), **rename(HEAD, "model.")}),
    ("w.pth", {**rename(BODY, "feature_extractor."), "classifier.weight": W["head.weight"], "classifier.bias": W["head.bias"]}),
    ("w.ckpt", LIGHTNING | {"state_dict": collections.OrderedDict(rename(W, "model."))}),
    ("w.pth", {"model": W, "args": argparse.Namespace(lr=1e-3, nested=argparse.Namespace(blr=None))}),
    ("w.pth", {"model": W, "model_ema": None}),
    *[("w.npz", to_google(W, 3, prefix, pre_logits)) for prefix, pre_logits in (("", False), ("", True), ("opt/target/", False))],
    *[("w.safetensors", rename(to_hugging_face(W, modules), prefix)) for modules, prefix in ((False, ""), (True, ""), (False, "module."))],
    ("w.bin", {**{k.removeprefix("vit."): v for k, v in to_hugging_face(W).items()}, "pooler.dense.weight": torch.ones(24, 24),
               "embeddings.mask_token": torch.ones(1, 1, 24)}),
]


@rows("name, content", LAYOUTS)
def test_load_pretrained_layouts(tmp_path, name, content):
    """Each layout in which weights are published gives the same model, bit for bit."""
    path, model = tmp_path / name, tiny()
    if name.endswith(".npz"):
        np.savez(path, **{k: np.asarray(v) for k, v in content.items()})
    else:
        save_file({k: v.contiguous().clone() for k, v in content.items()}, path) if name.endswith("safetensors") else torch.save(content, path)
    assert pyra.load_pretrained(model, path) is model
    assert identical(model.state_dict(), W)


@rows("key, content, more", [
    ("model_ema", AVERAGE, {"model": W}), ("state_dict_ema", AVERAGE, {"state_dict": W}), ("model_ema", AVERAGE, {}), ("ema_state_dict", AVERAGE, {"model": W}),
    ("model_ema", {"module": AVERAGE, "decay": 0.99}, {"model": W}),
    ("model_ema", {"n_averaged": torch.tensor(3), **rename(AVERAGE, "module.")}, {"state_dict": W}),
])
def test_averaged_weights_come_first_and_are_told(tmp_path, key, content, more):
    """timm's rule."""
    torch.save({**more, key: content}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=f"w.pth holds EMA weights, {key}: they are loaded instead of the last step's") as told:
        model = pyra.load_pretrained(tiny(), tmp_path / "w.pth")
    assert identical(model.state_dict(), AVERAGE) and told[0].filename == __file__


@rows("source", [
    lambda: W, lambda: collections.OrderedDict(W), lambda: types.MappingProxyType(W), lambda: dict(tiny(seed=1).named_parameters()),
    lambda: {k: v.numpy() for k, v in W.items()}, lambda: {k: v.double() for k, v in W.items()}, lambda: {"state_dict": W},
    lambda: tiny(seed=1), lambda: nn.DataParallel(tiny(seed=1)), lambda: torch.compile(nn.DataParallel(tiny(seed=1))), lambda: nn.Sequential(tiny(seed=1)),
])
def test_weights_in_memory(source):
    """A mapping of tensors or arrays, or a module, wrapped or not."""
    assert identical(pyra.load_pretrained(tiny(), source()).state_dict(), W)


def test_a_timm_model_is_a_source():
    timm = pytest.importorskip("timm", reason="timm, the oracle, isn't installed")
    size = dict(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2.0, num_classes=5)
    theirs = randomise(timm.models.vision_transformer.VisionTransformer(**size)).eval()
    for source in (theirs, theirs.half().float().state_dict(), nn.DataParallel(theirs)):
        torch.testing.assert_close(pyra.load_pretrained(tiny(), source)(batch()), theirs(batch()), rtol=1e-4, atol=1e-4)


@rows("given, resolved", [
    ("cache/snapshots/abc/model.safetensors", "cache/snapshots/abc/model.safetensors"),
    ("cache/snapshots/../snapshots/abc/model.safetensors", "cache/snapshots/abc/model.safetensors"),
    ("~/w.safetensors", "w.safetensors"), ("linked/model.safetensors", "linked/model.safetensors"), ("best", "best"),
])
def test_links_to_weights_are_not_followed(tmp_path, monkeypatch, given, resolved):
    """Hugging Face's cache links to files without a suffix; a link without one may lead to a file that has it."""
    (tmp_path / "cache/blobs").mkdir(parents=True), (tmp_path / "cache/snapshots/abc").mkdir(parents=True)
    save_file(W, tmp_path / "cache/blobs/0123"), save_file(W, tmp_path / "w.safetensors")
    for link, target in (("cache/snapshots/abc/model.safetensors", "../../blobs/0123"), ("linked", "cache/snapshots/abc"), ("best", "w.safetensors")):
        os.symlink(target, tmp_path / link)
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("HOME", str(tmp_path))
    fields = dict(weights=given, teacher="vit_base_patch16_224", teacher_weights=given, method="plain", device="cpu")
    config = Config(**fields).resolved()
    assert config.weights == config.teacher_weights == str(tmp_path / resolved) and config.resolved() == config
    for source in (given, pathlib.Path(given), config.weights):
        assert identical(pyra.load_pretrained(tiny(), source).state_dict(), W)


@pytest.mark.parametrize("suffix", ["pth", "npz"])
def test_load_pretrained_other_class_count(tmp_path, suffix):
    """A head for other classes is left as it is; everything else is loaded."""
    weights, path = tiny(seed=1, num_classes=9).state_dict(), tmp_path / f"weights.{suffix}"
    torch.save(weights, path) if suffix == "pth" else np.savez(path, **to_google(weights, heads=3, pre_logits=True))
    model = tiny()
    head = model.head.weight.clone(), model.head.bias.clone()
    pyra.load_pretrained(model, path)
    assert torch.equal(model.head.weight, head[0]) and torch.equal(model.head.bias, head[1])
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, weights[name])
    headless = pyra.load_pretrained(tiny(num_classes=0), path)
    assert torch.equal(headless.norm.weight, weights["norm.weight"])


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_load_pretrained_mae(tmp_path, pool):
    """MAE's encoder has no head, and a final norm that average pooling replaces by a new fc_norm."""
    weights = tiny(seed=1, num_classes=0).state_dict()
    assert "norm.weight" in weights and not any(k.startswith("head") for k in weights)
    torch.save({"model": weights}, tmp_path / "mae.pth")
    model = tiny(global_pool=pool)
    before = snapshot(model)
    pyra.load_pretrained(model, tmp_path / "mae.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith(("head.", "fc_norm.")) else weights[name]), name
    assert ("fc_norm.weight" in before) == (pool == "avg")


@pytest.mark.parametrize("classes", [5, 9])
def test_load_pretrained_distilled(tmp_path, classes):
    """DeiT's distilled models: a second special token, a second head, a position embedding of two more rows."""
    weights = tiny(seed=1, distilled=True, num_classes=classes).state_dict()
    assert weights["pos_embed"].shape == (1, 38, 24)
    torch.save({"model": weights}, tmp_path / "deit.pth")
    model = tiny(distilled=True)
    before = snapshot(model)
    pyra.load_pretrained(model, tmp_path / "deit.pth")
    for name, value in model.state_dict().items():
        fresh = classes != 5 and name.startswith("head")
        assert torch.equal(value, before[name] if fresh else weights[name]), name
    with pytest.raises(ValueError, match="head_dist|dist_token|position embedding"):
        pyra.load_pretrained(tiny(), tmp_path / "deit.pth")
    torch.save({"model": tiny().state_dict()}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="dist_token|position embedding"):
        pyra.load_pretrained(tiny(distilled=True), tmp_path / "vit.pth")


@rows("kwargs, kept, given", [
    *[(kwargs, kept, grid) for grid in (4, 9, 37) for kwargs, kept in (
        (dict(), 1), (dict(distilled=True), 2), (dict(reg_tokens=4), 5), (dict(reg_tokens=4), 1), (dict(reg_tokens=4), 0), (dict(), 0),
        (dict(class_token=False, global_pool="avg"), 0))],
])
def test_load_pretrained_resizes_the_position_embedding(kwargs, kept, given):
    """To another image size, smaller or larger, not square too, as timm does; the special tokens' rows stay, and where they have none they get zeros."""
    timm_layers = pytest.importorskip("timm.layers", reason="timm, the oracle, isn't installed")
    for size in (24, 4 * 14, (16, 40)):
        model = tiny(img_size=size, **kwargs)
        weights = tiny(seed=1, **kwargs).state_dict() | {"pos_embed": torch.randn(1, kept + given**2, 24)}
        pyra.load_pretrained(model, weights)
        expected = timm_layers.resample_abs_pos_embed(weights["pos_embed"], model.grid, num_prefix_tokens=kept)
        assert torch.equal(model.pos_embed[:, :kept], weights["pos_embed"][:, :kept]) and not model.pos_embed[:, kept:model.specials].any()
        torch.testing.assert_close(model.pos_embed[:, model.specials:].detach(), expected[:, kept:])
        assert torch.equal(model.blocks[2].mlp.fc2.weight, weights["blocks.2.mlp.fc2.weight"])


def test_as_many_positions_of_another_grid_are_not_taken_in_silence():
    """16 of a square for 2 x 8: a file of that very geometry looks the same. A module tells its own."""
    wide = dict(img_size=(8, 32))
    with pytest.warns(UserWarning, match="the source: its 16 positions are taken for a grid of 2 x 8, not a square's"):
        pyra.load_pretrained(tiny(**wide), tiny(img_size=16).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyra.load_pretrained(tiny(**wide), tiny(seed=1, **wide))
        pyra.load_pretrained(tiny(img_size=(8, 24)), tiny(seed=1, img_size=(8, 24)).state_dict())  # 12 are no square's


def test_another_backbones_weights_are_no_longer_those_that_lora_was_folded_into(tmp_path):
    model = pyra.merge_lora(pyra.add_lora(tiny(), 2))
    pyra.freeze(pyra.add_pyra(pyra.load_pretrained(model, tiny(seed=1)), R))
    pyra.save_adapter(model, tmp_path / "adapter.safetensors")


def test_load_pretrained_into_an_adapted_model(tmp_path):
    """LoRA and the generators may be there already: the backbone is loaded under them."""
    weights = tiny(seed=1).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    model = adapted("pyra")
    before = snapshot(model)
    pyra.load_pretrained(model, tmp_path / "weights.safetensors")
    after = model.state_dict()
    assert before.keys() - weights.keys() == {k for k in before if "lora_" in k or ".reducer." in k} != set()
    assert all(torch.equal(after[k], weights.get(k, before[k])) for k in after)


def without(*names, **more):
    return {k: v for k, v in W.items() if k not in names} | {name.replace("__", "."): value for name, value in more.items()}


FOREIGN = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"


@rows("content, message", [
    (without("blocks.1.norm1.weight", "cls_token"), r"lacks cls_token, blocks\.1\.norm1\.weight$"),
    (without("norm.bias"), r"lacks norm\.bias$"),
    (without(extra=torch.ones(2), other=torch.ones(1)), r"has unexpected extra, other$"),
    (without(head_dist__weight=torch.ones(5, 24)), r"unexpected head_dist\.weight$"),
    (without(blocks__3__norm1__weight=torch.ones(24)), r"unexpected blocks\.3\.norm1\.weight$"),
    (without(blocks__0__mlp__fc1__weight=torch.ones(48, 12), norm__bias=torch.ones(1)),
     r"it has blocks\.0\.mlp\.fc1\.weight as \(48, 12\), not \(48, 24\), norm\.bias as \(1,\), not \(24,\)$"),
    (without(head__bias=torch.ones(6)), r"it has head\.bias as \(6,\), not \(5,\)"),
    (without(head__weight=torch.tensor(1.0)), r"it has head\.weight as \(\), not \(5, 24\)"),
    (without(pos_embed=torch.ones(1, 37, 12)), r"it has pos_embed as \(1, 37, 12\), not \(1, 37, 24\)"),
    (without(pos_embed=torch.tensor(1.0)), r"it has pos_embed as \(\)"),
    (without(pos_embed=torch.ones(1, 35, 24)), r"position embedding \(1, 35, 24\).* square"),
    (without(pos_embed=torch.ones(37, 24)), r"position embedding \(37, 24\)"),
    (without(pos_embed=torch.ones(24)), r"position embedding \(24,\)"),
    (without(pos_embed=torch.ones(2, 17, 24)), r"position embedding \(2, 17, 24\)"),
    (without(pos_embed=torch.full((1, 17, 24), torch.nan)), r"not all is a finite floating-point number in pos_embed"),
    (without(norm__weight=torch.full((24,), torch.inf)), r"not all is a finite floating-point number in norm\.weight"),
    (without(norm__weight=torch.ones(24, dtype=torch.int8)), r"not all is a finite floating-point number in norm\.weight"),
    ({}, "holds no dictionary of tensors$"),
    (without(epoch=3), "holds no dictionary of tensors, but epoch$"),
    ({"model": W, "model_ema": [1]}, "w.pth: model_ema holds no dictionary of tensors$"),
    ({"student": W, "teacher": W, "epoch": 3}, "holds no dictionary of tensors, but student, teacher, epoch"),
    ({**rename(W, "model."), **rename(W, "teacher.")}, "holds 2 models, 'model.' and 'teacher.': save one of them alone"),
    (tiny(seed=1, embed_dim=12).state_dict(), r"has cls_token as \(1, 1, 12\), not \(1, 1, 24\), .* and \d+ more; is it of another size\?"),
    (tiny(seed=1, patch_size=8).state_dict(), r"has patch_embed.proj.weight as \(24, 3, 8, 8\), not \(24, 3, 4, 4\); is it of another size\?"),
    ({"transformer.wte.weight": torch.ones(2)}, r"has none of its names, but transformer.wte.weight; is it a plain ViT\?"),
    ({FOREIGN: torch.ones(2)}, f"has none of its names, but {FOREIGN}; it looks like BEiT or Swin, with relative positions"),
    (without(blocks__9__ls1__gamma=torch.ones(24), blocks__0__ls1__gamma=torch.ones(23)),
     r"unexpected blocks\.9\.ls1\.gamma, blocks\.0\.ls1\.gamma$"),
    (without(reg_token=torch.ones(1, 4, 24)), r"unexpected reg_token; it looks like another family of ViT: create the model by the timm name"),
    (without(norm_pre__weight=torch.ones(24), logit_scale=torch.tensor(1.0)), r"unexpected norm_pre\.weight, logit_scale; it looks like another family"),
    ({"conv1.weight": torch.ones(2), "bn1.running_mean": torch.ones(2)}, "has none of its names, but conv1.weight, .* it looks like a convolutional network"),
    (without(decoder_embed__weight=torch.ones(8, 24), mask_token=torch.ones(1, 1, 8)), "unexpected decoder_embed.weight; it looks like an autoencoder"),
    (adapted().state_dict(),
     "has unexpected blocks.0.attn.qkv.lora_a, .* it looks like an adapter, .* fold its PEFT in and remove its reducer before saving"),
    ({k: v[:, :12] if k.endswith("layer.1.attention.attention.key.weight") else v for k, v in to_hugging_face(W).items()},
     r"lacks blocks\.1\.attn\.qkv\.weight"),
])
def test_load_pretrained_tells_what_does_not_fit(tmp_path, content, message):
    """In one sentence that names the file and the likely reason; the model stays as it is."""
    torch.save(content, tmp_path / "w.pth")
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        pyra.load_pretrained(model, tmp_path / "w.pth")
    told = str(error.value)
    assert len(told.replace(str(tmp_path), "")) <= 400 and "\n" not in told and ("w.pth" in told or "position embedding" in told)
    assert identical(model.state_dict(), before)


@rows("source, message", [
    (lambda: None, "weights must be a path, a name on the hub, tensors by name or a module, not NoneType"), (lambda: [torch.ones(1)], "not list"),
    (lambda: {k: v.to("meta") for k, v in W.items()}, "the source holds no dictionary of tensors, but cls_token, pos_embed, .* and 41 more"),
    (lambda: {k: v.to_sparse() for k, v in W.items()}, "holds no dictionary of tensors"),
    (lambda: dict(enumerate(W.values())), "holds no dictionary of tensors, but 0, 1, 2"),
    (lambda: nn.Linear(2, 2), "the source doesn't fit the model: it has none of its names, but weight, bias; is it a plain ViT?"),
])
def test_load_pretrained_tells_what_no_source_is(source, message):
    with pytest.raises(ValueError, match=message):
        pyra.load_pretrained(tiny(), source())


@pytest.mark.parametrize("broken, message", [
    (lambda arrays: arrays.pop("Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"), "lacks blocks.1.attn.qkv.bias"),
    (lambda arrays: arrays.update({"Transformer/extra/kernel": np.ones(2, np.float32)}), "has unexpected Transformer/extra"),
])
def test_load_pretrained_lists_what_a_google_file_lacks_and_has(broken, message):
    """A name of Google's that has no place, or half of an attention, doesn't vanish."""
    arrays = to_google(tiny().state_dict(), heads=3)
    broken(arrays)
    with pytest.raises(ValueError, match=message):
        pyra.load_pretrained(tiny(), {k: torch.from_numpy(v) for k, v in arrays.items()})


class Touch:
    """When unpickled, makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "npz"])
def test_load_pretrained_executes_nothing(tmp_path, suffix):
    """A file that would run code when it is unpickled is refused, and the code doesn't run."""
    path, marker = tmp_path / f"weights.{suffix}", tmp_path / "marker"
    if suffix == "npz":
        np.savez(path, cls=np.array([Touch(marker)], dtype=object))
    elif suffix == "bin":
        path.write_bytes(pickle.dumps({"model": Touch(marker)}, protocol=2))
    else:
        torch.save({"model": Touch(marker)}, path)
    with pytest.raises(ValueError, match="can't be read"):
        pyra.load_pretrained(tiny(), path)
    assert not marker.exists()
    if suffix == "pth":  # the trap works
        torch.load(path, weights_only=False)
        assert marker.exists()


@rows("inside, name", [
    (pathlib.PurePosixPath("/x"), "pathlib.PurePosixPath"), (np.float64(0.9), "numpy.*scalar"),
    (argparse.Namespace(out=pathlib.PurePosixPath("/x")), "pathlib"),
    (collections.defaultdict(dict), "collections.defaultdict"), (nn.Linear, "torch.nn.modules.linear.Linear"), (len, "len"), (tiny, "helpers.tiny"),
])
def test_a_checkpoint_with_code_is_refused_plainly(tmp_path, inside, name):
    """Without the reader's own advice, which has colours, several lines and a way to run the code."""
    torch.save({"model": W, "args": inside}, tmp_path / "w.pth")
    message = rf"w.pth can't be read as a .pth file of tensors: it holds {name}\S*, which could run code: save its state dict alone$"
    with pytest.raises(ValueError, match=message) as error:
        pyra.load_pretrained(tiny(), tmp_path / "w.pth")
    assert len(str(error.value).replace(str(tmp_path), "")) <= 300 and "\x1b" not in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz"])
def test_load_pretrained_refuses_damaged_files(tmp_path, suffix):
    """One sentence with the file's name, whatever the reader's own complaint."""
    path = tmp_path / f"weights.{suffix}"
    weights = tiny().state_dict()
    if suffix == "safetensors":
        save_file(weights, path)
    elif suffix == "npz":
        np.savez(path, **to_google(weights, heads=3))
    else:
        torch.save(weights, path)
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"<html>404: not found</html>\n" * 9):
        path.write_bytes(content)
        message = f"weights.{suffix} can't be read as a .{suffix} file of tensors: it is damaged, incomplete or of another kind"
        with pytest.raises(ValueError, match=message) as error:
            pyra.load_pretrained(tiny(), path)
        assert "\n" not in str(error.value)


@rows("name, repo", [("vit_base_patch16_224.orig_in21k", "timm/vit_base_patch16_224.orig_in21k"),
                     ("google/vit-base-patch16-224-in21k", "google/vit-base-patch16-224-in21k")])
def test_load_pretrained_from_the_hub(tmp_path, monkeypatch, name, repo):
    """A timm name, or any owner's, is that repository's model.safetensors."""
    hub = pytest.importorskip("huggingface_hub")
    weights, calls = tiny(seed=1).state_dict(), []
    save_file(to_hugging_face(weights) if repo == name else weights, tmp_path / "model.safetensors")

    def download(repo_id, filename):
        calls.append((repo_id, filename))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert identical(pyra.load_pretrained(tiny(), name).state_dict(), weights)
    assert calls == [(repo, "model.safetensors")]


@pytest.mark.parametrize("error", [OSError("no network. Check it.\nmore of it"), TimeoutError()], ids=repr)
def test_load_pretrained_hub_failure(monkeypatch, error):
    """One sentence, also where the client's error has several lines or none."""
    hub = pytest.importorskip("huggingface_hub")

    def download(*_):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match="'vit_none.tag' is no file here, and the hub did not give it: (no network|TimeoutError); without a network "
                                         "pass --weights FILE .data/README.md lists where to get it.$") as raised:
        pyra.load_pretrained(tiny(), "vit_none.tag")
    assert "\n" not in str(raised.value)


def test_load_pretrained_real_weights():
    """A published ViT-Ti loads strictly: 152 tensors, bit for bit."""
    path = SHARED / "vit_tiny" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    if not path.exists():
        pytest.skip(f"needs the ViT-Ti weights, which are not in the repository: {path}")
    weights = load_file(path)
    model = pyra.load_pretrained(pyra.create_model(path.stem), path)
    assert len(weights) == 152 and identical(model.state_dict(), weights)
    fresh = pyra.load_pretrained(pyra.create_model(path.stem, num_classes=10), path)
    assert torch.equal(fresh.blocks[11].mlp.fc2.weight, weights["blocks.11.mlp.fc2.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Pre-trained weights of today's families


def with_scales(weights, seed=0):
    """Weights before LayerScale is folded in, by timm's names, {name: tensor}."""
    generator, weights = torch.Generator().manual_seed(seed), dict(weights)
    for i in range(3):
        for scale, part in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = torch.rand(24, generator=generator) + 0.1
            weights[f"blocks.{i}.{scale}.gamma"] = gamma
            weights[f"blocks.{i}.{part}.weight"] = weights[f"blocks.{i}.{part}.weight"] / gamma[:, None]
            weights[f"blocks.{i}.{part}.bias"] = weights[f"blocks.{i}.{part}.bias"] / gamma
    return weights


def renamed(weights, *pairs):
    for old, new in pairs:
        weights = {re.sub(old, new, name): value for name, value in weights.items()}
    return weights


def to_hugging_face_dinov2(weights):
    split = {}
    for name, value in weights.items():
        parts = zip(("query", "key", "value"), value.chunk(3)) if ".attn.qkv." in name else [(None, value)]
        split |= {name.replace("attn.qkv", f"attention.attention.{part}"): third for part, third in parts}
    return renamed(split | {"embeddings.mask_token": torch.ones(1, 24)}, (r"^blocks\.", "encoder.layer."), (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
                   (r"attn\.proj", "attention.output.dense"), (r"^norm\.", "layernorm."), (r"^cls_token$", "embeddings.cls_token"),
                   (r"^reg_token$", "embeddings.register_tokens"), (r"^pos_embed$", "embeddings.position_embeddings"),
                   (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."), (r"^head\.", "classifier."))


def without_registers_place(weights):
    """DINOv2's own files: the class token has a row of the position embedding, registers have none."""
    return weights | {"pos_embed": torch.cat([weights["pos_embed"][:, :1], weights["pos_embed"][:, 5:]], dim=1)}


@rows("family, change", [
    ("dinov2", lambda w: renamed(with_scales(without_registers_place(w)), ("^reg_token$", "register_tokens")) | {"mask_token": torch.ones(1, 24)}),
    ("dinov2", lambda w: renamed(with_scales(w), (r"ls([12])\.gamma", r"gamma_\1"))),
    ("dinov2", lambda w: to_hugging_face_dinov2(with_scales(without_registers_place(w)))),
    ("dinov3", lambda w: renamed({k: v for k, v in w.items() if k != "pos_embed"}, ("^reg_token$", "storage_tokens"))),
    ("dinov3", lambda w: {k.replace("fc1", half): part for k, v in w.items() for half, part in
                          (zip(("fc1_g", "fc1_x"), v.chunk(2)) if ".fc1." in k else [("fc1", v)])}),
    *[(family, lambda w: {f"model.{k}": v for k, v in w.items()}) for family in VARIANTS],
])
def test_weights_by_their_publishers_names(family, change):
    """And behind a wrapper's prefix, in models without a class token too."""
    model = variant(family, seed=1)
    with torch.no_grad():
        model.pos_embed[:, :model.specials][:, 1:] = 0  # the places that registers don't have
        model.pos_embed.mul_(not model.variant.get("rope"))
    weights = change(model.state_dict())
    loaded = pyra.load_pretrained(variant(family), weights)
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert loaded.layer_scale == any(re.search("gamma|lambda1", name) for name in weights)
    assert not pyra.load_pretrained(loaded, model.state_dict()).layer_scale


@rows("family, change, message", [
    ("dinov2", {"blocks.0.ls1.gamma": torch.ones(12)}, r"ls1\.gamma"), ("dinov2", {"blocks.7.ls2.gamma": torch.ones(24)}, r"ls2\.gamma"),
    ("dinov2", {"blocks.0.attn.qkv.bias": None, "blocks.0.attn.q_bias": torch.ones(24)}, "q_bias|lacks blocks.0.attn.qkv.bias"),
    ("dinov3", {"blocks.0.mlp.fc1.weight": None, "blocks.0.mlp.fc1_g.weight": torch.ones(48, 24)}, "fc1_g|lacks blocks.0.mlp.fc1.weight"),
    ("dinov2", {"blocks.1.attn.qkv.bias": None}, "lacks blocks.1.attn.qkv.bias"), ("dinov2", {"patch_embed.proj.bias": None}, "lacks patch_embed.proj.bias"),
    ("dinov2", {"pos_embed": None}, "lacks pos_embed"), ("siglip", {"attn_pool.latent": None}, "lacks attn_pool.latent"),
    ("clip", {"norm_pre.weight": None}, "lacks norm_pre.weight"),
    ("dinov2", {**{f"blocks.{i}.ls1.gamma": torch.ones(24) for i in range(3)}, "norm.bias": None}, "lacks norm.bias"),
])
def test_half_of_an_extra_is_refused(family, change, message):
    """What can't be folded doesn't vanish, and the model stays as it was."""
    model = variant(family)
    weights, before = variant(family, seed=1).state_dict() | change, snapshot(model)
    with pytest.raises(ValueError, match=message):
        pyra.load_pretrained(model, {k: v for k, v in weights.items() if v is not None})
    assert identical(model.state_dict(), before) and not model.layer_scale


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def trained_pair(seed=3, **kwargs):
    """A trained model and a fresh one, of the same backbone."""
    model, fresh = adapted(**kwargs), adapted(**kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model, fresh


@pytest.mark.parametrize("kwargs", [dict(method="pyra"), dict(method="pyra", s=3), dict(method="tome"), dict(method="plain"),
                                    dict(method="pyra", distilled=True), dict(method="pyra", lora=False)], ids=str)
def test_adapter_round_trip(tmp_path, kwargs):
    """What was trained, only that, and enough for a fresh model to give the same logits."""
    model, fresh = trained_pair(**kwargs)
    path = tmp_path / "adapter.safetensors"
    pyra.save_adapter(model, path)
    saved = load_file(path)
    assert saved.keys() == trained(model).keys()
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert not torch.allclose(fresh(batch()), model(batch()), rtol=1e-2)
    assert pyra.load_adapter(fresh, str(path)) is fresh
    assert torch.equal(fresh(batch()), model(batch()))
    assert all(p.requires_grad == (name in saved) for name, p in fresh.named_parameters())  # training can go on
    torch.testing.assert_close(pyra.merge_lora(fresh)(batch()), model(batch()), rtol=1e-4, atol=1e-4)


def test_adapter_is_small(tmp_path):
    """Four bytes a trained number and a few kB of names."""
    model = pyra.add_lora(pyra.create_model("vit_nano_patch4_56", num_classes=10), rank=4)
    pyra.add_pyra(model, pyra.merge_schedule("high"))
    pyra.save_adapter(model, tmp_path / "adapter.safetensors")
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers == 12 * 4 * 4 * 96 + 192 + 12 * 96 + 970
    assert 4 * numbers < (tmp_path / "adapter.safetensors").stat().st_size < 4 * numbers + 10_000


def test_adapter_of_a_bf16_backbone(tmp_path):
    """The backbone may be held in float32 on one side and in bf16 on the other, both ways; the adapter is float32 still."""
    model, fresh = trained_pair()
    for p in fresh.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    pyra.save_adapter(model, tmp_path / "a")
    pyra.load_adapter(fresh, tmp_path / "a")
    assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in trained(model).items())
    with torch.autocast("cpu", torch.bfloat16):
        assert fresh(batch()).isfinite().all()
    pyra.save_adapter(fresh, tmp_path / "b")
    pyra.load_adapter(model, tmp_path / "b")
    assert identical(load_file(tmp_path / "a"), load_file(tmp_path / "b"))


@rows("other, message", [
    (lambda: adapted(seed=9), "another backbone"),
    (lambda: nudged(), "another backbone"),
    (lambda: adapted(num_classes=6), "its num_classes is 5, the model's 6"),
    (lambda: adapted(s=2), "its s is 1, the model's 2"),
    (lambda: adapted("tome"), r'its reducers is \["PYRA"\], the model\'s \["ToMe"\]'),
    (lambda: adapted("plain"), r"its reducers is"),
    (lambda: adapted(lora=False), "its lora_rank is 2, the model's 0"),
    (lambda: randomise(pyra.add_pyra(pyra.add_lora(tiny(), rank=3), R)), "its lora_rank is 2, the model's 3"),
    (lambda: randomise(pyra.add_pyra(pyra.add_lora(tiny(), rank=2), [10, 6, 2])), r"its r is \[10, 6, 3\], the model's \[10, 6, 2\]"),
    (lambda: adapted(depth=2), "its depth is 3, the model's 2"),
    (lambda: adapted(num_heads=4), "its num_heads is 3, the model's 4"),
    (lambda: adapted(img_size=32), "its img_size is 24, the model's 32"),
    (lambda: adapted(distilled=True), "its distilled is false, the model's true"),
    (lambda: adapted(global_pool="avg"), 'its global_pool is "token", the model\'s "avg"'),
    (lambda: headless(), r"it has unexpected head\.bias, head\.weight$"),
    (lambda: unfrozen(), "another backbone|it lacks"),
    (lambda: no_prop_attn(), "prop_attn"),
    (lambda: pyra.merge_lora(adapted()), "its lora_rank is 2, the model's 0"),
])
def test_adapter_refused(tmp_path, other, message):
    """Where it doesn't fit, with what differs; the model is left as it was."""
    pyra.save_adapter(adapted(), tmp_path / "adapter.safetensors")
    model = other()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pyra.load_adapter(model, tmp_path / "adapter.safetensors")
    assert identical(model.state_dict(), before)


def adapted_variant(family="clip", targets=("qkv",), alpha=None, add=pyra.add_pyra, **kwargs):
    """One of today's families with LoRA and a reducer, all random."""
    return randomise(add(pyra.add_lora(variant(family, **kwargs), rank=3, targets=targets, alpha=alpha), [6, 4, 2]), seed=4).eval()


@rows("settings, other, message", [
    (dict(), dict(act="gelu"), r'its variant is .*"act": "quick_gelu".*, the model\'s'), (dict(family="dinov3"), dict(family="dinov3", rope=False), "variant"),
    (dict(family="siglip"), dict(family="gap"), "its global_pool is \"map\", the model's \"avg\""), (dict(), dict(eps=1e-6), "variant"),
    (dict(family="dinov2"), dict(family="dinov2", reg_tokens=3), "variant"), (dict(img_size=(16, 24)), dict(img_size=(24, 16)), r"its img_size is \[16, 24\]"),
    (dict(targets=("qkv", "fc2")), dict(), r'its lora is \[\["qkv", "fc2"\], 1.0\], the model\'s null'),
    (dict(targets=("fc1",)), dict(targets=("fc2",)), "its lora is"),
    (dict(alpha=6), dict(alpha=12), r'its lora is \[\["qkv"\], 2.0\], the model\'s \[\["qkv"\], 4.0\]'),
    (dict(alpha=3), dict(add=pyra.add_tome), "its reducers is"), (dict(family="dinov3_avg"), dict(family="dinov3_avg", act="gelu_tanh"), "variant"),
])
def test_an_adapter_fits_its_variant_and_no_other(settings, other, message, tmp_path):
    """Even of the same shapes, by the model's own forward pass and LoRA's."""
    model, path = adapted_variant(**settings), tmp_path / "a.safetensors"
    pyra.save_adapter(model, path)
    fresh, x = adapted_variant(**settings), numbers(2, 3, *(4 * side for side in model.grid))
    with torch.no_grad():
        for p in trained(fresh).values():
            p.zero_()
    assert torch.equal(pyra.load_adapter(fresh, path)(x), model(x))
    model, before = adapted_variant(**other), snapshot(adapted_variant(**other))
    with pytest.raises(ValueError, match=message):
        pyra.load_adapter(model, path)
    assert identical(model.state_dict(), before)


def nudged():
    """One frozen weight of the last block differs."""
    model = adapted()
    model.blocks[2].mlp.fc2.weight.data[3, 3] += 0.5
    return model


def headless():
    """The head isn't trained here."""
    model = adapted()
    model.head.requires_grad_(False)
    return model


def unfrozen():
    """Here a norm is trained too."""
    model = adapted()
    model.blocks[0].norm1.requires_grad_(True)
    return model


def no_prop_attn():
    """The same tensors, other logits."""
    model = tiny()
    return randomise(pyra.add_pyra(pyra.add_lora(model, rank=2), R, prop_attn=False))


def test_adapter_refused_without_frozen_weights(tmp_path):
    """After full fine-tuning nothing frozen tells two geometries apart: their shapes do, before anything is copied."""
    pyra.save_adapter(adapted(lora=False), tmp_path / "adapter.safetensors")
    model = adapted(lora=False, mlp_ratio=3.0, seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="mlp"):
        pyra.load_adapter(model, tmp_path / "adapter.safetensors")
    assert identical(model.state_dict(), before)


@rows("content, message", [("truncated", "can't be read"), ("empty", "can't be read"), ("weights", "is not an adapter that save_adapter wrote")])
def test_adapter_damaged(tmp_path, content, message):
    """Half a file, none, or a backbone's weights: one sentence, and the model stays as it is."""
    path, model = tmp_path / "adapter.safetensors", adapted()
    pyra.save_adapter(adapted(seed=1), path)
    if content == "weights":
        save_file(tiny().state_dict(), path)
    else:
        path.write_bytes(path.read_bytes()[:-40] if content == "truncated" else b"")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        pyra.load_adapter(model, path)
    assert "\n" not in str(error.value) and "adapter.safetensors" in str(error.value)
    assert identical(model.state_dict(), before)


def test_adapter_files_that_are_not_there(tmp_path):
    """Nor a model in which nothing is trained any more: its file fits still."""
    model = adapted()
    pyra.save_adapter(model, tmp_path / "a.safetensors")
    expected, head = model.eval()(batch()), model.head.weight.clone()
    model.requires_grad_(False).head.weight.zero_()
    torch.testing.assert_close(pyra.load_adapter(model, tmp_path / "a.safetensors")(batch()), expected)
    assert torch.equal(model.head.weight, head)
    with pytest.raises(FileNotFoundError, match="no adapter .*none.safetensors"):
        pyra.load_adapter(adapted(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no file .*none.pth"):
        pyra.load_pretrained(tiny(), tmp_path / "none.pth")


def test_save_adapter_refuses(tmp_path):
    """What can't be loaded again isn't written: LoRA folded in, or nothing trained. An older file stays."""
    path = tmp_path / "adapter.safetensors"
    pyra.save_adapter(adapted(), path)
    older = path.read_bytes()
    with pytest.raises(ValueError, match="LoRA was folded into the backbone: save the adapter before folding"):
        pyra.save_adapter(pyra.merge_lora(adapted()), path)
    with pytest.raises(ValueError, match="no trained parameters"):
        pyra.save_adapter(tiny().requires_grad_(False), path)
    assert path.read_bytes() == older
    pyra.save_adapter(adapted(seed=1), path)
    assert path.read_bytes() != older


HOLDERS = (torch.float32, torch.bfloat16, torch.float16)


def other_norm(model):
    model.blocks[1].norm2.bias.data[5] += 0.1
    return model


@rows("writer, reader", [(a, b) for a in HOLDERS for b in HOLDERS])
def test_adapters_between_number_types(tmp_path, writer, reader):
    """The backbone may be held in any of them on either side, though rounding changes it; another backbone is refused in all, even a nearly equal one."""
    pyra.save_adapter(trained_pair()[0].to(writer), tmp_path / "a")
    fresh = pyra.load_adapter(adapted().to(reader), tmp_path / "a")
    for name, p in trained(trained_pair()[0]).items():
        torch.testing.assert_close(fresh.get_parameter(name), p.to(writer).to(reader))
    for other in (adapted(seed=9), nudged(), other_norm(adapted())):
        with pytest.raises(ValueError, match="another backbone"):
            pyra.load_adapter(other.to(reader), tmp_path / "a")


@rows("change, message", [
    (lambda metadata, tensors: tensors["head.bias"].add_(1e-6), "is damaged: its numbers are not those that save_adapter wrote"),
    (lambda metadata, tensors: tensors["head.bias"].fill_(torch.nan), "not all is a finite floating-point number in head.bias"),
    (lambda metadata, tensors: tensors.update({"head.bias": tensors["head.bias"].double()}), "is damaged: its numbers are not those"),
    (lambda metadata, tensors: tensors.update({"head.bias": tensors["head.bias"].long()}), "not all is a finite floating-point number in head.bias"),
    (lambda metadata, tensors: metadata.update(s="two\nlines" + 500 * "x"), "its s is two, the model's 1"),
    (lambda metadata, tensors: metadata.update(s="\x1b[31mred" + 500 * "x"), r"its s is \?\[31mredx+, the model's 1"),
    (lambda metadata, tensors: metadata.update(backbone="0", dtype="torch.float16", sketch="[1, 2"), "another backbone"),
    (lambda metadata, tensors: metadata.update(backbone="0", dtype="torch.float16", sketch='["a"]'), "another backbone"),
])
def test_adapter_files_that_were_changed(tmp_path, change, message):
    """In one sentence, whatever the change, and not in silence."""
    pyra.save_adapter(adapted(), tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    change(metadata, tensors)
    save_file(tensors, tmp_path / "a", metadata)
    with pytest.raises(ValueError, match=message) as error:
        pyra.load_adapter(adapted(seed=0), tmp_path / "a")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_adapters_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pyra.save_adapter(adapted(), "~/a.safetensors")
    assert (tmp_path / "a.safetensors").is_file()
    pyra.load_adapter(adapted(), pathlib.Path("~/a.safetensors"))
