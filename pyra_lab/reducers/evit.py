"""EViT: keep the patches that the class token attends to most, fuse the others into one."""

import math

import torch
import torch.nn as nn

import pyra
from pyra_lab import budget
from pyra_lab.reducers.shared import attention_received, gather_tokens, ranking_queries


class EViT(nn.Module):
    """Keeps the patches that the class token attends to most, and fuses the others into one token."""

    def __init__(self, keep_rate, specials=1, queries=1):
        super().__init__()
        self.keep_rate, self.specials, self.queries = keep_rate, specials, queries
        self.settings = dict(keep_rate=keep_rate)

    def kept(self, n):
        return math.ceil(self.keep_rate * (n - self.specials) - 1e-9)  # 1e-9: 0.55 * 100 is 55.00000000000001

    def tokens_after(self, n):
        return min(self.specials + self.kept(n) + 1, n)

    def forward(self, tokens, qkv):
        (b, n, _), p = tokens.x.shape, self.specials
        k = self.kept(n)
        if k == n - p:
            return tokens
        score = attention_received(qkv, queries=self.queries).mean(dim=1)  # (b, n)
        ranked = score[:, p:].argsort(dim=1, descending=True, stable=True) + p
        specials = torch.arange(p, device=ranked.device).expand(b, -1)
        kept, fused = gather_tokens(tokens, torch.cat([specials, ranked[:, :k]], dim=1)), ranked[:, k:]
        x = (score.gather(1, fused)[..., None] * pyra.take(tokens.x, fused)).sum(dim=1, keepdim=True)
        return kept._replace(x=torch.cat([kept.x, x.to(kept.x.dtype)], dim=1), source=torch.where(kept.source < 0, p + k, kept.source))

    def extra_repr(self):
        return f"keep_rate={self.keep_rate}"


def check_layers(model, layers):
    """The blocks in which EViT acts, a list: those given, or those at a quarter, half and three quarters. Raises ValueError."""
    depth = len(model.blocks)
    layers = sorted({depth * i // 4 for i in (1, 2, 3)}) if layers is None else pyra.to_python(layers)
    if not isinstance(layers, (list, tuple)) or not layers or not all(type(i) is int and 0 <= i < depth for i in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be a list of different blocks from 0 to {depth - 1}, not {layers!r}")
    return sorted(layers)


@pyra.on_model
def add_evit(model, keep_rate=0.7, layers=None):
    """EViT (Liang et al., ICLR 2022, arXiv 2202.07800): in each of `layers`, keeps ceil(keep_rate n) of the n patches left.

    Those are the patches with the most attention a_j from the class token, the heads' mean; the others fuse into one token,
    sum a_j x_j, not normalised, which counts as a patch from then on. layers: blocks, from 0; None: a quarter, half and
    three quarters of the way (3, 6, 9 of 12, the paper's). `evit_keep_rate` finds the keep rate for a budget. All special tokens
    are kept; a distillation token is a patch like any other in the published code. Where no class token is classified, a_j is
    the mean attention from all tokens. Returns the model. Raises ValueError.
    """
    layers, keep_rate = check_layers(model, layers), pyra.to_python(keep_rate)
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, (int, float)) or not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate must be greater than 0 and at most 1, not {keep_rate!r}")
    queries = ranking_queries(model)
    return pyra.set_reducers(model, [EViT(float(keep_rate), model.specials, queries) if i in layers else None for i in range(len(model.blocks))])


@pyra.on_model
def evit_keep_rate(model, macs, layers=None):
    """The largest keep rate, to 1e-4, with which EViT in `layers` costs at most `macs`, by pyra.count_macs.

    Late layers save little: on ViT-B the paper's 3, 6, 9 reach the "low" budget (k = 0.49), but "high" takes more layers
    and earlier ones, such as 1, 3, 5, 7, 9. Raises ValueError where no keep rate is low enough.
    """
    layers = check_layers(model, layers)

    def cost(keep_rate):
        evit, counts = EViT(keep_rate, model.specials), [model.num_patches + model.specials]
        for i in range(len(model.blocks)):
            counts.append(evit.tokens_after(counts[-1]) if i in layers else counts[-1])
        return pyra.macs_of_counts(model, counts)

    if cost(1e-4) > macs:
        raise ValueError(f"EViT in blocks {layers} costs at least {cost(1e-4):,} MACs, not {macs:,.0f}: let it act in more or earlier blocks, or ask for less")
    low, high = 1, 10_000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle / 10_000) <= macs else (low, middle - 1)
    return low / 10_000


def add(model, config, plan):
    """EViT with the operations of the config's rate, in the paper's three layers, or in five where three can't save as much."""
    macs, layers = budget.target_macs(config, model), None
    try:
        keep_rate = evit_keep_rate(model, macs)
    except ValueError:
        layers = sorted({len(model.blocks) * i // 12 for i in (1, 3, 5, 7, 9)})
        keep_rate = evit_keep_rate(model, macs, layers)
    return add_evit(model, keep_rate, layers)
