"""What a merged token's rotary position should be: `python notebooks/measured/rope.py folder` writes rope.csv beside it, in half an hour on one core.

No small ViT with RoPE is published, so one is made first: vit_nano_patch4_56 without its position embedding and with DINOv3's RoPE instead,
trained further on the scenes that it was pre-trained on. Then ToMe merges it by four readings: as it is, and in training with LoRA.
"""

import argparse
import functools
import itertools
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file

import pyra
from pyra_lab import Config, backbones, run
from pyra_lab.images import normalize
from pyra_lab.pretrain import IGNORE, PATCH_QUESTIONS, QUESTIONS, build, choose_patches, compute_loss, draw_many
from pyra_lab.records import write_rows

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


# ---- Four readings ---------------------------------------------------------------------------------------------------

PLACES, KEYS = ("coordinates", "sines"), ("before", "after")


def means(values, source, n):
    """values (n0, e) of the patches -> (b, n, e), the mean over the patches of each of n tokens."""
    values = F.pad(values, (0, 1), value=1.0).expand(len(source), -1, -1)
    index = repeat(torch.where(source < 0, n, source), "b n -> b n e", e=values.shape[-1])
    total = values.new_zeros(len(source), n + 1, values.shape[-1]).scatter_add(1, index, values)[:, :n]
    return total[..., :-1] / total[..., -1:].clamp(min=1)


def rotate(self, qkv, source, place, keys):
    """RoPE.forward by one of the readings.

    place: a merged token's angles are those of its patches' mean coordinates, or its sines and cosines are their mean, which shrinks q and k.
    keys: tokens are compared by their keys before rotation, or after, when they tell the place too.
    """
    n, d = qkv.k.shape[2:]
    frequency = 2 * math.pi / 100 ** (torch.arange(d // 4) * 4 / d)
    angles = lambda yx: rearrange(yx[..., None] * frequency, "... two f -> ... (two f)")
    own = self.place / self.side - 1  # (n0, 2)
    if place == "coordinates":
        angle = angles(means(own, source, n))
        cos, sin = angle.cos(), angle.sin()
    else:
        cos, sin = means(torch.cat([angles(own).cos(), angles(own).sin()], dim=-1), source, n).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turn = lambda u, v: torch.cat([u * cos - v * sin, v * cos + u * sin], dim=-1)
    turned = lambda x: turn(*x.float().chunk(2, dim=-1)).to(x.dtype)
    return pyra.QKV(turned(qkv.q), turned(qkv.k), qkv.v, unrotated=qkv.k if keys == "before" else None)


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
    parser.add_argument("folder", type=Path, help="for the backbone and the runs, which a second call finds there")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--tasks", nargs="+", default=["sprites_location", "digits"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default=HERE / "rope.csv", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    file, heads_file = args.folder / "rope.safetensors", args.folder / "heads.safetensors"
    if not heads_file.is_file():
        for module, path in zip(pretrain(args.steps, args.scenes), (file, heads_file)):
            save_file(module.state_dict(), path)
    model, (_, heads) = with_rope(), build()
    model.load_state_dict(load_file(file)), heads.load_state_dict(load_file(heads_file))
    (images, answers), rows = draw_many(2000, 10 ** 6, 1), []

    def add(place, keys, rate, measured, seed, value):
        rows.append(dict(place=place, keys=keys, rate=rate, measured=measured, seed=seed, accuracy=f"{value:.4f}"))
        print(*rows[-1].values(), flush=True)

    add("", "", "plain", "scenes", 0, share_correct(model, heads, images, answers))
    pyra.SIZES["vit_nano_rope_patch4_56"] = SIZE
    backbones.BACKBONES["vit_nano_rope_patch4_56"] = dict(weights=str(file), norm="half", lora_rank=8, batch_size=64)
    for place, keys in itertools.product(PLACES, KEYS):
        pyra.RoPE.forward = functools.partialmethod(rotate, place=place, keys=keys)
        for rate in ("low", "high"):
            pyra.add_tome(model, pyra.merge_schedule(rate, model=model))
            add(place, keys, rate, "scenes", 0, share_correct(model, heads, images, answers))
        for task in args.tasks:
            for seed in range(args.seeds):
                config = Config(task=task, backbone="vit_nano_rope_patch4_56", weights=str(file), method="tome", epochs=2, lr=8e-3, seed=seed)
                add(place, keys, "high", task, seed, run(config, args.folder / f"{place}-{keys}", progress=False).accuracy_last)
    write_rows(rows, args.out)


if __name__ == "__main__":
    main()
