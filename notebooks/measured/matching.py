"""Why do predictions change with rounding? `python notebooks/measured/matching.py folder --data_root ... --weights ...` writes matching.csv beside it.

ToMe compares tokens anew in every block, by keys that rounding has moved: near-ties fall differently, and what follows differs. Here a ViT-Ti is
trained with four metrics. One that is fixed before the first block, and computed in float32 from numbers that bfloat16 holds, is the same to
the bit in both number types: what then still changes is what rounding does to a model without merging.
"""

import argparse
import copy
import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

import pyra
from pyra_lab import METHODS, Config, Method, fold, load_run, run
from pyra_lab.budget import schedule
from pyra_lab.images import normalize
from pyra_lab.records import write_rows
from pyra_lab.tasks import load_split

METRICS = {  # what tokens are compared by -> how it is computed
    "keys of each block": None,  # ToMe
    "keys of the first block": "first",
    "frozen keys of the first block": "frozen",  # without LoRA, in float32
    "embedding": "embedding",  # in float32
}


class Carried(NamedTuple):
    """pyra.Tokens with what they are compared by, (b, n, d); None: the keys of the block that they are in."""

    x: torch.Tensor
    size: torch.Tensor | None
    source: torch.Tensor
    metric: torch.Tensor | None


class Carrying(pyra.ToMe):
    """ToMe whose metric merges as its tokens do. first: it is this block's keys from here on. noise: relative, on the metric."""

    noise = 0.0

    def __init__(self, r, specials, first):
        super().__init__(r, specials)
        self.first = first

    def forward(self, tokens, qkv):
        n = tokens.x.shape[1]
        metric = qkv.metric() if self.first else getattr(tokens, "metric", None)
        used = qkv.metric() if metric is None else metric
        matching = pyra.match(used * (1 + self.noise * torch.randn_like(used)), n - self.tokens_after(n), self.specials)
        merged = pyra.merge(tokens, matching)
        return Carried(*merged, None if metric is None else pyra.merge(tokens._replace(x=metric), matching).x)


def in_bf16(x):
    """float32 numbers that bfloat16 holds."""
    return x.detach().to(torch.bfloat16).float()


def embed(original, metric_of, images):
    tokens = original(images)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return Carried(*tokens, metric_of and metric_of(in_bf16(images)))


def make_metric(model, kind):
    """The function of images, rounded as in_bf16 does, that gives the metric of all tokens; None where blocks give it."""
    if kind not in ("frozen", "embedding"):
        return None
    block, heads, c = model.blocks[0], model.blocks[0].attn.num_heads, model.embed_dim
    patch, first = rearrange(in_bf16(model.patch_embed.proj.weight), "c k p q -> c (k p q)"), in_bf16(model.cls_token)
    bias, places, scale, shift = (in_bf16(p) for p in (model.patch_embed.proj.bias, model.pos_embed, block.norm1.weight, block.norm1.bias))
    keys = in_bf16(reduce(block.attn.qkv.weight[c:2 * c].float(), "(h d) c -> d c", "mean", h=heads))
    of_keys = in_bf16(reduce(block.attn.qkv.bias[c:2 * c].float(), "(h d) -> d", "mean", h=heads))

    def metric_of(images):
        pixels = rearrange(images, "b k (y p) (x q) -> b (y x) (k p q)", p=model.patch_size, q=model.patch_size)
        x = torch.cat([first.expand(len(images), -1, -1), F.linear(pixels, patch, bias)], dim=1) + places
        if kind == "embedding":
            return F.layer_norm(x, (c,))
        return F.linear(F.layer_norm(x, (c,), scale, shift, block.norm1.eps), keys, of_keys)

    return metric_of


def add(kind, model, config, plan):
    model.embed = functools.partial(embed, model.embed, make_metric(model, kind))
    reducers = [Carrying(r, model.specials, kind == "first" and i == 0) if r else None for i, r in enumerate(schedule(config, model))]
    return pyra.set_reducers(model, reducers)


@torch.inference_mode()
def changed_predictions(result, images):
    """Of a run's predictions for uint8 images in float32: how many change with noise of 0.1 % on the metric, how many in bfloat16, and by how much
    the logits of the latter differ, the median."""
    model = fold(load_run(result)).eval()
    half = copy.deepcopy(model).to(torch.bfloat16)
    logits = lambda model, dtype: torch.cat([model(normalize(x, "half", dtype)).float() for x in images.split(50)])
    exact, rounded = logits(model, torch.float32), logits(half, torch.bfloat16)
    torch.manual_seed(0)
    Carrying.noise = 1e-3
    noisy = logits(model, torch.float32)
    Carrying.noise = 0.0
    count = lambda other: (other.argmax(dim=1) != exact.argmax(dim=1)).sum().item()
    return dict(images=len(images), noise=count(noisy), bf16=count(rounded), median_logit_difference=f"{(rounded - exact).abs().median().item():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the runs, which a second call finds there")
    parser.add_argument("--data_root", required=True, help="folder of the tasks")
    parser.add_argument("--weights", required=True, help="of vit_tiny_patch16_224.augreg_in21k_ft_in1k, a file or a name on the hub")
    parser.add_argument("--tasks", nargs="+", default=["cifar100", "eurosat1000", "coil20_azimuth"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", default=Path(__file__).parent / "matching.csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number, kind in enumerate(METRICS.values()):
        METHODS[f"metric{number}"] = Method("ToMe", "merges by another metric", functools.partial(add, kind))
    rows = []
    for task in args.tasks:
        for seed in range(args.seeds):
            for method, compared in [("plain", "no merging"), *((f"metric{number}", name) for number, name in enumerate(METRICS))]:
                config = Config(task=task, data_root=args.data_root, backbone="vit_tiny_patch16_224", weights=args.weights, norm="half", method=method,
                                epochs=args.epochs, warmup=max(1, args.epochs // 10), batch_size=args.batch_size, lr=args.lr, dtype="bfloat16", seed=seed)
                result = run(config, args.folder, progress=False)
                images, _ = load_split(task, "test", root=args.data_root)
                rows.append(dict(task=task, compared=compared, seed=seed, accuracy=f"{result.accuracy_last:.4f}",
                                 **changed_predictions(result, images[:400])))
                print(*rows[-1].values(), flush=True)
    write_rows(rows, args.out)


if __name__ == "__main__":
    main()
