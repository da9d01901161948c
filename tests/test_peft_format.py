"""Adapters as Hugging Face's peft has them, against peft itself where it is installed."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import R, TINY, adapted, batch, identical, quiet, randomise, rows, snapshot, tiny
from safetensors.torch import load_file, save_file

import pyra
from pyra_lab import load_peft, pruning, save_peft
from pyra_lab.pefts.adapter import add_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def oracle(name="peft"):
    return pytest.importorskip(name, reason=f"{name}, the oracle, isn't installed")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def warned(call, *args):
    """The result of call(*args), and the text of its only warning, or "" where there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*args)
    assert len(caught) <= 1 and all(warning.filename == __file__ for warning in caught)
    return result, "".join(str(warning.message) for warning in caught)


def train_with_peft(model, folder, images, **settings):
    """Saves the model's LoRA after a few large steps, so that B isn't 0. Returns its logits."""
    config = oracle().LoraConfig(**{"r": 2, "lora_alpha": 3, "modules_to_save": ["head"], **settings})
    model = oracle().get_peft_model(model, config).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    logits = lambda: getattr(out := model(images), "logits", out)
    for _ in range(3):
        F.cross_entropy(logits(), torch.arange(len(images)) % TINY["num_classes"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    quiet(model.save_pretrained, folder)
    return logits().detach()


@rows("settings, kwargs, changed", [
    (dict(target_modules=["qkv"], lora_dropout=0.1, init_lora_weights="gaussian"), {}, []),
    (dict(target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head", "norm"]), {}, ["norm", "patch_embed.proj"]),  # proj: of both
    (dict(target_modules=["proj", "fc2"], exclude_modules=["patch_embed.proj"], use_rslora=True), {}, []),
    (dict(target_modules=r"blocks\.\d+\.(attn\.qkv|mlp\.fc1)"), dict(init_values=0.3), []),  # LayerScale
    (dict(target_modules="all-linear", modules_to_save=None), {}, []),  # LoRA on the head
    (dict(target_modules=["qkv", "fc1"]), dict(class_token=False, global_pool="map"), ["attn_pool.mlp.fc1"]),
    (dict(target_modules=["qkv"], modules_to_save=["head", "fc_norm"]), dict(global_pool="avg"), []),
])
def test_from_peft_and_back(settings, kwargs, changed, tmp_path):
    """What peft wrote for timm's model gives its logits here; what is written here gives peft the same again, on a fresh model."""
    vit, images = oracle("timm.models.vision_transformer"), batch()
    theirs = randomise(vit.VisionTransformer(**{**TINY, **kwargs}))
    base = copy.deepcopy(theirs).eval()
    expected = train_with_peft(theirs, tmp_path / "theirs", images, **settings)
    assert (expected - base(images)).abs().max() > 0.1 * expected.abs().max()
    ours, message = warned(load_peft, pyra.from_timm(base), tmp_path / "theirs")
    assert ("changes the backbone's " + ", ".join(changed) + " too" in message) if changed else not message
    close(ours.eval()(images), expected)
    save_peft(ours, tmp_path / "ours")
    close(oracle().PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(images), expected)
    close(quiet(load_peft, pyra.from_timm(base), tmp_path / "ours").eval()(images), expected)


def with_lora(model, **kwargs):
    """The model with LoRA, all that is trained random."""
    torch.manual_seed(0)
    for p in pyra.add_lora(model.eval(), **kwargs).parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model


@rows("name, kwargs, lora, alpha, patterns", [
    ("vit_tiny_patch16_224", {}, dict(rank=3, targets=["proj", "fc1"], alpha=8), 8, r"(attn\.proj|mlp\.fc1)"),
    ("vit_tiny_patch16_224", dict(num_classes=0), dict(rank=3, alpha=2.5), 2.5, r"(attn\.qkv)"),
    ("vit_small_plus_patch16_dinov3", {}, dict(rank=2, targets=["qkv", "fc1"]), 2, r"(attn\.qkv|mlp\.fc1_g|mlp\.fc1_x)"),  # SwiGLU, there in two maps
])
def test_from_here_to_peft(name, kwargs, lora, alpha, patterns, tmp_path):
    """The logits without merging, which the format doesn't record; and that is told."""
    base = randomise(oracle("timm").create_model(name, **{**TINY, **kwargs})).eval()
    model = with_lora(pyra.from_timm(base), **lora)
    with torch.no_grad():
        expected = model(batch())
        _, message = warned(save_peft, nn.DataParallel(pyra.add_tome(model, R)), tmp_path / "new" / "folder")
        assert message == "peft's format doesn't record ToMe: what is saved is the model without it"
        close(oracle().PeftModel.from_pretrained(base, tmp_path / "new" / "folder").eval()(batch()), expected)
    config = json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())
    assert repr(config["lora_alpha"]) == repr(alpha) and config["target_modules"] == r"blocks\.\d+\." + patterns
    assert config["modules_to_save"] == (None if kwargs else ["head"])


@rows("targets, renamed, rank", [
    (["q_proj", "v_proj", "o_proj", "fc2"], ["query", "value", "dense"], 4),
    (["k_proj"], ["key"], 2),
])
def test_from_transformers(targets, renamed, rank, tmp_path):
    """LoRA on query, key or value is LoRA on these rows of qkv; under the names of transformers 5, and of 4 in a .bin file, as the hub has them."""
    hub, images = oracle("transformers"), batch()
    config = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48, image_size=24, patch_size=4, num_labels=5)
    theirs = randomise(hub.ViTForImageClassification(hub.ViTConfig(**config, layer_norm_eps=1e-6)))
    weights = snapshot(theirs)
    expected = train_with_peft(theirs, tmp_path / "five", images, target_modules=targets, modules_to_save=["classifier"])

    old_names = [("vit.layers", "vit.encoder.layer"), ("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
                 ("o_proj", "output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]
    tensors = load_file(tmp_path / "five" / WEIGHTS)
    for old, new in old_names:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    (tmp_path / "four").mkdir()
    torch.save(tensors, tmp_path / "four" / "adapter_model.bin")
    fields = json.loads((tmp_path / "five" / CONFIG).read_text())
    (tmp_path / "four" / CONFIG).write_text(json.dumps({**fields, "target_modules": renamed}))
    for version in ("four", "five"):
        model, message = warned(load_peft, pyra.load_pretrained(pyra.VisionTransformer(**TINY), weights), tmp_path / version)
        assert not message and {len(layer.lora_a) for layers in pyra.lora_layers(model).values() for layer in layers} == {rank}
        close(model.eval()(images), expected)


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def edit_weights(folder, **tensors):
    """Replaces A or B of the first block; None: removes it."""
    tensors = {f"base_model.model.blocks.0.attn.qkv.lora_{side}.weight": value for side, value in tensors.items()}
    save_file({k: v for k, v in {**load_file(folder / WEIGHTS), **tensors}.items() if v is not None}, folder / WEIGHTS)


def rename(folder, old, new):
    save_file({name.replace(old, new): value for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


@rows("damage, sentence", [
    (lambda f: (f / CONFIG).unlink(), "adapter_config.json can't be read as peft's config: .Errno 2. No such file"),
    (lambda f: (f / WEIGHTS).unlink(), "there is no adapter_model.safetensors in "),
    (lambda f: (f / CONFIG).write_text('{"r": 2,'), "adapter_config.json can't be read as peft's config: Expecting"),
    (lambda f: (f / CONFIG).write_text("[]"), "adapter_config.json can't be read as peft's config: 'list' object"),
    (lambda f: (f / CONFIG).write_bytes(b"\xff"), "adapter_config.json can't be read as peft's config: 'utf-8' codec"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "can't be read as a .safetensors file of tensors: it is damaged"),
    (lambda f: edit(f, peft_type="LOHA"), "adapter_config.json must be of peft_type LORA, not LOHA$"),
    (lambda f: edit(f, use_dora=True, rank_pattern={"fc1": 4}), "asks for what pyra.LoRALinear doesn't do: use_dora = True, rank_pattern = {'fc1': 4}$"),
    (lambda f: edit(f, bias="all"), "doesn't do: bias = all$"),
    (lambda f: edit(f, fan_in_fan_out=True), "doesn't do: fan_in_fan_out = True$"),
    (lambda f: edit(f, init_lora_weights="pissa"), "doesn't do: init_lora_weights = pissa$"),
    (lambda f: edit(f, something_new=[1]), r"doesn't do: something_new = \[1\]$"),
    (lambda f: edit(f, r="2"), "must have r and lora_alpha above 0 and lora_dropout in .0, 1., not '2', 2 and 0.1$"),
    (lambda f: edit(f, lora_alpha=float("nan")), "not 2, nan and 0.1$"),
    (lambda f: edit(f, lora_dropout=None), "not 2, 2 and None$"),
    (lambda f: edit(f, target_modules="("), "can't be read as peft's config: missing \\)"),
    (lambda f: edit(f, target_modules=7), "can't be read as peft's config: "),
    (lambda f: edit(f, target_modules=["proj"]), "doesn't fit adapter_config.json: its target_modules don't mean blocks.0.attn.qkv.lora_A.weight, .* and 3 more$"),
    (lambda f: edit(f, r=3), r"blocks.0.attn.qkv.lora_A.weight as \(2, 24\), not \(3, 24\)"),
    (lambda f: edit_weights(f, A=torch.full((2, 24), torch.nan)), "not all is a finite floating-point number in blocks.0.attn.qkv.lora_A.weight$"),
    (lambda f: edit_weights(f, B=torch.zeros(2, 72)), r"lora_B.weight as \(2, 72\), not \(72, 2\)"),
    (lambda f: edit_weights(f, B=None), "it lacks blocks.0.attn.qkv.lora_B.weight$"),
    (lambda f: rename(f, "blocks.0", "blocks.3"), "it lacks blocks.0.attn.qkv.lora_A.weight, blocks.0.attn.qkv.lora_B.weight$"),
    (lambda f: rename(f, "attn.qkv", "attn.kv"), "it has unexpected blocks.0.attn.kv.lora_A.weight"),
    (lambda f: rename(f, "head.bias", "other"), "it lacks head.bias$"),
    (lambda f: rename(f, ".head.", ".tail."), "it lacks head.weight, head.bias$"),
    (lambda f: save_file({"base_model.model.head.weight": torch.ones(5, 24)}, f / WEIGHTS), "it lacks head.bias$"),
])
def test_what_cannot_be_loaded(damage, sentence, tmp_path):
    """Each in a sentence, before the model changes."""
    save_peft(adapted("none"), tmp_path)
    damage(tmp_path)
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=sentence) as error:
        load_peft(model, tmp_path)
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")
    assert identical(snapshot(model), before) and all(p.requires_grad for p in model.parameters())


def scaled(**kwargs):
    model = tiny(**kwargs)
    model.layer_scale = True  # as load_pretrained notes it
    return model


def pruned():
    return pruning.prune_channels(tiny(), [(3, 48), (2, 30), (1, 40)])


@rows("make, sentence", [
    (tiny, "the model has no LoRA to save: see pyra.add_lora$"),
    (lambda: adapted("pyra"), "has no place for blocks.0.reducer.w_r, blocks.0.reducer.w_d, .* and 3 more: use pyra.save_adapter$"),
    (lambda: add_adapter(tiny()), "doesn't hold Adapter: use pyra.save_adapter$"),
    (lambda: pyra.merge_lora(adapted("none")), "LoRA was folded into the backbone: save the adapter before folding$"),
    (lambda: adapted("none").requires_grad_(True), "has no place for cls_token, pos_embed, patch_embed.proj.weight and .* more: use pyra.save_adapter$"),
    (lambda: adapted("none", distilled=True), "timm answers with the mean of a distilled model's two heads"),
    (lambda: pyra.add_lora(pruned()), "the blocks are pruned, and timm has no such model: use pyra.save_adapter$"),
    (lambda: pyra.add_lora(scaled(), targets=["fc1", "proj", "fc2"]), "LoRA on proj and fc2 doesn't carry over: LayerScale is in its weights"),
    (lambda: randomise(pyra.add_lora(tiny(rope=True))), "timm's DINOv3 with biases of q and v never calls its qkv"),
    (lambda: nn.Linear(2, 2), "save_peft needs a pyra.VisionTransformer"),
])
def test_what_cannot_be_saved(make, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        save_peft(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_models_that_a_folder_does_not_fit(tmp_path):
    save_peft(pyra.add_lora(tiny(), targets=["proj", "fc1"]), tmp_path)
    for model, sentence in [
        (adapted("none"), "the model has LoRA already, and takes one PEFT"),
        (scaled(), "LoRA on proj doesn't carry over: LayerScale is in its weights here, a factor after it in timm$"),
        (tiny(num_classes=4), r"has head.weight as \(5, 24\), not \(4, 24\)"),
        (tiny(depth=4), "lacks blocks.3.attn.proj.lora_A.weight, .* and 1 more$"),
        (tiny(distilled=True), "timm answers with the mean of a distilled model's two heads"),
    ]:
        before = snapshot(model)
        with pytest.raises(ValueError, match=sentence):
            load_peft(model, tmp_path)
        assert identical(snapshot(model), before)


def test_there_and_back(tmp_path):
    """Without peft: the same tensors and settings, in bf16 too, and none of the merging of either model; training goes on."""
    for dtype in (torch.float32, torch.bfloat16):
        first = with_lora(tiny(global_pool="avg").to(dtype), rank=3, dropout=0.25, targets=["qkv", "fc2"], alpha=7)
        save_peft(first, tmp_path)
        second = load_peft(pyra.add_tome(tiny(global_pool="avg").to(dtype), R), tmp_path)
        assert identical(snapshot(second), snapshot(first))
        assert {n for n, p in second.named_parameters() if p.requires_grad} == {n for n, p in first.named_parameters() if p.requires_grad}
        for name, layers in pyra.lora_layers(second).items():
            assert all((layer.scale, layer.dropout) == (7 / 3, 0.25) for layer in layers)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
