"""The backbones of the paper's Tables 2-4: their weights, normalisation and settings."""

import torch

import pyra
from pyra_lab import files

SHIPPED = "data/vit_nano_patch4_56.safetensors"  # comes with this repository; the name is part of the ids of configs

# What Tables 2 and 3 of the supplement say of each backbone, and the weights and normalisation that go with it. The published
# code feeds ImageNet's mean and std to the in21k ViTs too, though they were trained with 0.5; so does our default.
BACKBONES = {
    "vit_nano_patch4_56": dict(weights=SHIPPED, norm="half", lora_rank=8, batch_size=64),
    "vit_tiny_patch16_224": dict(weights="vit_tiny_patch16_224.augreg_in21k", norm="imagenet", lora_rank=8, batch_size=64),
    "vit_small_patch16_224": dict(weights="vit_small_patch16_224.augreg_in21k", norm="imagenet", lora_rank=4, batch_size=64),
    "vit_base_patch16_224": dict(weights="vit_base_patch16_224.orig_in21k", norm="imagenet", lora_rank=8, batch_size=64),
    "vit_large_patch16_224": dict(weights="vit_large_patch16_224.orig_in21k", norm="imagenet", lora_rank=12, batch_size=32),
    "vit_base_patch16_224.mae": dict(weights="vit_base_patch16_224.mae", norm="imagenet", lora_rank=8, batch_size=32, global_pool="avg"),
    "vit_large_patch16_224.mae": dict(weights="vit_large_patch16_224.mae", norm="imagenet", lora_rank=12, batch_size=32, global_pool="avg"),
    "deit_small_patch16_224": dict(weights="deit_small_patch16_224.fb_in1k", norm="imagenet", lora_rank=4, batch_size=128),
    "deit_base_patch16_224": dict(weights="deit_base_patch16_224.fb_in1k", norm="imagenet", lora_rank=8, batch_size=128),
    "deit_small_distilled_patch16_224": dict(weights="deit_small_distilled_patch16_224.fb_in1k", norm="imagenet", lora_rank=4, batch_size=128),
    "deit_base_distilled_patch16_224": dict(weights="deit_base_distilled_patch16_224.fb_in1k", norm="imagenet", lora_rank=8, batch_size=128),
}
# Table 4: the learning rates of W_r and W_D that the paper chooses from, task by task. It lists ViT-B, ViT-L, MAE's ViT-L and DeiT-B.
MODULATION_LRS = {name: [1e-6, 3e-6, 1e-5, 3e-5] if "global_pool" in row else [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3] for name, row in BACKBONES.items()}


def create_backbone(config, num_classes):
    """The config's backbone, untrained."""
    pool = BACKBONES[config.backbone].get("global_pool", "token")
    return pyra.create_model(config.backbone, num_classes=num_classes, drop_path_rate=config.drop_path, global_pool=pool)


def load_backbone(config, num_classes):
    """The backbone of a resolved config with its weights and nothing else, initialised by the config's seed."""
    torch.manual_seed(config.seed)
    model = create_backbone(config, num_classes)
    if config.weights != "none":
        pyra.load_pretrained(model, files.DATA.parent / SHIPPED if config.weights == SHIPPED else config.weights)
    return model
