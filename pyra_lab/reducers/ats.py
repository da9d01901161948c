"""ATS, adaptive token sampling: each image draws as many tokens as its attention is spread out."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import pyra
from pyra_lab import budget
from pyra_lab.reducers.shared import attention_received, gather_tokens, ranking_queries


class ATS(nn.Module):
    """Samples at most `count` tokens, special ones included, by the class token's attention. The image decides how many of them differ."""

    per_image = True

    def __init__(self, count, specials=1, queries=1):
        super().__init__()
        self.count, self.specials, self.queries = count, specials, queries
        self.settings = dict(count=count)

    def tokens_after(self, n):
        raise ValueError("ATS keeps as many tokens as each image needs: count them with budget.forward_counted, their cost with budget.mean_macs")

    def macs_saved(self, n, m, block):
        """A dropped token needs no row of attention's result, and no projection of it."""
        return (n - m) * (n + block.attn.proj.out_features) * block.attn.proj.in_features

    @torch.no_grad()
    def sample(self, qkv, size):
        """Which tokens stay, (b, n) bool."""
        p = self.specials
        norm = rearrange(qkv.v.float(), "b h n d -> b n (h d)").norm(dim=-1)
        score = attention_received(qkv, size, self.queries).sum(dim=1) * norm
        score, order = score[:, p:].sort(dim=1, stable=True)  # dead ones come first, with a score of 0
        cdf = score.cumsum(dim=1)
        points = (torch.arange(self.count - p, device=cdf.device) + 0.5) / (self.count - p)
        drawn = torch.searchsorted(cdf, points * cdf[:, -1:]).clamp(max=cdf.shape[1] - 1)  # (b, count - p) the first with cdf >= point
        kept = torch.zeros_like(norm, dtype=torch.bool)
        kept[:, :p] = True
        return kept.scatter(1, order.gather(1, drawn) + p, True)

    def forward(self, tokens, qkv):
        tokens = pyra.with_sizes(tokens)
        if tokens.x.shape[1] == self.specials:
            return tokens
        kept = self.sample(qkv, tokens.size)
        longest = F.pad(kept.sum(dim=1), (0, 1), value=self.specials).amax()  # of the batch, which may be empty
        order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        return gather_tokens(tokens._replace(size=tokens.size * kept[..., None]), order)

    def extra_repr(self):
        return f"count={self.count}"


@pyra.on_model
def add_ats(model, counts):
    """ATS, adaptive token sampling (Fayyaz et al., ECCV 2022, arXiv 2111.15667): tokens drawn by their significance, duplicates once.

    Significance S_j is the class token's attention to patch j times the norm of its value. Inverse transform sampling at
    K fixed points of S's cumulative distribution, (2k - 1) / 2K, k = 1..K, gives at most K different patches, fewer where
    a few carry most of the weight. counts: K with the special tokens, an int, in the last three quarters of the blocks
    (the paper's layers 3-11, K = 197); or a list with one entry per block, None where none are dropped. `ats_counts` makes one from a
    merging schedule. A batch is padded to its longest image with tokens of size 0.

    The published code takes equidistant points from the smallest positive value of the distribution on, and the nearest
    patch to each. It drops rows inside attention; after it, as here, the result is the same and a little more work is
    done than `mean_macs` counts. All special tokens are kept. Where no class token is classified, the mean attention from all
    tokens takes the place of its own. Returns the model. Raises ValueError.
    """
    depth, counts = len(model.blocks), pyra.to_python(counts)
    if isinstance(counts, int):
        counts = [None] * (depth // 4) + [counts] * (depth - depth // 4)
    if not isinstance(counts, (list, tuple)) or len(counts) != depth:
        raise ValueError(f"counts must be an integer or a list with one, or None, for each of the {depth} blocks, not {counts!r}")
    for i, count in enumerate(counts):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count <= model.specials):
            raise ValueError(f"block {i}: the count must be an integer greater than the {model.specials} special tokens, or None, not {count!r}")
    return pyra.set_reducers(model, [None if count is None else ATS(count, model.specials, ranking_queries(model)) for count in counts])


@pyra.on_model
def ats_counts(model, r):
    """add_ats's counts such that no block keeps more tokens than the merging schedule r leaves; it may keep fewer. Raises ValueError."""
    r = pyra.check_schedule(model, r)
    return [n if entry else None for entry, n in zip(r, budget.counts_of_schedule(model, r)[1:])]


@pyra.on_model
def scaled_counts(model, config, exponent):
    """ATS draws some patches more than once, so it draws 2**exponent times as many as the merging schedule would leave."""
    counts = ats_counts(model, budget.schedule(config, model))
    return [None if n is None else model.specials + max(1, round((n - model.specials) * 2**exponent)) for n in counts]


@pyra.on_model
def dial(model, config):
    """How many times more tokens are drawn than merging would leave, in all blocks alike. The plan is the counts."""

    def apply(exponent):
        counts = scaled_counts(model, config, exponent)
        add_ats(model, counts)
        return counts

    return budget.Dial(apply, 0, 4)


def plan(config, context):
    """Before training: how many tokens to sample in each block so that the pre-trained model meets its budget."""
    model = context.backbone().to(context.device)
    return budget.calibrate(dial(model, config), model, config, context.sample(), context.dtype)


def add(model, config, plan):
    return add_ats(model, plan)
