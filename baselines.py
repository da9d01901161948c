"""What PYRA is compared with: other token reducers, PEFT modules other than LoRA, channel pruning, distillation.

    add_evit(model, 0.7) | add_tofu(model, r) | add_ats(model, 197) | add_ltmp(model) | add_diffrate(model)     # instead of pyra.add_pyra
    add_adapter(model) | add_convpass(model) | add_fact(model) | add_snf(model)     # instead of pyra.add_lora
    prune_channels(model, search_pruning(model, flops_ratio=3.4, score=...))        # then pyra.add_lora, or one of these
    loss = distillation_loss(student(images), teacher(images), labels)

A token reducer here goes with LoRA and with every PEFT here; ATS, LTMP and DiffRate keep, or learn to keep, as many tokens
as they like, and `forward_counted` gives those counts beside the logits.

A PEFT here is added like LoRA, to a plain, ToMe or PYRA model, before or after the reducer; it freezes the backbone, and a
model takes one. What it adds is named peft_..., so pyra.freeze, param_groups, save_adapter and load_adapter know it. A
block becomes one of its subclasses in place, so that its parts keep timm's names.

Written from the papers' equations and the published settings. Where the papers' code is known to differ, the docstring says so.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange
from tqdm import tqdm

import pyra

# ----------------------------------------------------------------------------------------------------------------------
# Token reducers: what they share


def set_reducers(model, reducers):
    """Gives every block its reducer, or None, in place of what it had. Returns the model."""
    for block, reducer in zip(model.blocks, reducers):
        block.reducer = None if reducer is None else reducer.to(model.pos_embed.device).train(model.training)
        block.prop_attn = True  # a dead token has size 0, so that proportional attention does not see it
    return model


def check_class_token(model, name):
    if model.global_pool != "token":
        raise ValueError(f"{name} ranks patches by the class token's attention, and a model with global_pool={model.global_pool!r} does not classify that token")


def follow(source, new_index):
    """source after the tokens moved: new_index (b, n) int64 says where to, -1: nowhere, and the patches it held are gone."""
    return torch.where(source < 0, -1, new_index.gather(1, source.clamp(min=0)))


def pick(tokens, order):
    """The tokens at order (b, m), in that order; the patches of the others are gone, and those of dead ones."""
    x, size, source = tokens
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    if size is not None:
        size = pyra.take(size, order)
        place = torch.where(size[..., 0] > 0, place, -1)
    new_index = order.new_full(x.shape[:2], -1).scatter(1, order, place)
    return pyra.Tokens(pyra.take(x, order), size, follow(source, new_index))


def attention_rows(attention, size=None, queries=None):
    """The attention that a block's q, k, v and sizes give, of the first `queries` tokens or of all: (b, h, queries, n) float32."""
    with torch.autocast(attention.q.device.type, enabled=False):  # in bf16 the ranks would tie
        scores = (attention.q[:, :, :queries].float() * attention.q.shape[-1] ** -0.5) @ attention.k.float().mT
        if size is not None:
            scores = scores + rearrange(size.log(), "b n 1 -> b 1 1 n")
        return scores.softmax(dim=-1)


# Where which tokens die is trained, none is removed in training. Its size becomes 0 in value only: through the size,
# straight through, the gradient reaches the threshold or rate that killed it.


def living(size):
    """(b, n, 1) float: 1 for a living token and 0 for a dead one, with the gradient that `sized` put into the size."""
    number = size.detach()
    return (number > 0).float() + (size - number) / torch.where(number > 0, number, 1)


def sized(number, alive):
    """The size (b, n, 1) of tokens that stand for `number`, no gradient, where `alive`, 0 or 1, with its gradient, says that they live."""
    return torch.where(alive.detach() > 0, number, 1) * alive


def straight_through(hard, soft):
    """The value of one, the gradient of the other."""
    return hard + (soft - soft.detach())


class MaskedAttention(pyra.Attention):
    """Attention with the size as factor, e^score size, rather than as log size: dead keys, at log 0, get a gradient too."""

    def forward(self, qkv, size=None):
        if size is None or not size.requires_grad:
            return super().forward(qkv, size)
        size = rearrange(size, "b n 1 -> b 1 1 n")
        scores = ((qkv.q * qkv.q.shape[-1] ** -0.5) @ qkv.k.mT).float()
        top = scores.detach().masked_fill(size == 0, -math.inf).amax(dim=-1, keepdim=True)  # of the dead it could leave the living 0 / 0
        weight = (scores - top).clamp(max=20).exp() * size
        x = (weight / weight.sum(dim=-1, keepdim=True)).to(qkv.v.dtype) @ qkv.v
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


def forward_counted(model, images):
    """images (b, 3, img_size, img_size) -> logits (b, num_classes), counts (depth + 1, b) float32.

    counts: the tokens alive before the first block and after each, special ones included. Where thresholds or rates are
    trained they have a gradient: see `budget_loss`. For evaluation see `mean_macs`.
    """
    tokens = model.embed(images)
    counts = [torch.full((len(images),), float(tokens.x.shape[1]), device=images.device)]
    for block in model.blocks:
        tokens = model.through(block, tokens)
        if isinstance(block.reducer, DiffRate) and model.training:
            counts.append(block.reducer.count(counts[-1]))
        else:
            counts.append(living(pyra.with_sizes(tokens).size).sum(dim=(1, 2)))
    return model.head(model.pool(pyra.with_sizes(tokens))), torch.stack(counts)


def mean_macs(model, counts):
    """Multiply-accumulates of a forward pass, as in pyra.count_macs, the mean over the images of counts (depth + 1, images)."""
    counts = counts.double()
    macs = pyra.macs_of_counts(model, counts)
    for block, n, m in zip(model.blocks, counts, counts[1:]):
        if isinstance(block.reducer, ATS):  # what is dropped needs no row of attention's result, and none of its projection
            macs = macs - (n - m) * (n + model.embed_dim) * block.attn.proj.in_features
    return macs.mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# EViT


class EViT(nn.Module):
    """Keeps the patches that the class token attends to most, and fuses the others into one token."""

    def __init__(self, keep_rate, specials=1):
        super().__init__()
        self.keep_rate, self.specials = keep_rate, specials
        self.settings = dict(keep_rate=keep_rate)

    def kept(self, n):
        return math.ceil(self.keep_rate * (n - self.specials) - 1e-9)  # 1e-9: 0.55 * 100 is 55.00000000000001

    def tokens_after(self, n):
        return min(self.specials + self.kept(n) + 1, n)

    def forward(self, tokens, attention):
        (b, n, _), p = tokens.x.shape, self.specials
        k = self.kept(n)
        if k == n - p:
            return tokens
        score = attention_rows(attention, queries=1).mean(dim=(1, 2))  # (b, n)
        ranked = score[:, p:].argsort(dim=1, descending=True, stable=True) + p
        specials = torch.arange(p, device=ranked.device).expand(b, -1)
        kept, fused = pick(tokens, torch.cat([specials, ranked[:, :k]], dim=1)), ranked[:, k:]
        x = (score.gather(1, fused)[..., None] * pyra.take(tokens.x, fused)).sum(dim=1, keepdim=True)
        return kept._replace(x=torch.cat([kept.x, x.to(kept.x.dtype)], dim=1), source=torch.where(kept.source < 0, p + k, kept.source))

    def extra_repr(self):
        return f"keep_rate={self.keep_rate}"


def check_layers(model, layers):
    """The blocks in which EViT acts, a list: those given, or those at a quarter, half and three quarters. Raises ValueError."""
    depth = len(model.blocks)
    if layers is None:
        layers = sorted({depth * i // 4 for i in (1, 2, 3)})
    if not isinstance(layers, (list, tuple)) or not layers or not all(type(i) is int and 0 <= i < depth for i in layers) or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be a list of different blocks from 0 to {depth - 1}, not {layers!r}")
    return sorted(layers)


def add_evit(model, keep_rate=0.7, layers=None):
    """EViT (Liang et al., ICLR 2022, arXiv 2202.07800): in each of `layers`, keeps ceil(keep_rate n) of the n patches left.

    Those are the patches with the most attention a_j from the class token, the heads' mean; the others fuse into one token,
    sum a_j x_j, not normalised, which counts as a patch from then on. layers: blocks, from 0; None: a quarter, half and
    three quarters of the way (3, 6, 9 of 12, the paper's). `evit_keep_rate` finds the keep rate for a budget. The
    distillation token is always kept, which in the published code is a patch like any other. Returns the model. Raises ValueError.
    """
    check_class_token(model, "EViT")
    layers = check_layers(model, layers)
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, (int, float)) or not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate must be greater than 0 and at most 1, not {keep_rate!r}")
    return set_reducers(model, [EViT(float(keep_rate), model.specials) if i in layers else None for i in range(len(model.blocks))])


def evit_keep_rate(model, macs, layers=None):
    """The largest keep rate, to 1e-4, with which EViT in `layers` costs at most `macs`, by pyra.count_macs.

    Late layers save little: on ViT-B the paper's 3, 6, 9 reach the "low" budget (k = 0.49), but "high" takes more of
    them and earlier, such as 1, 3, 5, 7, 9. Raises ValueError where no keep rate is low enough.
    """
    layers = check_layers(model, layers)

    def cost(keep_rate):
        evit, counts = EViT(keep_rate, model.specials), [model.num_patches + model.specials]
        for i in range(len(model.blocks)):
            counts.append(evit.tokens_after(counts[-1]) if i in layers else counts[-1])
        return pyra.macs_of_counts(model, counts)

    if cost(1e-4) > macs:
        raise ValueError(f"EViT in blocks {layers} costs {cost(1e-4):,} MACs at the least, not {macs:,.0f}: let it act in more blocks or earlier, or ask for less")
    low, high = 1, 10_000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle / 10_000) <= macs else (low, middle - 1)
    return low / 10_000


# ----------------------------------------------------------------------------------------------------------------------
# ToFu


def mlerp(tokens, matching):
    """Merges by MLERP: a group's mean, every token counting as one, stretched to the largest norm in the group. Tracks no sizes."""
    order, dst = matching
    stay, src = order.split([order.shape[1] - dst.shape[1], dst.shape[1]], dim=1)
    x, x_src = pyra.take(tokens.x, stay), pyra.take(tokens.x, src)
    norm = x.float().norm(dim=-1).scatter_reduce(1, dst, x_src.float().norm(dim=-1), "amax")
    mean = F.normalize(pyra.add_at(x, dst, x_src).float(), dim=-1) * norm[..., None]  # of a sum or a mean, the direction is the same
    alone = torch.ones_like(norm).scatter(1, dst, 0) > 0
    place = torch.cat([torch.arange(x.shape[1], device=dst.device).expand(len(dst), -1), dst], dim=1)
    new_index = torch.empty_like(order).scatter(1, order, place)
    return tokens._replace(x=torch.where(alone[..., None], x, mean.to(x.dtype)), source=follow(tokens.source, new_index))


class ToFu(pyra.ToMe):
    """ToMe's matching, whose sources are pruned in the early blocks and merged by MLERP in the late ones."""

    def __init__(self, r, late, specials=1):
        super().__init__(r, specials)
        self.late = late

    def forward(self, tokens, attention):
        n = tokens.x.shape[1]
        if self.tokens_after(n) == n:
            return tokens
        matching = self.match(attention)
        return mlerp(tokens, matching) if self.late else pick(tokens, matching.order[:, :self.tokens_after(n)])


def add_tofu(model, r):
    """ToFu, token fusion (Kim et al., WACV 2024, arXiv 2312.01026): early blocks prune the r most similar patches, late ones merge them.

    r as in pyra.add_tome. Blocks up to the middle, 0 to 6 of 12, prune: the early layers are far from linear, and an average
    of two tokens means little to them. The others merge by MLERP, which keeps the norms that averaging shrinks. No code of
    the authors is public; ports of it divide by the destination's norm instead of the mean's, so that the norm is not the
    largest of the group as it should be. Sizes are not tracked: there is no proportional attention. Returns the model.
    Raises ValueError.
    """
    middle = len(model.blocks) // 2
    return set_reducers(model, [ToFu(entry, i > middle, model.specials) if entry else None for i, entry in enumerate(pyra.check_schedule(model, r))])


# ----------------------------------------------------------------------------------------------------------------------
# ATS


class ATS(nn.Module):
    """Samples at most `count` tokens, special ones included, by the class token's attention. How many differ, the image decides."""

    def __init__(self, count, specials=1):
        super().__init__()
        self.count, self.specials = count, specials
        self.settings = dict(count=count)

    def tokens_after(self, n):
        raise ValueError("ATS keeps as many tokens as an image needs: forward_counted counts them, mean_macs their cost")

    @torch.no_grad()
    def sample(self, attention, size):
        """Which tokens stay, (b, n) bool."""
        p = self.specials
        norm = rearrange(attention.v.float(), "b h n d -> b n (h d)").norm(dim=-1)
        score = attention_rows(attention, size, queries=1).sum(dim=(1, 2)) * norm
        score, order = score[:, p:].sort(dim=1, stable=True)  # dead ones come first, with a score of 0
        cdf = score.cumsum(dim=1)
        points = (torch.arange(self.count - p, device=cdf.device) + 0.5) / (self.count - p)
        drawn = torch.searchsorted(cdf, points * cdf[:, -1:]).clamp(max=cdf.shape[1] - 1)  # (b, count - p) the first with cdf >= point
        kept = torch.zeros_like(norm, dtype=torch.bool)
        kept[:, :p] = True
        return kept.scatter(1, order.gather(1, drawn) + p, True)

    def forward(self, tokens, attention):
        tokens = pyra.with_sizes(tokens)
        if tokens.x.shape[1] == self.specials:
            return tokens
        kept = self.sample(attention, tokens.size)
        order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :kept.sum(dim=1).amax()]  # padded to the batch's longest
        return pick(tokens._replace(size=tokens.size * kept[..., None]), order)

    def extra_repr(self):
        return f"count={self.count}"


def add_ats(model, counts):
    """ATS, adaptive token sampling (Fayyaz et al., ECCV 2022, arXiv 2111.15667): tokens drawn by their significance, duplicates once.

    Significance S_j is the class token's attention to patch j times the norm of its value. Inverse transform sampling at
    K fixed points of S's cumulative distribution, (2k - 1) / 2K, k = 1..K, gives at most K different patches, fewer where
    a few carry most of the weight. counts: K with the special tokens, an int, in the last three quarters of the blocks
    (the paper's layers 3-11, K = 197); or a list with one a block, None: none are dropped. `ats_counts` makes one from a
    merging schedule. A batch is padded to its longest image with tokens of size 0.

    The published code takes equidistant points from the smallest positive value of the distribution on, and the nearest
    patch to each. It drops rows inside attention; after it, as here, the result is the same and a little more work is
    done than `mean_macs` counts. The distillation token is always kept. Returns the model. Raises ValueError.
    """
    check_class_token(model, "ATS")
    depth = len(model.blocks)
    if isinstance(counts, int):
        counts = [None] * (depth // 4) + [counts] * (depth - depth // 4)
    if not isinstance(counts, (list, tuple)) or len(counts) != depth:
        raise ValueError(f"counts must be an integer or a list with one, or None, for each of the {depth} blocks, not {counts!r}")
    for i, count in enumerate(counts):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count <= model.specials):
            raise ValueError(f"block {i}: the count must be an integer greater than the {model.specials} special tokens, or None, not {count!r}")
    return set_reducers(model, [None if count is None else ATS(count, model.specials) for count in counts])


def ats_counts(model, r):
    """add_ats's counts such that no block keeps more tokens than the merging schedule r leaves; it may keep fewer. Raises ValueError."""
    r = pyra.check_schedule(model, r)
    return [n if entry else None for entry, n in zip(r, pyra.counts_of_schedule(model, r)[1:])]


# ----------------------------------------------------------------------------------------------------------------------
# LTMP

LTMP_TEMPERATURE = 0.1


def above(value, threshold):
    """1 where the value is above the threshold, else 0, with the gradient of a sigmoid."""
    return straight_through((value > threshold).float(), ((value - threshold) / LTMP_TEMPERATURE).sigmoid())


class LTMP(nn.Module):
    """Merges tokens more similar than one learned threshold, then prunes those less important than another."""

    def __init__(self, specials=1):
        super().__init__()
        self.specials = specials
        self.merge_threshold = nn.Parameter(torch.tensor(0.9))  # at 1 only pruning would be learned
        self.prune_threshold = nn.Parameter(torch.tensor(0.0))

    def tokens_after(self, n):
        raise ValueError("LTMP keeps as many tokens as an image needs: forward_counted counts them, mean_macs their cost")

    @torch.no_grad()
    def similarity(self, attention, dead):
        """For each even token its highest similarity to an odd one, -inf where it must not merge, and which that is: (b, a) each."""
        scores = pyra.similarities(attention.k.mean(dim=1), self.specials)
        return scores.masked_fill(dead[:, ::2, None] | dead[:, None, 1::2], -math.inf).max(dim=-1)

    @torch.no_grad()
    def importance(self, attention, size):
        """The mean attention that a token gets from the living, (b, n); infinite for special tokens, and for dead ones, to keep them out of it."""
        rows, alive = attention_rows(attention, size).mean(dim=1), (size > 0).float()
        importance = (rows * alive).sum(dim=1) / alive.sum(dim=1)
        importance[:, :self.specials] = math.inf
        return importance.masked_fill(size[..., 0] == 0, math.inf)

    def forward(self, tokens, attention):
        x, size, source = pyra.with_sizes(tokens)
        (b, n, _), p = x.shape, self.specials
        if n == p:
            return tokens
        alive, dead = living(size), size[..., 0] == 0
        number = torch.where(dead[..., None], 1, size.detach())
        best, partner = self.similarity(attention, dead)
        importance = self.importance(attention, size.detach())

        # merging: what goes is averaged into its partner, which becomes as important as the most important of them
        merged = above(best, self.merge_threshold)  # (b, a)
        gone = merged.detach()[..., None]
        weight = number[:, ::2] * gone
        total = pyra.add_at(number[:, 1::2], partner, weight)
        x_odd = pyra.add_at(x[:, 1::2] * number[:, 1::2].to(x.dtype), partner, x[:, ::2] * weight.to(x.dtype)) / total.to(x.dtype)
        given = importance[:, ::2].masked_fill(gone[..., 0] == 0, -math.inf)
        importance = torch.cat([importance[:, ::2], importance[:, 1::2].scatter_reduce(1, partner, given, "amax")], dim=1)
        x, number = torch.cat([x[:, ::2], x_odd], dim=1), torch.cat([number[:, ::2], total], dim=1)
        alive = torch.cat([alive[:, ::2] * (1 - merged[..., None]), alive[:, 1::2]], dim=1)
        evens, place = partner.shape[1], torch.arange(n, device=x.device)
        new_index = source.new_empty(b, n)
        new_index[:, ::2] = torch.where(gone[..., 0] > 0, evens + partner, place[:evens])
        new_index[:, 1::2] = place[evens:]

        # pruning; then the dead go last, so that the next block sees the pairs that it would see if they weren't there
        alive = alive * above(importance, self.prune_threshold)[..., None]
        size = sized(number, alive)
        key = (size.detach()[..., 0] == 0).int() + 1
        key[:, 0] = 0
        if p == 2:
            key[:, evens] = 0
        order = key.argsort(dim=1, stable=True)
        if not self.training:
            order = order[:, :(key < 2).sum(dim=1).amax()]
        return pick(pyra.Tokens(x, size, follow(source, new_index)), order)


def add_ltmp(model):
    """LTMP, learned thresholds token merging and pruning (Bonnaerens & Dambre, TMLR 2023, arXiv 2307.10780), two thresholds a block.

    Even tokens whose keys are more similar to an odd token's than merge_threshold merge into it, as in ToMe; then tokens
    whose mean attention, of all heads and queries, is no more than prune_threshold go. In training nothing is removed: the
    dead have size 0 (see `MaskedAttention`), and a straight-through sigmoid gives the thresholds their gradient. In
    evaluation a batch is cut to its longest image. Train with the logits and counts of `forward_counted`, `budget_loss`
    for a budget, `param_groups`, and `clamp_thresholds` after each step.

    The published code leaves the dead where they are in training, so that blocks pair other tokens than in evaluation,
    and evaluates images one by one. Returns the model. Raises ValueError.
    """
    for block in model.blocks:
        block.attn.__class__ = MaskedAttention
    return set_reducers(model, [LTMP(model.specials) for _ in model.blocks])


@torch.no_grad()
def clamp_thresholds(model):
    """After a step of the optimizer: LTMP's thresholds back into [0, 1]."""
    for block in model.blocks:
        if isinstance(block.reducer, LTMP):
            block.reducer.merge_threshold.clamp_(0, 1)
            block.reducer.prune_threshold.clamp_(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# DiffRate


def rank(tokens, attention, specials):
    """The tokens in the order of the class token's attention to them; special ones first, dead ones last."""
    tokens = pyra.with_sizes(tokens)
    with torch.no_grad():
        score = attention_rows(attention, tokens.size, queries=1).mean(dim=(1, 2)).masked_fill(tokens.size[..., 0] == 0, -1)
        score[:, :specials] = math.inf
    return pick(tokens, score.argsort(dim=1, descending=True, stable=True))


def fuse(tokens, src, dst):
    """Averages tokens of src into the most similar one of dst, both (b, n) bool; no token is removed, and none gets another place.

    Similarity is the cosine of the tokens themselves. A group's mean counts every token as one; a source adds its size times
    its similarity to the size. Returns the Tokens, whose size has no gradient.
    """
    x, size, source = tokens
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.float(), dim=-1)
        best, partner = (unit @ unit.mT).masked_fill(~dst[:, None], -math.inf).max(dim=-1)
    gone = src[..., None].float()
    count = pyra.add_at(torch.ones_like(gone), partner, gone)
    x = pyra.add_at(x, partner, x * gone.to(x.dtype)) / count.to(x.dtype)
    size = pyra.add_at(size.detach(), partner, size.detach() * gone * best[..., None].clamp(min=0))
    here = torch.arange(x.shape[1], device=x.device)
    return pyra.Tokens(x, size, follow(source, torch.where(src, partner, here)))


class FrozenDiffRate(nn.Module):
    """Keeps the `prune` patches with the most attention from the class token, then merges the last of them until `merge` are left."""

    def __init__(self, prune, merge, specials=1):
        super().__init__()
        self.prune, self.merge, self.specials = prune, merge, specials
        self.settings = dict(prune=prune, merge=merge)

    def tokens_after(self, n):
        return min(n, self.specials + self.prune, self.specials + self.merge)

    def forward(self, tokens, attention):
        n, p = tokens.x.shape[1], self.specials
        if self.tokens_after(n) == n:
            return tokens
        tokens = rank(tokens, attention, p)
        first = torch.arange(min(n, p + self.prune), device=tokens.x.device).expand(len(tokens.x), -1)
        tokens = pick(tokens, first)
        tokens = fuse(tokens, first >= p + self.merge, (first >= p) & (first < p + self.merge))
        return pick(tokens, first[:, :p + self.merge])

    def extra_repr(self):
        return f"prune={self.prune}, merge={self.merge}"


class DiffRate(nn.Module):
    """FrozenDiffRate whose numbers are trained: each is the expectation of `candidates` under the softmax of its logits."""

    def __init__(self, candidates, granularity, specials=1):
        super().__init__()
        self.specials, self.settings = specials, dict(granularity=granularity)
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
        return FrozenDiffRate(*self.rates(), self.specials)

    def tokens_after(self, n):
        return self.frozen().tokens_after(n)

    def count(self, n):
        """The tokens of n (b,) that stay. The gradient goes to both numbers, though one alone is the lesser, and not to n."""
        prune, merge = (self.specials + self.patches(logits) for logits in (self.prune_logits, self.merge_logits))
        least = torch.minimum(n, torch.minimum(prune, merge)).detach()
        return straight_through(least, prune + merge)

    def mask(self, logits, place, alive):
        """(b, n, 1) 0 for the living patches beyond the number that stay, of those at place (n,) 1, 2, ..., else 1.

        Its gradient is the probability of a candidate of place or more. The dead have 1, lest they cut the gradient of the
        mask that they died of; a number that would keep all of the living has no mask and no gradient.
        """
        stay, living = self.patches(logits), alive.detach() > 0
        soft = (logits.softmax(dim=0)[:, None] * (self.candidates[:, None] >= place)).sum(dim=0)
        mask = straight_through(((place <= stay)[:, None] | ~living).float(), soft[:, None])
        return torch.where(stay < living.sum(dim=1, keepdim=True) - self.specials, mask, 1)

    def forward(self, tokens, attention):
        if not self.training:
            return self.frozen()(tokens, attention)
        tokens = rank(tokens, attention, self.specials)
        place = torch.arange(tokens.x.shape[1], device=tokens.x.device) - self.specials + 1  # of a patch 1, 2, ..., of a special token 0 or less
        alive = living(tokens.size)
        alive = alive * self.mask(self.prune_logits, place, alive)
        here, keep = alive.detach()[..., 0] > 0, self.mask(self.merge_logits, place, alive)
        best = keep.detach()[..., 0] > 0
        x, size, source = fuse(tokens, here & ~best, here & best & (place > 0))
        return pyra.Tokens(x, sized(size, alive * keep), torch.where(here.gather(1, source.clamp(min=0)), source, -1))


def add_diffrate(model, granularity=4):
    """DiffRate, differentiable compression rate (Chen et al., ICCV 2023, arXiv 2305.17997): learns how many patches each block prunes and merges.

    A block ranks the patches by the class token's attention, keeps the best and merges the last of those into the most
    similar of the others. Both numbers are expectations over the candidates T, T - granularity, ... of T patches, under the
    softmax of trained logits; the first block has but one candidate, all patches, and with global_pool="avg" so has the
    last. In training nothing is removed: the dead have size 0 (see `MaskedAttention`), and the probability that a rank is
    kept gives the logits their gradient. In evaluation the tokens are cut. Train with the logits and counts of
    `forward_counted`, `budget_loss` for a budget, and `param_groups`; then `freeze_diffrate`.

    A merged token's size grows by the sources' similarity, which the published code lets be negative, so that in
    evaluation a size could be; here it is at least 0. Special tokens are always kept. Returns the model. Raises ValueError.
    """
    if isinstance(granularity, bool) or not isinstance(granularity, int) or not 1 <= granularity <= model.num_patches:
        raise ValueError(f"granularity must be an integer from 1 to {model.num_patches}, not {granularity!r}")
    reducers = []
    for i, block in enumerate(model.blocks):
        whole = i == 0 or i == len(model.blocks) - 1 and model.global_pool == "avg"
        candidates = [model.num_patches] if whole else list(range(model.num_patches, 0, -granularity))
        reducers.append(DiffRate(candidates, granularity, model.specials))
        block.attn.__class__ = MaskedAttention
    return set_reducers(model, reducers)


def diffrate_rates(model):
    """The numbers of patches that DiffRate keeps, a list with one (prune, merge) a block. Raises ValueError."""
    if not all(isinstance(block.reducer, (DiffRate, FrozenDiffRate)) for block in model.blocks):
        raise ValueError("the model has no DiffRate: add_diffrate adds it")
    return [block.reducer.rates() if isinstance(block.reducer, DiffRate) else (block.reducer.prune, block.reducer.merge) for block in model.blocks]


def freeze_diffrate(model, rates=None):
    """Replaces DiffRate's logits by the numbers that they came to: from now on tokens are cut in training too. Returns the model.

    rates: `diffrate_rates` of another model instead, say to load its adapter. The optimizer's groups change: the logits
    are gone. Raises ValueError.
    """
    found = diffrate_rates(model)
    rates = found if rates is None else rates
    if len(rates) != len(found) or not all(len(pair) == 2 and all(type(k) is int and 1 <= k <= model.num_patches for k in pair) for pair in rates):
        raise ValueError(f"rates must be one (prune, merge) for each of the {len(found)} blocks, integers from 1 to {model.num_patches}, not {rates!r}")
    return set_reducers(model, [FrozenDiffRate(*pair, model.specials) for pair in rates])


# ----------------------------------------------------------------------------------------------------------------------
# Training reducers to a budget

# AdamW's learning rates, none with weight decay. An importance is about 1 / n, and so is the threshold for it.
REDUCER_LRS = {"merge_threshold": 5e-3, "prune_threshold": 5e-6, "prune_logits": 1e-2, "merge_logits": 1e-2}


def param_groups(model, **settings):
    """pyra.param_groups(model, **settings), but LTMP's thresholds and DiffRate's logits apart, with the learning rates of their papers."""
    own = {id(p): name for block in model.blocks if block.reducer for name, p in block.reducer.named_parameters() if name in REDUCER_LRS}
    groups = pyra.param_groups(model, **settings)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    apart = [dict(name=name, params=[p for p in model.parameters() if own.get(id(p)) == name and p.requires_grad], lr=lr, weight_decay=0.0)
             for name, lr in REDUCER_LRS.items()]
    return [group for group in groups + apart if group["params"]]


def budget_loss(model, counts, macs):
    """What to add to the loss for a model with LTMP or DiffRate to cost `macs`: weight ((MACs of counts - macs) / MACs of all blocks, plain)^2.

    counts: (depth + 1, b) of `forward_counted`; the batch's mean counts. weight: LTMP's is 10. DiffRate's is 5 for MACs in
    units of 1e9: 7.5 as a ratio on DeiT-Ti, whose blocks have 1.22 of those, but 1,500 on ViT-B, where nothing but the
    budget moves the logits, all blocks' alike, until it is met. Thousands of steps afterwards tell the blocks apart; a
    short search has none left, so DeiT-Ti's weight is taken for all sizes. Raises ValueError.
    """
    weights = {LTMP: 10.0, DiffRate: 5 * 1.22**2}
    kind = type(model.blocks[-1].reducer)
    if kind not in weights:
        raise ValueError("the model has neither LTMP nor DiffRate: no budget is trained")
    n, depth = model.num_patches + model.specials, len(model.blocks)
    plain = pyra.macs_of_counts(model, [n] * (depth + 1)) - pyra.macs_of_counts(model, [0] * (depth + 1))
    return weights[kind] * ((pyra.macs_of_counts(model, counts.mean(dim=1)) - macs) / plain) ** 2


# ----------------------------------------------------------------------------------------------------------------------
# Parameter-efficient fine-tuning


def check_scale(scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number greater than 0, not {scale!r}")


def finish_peft(model, name, **settings):
    """Notes what an adapter of this model must fit, and freezes the backbone. Returns the model."""
    model.peft, model.merged = dict(name=name, **settings), None
    model.train(model.training)  # the new modules too
    pyra.freeze(model)
    return model


def quick_gelu(z):
    return z * (1.702 * z).sigmoid()


class Adapter(nn.Module):
    """A bottleneck: W2 dropout(phi(W1 x + b1)) + b2, phi the quick GELU. Tokens (b, n, c) -> (b, n, c)."""

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x):
        return self.up(F.dropout(quick_gelu(self.down(x)), self.dropout, self.training))

    def macs(self, n):
        return 2 * n * self.down.weight.numel()


class AdapterBlock(pyra.Block):
    def transform(self, tokens):
        m = self.drop_path(self.mlp(self.norm2(tokens.x)))  # before the adapter: a dropped sample still gets its biases
        return tokens._replace(x=tokens.x + m + self.peft_mlp(m))


def add_adapter(model, dim=8, dropout=0.1):
    """Adapter (Houlsby et al., ICML 2019) as NOAH and PYRA use it: one a block, in series after the MLP, with its own skip.

    x + m + adapter(m), where m is the MLP's branch after drop path. dim: the bottleneck. dropout: inside it, in training.
    The weights start as Xavier has it, not at zero, so training does not start at the pre-trained model; published code
    re-initialises them to a truncated normal, 0.02. Freezes the backbone. Returns the model. Raises ValueError.
    """
    pyra.check_peft(model, dropout, dim=dim)
    for block in model.blocks:
        block.__class__ = AdapterBlock
        block.peft_mlp = Adapter(model.embed_dim, dim, dropout).to(model.pos_embed)
    return finish_peft(model, "Adapter", dim=dim)


# What the published code sets for each task: the scale s, and whether the convolution starts as the identity or as Xavier has it.
CONVPASS = {
    "cifar100": (0.1, "identity"), "caltech101": (1.0, "identity"), "dtd": (0.01, "xavier"), "oxford_flowers102": (0.1, "xavier"),
    "oxford_pet": (1.0, "xavier"), "svhn": (100.0, "xavier"), "sun397": (0.1, "identity"), "patch_camelyon": (10.0, "identity"),
    "eurosat": (10.0, "identity"), "resisc45": (10.0, "identity"), "diabetic_retinopathy": (1.0, "identity"),
    "clevr_count": (1.0, "identity"), "clevr_dist": (0.1, "xavier"), "dmlab": (10.0, "identity"), "kitti": (10.0, "xavier"),
    "dsprites_loc": (100.0, "xavier"), "dsprites_ori": (0.1, "xavier"), "smallnorb_azi": (100.0, "xavier"), "smallnorb_ele": (1.0, "xavier"),
}


def convpass_settings(task):
    """add_convpass's scale and init for a task of VTAB-1k, by its name in tasks.VTAB; for any other 1 and "identity"."""
    scale, init = CONVPASS.get(task, (1.0, "identity"))
    return dict(scale=scale, init=init)


class Convpass(nn.Module):
    """A bottleneck with a 3x3 convolution over the image: s W_u dropout(phi(conv(phi(W_d x + b_d)))) + s b_u."""

    def __init__(self, dim, hidden, grid, scale, init, dropout):
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.grid, self.scale, self.dropout = grid, scale, dropout
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)  # training starts at the pre-trained model
        nn.init.xavier_uniform_(self.conv.weight) if init == "xavier" else nn.init.dirac_(self.conv.weight)
        for part in (self.down, self.conv, self.up):
            nn.init.zeros_(part.bias)

    def forward(self, x, source):
        """x (b, n, c); source (b, specials + patches), as in pyra.Tokens: which token holds each patch. Returns (b, n, c).

        Merging breaks up the grid, and Convpass does not say what then. Here each patch reads the token that holds it, the
        convolution runs over the whole grid, and a token gets the mean of its patches; nothing merged, it is Convpass.
        A patch whose token is gone (source -1) reads zero, as beyond the border.
        A token without a patch, such as a special one, is an image of its own, 1x1: of the kernel it sees the centre.
        """
        z = quick_gelu(self.down(x))  # (b, n, h)
        where = source[:, source.shape[1] - self.grid**2:]
        held, where = where[..., None] >= 0, where.clamp(min=0)
        patches = self.conv(rearrange(torch.where(held, pyra.take(z, where), 0), "b (y x) h -> b h y x", y=self.grid))
        patches = F.pad(rearrange(patches, "b h y x -> b (y x) h").float(), (0, 1), value=1.0) * held  # a 1 more, which counts them
        total = pyra.add_at(patches.new_zeros(*x.shape[:2], patches.shape[2]), where, patches)
        total, count = total[..., :-1], total[..., -1:]
        alone = F.linear(z, self.conv.weight[:, :, 1, 1], self.conv.bias)
        z = torch.where(count > 0, (total / count.clamp(min=1)).to(alone.dtype), alone)
        return self.scale * self.up(F.dropout(quick_gelu(z), self.dropout, self.training))

    def macs(self, n):
        return 2 * n * self.down.weight.numel() + self.grid**2 * self.conv.weight.numel() + n * self.conv.weight[:, :, 1, 1].numel()


class ConvpassBlock(pyra.Block):
    def attend(self, tokens):
        u = self.norm1(tokens.x)
        qkv = self.attn.project(u)
        x = tokens.x + self.attention_branch(tokens, qkv)
        return tokens._replace(x=x + self.drop_path(self.peft_attn(u, tokens.source))), qkv

    def transform(self, tokens):  # after the merge, and so is its source
        u = self.norm2(tokens.x)
        return tokens._replace(x=tokens.x + self.drop_path(self.mlp(u)) + self.drop_path(self.peft_mlp(u, tokens.source)))


def add_convpass(model, dim=8, scale=1.0, init="identity", dropout=0.1):
    """Convpass (Jie & Deng, 2022, arXiv 2207.07039): a convolutional bypass beside attention and another beside the MLP.

    dim: the bottleneck. scale, init ("identity" or "xavier", of the convolution): the paper picks them by task, see
    `convpass_settings`. dropout: in the bottleneck, in training. Freezes the backbone. Returns the model. Raises ValueError.
    """
    pyra.check_peft(model, dropout, dim=dim)
    check_scale(scale)
    if init not in ("identity", "xavier"):
        raise ValueError(f"init must be 'identity' or 'xavier', not {init!r}")
    for block in model.blocks:
        block.__class__ = ConvpassBlock
        for name in ("peft_attn", "peft_mlp"):
            bypass = Convpass(model.embed_dim, dim, model.img_size // model.patch_size, float(scale), init, dropout)
            setattr(block, name, bypass.to(model.pos_embed))
    return finish_peft(model, "Convpass", dim=dim, scale=float(scale))


# What the published code sets for each task: rank and scale of the TT form, rank and scale of the TK form.
FACT = {
    "cifar100": (8, 1.0, 32, 0.1), "caltech101": (16, 10.0, 32, 10.0), "dtd": (8, 0.01, 16, 0.01), "oxford_flowers102": (16, 1.0, 32, 1.0),
    "oxford_pet": (8, 1.0, 16, 10.0), "svhn": (16, 100.0, 32, 100.0), "sun397": (8, 1.0, 16, 1.0), "patch_camelyon": (8, 10.0, 32, 10.0),
    "eurosat": (8, 100.0, 32, 100.0), "resisc45": (8, 0.1, 32, 10.0), "diabetic_retinopathy": (8, 1.0, 16, 1.0),
    "clevr_count": (16, 1.0, 32, 10.0), "clevr_dist": (4, 10.0, 16, 10.0), "dmlab": (16, 10.0, 32, 10.0), "kitti": (16, 10.0, 32, 10.0),
    "dsprites_loc": (16, 100.0, 32, 100.0), "dsprites_ori": (16, 1.0, 32, 1.0), "smallnorb_azi": (16, 100.0, 32, 100.0),
    "smallnorb_ele": (8, 10.0, 16, 10.0),
}


def fact_settings(task, form="tt"):
    """add_fact's form, rank and scale for a task of VTAB-1k, by its name in tasks.VTAB; for any other rank 16 (tk: 32), scale 1."""
    tt_rank, tt_scale, tk_rank, tk_scale = FACT.get(task, (16, 1.0, 32, 1.0))
    return dict(form=form, rank=tt_rank, scale=tt_scale) if form == "tt" else dict(form=form, rank=tk_rank, scale=tk_scale)


class FacTLinear(nn.Linear):
    """A frozen linear map whose weight, cut into outs x ins pieces of at most c x c, gets s V Sigma U added to each piece.

    u: (r, c) and v: (c, r) are the whole network's; each piece has its own Sigma, (r, r). In the TT form that is core
    (outs, ins, r, r) as it stands. In the TK form Sigma = sum_k core[:, :, k] p[k], core (r, r, r) being the network's too
    and p (r, outs, ins). A piece that pruning left narrower than c takes the first rows of v, or columns of u.
    """

    def __init__(self, linear, u, v, core, p, scale, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.peft_u, self.peft_v, self.peft_core, self.peft_p = u, v, core, p
        self.outs, self.ins = core.shape[:2] if p is None else p.shape[1:]
        self.scale, self.dropout = scale, dropout

    def down(self):
        """Sigma U of all the pieces, (outs r, in_features)."""
        core = self.peft_core if self.peft_p is None else einsum(self.peft_core, self.peft_p, "q s k, k o i -> o i q s")
        u = self.peft_u[:, :math.ceil(self.in_features / self.ins)]
        return rearrange(einsum(core, u, "o i q s, s c -> o q i c"), "o q i c -> (o q) (i c)")[:, :self.in_features]

    def up(self):
        """V, as wide as a piece: (out_features / outs, r)."""
        return self.peft_v[:math.ceil(self.out_features / self.outs)]

    def forward(self, x):
        low = F.dropout(F.linear(x, self.down()), self.dropout, self.training)
        delta = F.linear(rearrange(low, "b n (o q) -> b n o q", o=self.outs), self.up())
        delta = rearrange(delta, "b n o c -> b n (o c)")[..., :self.out_features]
        return F.linear(x, self.weight, self.bias) + self.scale * delta

    @torch.no_grad()
    def merged(self):
        """The plain nn.Linear with the update in its weight."""
        update = self.up().float() @ rearrange(self.down().float(), "(o q) c -> o q c", o=self.outs)
        return pyra.updated(self, self.scale * rearrange(update, "o d c -> (o d) c")[:self.out_features])

    def macs(self, n):
        return n * self.outs * (self.peft_u.shape[0] * self.in_features + self.up().numel())


def linears(block):
    """A block's four linear maps as (module, name, outs, ins): in how many pieces FacT cuts each."""
    k = math.ceil(block.mlp.fc1.out_features / block.mlp.fc1.in_features)
    return (block.attn, "qkv", 3, 1), (block.attn, "proj", 1, 1), (block.mlp, "fc1", k, 1), (block.mlp, "fc2", 1, k)


def add_fact(model, form="tt", rank=16, scale=1.0, dropout=0.1):
    """FacT (Jie & Deng, AAAI 2023, arXiv 2212.03145): low-rank updates of all linear maps from factors that they share.

    form: "tt" (tensor train) or "tk" (Tucker). rank, scale: the paper picks them by task, see `fact_settings`. dropout:
    between Sigma and V, in training. V starts at zero: training starts at the pre-trained model. q, k, v and proj are a
    c x c piece each, fc1 and fc2 four each. The published TK form mixes fc1's (and fc2's) pieces by reshaping (r, r, 4)
    to (r, 4r) before cutting it in four; here, as in the paper, each piece has its own Sigma. Freezes the backbone.
    Returns the model. Raises ValueError.
    """
    pyra.check_peft(model, dropout, rank=rank)
    check_scale(scale)
    if form not in ("tt", "tk"):
        raise ValueError(f"form must be 'tt' or 'tk', not {form!r}")
    c, new = model.embed_dim, model.pos_embed.new_empty
    model.peft_u = nn.Parameter(new(rank, c).uniform_(-1, 1) / math.sqrt(c))
    model.peft_v = nn.Parameter(new(c, rank).zero_())
    if form == "tk":
        columns = sum(outs * ins for block in model.blocks for *_, outs, ins in linears(block))
        model.peft_core = nn.Parameter(nn.init.xavier_uniform_(new(rank, rank, rank)))
    for block in model.blocks:
        for module, name, outs, ins in linears(block):
            if form == "tt":
                core, p = nn.Parameter(new(outs, ins, rank, rank).uniform_(-1, 1) / math.sqrt(ins * rank)), None
            else:  # a column of the paper's P (r, 12 L) for each piece, Xavier for the whole of P
                core, p = model.peft_core, nn.Parameter(new(rank, outs, ins).uniform_(-1, 1) * math.sqrt(6 / (rank + columns)))
            setattr(module, name, FacTLinear(getattr(module, name), model.peft_u, model.peft_v, core, p, float(scale), dropout))
    return finish_peft(model, "FacT", form=form, rank=rank, scale=float(scale))


def merge_fact(model):
    """Folds FacT into the linear maps, W + s V Sigma U, and removes its tensors: the same logits for less work. Returns the model."""
    if model.peft and model.peft["name"] == "FacT":
        for block in model.blocks:
            for module, name, *_ in linears(block):
                setattr(module, name, getattr(module, name).merged())
        for name in [name for name in model._parameters if name.startswith("peft_")]:
            delattr(model, name)
        model.peft, model.merged = None, "FacT"
    return model


class Flow(nn.Module):
    """A normalizing flow on each token: x -> shift + exp(log_scale) x, then `flows` times x -> x + a tanh(w^T x + b)."""

    def __init__(self, dim, flows, affine):
        super().__init__()
        self.dim, self.flows, self.affine = dim, flows, affine
        if affine:
            self.shift, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        if flows:
            self.w, self.a, self.b = (nn.Parameter(torch.empty(*shape).uniform_(-0.01, 0.01)) for shape in ((flows, dim), (flows, dim), (flows,)))

    def forward(self, x):
        y = self.shift + self.log_scale.exp() * x if self.affine else x
        for k in range(self.flows):
            y = y + (y @ self.w[k] + self.b[k]).tanh()[..., None] * self.a[k]
        return y.to(x.dtype)

    def macs(self, n):
        return n * self.dim * (self.affine + 2 * self.flows)


class SNFBlock(pyra.Block):
    def attend(self, tokens):
        qkv = self.attn.project(self.norm1(tokens.x))
        return tokens._replace(x=self.peft_attn(tokens.x) + self.attention_branch(tokens, qkv)), qkv

    def transform(self, tokens):
        return tokens._replace(x=self.peft_mlp(tokens.x) + self.drop_path(self.mlp(self.norm2(tokens.x))))


def add_snf(model, flows=0, affine=True):
    """SNF (Wang et al., CVPR 2023): a normalizing flow on each of a block's two identity shortcuts.

    flows: planar flows after the affine one. The paper's 0.036 M parameters for ViT-B are those of the affine flow alone,
    the default here (36,864), but also those of one planar flow without it (36,888); the published code's 16 have 627,072.
    The default starts at the pre-trained model. No log-determinant enters the loss. Freezes the backbone. Returns the model.
    Raises ValueError.
    """
    pyra.check_peft(model)
    pyra.check_integer("flows", flows, least=0)
    if not flows and not affine:
        raise ValueError("SNF without affine needs flows of at least 1")
    for block in model.blocks:
        block.__class__ = SNFBlock
        for name in ("peft_attn", "peft_mlp"):
            setattr(block, name, Flow(model.embed_dim, flows, bool(affine)).to(model.pos_embed))
    return finish_peft(model, "SNF", flows=flows, affine=bool(affine))


def peft_macs(model, counts=None):
    """Multiply-accumulates that a PEFT adds to one image's forward pass; all in all the model costs count_macs + peft_macs.

    counts: tokens before the first block and after each, where they are not the model's `pyra.token_counts`.

    For what can't be folded in, Adapter, Convpass and SNF, and for FacT until merge_fact. LoRA counts as folded in: 0.
    Activations, biases and the gathering and averaging of Convpass's patches are left out, and what FacT spends once a
    batch, whatever its size, on Sigma U.
    """
    macs, counts = 0, pyra.token_counts(model) if counts is None else counts
    for block, n, m in zip(model.blocks, counts, counts[1:]):
        for name, module in block.named_modules():
            if isinstance(module, (Adapter, Convpass, FacTLinear, Flow)):
                macs += module.macs(n if "attn" in name else m)
    return macs


# ----------------------------------------------------------------------------------------------------------------------
# Channel pruning


def keep_rows(linear, index):
    """Cuts a linear map down to the outputs at index, in place."""
    linear.weight = nn.Parameter(linear.weight[index], linear.weight.requires_grad)
    linear.bias = nn.Parameter(linear.bias[index], linear.bias.requires_grad)
    linear.out_features = len(index)


def keep_columns(linear, index):
    """Cuts a linear map down to the inputs at index, in place."""
    linear.weight = nn.Parameter(linear.weight[:, index], linear.weight.requires_grad)
    linear.in_features = len(index)


def check_prunable(model):
    if model.peft or any(isinstance(block.attn.qkv, pyra.LoRALinear) for block in model.blocks):
        raise ValueError("the model has a PEFT already: prune first, then add it to the pruned model")


@torch.no_grad()
def prune_channels(model, keep):
    """Cuts attention heads and MLP units out of every block, in place; the residual stream stays c wide. Returns the model.

    keep: one (heads, units) a block, how many stay, 1 at least: those with the largest L1 norm of all their weights (a head's
    rows of q, k, v and columns of proj; a unit's row of fc1 and column of fc2). A head keeps its width d, so its softmax is
    scaled as before. Raises ValueError.
    """
    check_prunable(model)
    if not isinstance(keep, (list, tuple)) or len(keep) != len(model.blocks):
        raise ValueError(f"keep must be a list with one (heads, units) for each of the {len(model.blocks)} blocks, not {keep!r}")
    for i, (block, pair) in enumerate(zip(model.blocks, keep)):
        most = block.attn.num_heads, block.mlp.fc1.out_features
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(k) is int and 1 <= k <= full for k, full in zip(pair, most)):
            raise ValueError(f"block {i}: (heads, units) to keep must be integers from (1, 1) to {most}, not {pair!r}")

    def choose(norms, k):
        return norms.topk(k).indices.sort().values

    for block, (heads, units) in zip(model.blocks, keep):
        attn, mlp, h = block.attn, block.mlp, block.attn.num_heads
        norms = rearrange(attn.qkv.weight.abs(), "(three h d) c -> h (three d c)", three=3, h=h).sum(dim=1)
        norms += rearrange(attn.proj.weight.abs(), "c (h d) -> h (c d)", h=h).sum(dim=1)
        kept = choose(norms, heads)
        places = torch.arange(attn.qkv.out_features, device=kept.device)
        places = rearrange(places, "(three h d) -> three h d", three=3, h=h)[:, kept]
        keep_rows(attn.qkv, places.flatten())
        keep_columns(attn.proj, places[0].flatten())
        attn.num_heads = heads

        kept = choose(mlp.fc1.weight.abs().sum(dim=1) + mlp.fc2.weight.abs().sum(dim=0), units)
        keep_rows(mlp.fc1, kept)
        keep_columns(mlp.fc2, kept)
    return model


def fill(ratios, full, cost, budget):
    """full * ratios * t, each from 1 to full, with the t at which they cost the budget, or nearly; by bisection. All 1-D."""
    low, high = 0.0, 1 / ratios.min().item()  # at high everything is full
    for _ in range(60):
        t = (low + high) / 2
        keep = torch.minimum((full * ratios * t).clamp(min=1), full)
        low, high = (t, high) if keep @ cost < budget else (low, t)
    return keep


def random_keep(model, flops_ratio, generator):
    """Random (heads, units) to keep in each block, of which count_macs is within 1 % of the model's over flops_ratio.

    Ratios from U(0.1, 1), one a block for heads and one for units, all scaled by one factor and at most 1; heads are
    rounded first, and units make up for it. Raises ValueError where that meets the budget in none of 100 draws.
    """
    counts, c, depth = pyra.token_counts(model), model.embed_dim, len(model.blocks)
    full, cost = [], []  # heads of all blocks, then units of all blocks; MACs of one
    for block, n in zip(model.blocks, counts):
        full.append(block.attn.num_heads)
        cost.append((4 * n * c + 2 * n**2) * block.attn.proj.in_features // block.attn.num_heads)
    for block, m in zip(model.blocks, counts[1:]):
        full.append(block.mlp.fc1.out_features)
        cost.append(2 * m * c)
    full, cost = torch.tensor(full, dtype=torch.float64), torch.tensor(cost, dtype=torch.float64)
    target = pyra.count_macs(model) / flops_ratio
    budget = target - (pyra.count_macs(model) - (full @ cost).item())  # patch embedding and head are not pruned
    for _ in range(100):
        ratios = torch.empty(2 * depth, dtype=torch.float64).uniform_(0.1, 1, generator=generator)
        heads = fill(ratios, full, cost, budget)[:depth].round()
        units = fill(ratios[depth:], full[depth:], cost[depth:], budget - (heads @ cost[:depth]).item()).round()
        if abs((torch.cat([heads, units]) @ cost).item() - budget) <= 0.01 * target:
            return [(int(a), int(b)) for a, b in zip(heads, units)]
    raise ValueError(f"no random pruning of this model meets 1/{flops_ratio:g} of its MACs within 1 %")


def search_pruning(model, flops_ratio, score, candidates=20, seed=0):
    """RaP, "Revisiting random channel pruning" (Li et al., CVPR 2022), for a ViT: the best of `candidates` random prunings.

    flops_ratio: F/f, the model's MACs over the pruned one's, met within 1 %. score(pruned) -> a number, the lower the better,
    such as `probe_loss`; it may train what it gets, which is thrown away. Returns what `prune_channels` is to keep; the model
    stays as it is. Raises ValueError.

    The paper prunes CNNs, and no code was published: heads and MLP units for channels are our choice. Its least-squares
    reconstruction of the features is left out, since adaptation trains the pruned model anyway.
    """
    check_prunable(model)
    pyra.check_flops_ratio(flops_ratio)
    pyra.check_integer("candidates", candidates)
    generator = torch.Generator().manual_seed(seed)
    best, best_score = None, math.inf
    for _ in tqdm(range(candidates), desc="scoring prunings", leave=False, delay=2):
        keep = random_keep(model, flops_ratio, generator)
        value = torch.as_tensor(score(prune_channels(copy.deepcopy(model), keep))).item()
        if value < best_score:  # never true of nan
            best, best_score = keep, value
    if best is None:
        raise ValueError(f"score gave no finite number for any of the {candidates} candidates")
    return best


def probe_loss(features, labels, held_out, held_out_labels, num_classes, weight_decay=1e-3):
    """Cross-entropy on held-out features of the linear head that fits the others best: how much a frozen model knows of a task.

    features: (n, c); labels: (n,) int64; held_out: (m, c); held_out_labels: (m,). The head is logistic regression on
    standardised features, with an L2 penalty of weight_decay, fitted to convergence by L-BFGS. Returns a float.
    """
    mean, std = features.float().mean(dim=0), features.float().std(dim=0).clamp(min=1e-6)
    x, held_out = (features.float() - mean) / std, (held_out.float() - mean) / std
    weight, bias = (x.new_zeros(*shape).requires_grad_() for shape in ((num_classes, x.shape[1]), (num_classes,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return F.cross_entropy(F.linear(held_out, weight.detach(), bias.detach()), held_out_labels).item()


# ----------------------------------------------------------------------------------------------------------------------
# Distillation


def distillation_loss(student_logits, teacher_logits, labels, weight=1.0, temperature=1.0):
    """Eq. (2) of the supplement, L_task + L_dist: cross-entropy(z_s, y) + weight T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    student_logits, teacher_logits: (b, classes), in one order of classes; labels: (b,) int64; T: temperature. Both terms
    are means over the batch. No gradient reaches the teacher. Raises ValueError.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student and teacher must agree on the logits' shape, not {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature!r}")
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return F.cross_entropy(student_logits, labels) + weight * temperature**2 * kl
