"""What else gives accuracy back? `python notebooks/measured/candidates.py folder --data_root ... --weights ...` writes candidates.csv beside it.

Each candidate alone, on PYRA at the high rate: trained on train800 and judged on val200, then the promising ones on test images, over three seeds.
"""

import argparse
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import pyra
from pyra_lab import METHODS, Config, Method, budget, epochs, evaluation, run
from pyra_lab.records import write_rows

# ---- What is changed in a block --------------------------------------------------------------------------------------


class Noisy(pyra.PYRA):
    """In training, tokens are compared by keys with noise of 10 %: near-ties fall differently in every step."""

    def match(self, qkv):
        metric = qkv.metric()
        if self.training:
            metric = metric * (1 + 0.1 * torch.randn_like(metric))
        n = metric.shape[1]
        return pyra.match(metric, n - self.tokens_after(n), self.specials)


class AllHeads(pyra.PYRA):
    """Tokens are compared by the keys of all heads, instead of by their mean."""

    def match(self, qkv):
        n = qkv.k.shape[2]
        return pyra.match(rearrange(qkv.k, "b h n d -> b n (h d)"), n - self.tokens_after(n), self.specials)


class ByValues(pyra.PYRA):
    """Tokens are compared by key and value, the heads' means, each of length 1."""

    def match(self, qkv):
        n, unit = qkv.k.shape[2], partial(F.normalize, dim=-1)
        return pyra.match(torch.cat([unit(qkv.k.mean(dim=1)), unit(qkv.v.mean(dim=1))], dim=-1), n - self.tokens_after(n), self.specials)


class BothEnds(pyra.PYRA):
    """Destinations are modulated too, by generators of their own."""

    def __init__(self, r, dim, s, specials, lr):
        super().__init__(r, dim, s, specials)
        self.w_r_dst = nn.Parameter(torch.empty(r, s).uniform_(-1, 1) / math.sqrt(s))
        self.w_d_dst = nn.Parameter(torch.zeros(s, dim))
        self.lrs = {"w_r_dst": lr, "w_d_dst": lr}

    def modulate(self, src, dst):
        change = pyra.modulate(dst, src, pyra.widen(self.w_r_dst), pyra.widen(self.w_d_dst)) - dst
        return super().modulate(src, dst) + change  # which is added to the destination


def add(reducer, model, config, plan):
    own = {"lr": config.modulation_lr} if reducer is BothEnds else {}
    return pyra.set_reducers(model, [reducer(r, model.embed_dim, config.s, model.specials, **own) if r else None for r in budget.schedule(config, model)])


# ---- What is changed in training -------------------------------------------------------------------------------------


def consistent(loss_of, x, y, teacher):
    """Two forward passes, which differ in drop path, dropout and the noise on their metrics, and how much their answers differ."""
    (loss, logits, y), (other_loss, other, _) = loss_of(x, y, teacher), loss_of(x, y, teacher)
    p, q = logits.float().log_softmax(dim=-1), other.float().log_softmax(dim=-1)
    kl = partial(F.kl_div, reduction="batchmean", log_target=True)
    return (loss + other_loss) / 2 + (kl(p, q) + kl(q, p)) / 2, logits, y


def make_loss(original, model, config, num_classes):
    loss_of = original(model, config, num_classes)
    return partial(consistent, loss_of) if config.method == "consistent" else loss_of


# ---- The candidates --------------------------------------------------------------------------------------------------

CHANGED = {  # in the table -> the method
    "PYRA": "pyra",
    "noise of 10 % on the metric, in training": "noisy",
    "the same, and two views of an image that are to agree": "consistent",
    "compared by the keys of all heads": "all_heads",
    "compared by keys and values": "by_values",
    "destinations modulated too": "both_ends",
}
PROMISING = ("pyra", "all_heads", "by_values")  # by val200: these are tried on test images


def add_rows():
    """Adds the candidates to METHODS, and to training what is changed there."""
    pyra_uses = METHODS["pyra"].uses
    for name, reducer in dict(noisy=Noisy, consistent=Noisy, all_heads=AllHeads, by_values=ByValues, both_ends=BothEnds).items():
        METHODS[name] = Method(name, reducer.__doc__, partial(add, reducer), pyra_uses)
    epochs.make_loss = partial(make_loss, epochs.make_loss)
    evaluation.METRICS["hits"] = lambda logits, labels: (logits.argmax(dim=1) == labels).int().tolist()


def config_of(method, task, seed, eval_split, data_root, weights):
    """15 epochs on train800 to select on val200, or compare_reducers' 3 on all images to test."""
    recipe = (dict(epochs=15, batch_size=32, lr=2e-3, train_split="train800", eval_split="val200") if eval_split == "val200" else
              dict(epochs=3, batch_size=16, lr=3e-3))
    return Config(task=task, seed=seed, method=method, data_root=data_root, backbone="vit_tiny_patch16_224", weights=weights, norm="half", warmup=1,
                  modulation_lr=1e-4, **recipe)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the runs, which a second call finds there")
    parser.add_argument("--data_root", required=True, help="folder of the tasks")
    parser.add_argument("--weights", required=True, help="of vit_tiny_patch16_224.augreg_in21k_ft_in1k, a file or a name on the hub")
    parser.add_argument("--tasks", nargs="+", default=["cifar100"])
    parser.add_argument("--out", default=Path(__file__).with_suffix(".csv"), type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    add_rows()
    rows = []
    names = {method: changed for changed, method in CHANGED.items()}
    for eval_split, method, task, seed in [*itertools.product(["val200"], names, args.tasks, [0]),
                                           *itertools.product(["test"], PROMISING, args.tasks, range(3))]:
        result = run(config_of(method, task, seed, eval_split, args.data_root, args.weights), args.folder, progress=False)
        hits = np.array(result.metrics["hits"], dtype=bool)
        rows.append(dict(changed=names[method], eval_split=eval_split, task=task, seed=seed, accuracy=f"{result.accuracy_last:.4f}", macs=result.macs,
                         images=len(hits), hits=np.packbits(hits).tobytes().hex()))
        print(*list(rows[-1].values())[:5], flush=True)
    write_rows(rows, args.out)


if __name__ == "__main__":
    main()
