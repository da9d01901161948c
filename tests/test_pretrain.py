"""pyra_lab/pretrain.py: the scenes' answers, the model that is trained against the one that is shipped, and a short training."""

import argparse
import json

import pytest
import torch
from safetensors import safe_open

import pyra
from pyra_lab import pretrain


@pytest.fixture(scope="module")
def scenes():
    images, answers = pretrain.draw_scenes(40, seed=0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), {name: torch.from_numpy(answer) for name, answer in answers.items()}


def test_scenes_have_an_answer_for_each_question(scenes):
    images, answers = scenes
    assert images.shape == (40, 3, 56, 56) and images.dtype == torch.uint8
    questions = pretrain.QUESTIONS | pretrain.PATCH_QUESTIONS
    assert answers.keys() == questions.keys()
    for name, answer in answers.items():
        assert answer.shape == ((40, 196) if name.startswith("patch") else (40,))
        assert answer.min() >= pretrain.IGNORE and answer.max() < questions[name]
    two = answers["count"] > 0
    assert (answers["second_shape"][two] >= 0).all() and (answers["second_shape"][~two] == pretrain.IGNORE).all()
    background = answers["patch_rank"] == 3
    assert ((answers["patch_shape"] == len(pretrain.SHAPES)) == background).all() and 0.3 < background.float().mean() < 0.95


def test_what_is_trained_is_what_pyra_runs(scenes):
    """The forward pass that can hide patches is VisionTransformer's where all are shown, in whatever order."""
    torch.manual_seed(0)
    model, heads = pretrain.build()
    x = pretrain.normalize(scenes[0][:4], "half")
    with torch.no_grad():
        image_logits, patch_logits = pretrain.forward(model, heads, x)
        assert torch.allclose(image_logits, heads["image"](model(x)), atol=1e-5)
        order = torch.rand(4, 196).argsort(1)
        shuffled_image, shuffled_patch = pretrain.forward(model, heads, x, order)
    assert torch.allclose(shuffled_image, image_logits, atol=1e-4)
    assert torch.allclose(shuffled_patch, patch_logits.gather(1, order[..., None].expand_as(patch_logits)), atol=1e-4)


def test_a_short_training_writes_a_backbone(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_many", lambda n, seed, workers: scenes)  # the held-out scenes
    path = tmp_path / "nano.safetensors"
    args = argparse.Namespace(out=str(path), minutes=1, steps=4, batch=8, lr=1e-3, workers=1, device="cpu", seed=0)
    pretrain.train(0, args, *scenes)
    model = pyra.create_model("vit_nano_patch4_56", num_classes=5)
    before = model.blocks[0].attn.qkv.weight.clone()
    pyra.load_pretrained(model, path)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["norm"] == "half" and metadata["recipe"].startswith("pyra_lab.pretrain: 32 drawn scenes of 40, 4 steps of 8")
    for name in ("accuracy", "commonest_answer"):
        assert json.loads(metadata[name]).keys() == (pretrain.QUESTIONS | pretrain.PATCH_QUESTIONS).keys()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
