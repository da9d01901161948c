"""What a merged token's rotary position should be: `python notebooks/measured/rope.py` writes rope.csv beside it, in an hour on one core.

No small ViT with RoPE is published, so one is made first: vit_nano_patch4_56 without its position embedding and with DINOv3's RoPE instead,
trained further on the scenes that it was pre-trained on. Then ToMe merges it by three readings: as it is, and in training with LoRA.
"""

import argparse
import csv
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file

import pyra
from pyra_lab import Config, backbones, run
from pyra_lab.images import normalize
from pyra_lab.pretrain import IGNORE, PATCH_QUESTIONS, QUESTIONS, build, choose_patches, compute_loss, draw_many

HERE = Path(__file__).parent
SIZE = dict(img_size=56, patch_size=4, embed_dim=96, num_heads=3, rope=True)


# ---- The backbone ----------------------------------------------------------------------------------------------------


def with_rope():
    """The shipped backbone with RoPE in place of its position embedding, which only the class token keeps."""
    model, shipped = (pyra.VisionTransformer(num_classes=0, **size) for size in (SIZE, {**SIZE, "rope": False}))
    pyra.load_pretrained(shipped, HERE.parents[1] / backbones.SHIPPED)
    state = shipped.state_dict()
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    model.load_state_dict({**state, "pos_embed": torch.zeros_like(model.pos_embed)})
    return model


def answer(model, heads, images, keep=None):
    """images (b, 3, 56, 56); keep (b, k): the patches shown, None: all -> logits of the image's questions, and of each patch's."""
    tokens = model.embed(images)
    if keep is not None:  # a patch that isn't shown is in no token
        keep = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
        places = torch.arange(keep.shape[1]).expand_as(keep)
        tokens = tokens._replace(x=pyra.take(tokens.x, keep), source=torch.full_like(tokens.source, -1).scatter(1, keep, places))
    for block in model.blocks:
        tokens = block(tokens)
    x = model.norm(tokens.x)
    return heads["image"](x[:, 0]), heads["patch"](x[:, 1:])


def pretrain(steps, scenes):
    """The backbone with RoPE and the heads for its questions, trained on drawn scenes."""
    torch.manual_seed(0)
    model, (_, heads), start = with_rope(), build(), time.time()
    images, answers = draw_many(scenes, 0, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    for step in range(steps):
        progress = step / steps
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * progress))
        patches = 49 if progress < 0.6 else 98 if progress < 0.8 else None
        index = torch.randint(len(images), (64,))
        batch = {name: a[index] for name, a in answers.items()}
        keep = None if patches is None else choose_patches(batch["patch_shape"], patches)
        if keep is not None:
            batch |= {name: batch[name].gather(1, keep) for name in PATCH_QUESTIONS}
        with torch.autocast("cpu", torch.bfloat16):
            of_image, of_patches = answer(model, heads, normalize(images[index], "half"), keep)
        loss = compute_loss(of_image, batch, QUESTIONS) + compute_loss(of_patches, batch, PATCH_QUESTIONS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"{(time.time() - start) / 60:.1f} min, step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    return model, heads


# ---- Three readings --------------------------------------------------------------------------------------------------

OURS = pyra.RoPE.forward


def rotated_keys(self, qkv, source):
    """Tokens are compared by their keys after rotation, which tell the place too."""
    return OURS(self, qkv, source)._replace(unrotated=None)


def mean_of_sines(self, qkv, source):
    """A merged token's sines and cosines are the mean of its patches', which shrinks q and k."""
    b, h, n, d = qkv.k.shape
    frequency = 2 * math.pi / 100 ** (torch.arange(d // 4) * 4 / d)
    angle = rearrange((self.place / self.side - 1)[..., None] * frequency, "n two f -> n (two f)")
    waves = torch.cat([angle.cos(), angle.sin(), torch.ones(len(angle), 1)], dim=1).expand(b, -1, -1)
    index = repeat(torch.where(source < 0, n, source), "b n -> b n e", e=waves.shape[-1])
    total = waves.new_zeros(b, n + 1, waves.shape[-1]).scatter_add(1, index, waves)[:, None, :n]
    cos, sin = (total[..., :-1] / total[..., -1:].clamp(min=1)).chunk(2, dim=-1)
    turn = lambda u, v: torch.cat([u * cos - v * sin, v * cos + u * sin], dim=-1)
    rotate = lambda x: turn(*x.float().chunk(2, dim=-1)).to(x.dtype)
    return pyra.QKV(rotate(qkv.q), rotate(qkv.k), qkv.v, unrotated=qkv.k)


READINGS = {"mean place, keys before rotation": OURS, "mean place, keys after rotation": rotated_keys, "mean of sines, keys before rotation": mean_of_sines}


@torch.no_grad()
def share_correct(model, heads, images, answers):
    """Of the image's questions, the share of correct answers, averaged over the questions."""
    logits = torch.cat([heads["image"](model.pool(model.forward_tokens(normalize(x, "half")))) for x in images.split(100)])
    shares = []
    for name, part in zip(QUESTIONS, logits.split(list(QUESTIONS.values()), dim=-1)):
        asked = answers[name] != IGNORE
        shares.append((part.argmax(dim=-1) == answers[name])[asked].double().mean())
    return torch.stack(shares).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--tasks", nargs="+", default=["sprites_location", "sprites_orientation", "digits"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default=HERE / "rope.csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, heads = pretrain(args.steps, args.scenes)
    images, answers = draw_many(2000, 10 ** 6, 1)
    rows = []

    def add(reading, rate, measured, seed, value):
        rows.append(dict(reading=reading, rate=rate, measured=measured, seed=seed, accuracy=f"{value:.4f}"))
        print(*rows[-1].values(), flush=True)

    add("", "plain", "scenes", 0, share_correct(model, heads, images, answers))
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rope.safetensors"
        save_file(model.state_dict(), file)
        pyra.SIZES["vit_nano_rope_patch4_56"] = SIZE
        backbones.BACKBONES["vit_nano_rope_patch4_56"] = dict(weights=file, norm="half", lora_rank=8, batch_size=64)
        for name, reading in READINGS.items():
            pyra.RoPE.forward = reading
            for rate in ("low", "high"):
                pyra.add_tome(model, pyra.merge_schedule(rate, model=model))
                add(name, rate, "scenes", 0, share_correct(model, heads, images, answers))
            pyra.add_tome(model, 0)
            for task in args.tasks:
                for seed in range(args.seeds):
                    config = Config(task=task, backbone="vit_nano_rope_patch4_56", weights=file, method="tome", epochs=2, lr=8e-3, seed=seed)
                    add(name, "high", task, seed, run(config, f"{folder}/{reading.__name__}", progress=False).accuracy_last)
    with open(args.out, "w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
