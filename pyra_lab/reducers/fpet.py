"""FPET: few merges, each of half of the patches at once, by keys that are refined for it."""

import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import pyra
from pyra_lab import budget
from pyra_lab.reducers.shared import merge_learned


class FPET(nn.Module):
    """Merges r of every other patch into the most similar one of the others; the keys that it compares are refined by two trained matrices."""

    modulate = None  # as in pyra.ToMe

    def __init__(self, r, head_dim, grid, specials=1):
        super().__init__()
        self.r, self.grid, self.specials = r, grid, specials
        self.w_down = nn.Parameter(torch.empty(head_dim, head_dim // 2).uniform_(-1, 1) / math.sqrt(head_dim))
        self.w_up = nn.Parameter(torch.zeros(head_dim // 2, head_dim))  # zeros: training starts with the keys as they are

    def tokens_after(self, n):
        return n - min(self.r, half_of(n, self.specials))

    def refine(self, key):
        """key (b, n, d), without gradient -> key + dropout(relu(key W_down)) W_up, float32."""
        with torch.autocast(key.device.type, enabled=False):
            key = key.detach().float()
            return key + F.dropout((key @ self.w_down.float()).relu(), 0.1, self.training) @ self.w_up.float()

    def match(self, metric):
        """The Matching of the even patches with the odd ones: squares of a chessboard while the grid is whole, every other patch after that."""
        (b, n, _), p, (height, width) = metric.shape, self.specials, self.grid
        patch, r = torch.arange(n - p, device=metric.device), n - self.tokens_after(n)
        colour = (patch // width + patch % width) % 2 if n - p == height * width else patch % 2
        even, odd = (p + colour.argsort(stable=True)).tensor_split([half_of(n, p)])
        with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
            unit = F.normalize(metric.float(), dim=-1)
            best, partner = (unit[:, even] @ unit[:, odd].mT).max(dim=-1)
            ranked = best.argsort(dim=-1, descending=True, stable=True)
        src, unmerged = ranked[:, :r], ranked[:, r:].sort(dim=-1).values
        front, odd = torch.arange(p, device=metric.device).expand(b, -1), odd.expand(b, -1)
        return pyra.Matching(torch.cat([front, even[unmerged], odd, even[src]], dim=1), partner.gather(1, src) + p + unmerged.shape[1])

    def forward(self, tokens, qkv):
        n = tokens.x.shape[1]
        if self.tokens_after(n) == n:
            return tokens
        metric = self.refine(qkv.metric())
        matching = self.match(metric)
        place = torch.arange(self.tokens_after(n), device=metric.device)
        return merge_learned(tokens, metric, matching, (place >= len(place) - (n - self.specials) // 2).expand(len(metric), -1), self.modulate)  # the odd ones

    def extra_repr(self):
        return f"r={self.r}"


def half_of(n, specials):
    """How many of n tokens FPET merges at once: half of the patches, rounded up, where there are two or more."""
    return (n - specials + 1) // 2 if n - specials > 1 else 0


@pyra.on_model
def fpet_schedule(model, macs):
    """Where FPET merges, and how many patches, with at most `macs` operations (a patch more or less): a list with one int per block.

    As few merges as reach it, each of half of the patches and as late as possible, the first before all; then the last one is made smaller
    until the operations are met. The first block, whose keys know little but their own patch, merges only where it must. The paper merges
    once, in block 6 of 12: three quarters of the operations. Raises ValueError.
    """
    depth = len(model.blocks)

    def halved(blocks):
        r, n = [0] * depth, model.num_patches + model.specials
        for i in blocks:
            r[i] = half_of(n, model.specials)
            n -= r[i]
        return r

    cost = lambda r: pyra.macs_of_counts(model, list(itertools.accumulate(r, int.__sub__, initial=model.num_patches + model.specials)))
    for first, merges in itertools.product((1, 0), range(1, 5)):  # four merges leave a sixteenth of the patches
        found = [blocks for blocks in itertools.combinations(range(first, depth), merges) if cost(halved(blocks)) <= macs]
        if found:
            last, r = max(found)[-1], halved(max(found))
            sizes = [[*r[:last], entry, *r[last + 1:]] for entry in range(r[last] + 1)]
            return min(sizes, key=lambda r: abs(cost(r) - macs))
    raise ValueError(f"FPET costs at least {cost(halved(range(min(depth, 4)))):,} MACs, not {macs:,.0f}: ask for less")


@pyra.on_model
def add_fpet(model, r=None):
    """FPET (Kim et al., CVPR 2025, arXiv 2503.20282): one dense merge, learned, between attention and MLP.

    In a block, the patches on the white squares of a chessboard each choose the most similar one on the black squares, by cosines of the mean key
    K' = K + relu(K W_down) W_up, and all merge, weighted by size. W learns straight through the choice, see `merge_learned`; no gradient
    reaches the keys. W is held in float32, where the authors hold it in one bit. r: patches to merge, a list with one entry per block; None: half of
    them in the middle, block 6 of 12, as in the paper. Beyond the paper, there may be several merges, after the first of which every other patch
    chooses among the others; and one of fewer than half, of which those with the most similar partner merge. Returns the model. Raises ValueError.
    """
    depth, widths = len(model.blocks), [block.attn.proj.in_features // block.attn.num_heads for block in model.blocks]
    r = [half_of(model.num_patches, 0) if i == depth // 2 else 0 for i in range(depth)] if r is None else pyra.check_schedule(model, r)
    return pyra.set_reducers(model, [FPET(entry, width, model.grid, model.specials) if entry else None for entry, width in zip(r, widths)])


def add(model, config, plan):
    """FPET with the operations of the config's rate."""
    return add_fpet(model, fpet_schedule(model, budget.target_macs(config, model)))
