"""Draws hero.png, the README's first figure: python docs/hero.py WEIGHTS, of a ViT-Ti/16 (timm's augreg_in21k_ft_in1k).

The photograph comes with scikit-learn (vultilion, CC BY 2.0). Accuracy is the paper's average over VTAB-1k (Tables 1 and 2, ViT-B/16);
the speed was measured with `python -m pyra_lab benchmark --dtype float32` on 2 CPU cores (AMD Zen 4), see notebooks/README.md.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import pyra
from pyra_lab.report import colour, fill_tokens, held_patches

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

ACCURACY = {"plain": 74.76, "tome": 70.43, "pyra": 72.06}  # %, the paper's
SPEED = {"plain": 5.6, "tome": 19.4, "pyra": 19.2}  # images/s, ours, packed for the CPU
TITLES = {"plain": "LoRA", "tome": "+ ToMe, high", "pyra": "+ PYRA, high"}

model = pyra.load_pretrained(pyra.create_model("vit_tiny_patch16_224"), sys.argv[1]).eval()
pyra.add_tome(model, pyra.merge_schedule("high"))
photo = Image.fromarray(load_sample_image("flower.jpg")).crop((120, 0, 547, 427)).resize((224, 224), Image.Resampling.BICUBIC)
image = torch.from_numpy(np.asarray(photo).copy())

figure, axes = plt.subplots(1, 6, figsize=(12.5, 2.1), gridspec_kw=dict(width_ratios=[1, 1, 1, 1, 1.1, 1.1], wspace=0.15))
axes[0].imshow(image)
axes[0].set_title("196 patches", fontsize=10)
for ax, block in zip(axes[1:4], (2, 4, 12)):
    held = held_patches(model, image.permute(2, 0, 1)[None], "half", block)[0]
    ax.imshow(fill_tokens(image / 255, held, model.patch_size))
    ax.set_title(f"after block {block}: {len(held.unique())}", fontsize=10)
for ax in axes[:4]:
    ax.axis("off")
for ax, title, values in ((axes[4], "accuracy, %", ACCURACY), (axes[5], "images/s", SPEED)):
    for i, (method, value) in enumerate(values.items()):
        ax.barh(-i, value, color=colour(method), height=0.7)
        ax.text(value - 0.02 * max(values.values()), -i, f"{value:.1f}", va="center", ha="right", color="white", fontsize=9, fontweight="bold")
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
for i, title in enumerate(TITLES.values()):
    axes[4].text(2, -i, title, va="center", ha="left", color="white", fontsize=9)
figure.savefig(Path(__file__).with_name("hero.png"), dpi=150, bbox_inches="tight")
