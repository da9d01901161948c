"""The small, random models that several test files share."""

import zlib

import pytest
import torch

import pyra

TINY = dict(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2.0, num_classes=5)  # 36 patches
R = [10, 6, 3]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def batch(b=3, seed=0):
    return torch.randn(b, 3, 24, 24, generator=torch.Generator().manual_seed(100 + seed))


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return pyra.create_model(name, **kwargs)
