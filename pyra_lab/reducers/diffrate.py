"""DiffRate, differentiable compression rate: learn how many patches each block prunes and merges, then cut."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import pyra
from pyra_lab import budget
from pyra_lab.budget import alive_mask
from pyra_lab.reducers.shared import (attend_with_gradient, attention_received, gather_tokens, ranking_queries, size_with_gradient,
                                      straight_through)


def sort_by_attention(tokens, qkv, specials, queries):
    """The tokens sorted by the attention that they receive; special ones first, dead ones last."""
    tokens = pyra.with_sizes(tokens)
    with torch.no_grad():
        score = attention_received(qkv, tokens.size, queries).mean(dim=1).masked_fill(tokens.size[..., 0] == 0, -1)
        score[:, :specials] = math.inf
    return gather_tokens(tokens, score.argsort(dim=1, descending=True, stable=True))


def merge_by_similarity(tokens, src, dst):
    """Averages tokens of src into the most similar one of dst, both (b, n) bool; no token is removed or moved.

    Similarity is the cosine of the tokens themselves. The mean of a group counts each token as one; a source adds its
    size times its similarity to the size. Returns the Tokens, whose size has no gradient.
    """
    x, size, source = tokens
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.float(), dim=-1)
        best, partner = (unit @ unit.mT).masked_fill(~dst[:, None], -math.inf).max(dim=-1)
    gone = src[..., None].float()
    count = pyra.add_at(torch.ones_like(gone), partner, gone)
    x = pyra.widen(x)
    x = pyra.add_at(x, partner, x * gone.to(x.dtype)) / count.to(x.dtype)
    size = pyra.add_at(size.detach(), partner, size.detach() * gone * best[..., None].clamp(min=0))
    here = torch.arange(x.shape[1], device=x.device)
    return pyra.Tokens(x.to(tokens.x.dtype), size, pyra.follow(source, torch.where(src, partner, here)))


class FrozenDiffRate(nn.Module):
    """Keeps the `prune` patches with the most attention from the class token, then merges the last of them until `merge` are left."""

    def __init__(self, prune, merge, specials=1, queries=1):
        super().__init__()
        self.prune, self.merge, self.specials, self.queries = prune, merge, specials, queries
        self.settings = dict(prune=prune, merge=merge)

    def tokens_after(self, n):
        return min(n, self.specials + self.prune, self.specials + self.merge)

    def forward(self, tokens, qkv):
        n, p = tokens.x.shape[1], self.specials
        if self.tokens_after(n) == n:
            return tokens
        tokens = sort_by_attention(tokens, qkv, p, self.queries)
        first = torch.arange(min(n, p + self.prune), device=tokens.x.device).expand(len(tokens.x), -1)
        tokens = gather_tokens(tokens, first)
        tokens = merge_by_similarity(tokens, first >= p + self.merge, (first >= p) & (first < p + self.merge))
        return gather_tokens(tokens, first[:, :p + self.merge])

    def extra_repr(self):
        return f"prune={self.prune}, merge={self.merge}"


class DiffRate(nn.Module):
    """FrozenDiffRate whose numbers are trained: each is the expectation of `candidates` under the softmax of its logits."""

    lrs = {"prune_logits": 1e-2, "merge_logits": 1e-2}
    # The paper's weight is 5 for MACs in units of 1e9: as a ratio 7.5 on DeiT-Ti, whose blocks have 1.22 of those, but 1,500 on
    # ViT-B, where nothing but the budget moves the logits, those of all blocks alike, until it is met. Thousands of steps afterwards
    # tell the blocks apart; a short search has none left, so DeiT-Ti's weight is taken for all sizes.
    budget_weight = 5 * 1.22**2

    def __init__(self, candidates, granularity, specials=1, queries=1):
        super().__init__()
        self.specials, self.queries, self.settings = specials, queries, dict(granularity=granularity)
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32), persistent=False)
        self.prune_logits = nn.Parameter(torch.zeros(len(candidates)))
        self.merge_logits = nn.Parameter(torch.zeros(len(candidates)))

    def patches(self, logits):
        """How many patches stay: the expectation, rounded up, straight through. A scalar."""
        mean = (logits.softmax(dim=0) * self.candidates).sum()  # no product of matrices: autocast would round the number of tokens
        return straight_through((mean.detach() - 1e-3).ceil(), mean)  # 1e-3: a mean of 100 may be a little more in floating point

    def rates(self):
        """(prune, merge) as ints."""
        return int(self.patches(self.prune_logits)), int(self.patches(self.merge_logits))

    def frozen(self):
        return FrozenDiffRate(*self.rates(), self.specials, self.queries)

    def tokens_after(self, n):
        return self.frozen().tokens_after(n)

    def tokens_expected(self, n):
        """How many of n tokens (b,) stay. The gradient goes to both numbers, though one alone is the lesser, and not to n."""
        prune, merge = (self.specials + self.patches(logits) for logits in (self.prune_logits, self.merge_logits))
        least = torch.minimum(n, torch.minimum(prune, merge)).detach()
        return straight_through(least, prune + merge)

    def mask(self, logits, place, alive):
        """(b, n, 1) 0 for the living patches beyond the number that stay, of those at place (n,) 1, 2, ..., else 1.

        Its gradient is the probability of a candidate of at least `place`. Dead tokens get 1, so that this mask doesn't block
        the gradient of the one that removed them. Where all living tokens are kept, the mask is constant.
        """
        stay, living = self.patches(logits), alive.detach() > 0
        soft = (logits.softmax(dim=0)[:, None] * (self.candidates[:, None] >= place)).sum(dim=0)
        mask = straight_through(((place <= stay)[:, None] | ~living).float(), soft[:, None])
        return torch.where(stay < living.sum(dim=1, keepdim=True) - self.specials, mask, 1)

    def forward(self, tokens, qkv):
        if not self.training:
            return self.frozen()(tokens, qkv)
        tokens = sort_by_attention(tokens, qkv, self.specials, self.queries)
        place = torch.arange(tokens.x.shape[1], device=tokens.x.device) - self.specials + 1  # of a patch 1, 2, ..., of a special token 0 or less
        alive = alive_mask(tokens.size)
        alive = alive * self.mask(self.prune_logits, place, alive)
        here, keep = alive.detach()[..., 0] > 0, self.mask(self.merge_logits, place, alive)
        best = keep.detach()[..., 0] > 0
        x, size, source = merge_by_similarity(tokens, here & ~best, here & best & (place > 0))
        return pyra.Tokens(x, size_with_gradient(size, alive * keep), torch.where(here.gather(1, source.clamp(min=0)), source, -1))


@pyra.on_model
def add_diffrate(model, granularity=4):
    """DiffRate, differentiable compression rate (Chen et al., ICCV 2023, arXiv 2305.17997): learns how many patches each block prunes and merges.

    A block ranks the patches by the class token's attention, keeps the best and merges the last of those into the most
    similar of the others. Both numbers are expectations over the candidates T, T - granularity, ... of T patches, under the
    softmax of trained logits; the first block has but one candidate, all patches, and without a class token to classify so
    has the last (there the patches are ranked by the mean attention from all tokens). In training nothing is removed: dead
    tokens have size 0 (see `attend_with_gradient`), and the probability that a place is kept gives the logits their
    gradient. In evaluation the tokens are cut. Train with the logits and counts of `budget.forward_counted` and
    `budget.budget_loss`; then `freeze_diffrate`.

    A merged token's size grows by the sources' similarity, which the published code lets be negative, so that in
    evaluation a size could be; here it is at least 0. Special tokens are always kept. Returns the model. Raises ValueError.
    """
    granularity = pyra.to_python(granularity)
    if isinstance(granularity, bool) or not isinstance(granularity, int) or not 1 <= granularity <= model.num_patches:
        raise ValueError(f"granularity must be an integer from 1 to {model.num_patches}, not {granularity!r}")
    reducers = []
    for i in range(len(model.blocks)):
        whole = i == 0 or i == len(model.blocks) - 1 and model.global_pool != "token"
        candidates = [model.num_patches] if whole else list(range(model.num_patches, 0, -granularity))
        reducers.append(DiffRate(candidates, granularity, model.specials, ranking_queries(model)))
    return pyra.set_reducers(model, reducers, attend=attend_with_gradient)


@pyra.on_model
def diffrate_rates(model):
    """The numbers of patches that DiffRate keeps, a list with one (prune, merge) per block. Raises ValueError."""
    if not all(isinstance(block.reducer, (DiffRate, FrozenDiffRate)) for block in model.blocks):
        raise ValueError("the model has no DiffRate: add_diffrate adds it")
    return [block.reducer.rates() if isinstance(block.reducer, DiffRate) else (block.reducer.prune, block.reducer.merge) for block in model.blocks]


@pyra.on_model
def freeze_diffrate(model, rates=None):
    """Replaces DiffRate's logits by the numbers that they came to: from now on tokens are cut in training too. Returns the model.

    rates: `diffrate_rates` of another model instead, for example to load its adapter. The optimizer's groups change: the
    logits are gone. Raises ValueError.
    """
    learned = diffrate_rates(model)
    rates = learned if rates is None else pyra.to_python(rates)
    if len(rates) != len(learned) or not all(len(pair) == 2 and all(type(k) is int and 1 <= k <= model.num_patches for k in pair) for pair in rates):
        raise ValueError(f"rates must be one (prune, merge) for each of the {len(learned)} blocks, integers from 1 to {model.num_patches}, not {rates!r}")
    return pyra.set_reducers(model, [FrozenDiffRate(*pair, model.specials, ranking_queries(model)) for pair in rates])


@pyra.on_model
def dial(model, config):
    """How far the logits lean towards keeping all patches, in all blocks alike. The plan is the rates."""
    logits = [(p, p.clone(), block.reducer.candidates / model.num_patches) for block in model.blocks for p in block.reducer.parameters()]

    def apply(x):
        for p, learned, share in logits:
            p.copy_(learned + x * share)
        return [list(pair) for pair in diffrate_rates(model)]

    return budget.Dial(apply, -40, 40)


def plan(config, context):
    """Before training: a search of a tenth of the epochs, with the PEFT, which learns how many patches each block keeps."""
    model, epochs = add_diffrate(context.adapted()), max(1, config.epochs // 10)
    for block in model.blocks:  # the paper's rate supposes thousands of steps; in fewer steps the logits have to come as far
        block.reducer.lrs = {name: lr * max(1, 300 / (context.steps * epochs)) for name, lr in DiffRate.lrs.items()}
    context.train(model, epochs)
    return budget.calibrate(dial(model, config), model, config, context.sample(), context.dtype)


def add(model, config, plan):
    return freeze_diffrate(add_diffrate(model), plan)
