"""The backbones of the paper's Tables 2-4 and those that came after: their weights, normalisation and settings."""

import torch

import pyra
from pyra_lab import files

SHIPPED = "data/vit_nano_patch4_56.safetensors"  # comes with this repository; the name is part of the ids of configs

# What Tables 2 and 3 of the supplement say of each backbone, and the weights and normalisation that go with it. The published
# code feeds ImageNet's mean and std to the in21k ViTs too, though they were trained with 0.5, which `expects` says; so does our default.
BACKBONES = {
    "vit_nano_patch4_56": dict(weights=SHIPPED, norm="half", lora_rank=8, batch_size=64),
    "vit_nano_patch4_28": dict(weights=SHIPPED, norm="half", lora_rank=8, batch_size=64),  # the same with a quarter of the patches
    "vit_tiny_patch16_224": dict(weights="vit_tiny_patch16_224.augreg_in21k", norm="imagenet", expects="half", lora_rank=8, batch_size=64),
    "vit_small_patch16_224": dict(weights="vit_small_patch16_224.augreg_in21k", norm="imagenet", expects="half", lora_rank=4, batch_size=64),
    "vit_base_patch16_224": dict(weights="vit_base_patch16_224.orig_in21k", norm="imagenet", expects="half", lora_rank=8, batch_size=64),
    "vit_large_patch16_224": dict(weights="vit_large_patch16_224.orig_in21k", norm="imagenet", expects="half", lora_rank=12, batch_size=32),
    "vit_base_patch16_224.mae": dict(weights="vit_base_patch16_224.mae", norm="imagenet", lora_rank=8, batch_size=32, global_pool="avg"),
    "vit_large_patch16_224.mae": dict(weights="vit_large_patch16_224.mae", norm="imagenet", lora_rank=12, batch_size=32, global_pool="avg"),
    "deit_small_patch16_224": dict(weights="deit_small_patch16_224.fb_in1k", norm="imagenet", lora_rank=4, batch_size=128),
    "deit_base_patch16_224": dict(weights="deit_base_patch16_224.fb_in1k", norm="imagenet", lora_rank=8, batch_size=128),
    "deit_small_distilled_patch16_224": dict(weights="deit_small_distilled_patch16_224.fb_in1k", norm="imagenet", lora_rank=4, batch_size=128),
    "deit_base_distilled_patch16_224": dict(weights="deit_base_distilled_patch16_224.fb_in1k", norm="imagenet", lora_rank=8, batch_size=128),
}
# Table 4: the learning rates of W_r and W_D that the paper chooses from, task by task. It lists ViT-B, ViT-L, MAE's ViT-L and DeiT-B.
MODULATION_LRS = {name: [1e-6, 3e-6, 1e-5, 3e-5] if "global_pool" in row else [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3] for name, row in BACKBONES.items()}

# Later families: the name for each size, the tag of the weights at timm's place on the hub, and their normalisation. LoRA's rank and the
# batch are the paper's for a ViT of that size. DINO's are used at 224 pixels, as is usual for classification, and by the class token.
SETTINGS = {"small": (4, 64), "small_plus": (4, 64), "base": (8, 64), "large": (12, 32), "so400m": (12, 32)}
for pattern, tag, norm, sizes, more in [
    ("vit_{}_patch16_224_miil", "in21k", "none", ["base"], {}),
    ("deit3_{}_patch16_224", "fb_in22k_ft_in1k", "imagenet", ["small", "base", "large"], {}),
    ("vit_{}_patch14_dinov2", "lvd142m", "imagenet", ["small", "base", "large"], dict(img_size=224)),
    ("vit_{}_patch14_reg4_dinov2", "lvd142m", "imagenet", ["small", "base", "large"], dict(img_size=224)),
    ("vit_{}_patch16_dinov3", "lvd1689m", "imagenet", ["small", "small_plus", "base", "large"], dict(img_size=224, global_pool="token")),
    ("vit_{}_patch16_clip_224", "laion2b", "clip", ["base"], {}),
    ("vit_{}_patch14_clip_224", "datacompxl", "clip", ["large"], {}),
    ("vit_{}_patch16_clip_quickgelu_224", "openai", "clip", ["base"], {}),
    ("vit_{}_patch14_clip_quickgelu_224", "openai", "clip", ["large"], {}),
    ("vit_{}_patch16_siglip_224", "v2_webli", "half", ["base"], {}),
    ("vit_{}_patch16_siglip_gap_224", "v2_webli", "half", ["base"], {}),
    ("vit_{}_patch14_siglip_224", "v2_webli", "half", ["so400m"], {}),
]:
    for size in sizes:
        name, (lora_rank, batch_size) = pattern.format(size), SETTINGS[size]
        BACKBONES[name] = dict(weights=f"{name}.{tag}", norm=norm, lora_rank=lora_rank, batch_size=batch_size, **more)
        MODULATION_LRS[name] = MODULATION_LRS["vit_base_patch16_224"]


def default_img_size(backbone):
    """The side of the images, in pixels, that a backbone of the table gets unless a config says otherwise."""
    return BACKBONES[backbone].get("img_size") or pyra.read_name(backbone.split(".")[0]).get("img_size", 224)


def create_backbone(config, num_classes):
    """The config's backbone, untrained."""
    row, size = BACKBONES[config.backbone], config.img_size or default_img_size(config.backbone)
    pool = {"global_pool": row["global_pool"]} if "global_pool" in row else {}
    return pyra.create_model(config.backbone, num_classes=num_classes, drop_path_rate=config.drop_path, img_size=size, **pool)


def shape_of(config, num_classes=1):
    """The config's backbone on the meta device, without weights: to count, and to solve for."""
    with torch.device("meta"):
        return create_backbone(config, num_classes)


def load_backbone(config, num_classes):
    """The backbone of a resolved config with its weights and nothing else, initialised by the config's seed."""
    torch.manual_seed(config.seed)
    model = create_backbone(config, num_classes)
    if config.weights != "none":
        pyra.load_pretrained(model, files.DATA.parent / SHIPPED if config.weights == SHIPPED else config.weights)
    return model
