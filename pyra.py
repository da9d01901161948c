"""PYRA: parallel yielding re-activation, in plain PyTorch + einops.

PYRA (Xiong et al., ECCV 2024, arXiv 2403.09192) adapts a frozen, pre-trained Vision Transformer to a task and makes it
faster in the same, single training stage:

1. LoRA adds a low-rank update to every block's qkv projection; the backbone stays frozen.
2. ToMe merges the r^l most similar token pairs of every block l between attention and MLP, so later blocks have less to do.
3. Just before a pair merges, PYRA modulates its source token. Two tiny generators, W_r (r, s) and W_D (s, c), read the
   pairs and yield a gate per channel and a gate per token; their product re-activates what averaging would blur.

After training, LoRA folds into the backbone. What is left is a ViT that merges tokens, plus about 10,000 numbers of modulation.

    model = create_model("vit_base_patch16_224", num_classes=100)
    load_pretrained(model, "vit_base_patch16_224.orig_in21k")       # or a .safetensors / .pth / .npz file
    add_lora(model, rank=8)
    add_pyra(model, merge_schedule("high"))
    ...                                                             # train param_groups(model, lr=1e-3, modulation_lr=1e-4)
    save_adapter(model, "adapter.safetensors")
    merge_lora(model)

Axes: b batch, n tokens, h heads, d head dim, c channels, r merged pairs, s modulation rank. Parameter names are timm's.

Where this departs from the published code (github.com/THU-MIG/PYRA), and why:
- the modulation's LayerNorm has no affine part: only so does ViT-B count the paper's 9.4 K parameters;
- `param_groups` gives the generators their own learning rate; in the published code that option matches no parameter;
- LoRA's B starts at zero, so that training starts at the pre-trained model (`init="published"` for the code's init);
- a distilled model's logits come from the class head alone, the one that is trained; `forward_heads` gives both;
- a schedule is an argument, not a list popped during the forward: two forwards agree, and so do compile and checkpointing.

It imports torch and einops; safetensors, numpy and huggingface_hub only where such a file is read or written.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat

# ----------------------------------------------------------------------------------------------------------------------
# Schedules: how many pairs each block merges

# Table 5 of the supplement. For ViT-L the table prints 23 entries for 24 blocks: one of its 4s is missing (the published
# code has three). The low lists are the constant 16 and 8; the last block has too few tokens left for a full entry.
PAPER_SCHEDULES = {
    ("low", 12): [16] * 11 + [10],
    ("high", 12): [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],
    ("low", 24): [8] * 23 + [6],
    ("high", 24): [20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1],
}


def check_integer(name, value, least=1):
    """Raises ValueError unless the value is an int, no bool, and large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be {'a positive integer' if least == 1 else f'an integer of at least {least}'}, not {value!r}")


def check_flops_ratio(flops_ratio):
    """F/f, how many times fewer operations, must be a finite number above 1. Raises ValueError."""
    if isinstance(flops_ratio, bool) or not isinstance(flops_ratio, (int, float)) or not 1 < flops_ratio < math.inf:
        raise ValueError(f"flops_ratio must be a finite number greater than 1, not {flops_ratio!r}")


def solve_schedule(depth, tokens=196, remaining=4, flops_ratio=3.4):
    """Eq. (1) of the supplement, as printed: r^l = floor((g(l-1) - g(l)) (T - t)), g(x) = (1 - x/L)^(F/f - 1).

    depth: L, blocks. tokens: T, patches at the start (special tokens not counted). remaining: t, patches after the last
    block. flops_ratio: F/f, how many times fewer operations; 2 gives a constant schedule. Returns a list of L ints.
    The equation approximates: the MACs it reaches are a few per cent off F/f. Raises ValueError.
    """
    for name, value, least in (("depth", depth, 1), ("remaining", remaining, 0), ("tokens", tokens, 1)):
        check_integer(name, value, least)
    if remaining >= tokens:
        raise ValueError(f"remaining ({remaining}) must be less than tokens ({tokens})")
    check_flops_ratio(flops_ratio)

    def g(x):
        return (1 - x / depth) ** (flops_ratio - 1)

    # 1e-9: (1/12) * 192 is 15.999... in floating point, and must floor to 16
    return [math.floor((g(l - 1) - g(l)) * (tokens - remaining) + 1e-9) for l in range(1, depth + 1)]


def merge_schedule(rate, depth=12, tokens=196):
    """The schedule of a compression rate: a list of `depth` ints, the pairs merged in each block. Raises ValueError.

    rate: "low" or "high", the paper's lists for 196 patches (Table 5; depth 12 or 24); or a float, Eq. (1) for F/f = rate
    (`solve_macs` meets a ratio of operations exactly). Where Eq. (1) asks for more than half of the patches that are left,
    half of them merge, so that every schedule can be satisfied.
    """
    if isinstance(rate, str):
        if rate not in ("low", "high"):
            raise ValueError(f"rate must be 'low', 'high' or a number greater than 1, not {rate!r}")
        if (rate, depth) not in PAPER_SCHEDULES or tokens != 196:
            raise ValueError(f"the paper's {rate!r} schedule is for depths 12 and 24 and 196 patches, not {depth!r} and {tokens!r}; pass a number for Eq. (1)")
        return list(PAPER_SCHEDULES[rate, depth])
    r, left = [], tokens
    for entry in solve_schedule(depth, tokens, flops_ratio=rate):
        r.append(min(entry, most_merges(left, 0)))
        left -= r[-1]
    return r


def most_macs_ratio(model, remaining=4):
    """How many times fewer MACs the strongest merging leaves: half of the tokens in every block, down to `remaining` patches."""
    counts = [model.num_patches + model.specials]
    for _ in model.blocks:
        counts.append(counts[-1] - min(most_merges(counts[-1], model.specials), counts[-1] - model.specials - remaining))
    return macs_of_counts(model, counts[:1] * len(counts)) / macs_of_counts(model, counts)


def solve_macs(model, flops_ratio, remaining=4):
    """The schedule of Eq. (1)'s family with flops_ratio times fewer MACs, by `count_macs`, than the unmerged model.

    Eq. (1) misses its target: its exponent F/f - 1 is an approximation, and its floors lose up to one pair per block. Here the
    exponent is solved for, and rounding errors carry over to the next block; then single pairs are moved while that helps.
    A block merges at most half of its tokens, and at least `remaining` patches are left. Returns a list with one int per
    block. Raises ValueError where no schedule saves so many operations.
    """
    check_flops_ratio(flops_ratio)
    check_integer("remaining", remaining)
    if remaining >= model.num_patches:
        raise ValueError(f"remaining ({remaining}) must be less than the model's {model.num_patches} patches")
    depth, start = len(model.blocks), model.num_patches + model.specials
    counts = lambda r: [start - sum(r[:l]) for l in range(depth + 1)]
    plain = macs_of_counts(model, [start] * (depth + 1))

    def curve(exponent):
        r, n = [], start
        for l in range(1, depth + 1):
            due = (model.num_patches - remaining) * (1 - (1 - l / depth) ** exponent) - sum(r)
            r.append(max(0, min(round(due), most_merges(n, model.specials))))
            n -= r[-1]
        return r

    def miss(r):
        return abs(plain / macs_of_counts(model, counts(r)) / flops_ratio - 1)

    most = most_macs_ratio(model, remaining)
    if flops_ratio > most:
        raise ValueError(f"flops_ratio {flops_ratio:g} is out of reach: merging down to {remaining} patches reaches {most:.2f} at most")
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if plain / macs_of_counts(model, counts(curve(middle))) < flops_ratio else (low, middle)
    best = min(curve(low), curve(high), key=miss)
    while True:
        moves = [best[:l] + [best[l] + step] + best[l + 1:] for l in range(depth) for step in (-1, 1)]
        moves = [r for r in moves if sum(r) <= model.num_patches - remaining
                 and all(0 <= m <= most_merges(n, model.specials) for m, n in zip(r, counts(r)))]
        move = min(moves, key=miss, default=best)
        if miss(move) >= miss(best):
            return best
        best = move


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: what flows through the blocks


class Tokens(NamedTuple):
    x: torch.Tensor  # (b, n, c) special tokens first
    size: torch.Tensor | None  # (b, n, 1) float32: how many tokens each one stands for; None: one each; 0: dead
    source: torch.Tensor  # (b, n0) int64: for each token of the input, the index of the one that now holds it; -1: none does


def with_sizes(tokens):
    """The Tokens with explicit sizes: ones where size was None."""
    return tokens if tokens.size is not None else tokens._replace(size=torch.ones(*tokens.x.shape[:2], 1, device=tokens.x.device))


class QKV(NamedTuple):
    q: torch.Tensor  # (b, h, n, d)
    k: torch.Tensor
    v: torch.Tensor


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


def drop_mask(x, rate):
    """Which elements of x dropout keeps, as bools: a share of 1 - rate, to within 2^-16."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand(x.shape, device=x.device) >= rate
    # on a CPU bernoulli_ draws element by element, a tenth of a small model's training; here 64 bits serve four elements
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape) >= min(round(rate * 2**16), 2**16 - 1) - 2**15


def with_update(linear, update):
    """The plain, frozen nn.Linear whose weight is that of `linear` plus the update (out, in), added in float32 before rounding."""
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight = nn.Parameter((linear.weight.float() + update).to(linear.weight.dtype), requires_grad=False)
    plain.bias = linear.bias
    return plain


class LoRALinear(nn.Linear):
    """A frozen linear map plus a low-rank update: y = W x + b + B A dropout(x), scale 1.

    On qkv this is the paper's form: one A (rank, c) shared by q, k and v, and one joint B (3c, rank).
    """

    def __init__(self, linear, rank, dropout=0.0, init="zero"):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        self.dropout = dropout
        self.train(linear.training)
        if init == "zero":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        else:  # the published code re-initialises every nn.Linear after LoRA set its own weights
            nn.init.trunc_normal_(self.lora_a, std=0.02)
            nn.init.trunc_normal_(self.lora_b, std=0.02)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.training and self.dropout:
            low = F.linear(torch.where(drop_mask(x, self.dropout), x, 0), self.lora_a) / (1 - self.dropout)
        else:
            low = F.linear(x, self.lora_a)
        return y + F.linear(low, self.lora_b)

    @torch.no_grad()
    def folded(self):
        """The plain nn.Linear whose weight is W + B A."""
        return with_update(self, self.lora_b.float() @ self.lora_a.float())


# ----------------------------------------------------------------------------------------------------------------------
# Matching, merging, modulation


class Matching(NamedTuple):
    order: torch.Tensor  # (b, n) a permutation: the tokens that stay, in their new order, then the sources, most similar first
    dst: torch.Tensor  # (b, r) for each source the index, among those that stay, of the token that it merges into


def most_merges(n, specials):
    """The most pairs that can merge among n tokens, `specials` of which never do."""
    return max((n - specials) // 2, 0)


def similarities(metric, specials=1):
    """metric (b, n, d) -> cosines of even with odd tokens (b, ceil(n / 2), floor(n / 2)), float32; -inf for special tokens."""
    with torch.autocast(metric.device.type, enabled=False):  # in bf16 many would be equal
        metric = F.normalize(metric.float(), dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].mT
    scores[:, 0] = -math.inf  # the class token is even token 0
    if specials == 2:
        scores[:, :, 0] = -math.inf  # the distillation token is odd token 0
    return scores


def match(metric, r, specials=1):
    """Bipartite soft matching (ToMe §3): each even token proposes to its most similar odd one; the r best pairs merge.

    metric: (b, n, d), compared by cosine. r: at most most_merges(n, specials). specials: 1 (class token) or 2 (class and
    distillation token), which stay, in front. No gradient flows through the matching. Returns a Matching.
    """
    b, n, _ = metric.shape
    best, partner = similarities(metric.detach(), specials).max(dim=-1)  # (b, a)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    src, unmerged = ranked[:, :r], ranked[:, r:].sort(dim=-1).values  # sorted: the class token comes first

    odd = torch.arange(1, n, 2, device=metric.device).expand(b, -1)
    dst = partner.gather(1, src) + unmerged.shape[1]
    if specials == 1:
        order = [2 * unmerged, odd, 2 * src]
    else:
        # the distillation token moves up to second place; nothing merges into it, so no other odd token's place changes
        order = [2 * unmerged[:, :1], odd[:, :1], 2 * unmerged[:, 1:], odd[:, 1:], 2 * src]
    return Matching(torch.cat(order, dim=1), dst)


def rows(index, n):
    """index (b, m) into the n tokens of each image -> (b m), into the tokens of the whole batch, image after image."""
    return (index + n * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


def take(x, index):
    """Tokens of x (b, n, c) at index (b, m) -> (b, m, c). On a CPU copying whole rows is 20 times as fast as a gather."""
    taken = rearrange(x, "b n c -> (b n) c").index_select(0, rows(index, x.shape[1]))
    return rearrange(taken, "(b m) c -> b m c", b=x.shape[0])


def add_at(x, index, y):
    """x (b, n, c) plus y (b, m, c) at the tokens index (b, m); several may go to the same token."""
    added = rearrange(x, "b n c -> (b n) c").index_add(0, rows(index, x.shape[1]), rearrange(y, "b m c -> (b m) c"))
    return rearrange(added, "(b n) c -> b n c", b=x.shape[0])


def merge(tokens, matching, modulate=None):
    """Size-weighted merging (ToMe §3): every source is averaged into its destination, each weighted by its size.

    modulate: None, or a function (sources, destinations) -> sources, all (b, r, c), weighted by size, the most similar pair
    first; what it returns is merged instead. The divisor stays the merged size. Returns Tokens with r fewer.
    """
    x, size, source = tokens
    order, dst = matching
    r, kept = dst.shape[1], order.shape[1] - dst.shape[1]
    if size is None:
        size = torch.ones(*order.shape, 1, device=x.device)
    else:
        x = x * size.to(x.dtype)
    stay, src = order.split([kept, r], dim=1)
    x, x_src = take(x, stay), take(x, src)
    if modulate is not None:
        x_src = modulate(x_src, take(x, dst))
    x = add_at(x, dst, x_src.to(x.dtype))
    size = size.gather(1, order[..., None])
    size = size[:, :kept].scatter_add(1, dst[..., None], size[:, kept:])

    new_index = repeat(torch.arange(kept, device=dst.device), "n -> b n", b=dst.shape[0])
    new_index = torch.empty_like(order).scatter(1, order, torch.cat([new_index, dst], dim=1))  # (b, n): old -> new
    return Tokens(x / size.to(x.dtype), size, new_index.gather(1, source))


def modulate(src, dst, w_r, w_d):
    """PYRA's re-activation of the source tokens (§3.3 of the paper).

    src, dst: (b, r, c) weighted by size. w_r: (r, s), w_d: (s, c). Returns (b, r, c).

    With P = LN(src + dst), delta_D = W_r^T P (s, c) and delta_r = P W_D^T (r, s):
    - s = 1: src + src * g_D * g_r with the channel gate g_D = 2 sigmoid(delta_D) in (0, 2) and the token gate
      g_r = 2 sigmoid(delta_r) - 1 in (-1, 1).
    - s > 1 (supplement, "Modulation Matrix Rank"): src + src * W with W = delta_r delta_D (r, c). Our reading: Eq. 6, the
      channel gate, is left out, and W stands where g_r stood, without a squashing function, since none is mentioned.
    W_D = 0 gives src in both.
    """
    p = F.layer_norm(src + dst, src.shape[-1:])
    delta_d = w_r.mT @ p  # (b, s, c)
    delta_r = F.linear(p, w_d)  # (b, r, s)
    if w_r.shape[1] == 1:
        gate = (2 * delta_d.sigmoid()) * (2 * delta_r.sigmoid() - 1)
    else:
        gate = delta_r @ delta_d  # (b, r, c)
    return torch.addcmul(src, src, gate)


class ToMe(nn.Module):
    """Token merging (Bolya et al., ICLR 2023): merges the r most similar pairs, or half of the tokens where fewer are left.

    The simplest token reducer; `Block` says what a reducer is.
    """

    def __init__(self, r, specials=1):
        super().__init__()
        self.r, self.specials = r, specials

    def tokens_after(self, n):
        return n - min(self.r, most_merges(n, self.specials))

    def match(self, qkv):
        n = qkv.k.shape[2]
        metric = qkv.k.mean(dim=1)  # (b, n, d) the mean key of the heads
        return match(metric, n - self.tokens_after(n), self.specials)

    def forward(self, tokens, qkv):
        n = tokens.x.shape[1]
        return tokens if self.tokens_after(n) == n else merge(tokens, self.match(qkv))

    def extra_repr(self):
        return f"r={self.r}"


class PYRA(ToMe):
    """ToMe with modulation: w_r has one row per merged pair, in order of similarity, so r is exact and never clamped."""

    def __init__(self, r, dim, s=1, specials=1):
        super().__init__(r, specials)
        self.w_r = nn.Parameter(torch.empty(r, s).uniform_(-1, 1) / math.sqrt(s))
        self.w_d = nn.Parameter(torch.zeros(s, dim))  # zeros: training starts at ToMe

    def forward(self, tokens, qkv):
        return merge(tokens, self.match(qkv), lambda src, dst: modulate(src, dst, self.w_r, self.w_d))

    def extra_repr(self):
        return f"r={self.r}, s={self.w_r.shape[1]}"


# ----------------------------------------------------------------------------------------------------------------------
# The Vision Transformer


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the branch of each sample with probability `rate`."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):  # a convolution whose patches don't overlap is a linear map of each patch
        (p, q), weight = self.proj.kernel_size, rearrange(self.proj.weight, "c k p q -> c (k p q)")
        return F.linear(rearrange(images, "b k (y p) (x q) -> b (y x) (k p q)", p=p, q=q), weight, self.proj.bias)


def attend(qkv, size=None):
    """Softmax(q k^T / sqrt(d) + log size) v, (b, h, n, d). With its size as weight, a merged token counts as all that it stands for."""
    bias = None if size is None else rearrange(size.log().to(qkv.q.dtype), "b n 1 -> b 1 1 n")
    if qkv.q.device.type == "cpu" and (torch.is_grad_enabled() or qkv.q.dtype == torch.bfloat16):
        # on a CPU the fused kernel's backward takes two to five times as long as these lines, and in bf16 its forward 1.1 to 1.6 times
        q, k, v = (t.contiguous() for t in qkv)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(*qkv, attn_mask=bias)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = attend  # replaced by reducers whose sizes carry a gradient, see set_reducers

    def project(self, x):
        return QKV(*rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads))

    def forward(self, qkv, size=None):
        return self.proj(rearrange(self.attend(qkv, size), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def residual(tokens, u, branch):
    """How a branch joins the stream: x + branch, (b, n, c). u, the branch's input LN(x), is there for a PEFT that reads it too."""
    return tokens.x + branch


class Block(nn.Module):
    """A transformer block that reduces its tokens between attention and MLP.

    A PEFT may replace any linear map by its own, and the two joins `peft_attn` and `peft_mlp`, called as
    join(tokens, u, branch) -> x (b, n, c). What it adds is named peft_..., so that it is trained and saved; a module that
    adds work for n tokens says how much by `macs(n)`.

    A reducer is a module called as reducer(tokens, qkv) -> Tokens. Besides:
    - tokens_after(n): how many of n tokens are left, special ones included; raises ValueError where the image decides;
    - r, settings: what an adapter's file records of it, pairs merged (an int) and anything else (a dict); both optional.
    Only where they apply:
    - per_image = True: how many tokens are left depends on the image. A batch is padded with tokens of size 0;
    - lrs: {parameter name: learning rate} of parameters that have their own, without weight decay;
    - tokens_expected(n): in training, how many of n tokens (b,) float32 stay, with a gradient; else those of size > 0 count;
    - budget_weight: the number of tokens is learned, towards a budget of operations whose loss has this weight;
    - after_step(): called after each step of the optimizer;
    - macs_saved(n, m, block): operations that the block saves beyond those of m instead of n tokens in its MLP.
    """

    def __init__(self, dim, num_heads, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.peft_attn = self.peft_mlp = residual
        self.reducer = None
        self.prop_attn = True  # proportional attention: weigh each key by its size

    def forward(self, tokens):
        u = self.norm1(tokens.x)
        qkv = self.attn.project(u)
        branch = self.drop_path(self.attn(qkv, tokens.size if self.prop_attn else None))
        tokens = tokens._replace(x=self.peft_attn(tokens, u, branch))
        if self.reducer is not None:
            tokens = self.reducer(tokens, qkv)
        u = self.norm2(tokens.x)
        return tokens._replace(x=self.peft_mlp(tokens, u, self.drop_path(self.mlp(u))))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021) with timm's parameter names.

    img_size, patch_size: pixels; the one must divide the other. distilled: DeiT's second special token and head.
    global_pool: "token" (the class token's output is classified) or "avg" (MAE's fine-tuning: the patches' mean, each
    weighted by its size, then fc_norm). drop_path_rate: of the last block; it rises linearly from 0. num_classes = 0: no
    head, the logits are the pooled features. Raises ValueError.
    """

    def __init__(self, *, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 num_classes=1000, distilled=False, global_pool="token", drop_path_rate=0.0):
        super().__init__()
        for name, value in dict(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads).items():
            check_integer(name, value)
        check_integer("num_classes", num_classes, least=0)
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg', not {global_pool!r}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and less than 1, not {drop_path_rate!r}")
        self.img_size, self.patch_size, self.embed_dim, self.num_classes = img_size, patch_size, embed_dim, num_classes
        self.distilled, self.global_pool = distilled, global_pool
        self.num_patches = (img_size // patch_size) ** 2
        self.specials = 2 if distilled else 1
        self.checkpoint = False  # in training: keep a block's input alone, and compute the block again in the backward pass
        self.peft = None  # a PEFT other than LoRA: its name and sizes, for `describe`
        self.folded = None  # the PEFT that was folded into the weights, if any: save_adapter has nothing left to save then

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.specials + self.num_patches, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        if global_pool == "avg":
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        else:
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if distilled:
            self.head_dist = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, images):
        """images (b, 3, img_size, img_size), normalised -> the Tokens before the first block."""
        if images.ndim != 4 or images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"images must be (b, 3, {self.img_size}, {self.img_size}), not {tuple(images.shape)}")
        specials = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        specials = repeat(torch.cat(specials, dim=1), "1 p c -> b p c", b=images.shape[0])
        x = torch.cat([specials, self.patch_embed(images)], dim=1) + self.pos_embed
        source = repeat(torch.arange(x.shape[1], device=x.device), "n -> b n", b=x.shape[0])
        return Tokens(x, None, source)

    def run_block(self, block, tokens):
        if self.checkpoint and self.training:
            return torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def forward_tokens(self, images, depth=None):
        """images (b, 3, img_size, img_size), normalised -> the Tokens after the first `depth` blocks, by default all."""
        tokens = self.embed(images)
        for block in self.blocks[:depth]:
            tokens = self.run_block(block, tokens)
        return with_sizes(tokens)

    def pool(self, tokens):
        """Tokens after the last block -> what the head reads, (b, c)."""
        if self.global_pool == "token":
            return self.norm(tokens.x[:, 0])
        x, size = tokens.x[:, self.specials:], tokens.size[:, self.specials:].to(tokens.x.dtype)
        return self.fc_norm((x * size).sum(dim=1) / size.sum(dim=1))

    def forward(self, images):
        """images (b, 3, img_size, img_size), normalised -> logits (b, num_classes) of the class head."""
        return self.head(self.pool(self.forward_tokens(images)))

    def forward_heads(self, images):
        """A distilled model's logits of both heads, two (b, num_classes); DeiT's and timm's answer is their mean."""
        if not self.distilled or self.global_pool != "token":
            raise ValueError("forward_heads is for a distilled model with global_pool='token'")
        x = self.norm(self.forward_tokens(images).x[:, :2])
        return self.head(x[:, 0]), self.head_dist(x[:, 1])


SIZES = {
    "vit_nano_patch4_56": dict(img_size=56, patch_size=4, embed_dim=96, num_heads=3),  # ours: data/README.md
    "vit_tiny_patch16_224": dict(embed_dim=192, num_heads=3),
    "vit_small_patch16_224": dict(embed_dim=384, num_heads=6),
    "vit_base_patch16_224": dict(embed_dim=768, num_heads=12),
    "vit_large_patch16_224": dict(embed_dim=1024, num_heads=16, depth=24),
    "deit_small_patch16_224": dict(embed_dim=384, num_heads=6),
    "deit_base_patch16_224": dict(embed_dim=768, num_heads=12),
    "deit_small_distilled_patch16_224": dict(embed_dim=384, num_heads=6, distilled=True),
    "deit_base_distilled_patch16_224": dict(embed_dim=768, num_heads=12, distilled=True),
}


def create_model(name, **kwargs):
    """An untrained VisionTransformer by its timm name; what follows a dot (timm's tag of the weights) is ignored.

    kwargs are VisionTransformer's: num_classes=..., drop_path_rate=..., global_pool="avg" for MAE's. Raises ValueError.
    """
    size = str(name).split(".")[0]
    if size not in SIZES:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(SIZES)}")
    return VisionTransformer(**{**SIZES[size], **kwargs})


# ----------------------------------------------------------------------------------------------------------------------
# Surgery: adapting and merging an existing model


def is_adapter(name):
    """Whether adaptation trains the parameter: a PEFT's, a reducer's, or the class head's (with global_pool="avg" also its norm's)."""
    return "lora_" in name or "peft_" in name or ".reducer." in name or name.startswith(("head.", "fc_norm."))


def freeze(model):
    """Freezes the backbone: only the parameters of `is_adapter` are trained. Returns the model."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
    return model


def check_peft(model, dropout=0.0, **sizes):
    """Checks what every PEFT needs: sizes that are positive integers, a dropout rate, and a model without a PEFT. Raises ValueError."""
    for name, value in sizes.items():
        check_integer(name, value)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, not {dropout!r}")
    if any(isinstance(block.attn.qkv, LoRALinear) for block in model.blocks):
        raise ValueError("the model has LoRA already; merge_lora folds it in")
    if model.peft:
        raise ValueError(f"the model has {model.peft['name']} already, and takes one PEFT")


def add_lora(model, rank=8, dropout=0.1, init="zero"):
    """Adds LoRA to every block's attn.qkv and freezes the backbone (see `freeze`). Returns the model.

    rank: h in the paper. dropout: on LoRA's input, in training. init: "zero" (B = 0), or "published" (A and B truncated
    normal, 0.02, as the published code has it in effect). Raises ValueError.
    """
    check_peft(model, dropout, rank=rank)
    if init not in ("zero", "published"):
        raise ValueError(f"init must be 'zero' or 'published', not {init!r}")
    for block in model.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank, dropout, init)
    model.folded = None
    return freeze(model)


def merge_lora(model):
    """Folds LoRA into qkv, W + B A, and removes its tensors: the same logits for less work. Returns the model."""
    for block in model.blocks:
        if isinstance(block.attn.qkv, LoRALinear):
            block.attn.qkv = block.attn.qkv.folded()
            model.folded = "LoRA"
    return model


def check_schedule(model, r):
    """r, an int or a list, as a list of ints with one entry per block. Raises ValueError."""
    depth = len(model.blocks)
    entries = [r] * depth if isinstance(r, int) else list(r) if isinstance(r, (list, tuple)) else None
    if entries is None:
        raise ValueError(f"r must be an integer or a list with one entry per block, not {r!r}")
    if len(entries) != depth:
        raise ValueError(f"the schedule has {len(entries)} entries, the model {depth} blocks")
    for i, entry in enumerate(entries):
        check_integer(f"block {i}: r", entry, least=0)
    return entries


def set_reducers(model, reducers, prop_attn=True, attend=attend):
    """Gives each block its reducer, or None, in place of the one that it had and of all that came with that one. Returns the model.

    prop_attn, attend: of every block: attention after a reducer depends on the sizes that the reducer gives.
    """
    for block, reducer in zip(model.blocks, reducers, strict=True):
        block.reducer = None if reducer is None else reducer.to(model.pos_embed.device).train(model.training)
        block.prop_attn, block.attn.attend = prop_attn, attend
    return model


def add_tome(model, r, prop_attn=True):
    """Merges tokens in every block with r > 0, in place of any reducer there is. Returns the model.

    r: pairs merged, an int or a list with one entry per block; as in ToMe, a block merges at most half of the tokens that it
    gets. prop_attn: proportional attention. Raises ValueError.
    """
    return set_reducers(model, [ToMe(entry, model.specials) if entry else None for entry in check_schedule(model, r)], prop_attn)


def add_pyra(model, r, s=1, prop_attn=True):
    """Merges with modulation in every block with r > 0, in place of any reducer there is. Returns the model.

    r as in `add_tome`, but an entry of more than half of the tokens left is refused: w_r has a row for each merged pair.
    s: rank of the generators w_r (r, s) and w_d (s, c). Raises ValueError.
    """
    check_integer("s", s)
    entries = check_schedule(model, r)
    n = model.num_patches + model.specials
    for i, entry in enumerate(entries):
        if entry > (most := most_merges(n, model.specials)):
            raise ValueError(f"block {i}: {entry} pairs can't merge, {n} tokens are left and at most {most} pairs can")
        n -= entry
    reducers = [PYRA(entry, model.embed_dim, s, model.specials).to(model.pos_embed) if entry else None for entry in entries]
    return set_reducers(model, reducers, prop_attn)


def param_groups(model, lr=1e-3, modulation_lr=None, weight_decay=1e-4, layer_decay=None):
    """The trained parameters as AdamW's groups, each with a "name": "decay", "no_decay", "modulation"; empty ones left out.

    Biases, norms, position embedding and special tokens don't decay. modulation_lr: of w_r and w_d (Table 4); None: lr.
    Parameters with a learning rate from their reducer (`lrs`) form groups of their names. layer_decay: for full fine-tuning
    (BEiT, MAE), the learning rate's factor from each block to the one below; then there is one group per layer.
    """
    kinds = {
        "decay": dict(lr=lr, weight_decay=weight_decay),
        "no_decay": dict(lr=lr, weight_decay=0.0),
        "modulation": dict(lr=lr if modulation_lr is None else modulation_lr, weight_decay=weight_decay),
    }
    for block in model.blocks:
        kinds |= {name: dict(lr=own, weight_decay=0.0) for name, own in getattr(block.reducer, "lrs", {}).items()}
    groups = {kind: {} for kind in kinds}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = name.rpartition(".reducer.")[2]
            plain = p.ndim <= 1 or name in ("pos_embed", "cls_token", "dist_token")
            kind = own if own in kinds else "modulation" if own in ("w_r", "w_d") else "no_decay" if plain else "decay"
            above = layers_above(name, len(model.blocks)) if layer_decay is not None and own not in kinds else 0
            groups[kind].setdefault(above, []).append(p)
    return [dict(kinds[kind], name=kind, params=params, lr=kinds[kind]["lr"] * (layer_decay or 1) ** above)
            for kind, layers in groups.items() for above, params in layers.items()]


def layers_above(name, depth):
    """How many layers lie between a parameter and the logits: depth + 1 for the embedding's, 0 for a head's."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return depth - int(block[1])
    return depth + 1 if name.startswith(("patch_embed.", "pos_embed", "cls_token", "dist_token")) else 0


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def first_line(error):
    """The first line of an exception's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_atomically(path, write):
    """write(partial path), then rename: whenever the process is killed, `path` is complete or as it was before."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except Exception as error:
        # a full disk raises any of these in Python, torch and safetensors
        if not isinstance(error, (OSError, RuntimeError)) and type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path} can't be written ({first_line(error)}): is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def check_fit(source, own, given, optional=()):
    """Raises ValueError unless the tensors `given` have the names and shapes of `own`, {name: tensor}; some names may be optional."""
    missing = [k for k in own if k not in given and not k.startswith(tuple(optional))]
    unexpected = [k for k in given if k not in own]
    misshapen = [f"{k} as {tuple(given[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in given and given[k].shape != own[k].shape]
    for what, names in (("lacks", missing), ("has the unexpected", unexpected), ("has", misshapen)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{source} doesn't fit the model: it {what} {', '.join(names[:5])}{more}")


@torch.no_grad()
def load_pretrained(model, source):
    """Loads a backbone's weights, strictly. Returns the model.

    source: a file, .safetensors, .pth / .pt / .bin (plain, or under "model" or "state_dict"; "module." in front of names is
    removed) or .npz (Google's JAX release); or a timm name on the Hugging Face hub, "vit_base_patch16_224.orig_in21k".
    A head stays as it is where the file has none, or one for another number of classes. The position embedding is resized to
    the model's grid. With global_pool="avg" the file's final norm isn't used: MAE trains a new fc_norm. Nothing in a file is
    executed. Raises FileNotFoundError, or ValueError that lists what is missing, unexpected or misshapen.
    """
    weights = read_checkpoint(source)
    if "blocks.0.norm1.weight" not in weights and "embedding/kernel" in {k.removeprefix("opt/target/") for k in weights}:
        weights = from_google(weights)
    weights = {k: v for k, v in weights.items() if not k.startswith("pre_logits.")}  # original in21k; Google drops it too
    if model.global_pool == "avg":
        weights = {k: v for k, v in weights.items() if not k.startswith("norm.")}

    own = {k: v for k, v in model.state_dict().items() if "lora_" not in k and "peft_" not in k and ".reducer." not in k}
    for head in ("head", "head_dist")[: model.specials]:
        if f"{head}.weight" in weights and len(weights[f"{head}.weight"]) != model.num_classes:
            weights = {k: v for k, v in weights.items() if not k.startswith(f"{head}.")}
    if "pos_embed" in weights and weights["pos_embed"].shape != own["pos_embed"].shape:
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], model)

    check_fit(source, own, weights, optional=("head.", "head_dist.", "fc_norm."))
    for name, value in weights.items():
        own[name].copy_(value)
    return model


def read_checkpoint(source):
    """{name: tensor} of a file, or of a model on the hub; see load_pretrained."""
    path, suffix = str(source), os.path.splitext(str(source))[1]
    if suffix not in (".safetensors", ".pth", ".pt", ".bin", ".npz"):
        if os.path.exists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise ValueError(f"weights must be a .safetensors, .pth, .pt, .bin or .npz file or a name on the hub, not {path!r}")
        from huggingface_hub import hf_hub_download
        try:
            path = hf_hub_download(path if "/" in path else f"timm/{path}", "model.safetensors")
        except Exception as error:  # the hub's client raises a dozen kinds: no such name, no network, no permission
            raise ValueError(f"{source!r} is no file here, and the hub did not give it: {first_line(error)}") from error
        suffix = ".safetensors"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path!r}")
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file
            weights = load_file(path)
        elif suffix == ".npz":
            import numpy as np
            with np.load(path, allow_pickle=False) as arrays:
                weights = {k: torch.from_numpy(arrays[k]) for k in arrays.files}
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, another format, or pickled code
        raise ValueError(f"{path} can't be read as a {suffix} file of tensors: {first_line(error)}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return {k.removeprefix("module."): v for k, v in weights.items()}


def from_google(arrays):
    """Google's JAX names and layouts (vision_transformer's .npz releases) -> timm's."""
    arrays = {k.removeprefix("opt/target/"): v for k, v in arrays.items()}
    renamed = {}

    def move(old, new, pattern=None):
        for part in ("kernel", "scale", "bias"):
            if f"{old}/{part}" in arrays:
                value, kind = arrays.pop(f"{old}/{part}"), "bias" if part == "bias" else "weight"
                renamed[f"{new}.{kind}"] = rearrange(value, pattern) if pattern and part == "kernel" else value

    for old, new in (("cls", "cls_token"), ("Transformer/posembed_input/pos_embedding", "pos_embed")):
        if old in arrays:
            renamed[new] = arrays.pop(old)
    move("embedding", "patch_embed.proj", "p q k c -> c k p q")
    move("Transformer/encoder_norm", "norm")
    move("head", "head", "i o -> o i")
    move("pre_logits", "pre_logits", "i o -> o i")
    depth = 1 + max((int(m[1]) for m in (re.match(r"Transformer/encoderblock_(\d+)/", k) for k in arrays) if m), default=-1)
    for i in range(depth):
        old, new = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{old}/MultiHeadDotProductAttention_1"
        move(f"{old}/LayerNorm_0", f"{new}.norm1")
        move(f"{old}/LayerNorm_2", f"{new}.norm2")
        move(f"{old}/MlpBlock_3/Dense_0", f"{new}.mlp.fc1", "i o -> o i")
        move(f"{old}/MlpBlock_3/Dense_1", f"{new}.mlp.fc2", "i o -> o i")
        move(f"{attention}/out", f"{new}.attn.proj", "h d o -> o (h d)")
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        if all(f"{part}/{kind}" in arrays for part in parts for kind in ("kernel", "bias")):
            kernels, biases = ([arrays.pop(f"{part}/{kind}") for part in parts] for kind in ("kernel", "bias"))
            renamed[f"{new}.attn.qkv.weight"] = rearrange(kernels, "three i h d -> (three h d) i")
            renamed[f"{new}.attn.qkv.bias"] = rearrange(biases, "three h d -> (three h d)")
    return {**renamed, **arrays}  # load_pretrained refuses what is left


def resize_pos_embed(pos_embed, model):
    """A position embedding (1, specials + n, c) resized to the model's grid; bicubic, as timm does. Raises ValueError."""
    n = pos_embed.shape[1] - model.specials if pos_embed.ndim == 3 and pos_embed.shape[0] == 1 else 0
    grid, new_grid = math.isqrt(max(n, 0)), math.isqrt(model.num_patches)
    if n < 1 or n != grid**2:
        raise ValueError(f"the position embedding {tuple(pos_embed.shape)} isn't {model.specials} special tokens and a square grid")
    specials, patches = pos_embed[:, :model.specials], pos_embed[:, model.specials:]
    patches = rearrange(patches.float(), "1 (y x) c -> 1 c y x", y=grid)
    patches = F.interpolate(patches, size=(new_grid, new_grid), mode="bicubic", antialias=True)
    return torch.cat([specials, rearrange(patches, "1 c y x -> 1 (y x) c").to(specials.dtype)], dim=1)


def describe(model):
    """What an adapter must fit, as {str: str}: geometry, classes, PEFT, reducers, and a hash of the frozen weights."""
    qkv = model.blocks[0].attn.qkv
    reducers = [block.reducer for block in model.blocks]
    settings = [getattr(reducer, "settings", None) for reducer in reducers]
    frozen = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad and not is_adapter(name) and not name.startswith("head_dist."):
            frozen.update(name.encode())
            # as bf16 the hash is the same whether the backbone is held in float32 or in bf16
            frozen.update(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    fields = dict(
        img_size=model.img_size, patch_size=model.patch_size, embed_dim=model.embed_dim, depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads, num_classes=model.num_classes, distilled=model.distilled,
        global_pool=model.global_pool,
        lora_rank=qkv.lora_a.shape[0] if isinstance(qkv, LoRALinear) else 0,
        peft=model.peft,
        reducers=sorted({type(reducer).__name__ for reducer in reducers if reducer is not None}),
        r=[0 if reducer is None else getattr(reducer, "r", None) for reducer in reducers],
        settings=settings if any(settings) else None,
        s=max((reducer.w_r.shape[1] for reducer in reducers if isinstance(reducer, PYRA)), default=0),
        prop_attn=[block.prop_attn for block in model.blocks],
        backbone=frozen.hexdigest(),
    )
    return {k: json.dumps(v) for k, v in fields.items()}


def save_adapter(model, path):
    """Writes the trained parameters, and only them, as safetensors, with what they fit in the metadata (see `describe`).

    Raises ValueError where the PEFT was folded in already or nothing is trained.
    """
    from safetensors.torch import save_file
    if model.folded:
        raise ValueError(f"{model.folded} was folded into the backbone: save the adapter before folding")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    if not tensors:
        raise ValueError("the model has no trained parameters to save")
    metadata = {"format": "pyra-adapter", **describe(model)}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata))


@torch.no_grad()
def load_adapter(model, path):
    """Loads what save_adapter wrote into a model with the same backbone, PEFT, reducers and classes. Returns the model.

    Raises FileNotFoundError, or ValueError naming what differs; the model is left as it was then.
    """
    from safetensors import safe_open
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no adapter {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} can't be read as a safetensors file: {first_line(error)}") from error
    if metadata.get("format") != "pyra-adapter":
        raise ValueError(f"{path} is not an adapter that save_adapter wrote")
    for key, value in describe(model).items():
        if metadata.get(key, "null") != value:  # an older version had none of the settings that its file lacks
            differs = "its frozen weights are of another backbone" if key == "backbone" else f"its {key} is {metadata.get(key)}, the model's {value}"
            raise ValueError(f"{path} doesn't fit the model: {differs}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_fit(path, trained, tensors)
    for name, p in trained.items():
        p.copy_(tensors[name])
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Cost


def token_counts(model):
    """Tokens before the first block and after each, special ones included: a list of depth + 1 ints."""
    counts = [model.num_patches + model.specials]
    for block in model.blocks:
        counts.append(counts[-1] if block.reducer is None else block.reducer.tokens_after(counts[-1]))
    return counts


def macs_of_counts(model, counts):
    """Multiply-accumulates of one image's forward pass with so many tokens before the first block and after each; see count_macs."""
    c = model.embed_dim
    macs = model.num_patches * c * 3 * model.patch_size**2 + c * model.num_classes
    for block, n, m in zip(model.blocks, counts, counts[1:]):
        a = block.attn.proj.in_features
        macs += 4 * n * c * a + 2 * n**2 * a + 2 * m * c * block.mlp.fc1.out_features
    return macs


def count_macs(model):
    """Multiply-accumulates of one image's forward pass by formula, LoRA folded in; the literature's "GFLOPs" are 1e9 of these.

    A block that gets n tokens and keeps m costs 4 n c a + 2 n^2 a (attention, a wide: c, less where heads are pruned)
    + 2 m c hidden (MLP). Norms, softmax, activations, matching and modulation, together well below 1 %, are left out as is usual.
    """
    return macs_of_counts(model, token_counts(model))
