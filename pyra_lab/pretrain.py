"""Pre-trains the small ViT that this repository ships: `python -m pyra_lab.pretrain --minutes 28`.

vit_nano_patch4_56 has the paper's geometry (depth 12, 14 x 14 patches and a class token) at a width of 96, so that every schedule of the
paper applies to it as printed, and adapting it takes a minute on a CPU. It learns from scenes drawn here, whose factors are known.
Linear heads on the class token predict the largest object's shape, fill, hue, size, place and angle, the number of objects, the
background, and distance and direction of the second object; heads on each patch, which object lies there. The sprites tasks have the
same outlines, but their questions are not among these.

For most of the run the model sees a random subset of each image's patches, which costs a fraction and does no harm; at the end all.
"""

import argparse
import json
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import pyra
from pyra_lab import files
from pyra_lab.images import normalize
from pyra_lab.sprites import ORIENTED, SHAPES, hsv_to_rgb, rasterize

SIZE, PATCH = 56, 4
IGNORE = -1  # the label of a question that has no answer for an image, such as the angle of a disc
OBJECTS = 6  # at most

# Questions that the class token answers: question -> number of answers.
QUESTIONS = {
    "shape": len(SHAPES), "fill": 5, "hue": 9, "size": 5, "column": 7, "row": 7, "angle": 12, "count": OBJECTS,
    "background": 6, "second_shape": len(SHAPES), "second_distance": 5, "second_direction": 8,
}
# Questions that each patch answers about the object at its centre: shape, hue and rank (the last answer is "background"), and angle.
PATCH_QUESTIONS = {"patch_shape": len(SHAPES) + 1, "patch_hue": 9 + 1, "patch_rank": 3 + 1, "patch_angle": 12}


# ---- Scenes ----------------------------------------------------------------------------------------------------------


def draw_textures(kind, rng, size):
    """(n,) kinds -> patterns (n, size, size) float32 in [0, 1]: 0 plain, 1 ramp, 2 stripes, 3 checks, 4 dots, 5 clouds."""
    n = len(kind)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, n, 1, 1)).astype(np.float32)
    wave = 2 * np.pi / rng.uniform(4, 14, (n, 1, 1)).astype(np.float32)
    p = np.arange(size, dtype=np.float32)
    u, v = p * np.cos(angle) + p[:, None] * np.sin(angle), p[:, None] * np.cos(angle) - p * np.sin(angle)
    out = np.zeros((n, size, size), np.float32)
    for k, f in enumerate([
        lambda u, v, w, q: 0 * u,
        lambda u, v, w, q: 0.5 + (u - u.mean((1, 2), keepdims=True)) / (1.4 * size),
        lambda u, v, w, q: 0.5 + np.clip(2 * np.sin(w * u + q), -0.5, 0.5),
        lambda u, v, w, q: 0.5 + np.clip(4 * np.sin(w * u + q) * np.sin(w * v + q), -0.5, 0.5),
        lambda u, v, w, q: np.clip(3 * (np.sin(w * u + q) + np.sin(w * v + q) - 1), 0, 1),
        lambda u, v, w, q: 0.5 + (np.sin(w * u / 2 + 3 * np.sin(w * v / 3 + q)) + np.sin(w * v / 2 + 3 * np.sin(w * u / 3 - q))) / 4,
    ]):
        m = kind == k
        if m.any():
            out[m] = f(u[m], v[m], wave[m], phase[m])
    return out


def draw_scenes(n, seed):
    """n scenes -> images uint8 (n, 56, 56, 3), answers int64 {question: (n,) or (n, 196)}."""
    rng = np.random.default_rng([2024, seed])
    count = rng.integers(1, OBJECTS + 1, n)
    slot = np.arange(OBJECTS)
    shape = rng.integers(len(SHAPES), size=(n, OBJECTS))
    fill = rng.integers(QUESTIONS["fill"], size=(n, OBJECTS))
    angle = rng.uniform(0, 2 * np.pi, (n, OBJECTS))
    # The first object is the largest by a quarter at least, the second comes next. The last drawn lie on top: so they are drawn in reverse.
    largest = rng.uniform(7, 17, n)
    ratio = np.where(slot == 1, rng.uniform(0.6, 0.8, (n, 1)), rng.uniform(0.3, 0.58, (n, OBJECTS)))
    radius = largest[:, None] * np.where(slot == 0, 1, ratio)
    radius = np.maximum(radius, 2.2)
    # Of a few random places each object takes the one farthest from those already placed.
    margin = np.minimum(radius * 0.7, 10)
    x, y = np.zeros((2, n, OBJECTS))
    for i in range(OBJECTS):
        tries = margin[:, i, None, None] + rng.random((n, 8, 2)) * (SIZE - 2 * margin[:, i, None, None])
        if i:
            distance = np.hypot(tries[:, :, 0, None] - x[:, None, :i], tries[:, :, 1, None] - y[:, None, :i])
            gap = distance - radius[:, None, :i] - radius[:, i, None, None]
            best = np.minimum(gap.min(-1), 1).argmax(1)  # the first that is free, so places stay random
        else:
            best = np.zeros(n, int)
        x[:, i], y[:, i] = tries[np.arange(n), best].T

    # Bright objects on a dark ground, or dark ones on a bright ground; an object's hue is one of 8, or grey.
    ground = rng.integers(QUESTIONS["background"], size=n)
    plain = rng.random(n) < 0.6  # outlines are learned from simple scenes first
    ground[plain], fill[plain] = ground[plain] % 2, 0
    dark = rng.random((n, 1)) < 0.5
    hues, saturations = rng.random((n, 2)), rng.uniform(0, 1, (n, 2))
    ends = hsv_to_rgb(hues, saturations, np.where(dark, rng.uniform(0, 0.42, (n, 2)), rng.uniform(0.58, 1, (n, 2))))
    ends = np.where(dark[..., None], ends, 0.55 + 0.45 * ends).astype(np.float32)
    hue_bin = rng.integers(9, size=(n, OBJECTS))
    hue = (hue_bin + rng.uniform(-0.35, 0.35, (n, OBJECTS))) / 8
    value = np.where(dark, rng.uniform(0.7, 1, (n, OBJECTS)), rng.uniform(0.15, 0.4, (n, OBJECTS)))
    saturation = np.where(hue_bin == 8, 0, rng.uniform(0.5, 1, (n, OBJECTS)))
    first = hsv_to_rgb(hue % 1, saturation, value).astype(np.float32)
    second = first + np.where(dark, 1, -1)[..., None] * -0.45 * first  # fills alternate between a colour and a darker one

    blend = draw_textures(ground, rng, SIZE)[..., None]
    canvas = (ends[:, 0, None, None] + (ends[:, 1] - ends[:, 0])[:, None, None] * blend).astype(np.float32)
    centres = slice(PATCH // 2, None, PATCH)
    patch_shape = np.full((n, SIZE // PATCH, SIZE // PATCH), len(SHAPES))
    patch_hue, patch_rank, patch_angle = (np.full_like(patch_shape, v) for v in (9, 3, IGNORE))
    turn = lambda a, bins: np.floor((a / (2 * np.pi) * bins + 0.5) % bins).astype(int)
    answer_angle = np.where(np.isin(shape, ORIENTED), turn(angle, 12), IGNORE)
    for i in reversed(range(OBJECTS)):
        m = np.flatnonzero(count > i)
        if not len(m):
            continue
        alpha = rasterize(shape[m, i], x[m, i], y[m, i], radius[m, i], angle[m, i], SIZE)
        blend = draw_textures(fill[m, i], rng, SIZE)[..., None]
        paint = first[m, i, None, None] + (second[m, i] - first[m, i])[:, None, None] * blend
        canvas[m] += alpha[..., None] * (paint - canvas[m])
        there = alpha[:, centres, centres] > 0.5
        patch_shape[m] = np.where(there, shape[m, i, None, None], patch_shape[m])
        patch_hue[m] = np.where(there, hue_bin[m, i, None, None], patch_hue[m])
        patch_rank[m] = np.where(there, min(i, 2), patch_rank[m])
        patch_angle[m] = np.where(there, answer_angle[m, i, None, None], patch_angle[m])
    noise = rng.normal(0, 1, canvas.shape).astype(np.float32)
    canvas += noise * np.where(plain, 0.015, rng.uniform(0, 0.06, n))[:, None, None, None].astype(np.float32)

    dx, dy = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
    two = count > 1
    answers = dict(
        shape=shape[:, 0], fill=fill[:, 0], hue=hue_bin[:, 0], size=np.minimum((largest - 7) // 2, 4),
        column=np.minimum(x[:, 0] // 8, 6), row=np.minimum(y[:, 0] // 8, 6),
        angle=answer_angle[:, 0], count=count - 1, background=ground,
        second_shape=np.where(two, shape[:, 1], IGNORE),
        second_distance=np.where(two, np.digitize(np.hypot(dx, dy), [14, 20, 26, 32]), IGNORE),
        second_direction=np.where(two, turn(np.arctan2(dy, dx), 8), IGNORE),
        patch_shape=patch_shape.reshape(n, -1), patch_hue=patch_hue.reshape(n, -1),
        patch_rank=patch_rank.reshape(n, -1), patch_angle=patch_angle.reshape(n, -1))
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), {k: v.astype(np.int8) for k, v in answers.items()}


def draw_many(n, seed, workers):
    """draw_scenes in parallel -> uint8 tensor (n, 3, 56, 56), {question: int8 tensor}."""
    chunk = 500
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(draw_scenes, [chunk] * math.ceil(n / chunk), range(seed, seed + math.ceil(n / chunk))))
    images = torch.from_numpy(np.concatenate([p[0] for p in parts])).permute(0, 3, 1, 2).contiguous()
    return images, {k: torch.from_numpy(np.concatenate([p[1][k] for p in parts])) for k in parts[0][1]}


# ---- Training --------------------------------------------------------------------------------------------------------


def build():
    """The backbone, and one linear head for all the class token's questions, one for the patches'."""
    model = pyra.VisionTransformer(img_size=SIZE, patch_size=PATCH, embed_dim=96, depth=12, num_heads=3, num_classes=0)
    # A training this short depends on the initialisation. Sines tell places apart. Queries that resemble keys, and a projection that
    # subtracts part of the value, are what trained ViTs end up with (Trockman & Kolter, 2023): a token attends to similar and near ones.
    for block in model.blocks:
        key, value = torch.randn(96, 96) / 96 ** 0.5, nn.init.orthogonal_(torch.empty(96, 96))
        noise = lambda: torch.randn(96, 96) * 0.3 / 96 ** 0.5
        block.attn.qkv.weight.data = torch.cat([0.8 * key + noise(), 0.8 * key + noise(), 0.6 * value + noise()])
        block.attn.proj.weight.data = -0.6 * value.T + noise()
        for layer in (block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
    nn.init.normal_(model.patch_embed.proj.weight, std=(3 * PATCH ** 2) ** -0.5)
    place = torch.arange(SIZE // PATCH) / (SIZE // PATCH)
    waves = torch.pi * place[:, None] * 2 ** torch.linspace(0, 3.5, 24)  # (14, 24)
    waves = torch.cat([waves.sin(), waves.cos()], 1)
    grid = torch.cat([waves[:, None].expand(-1, 14, -1), waves[None].expand(14, -1, -1)], -1).reshape(1, 196, 96)
    model.pos_embed.data[:, 1:] = 0.7 * grid
    heads = nn.ModuleDict({"image": nn.Linear(96, sum(QUESTIONS.values())), "patch": nn.Linear(96, sum(PATCH_QUESTIONS.values()))})
    return model, heads


def forward(model, heads, images, keep=None):
    """images (b, 3, 56, 56) float; keep (b, k) indices of the patches shown, None: all -> logits (b, .), (b, k, .)."""
    x = model.patch_embed.proj(images).flatten(2).mT + model.pos_embed[:, 1:]
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        x = x + block.attn(block.attn.project(block.norm1(x)))
        x = x + block.mlp(block.norm2(x))
    x = model.norm(x)
    return heads["image"](x[:, 0]), heads["patch"](x[:, 1:])


def choose_patches(patch_shape, k):
    """Random k of the patches (b, k), those on or beside an object more likely: most of a scene is background."""
    on = (patch_shape < len(SHAPES)).float().view(-1, 1, 14, 14)
    near = F.max_pool2d(on, 3, 1, 1).flatten(1)
    return (torch.rand_like(near) + 0.6 * near).topk(k, 1).indices


def compute_loss(logits, answers, questions):
    parts = logits.float().split(list(questions.values()), -1)
    targets = [answers[name].flatten().long() for name in questions]
    return sum(F.cross_entropy(part.flatten(0, -2), target, ignore_index=IGNORE) for part, target in zip(parts, targets)) / len(parts)


@torch.no_grad()
def measure_accuracy(model, heads, images, answers, device):
    """Share of correct answers, all patches shown: {question: float}."""
    right = {}
    for i in range(0, len(images), 100):
        with torch.autocast(device, torch.bfloat16):
            outputs = forward(model, heads, normalize(images[i:i + 100].to(device), "half"))
        for logits, questions in zip(outputs, (QUESTIONS, PATCH_QUESTIONS)):
            for (name, _), part in zip(questions.items(), logits.split(list(questions.values()), -1)):
                target = answers[name][i:i + 100].to(device)
                right.setdefault(name, []).append((part.argmax(-1) == target)[target != IGNORE].flatten().float())
    return {name: round(torch.cat(r).mean().item(), 4) for name, r in right.items()}


def save(model, path, **metadata):
    """Writes the backbone as float16, atomically."""
    state = {name: p.detach().half().contiguous().cpu() for name, p in model.state_dict().items()}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    metadata = {"model": "vit_nano_patch4_56", "norm": "half", **texts}
    files.write_atomically(path, lambda partial: save_file(state, partial, metadata))


def train(rank, args, images, answers):
    """One worker: its own batches, gradients averaged over all workers before each step."""
    device, start = args.device, time.time()
    if args.workers > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{args.meet}", rank=rank, world_size=args.workers)
        torch.set_num_threads(1)  # on a few cores, workers of one thread beat threads that wait for each other
    torch.manual_seed(args.seed)
    model, heads = (m.to(device) for m in build())
    torch.manual_seed(args.seed * 1000 + rank)
    held_images, held = draw_many(2000, 10 ** 6, 1) if rank == 0 else (None, None)
    params = [p for m in (model, heads) for p in m.parameters()]
    flat = [{"params": [p for p in params if p.ndim > 1 and p is not model.pos_embed], "weight_decay": 0.05},
            {"params": [p for p in params if p.ndim < 2 or p is model.pos_embed], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(flat, lr=args.lr, betas=(0.9, 0.98), fused=True)
    step, seen, progress, printed, saved, average = 0, 0, 0.0, start, start, None
    while progress < 1:
        patches = 49 if progress < 0.65 else 98 if progress < 0.85 else None
        index = torch.randint(len(images), (args.batch // args.workers,))
        batch = {name: a[index].to(device) for name, a in answers.items()}
        keep = None if patches is None else choose_patches(batch["patch_shape"], patches)
        if keep is not None:
            for name in PATCH_QUESTIONS:
                batch[name] = batch[name].gather(1, keep)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (progress + 1e-4) / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.autocast(device, torch.bfloat16):
            image_logits, patch_logits = forward(model, heads, normalize(images[index].to(device), "half"), keep)
        image_loss, patch_loss = compute_loss(image_logits, batch, QUESTIONS), compute_loss(patch_logits, batch, PATCH_QUESTIONS)
        optimizer.zero_grad()
        (image_loss + patch_loss).backward()
        step, seen = step + 1, seen + args.batch
        progress = step / args.steps if args.steps else (time.time() - start) / (60 * args.minutes)
        if args.workers > 1:  # one message: the gradients, and how far each worker's clock says it is
            message = torch.cat([p.grad.flatten() for p in params] + [torch.tensor([progress])])
            torch.distributed.all_reduce(message)
            message /= args.workers
            progress = message[-1].item()
            for p, g in zip(params, message[:-1].split([p.numel() for p in params])):
                p.grad.copy_(g.view_as(p))
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if rank == 0:
            losses = torch.tensor([image_loss.item(), patch_loss.item()])
            average = losses if average is None else 0.98 * average + 0.02 * losses
            if time.time() - printed > 20:
                printed = time.time()
                rate = seen / (printed - start)
                losses = f"{average[0]:.3f} {average[1]:.3f}"
                print(f"{(printed - start) / 60:5.1f} min  step {step}  {rate:.0f} images/s  loss {losses}", flush=True)
            if time.time() - saved > 240:
                saved = time.time()
                print(measure_accuracy(model, heads, held_images[:500], held, device), flush=True)
                save(model, f"{args.out}.unfinished", progress=round(progress, 3))
    if rank == 0:
        minutes, found = (time.time() - start) / 60, measure_accuracy(model, heads, held_images, held, device)
        recipe = (f"pyra_lab.pretrain: {seen} drawn scenes of {len(images)}, {step} steps of {args.batch}, lr {args.lr}, "
                  f"{minutes:.1f} minutes with {args.workers} worker(s) on {device}")
        common = {name: round((a[a != IGNORE].long().bincount().max() / (a != IGNORE).sum()).item(), 4) for name, a in held.items()}
        save(model, args.out, recipe=recipe, accuracy=found, commonest_answer=common)
        print(recipe)
        for name, value in found.items():
            print(f"{name:18s} {100 * value:5.1f} %   most common answer {100 * common[name]:5.1f} %")
        print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB", flush=True)
    if args.workers > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main():
    out = files.home() / "data" / "vit_nano_patch4_56.safetensors"
    parser = argparse.ArgumentParser(
        "python -m pyra_lab.pretrain", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(out), help="where the backbone is written")
    parser.add_argument("--minutes", type=float, default=28, help="length of the training, unless --steps is given")
    parser.add_argument("--steps", type=int, default=0, help="length of the training in steps; 0: as long as --minutes says")
    parser.add_argument("--scenes", type=int, default=80000, help="scenes drawn before training")
    parser.add_argument("--batch", type=int, default=64, help="scenes per step, over all workers")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=2, help="processes that train together; 1 on a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device != "cpu":
        args.workers = 1
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    images, answers = draw_many(args.scenes, 0, max(args.workers, 2))
    print(f"drew {len(images)} scenes in {time.time() - start:.0f} s", flush=True)
    if args.workers == 1:
        return train(0, args, images, answers)
    for tensor in (images, *answers.values()):
        tensor.share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        args.meet = f"{folder}/meet"
        torch.multiprocessing.spawn(train, (args, images, answers), nprocs=args.workers)


if __name__ == "__main__":
    main()
