"""PYRA: parallel yielding re-activation, in plain PyTorch + einops.

PYRA (Xiong et al., ECCV 2024, arXiv 2403.09192) adapts a frozen, pre-trained Vision Transformer and makes it faster in one training stage:

1. LoRA adds a low-rank update to every block's qkv projection; the backbone stays frozen.
2. ToMe merges the r^l most similar token pairs of every block l between attention and MLP, so later blocks have less to do.
3. Just before a pair merges, PYRA modulates its source token. Two tiny generators, W_r (r, s) and W_D (s, c), read the pairs and yield a gate
   per channel and one per token; their product re-activates what averaging would blur. After training, LoRA folds into the backbone.

    model = create_model("vit_base_patch16_224", num_classes=100)
    load_pretrained(model, "vit_base_patch16_224.orig_in21k")       # or a file, tensors, a timm model
    add_lora(model, rank=8)
    add_pyra(model, merge_schedule("high"))
    ...                                                             # train param_groups(model, lr=1e-3, modulation_lr=1e-4)
    save_adapter(model, "adapter.safetensors")
    merge_lora(model)

Axes: b batch, n tokens, h heads, d head dim, c channels, r merged pairs, s modulation rank. Parameter names are timm's.

Where this departs from the published code (github.com/THU-MIG/PYRA), and why:
- the modulation's LayerNorm has no affine part: only then does ViT-B have the paper's 9.4 K parameters of modulation;
- `param_groups` gives the generators their own learning rate; in the published code that option matches no parameter;
- LoRA's B starts at zero, so that training starts at the pre-trained model; the published code draws it at random;
- a distilled model's logits come from the class head alone, the one that is trained; `forward_heads` gives both;
- a schedule is an argument, not a list popped during the forward: two forwards agree, and so do compile and checkpointing.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange, repeat

# ---- What public functions check -------------------------------------------------------------------------------------
def require(condition, sentence, error=ValueError):
    """Raises ValueError, or another error, with the sentence unless the condition holds."""
    if not condition:
        raise error(sentence)

def unwrap(model):
    """The model inside torch.compile, DistributedDataParallel and DataParallel, in any nesting."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model

def on_model(function):
    """Lets a function whose first argument is a model take a wrapped one too. Raises ValueError for a foreign one."""
    @functools.wraps(function)
    def wrapper(model, *args, **kwargs):
        own, kind = unwrap(model), f"{type(unwrap(model)).__module__}.{type(unwrap(model)).__name__}"
        require(isinstance(own, VisionTransformer), f"{function.__name__} needs a pyra.VisionTransformer, not {kind}: see create_model and from_timm")
        result = function(own, *args, **kwargs)
        return model if result is own else result
    return wrapper

def to_python(value):
    """NumPy's and torch's numbers and arrays as Python's, in a list too."""
    return value.tolist() if hasattr(value, "tolist") else [to_python(v) for v in value] if isinstance(value, (list, tuple, range)) else value

def check_integer(name, value, least=1):
    """The value as an int. Raises ValueError unless it is an integer, NumPy's and torch's too, and large enough."""
    kind, number = "a positive integer" if least == 1 else f"an integer of at least {least}", to_python(value)
    require(type(number) is int and number >= least, f"{name} must be {kind}, not {value!r}")
    return number

# ---- Schedules: how many pairs each block merges ---------------------------------------------------------------------
# Table 5 of the supplement. For ViT-L it prints 23 entries for 24 blocks: one of its 4s is missing (the published code has three).
PAPER_SCHEDULES = {
    ("low", 12): [16] * 11 + [10], ("low", 24): [8] * 23 + [6], ("high", 12): [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3],
    ("high", 24): [20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1],
}
MAC_RATIOS = {"low": 2.002, "high": 3.463}  # of ViT-B when merged by these lists

def check_flops_ratio(flops_ratio, name="flops_ratio"):
    """F/f, how many times fewer operations, as a Python number. Raises ValueError unless it is finite and above 1."""
    number = to_python(flops_ratio)
    require(type(number) in (int, float) and 1 < number < math.inf, f"{name} must be a finite number greater than 1, not {flops_ratio!r}")
    return number

def solve_schedule(depth, tokens=196, remaining=4, flops_ratio=3.4):
    """Eq. (1) of the supplement, as printed: r^l = floor((g(l-1) - g(l)) (T - t)), g(x) = (1 - x/L)^(F/f - 1).

    depth: L, blocks. tokens: T, patches at the start (special tokens not counted). remaining: t, patches after the last
    block. flops_ratio: F/f, which the MACs meet to a few per cent up to 4; 2 gives a constant schedule. Returns L ints. Raises ValueError."""
    depth, tokens, remaining = check_integer("depth", depth), check_integer("tokens", tokens), check_integer("remaining", remaining, least=0)
    require(remaining < tokens, f"remaining ({remaining}) must be less than tokens ({tokens})")
    exponent = check_flops_ratio(flops_ratio) - 1
    g = lambda x: (1 - x / depth) ** exponent
    return [math.floor((g(l - 1) - g(l)) * (tokens - remaining) + 1e-9) for l in range(1, depth + 1)]  # 1e-9: (1/12) * 192 is 15.999...

def merge_schedule(rate, depth=12, tokens=196, model=None):
    """The schedule of a compression rate: a list of `depth` ints, the pairs merged in each block. Raises ValueError.

    rate: "low" or "high", the paper's lists for 196 patches and 12 or 24 blocks (Table 5), and for any other geometry what `solve_macs` finds
    for their ratio of operations; or a float, Eq. (1) for F/f = rate, except that at most half of the patches left merge. model: whose depth
    and patches count instead of the two numbers; without one, operations are those of a ViT-B with so many blocks and patches."""
    require(model is None or isinstance(unwrap(model), VisionTransformer), f"model must be a pyra.VisionTransformer, not {type(model)}: see from_timm")
    depth, tokens = (depth, to_python(tokens)) if model is None else (len(unwrap(model).blocks), unwrap(model).num_patches)
    if isinstance(rate, str):
        require(rate in MAC_RATIOS, f"rate must be 'low', 'high' or a number greater than 1, not {rate!r}")
        if (rate, depth) in PAPER_SCHEDULES and tokens == 196:
            return list(PAPER_SCHEDULES[rate, depth])
        if model is None:
            with torch.device("meta"):
                model = VisionTransformer(img_size=(16, 16 * check_integer("tokens", tokens)), depth=depth, num_classes=100)
        return solve_macs(model, MAC_RATIOS[rate])
    r, asked = [], solve_schedule(depth, tokens, flops_ratio=check_flops_ratio(rate, "rate"))
    for entry in asked:
        r.append(min(entry, most_merges(tokens - sum(r), 0)))
    if sum(r) < 0.95 * sum(asked):
        warnings.warn(f"Eq. (1) for F/f = {rate:g} merges too many at once, and only {sum(r)} of its {sum(asked)} pairs can; see solve_macs", stacklevel=2)
    return r

def counts_along(tokens, depth, exponent, remaining):
    """Patches before the first block and after each along Eq. (1)'s curve with any exponent; each block merges at most half of them."""
    counts = [tokens]
    for l in range(1, depth + 1):
        counts.append(min(counts[-1], max(round(remaining + (tokens - remaining) * (1 - l / depth) ** exponent), (counts[-1] + 1) // 2)))
    return counts

@on_model
def solve_macs(model, flops_ratio, remaining=4):
    """The schedule of Eq. (1)'s family with flops_ratio times fewer MACs, by `count_macs`, than the unmerged model.

    Eq. (1) misses its target: its exponent F/f - 1 is an approximation, and its floors lose up to one pair per block. Here the exponent is
    solved for, rounding errors carry over to the next block, and then single tokens are moved while that helps. At least `remaining`
    patches are left. Returns a list with one int per block. Raises ValueError where no schedule saves so many operations."""
    flops_ratio, remaining, tokens = check_flops_ratio(flops_ratio), check_integer("remaining", remaining), model.num_patches
    require(remaining < tokens, f"remaining ({remaining}) must be less than the model's {tokens} patches")
    along = functools.partial(counts_along, tokens, len(model.blocks), remaining=remaining)
    cost = lambda counts: macs_of_counts(model, [n + model.specials for n in counts])
    ratio, miss = lambda counts: cost([tokens] * len(counts)) / cost(counts), lambda counts: abs(ratio(counts) / flops_ratio - 1)
    low, high, most = 0.0, 1e3, ratio(along(math.inf))  # most: half of the patches in every block
    require(flops_ratio <= most, f"flops_ratio {flops_ratio:g} is out of reach: merging down to {remaining} patches reaches {most:.2f} at most")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(along(middle)) < flops_ratio else (low, middle)
    fits = lambda counts: counts[-1] >= remaining and all(0 <= n - m <= n // 2 for n, m in zip(counts, counts[1:]))
    # a pair more or less in block l: a token less or more after it and after all later ones
    moves = lambda counts: [counts[:l] + [n + step for n in counts[l:]] for l in range(1, len(counts)) for step in (-1, 1)]
    best = min(along(low), along(high), key=miss)
    while miss(better := min(filter(fits, moves(best)), key=miss, default=best)) < miss(best):
        best = better
    return [n - m for n, m in zip(best, best[1:])]

# ---- Tokens: what flows through the blocks ---------------------------------------------------------------------------
SPECIALS = ("cls_token", "dist_token", "reg_token")  # in front of the patches, in this order

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
    unrotated: torch.Tensor | None = None  # k before RoPE, where there is one

    def metric(self):
        """What tokens are compared by: the heads' mean key (b, n, d), before RoPE, after which equal patches that are far apart look unlike."""
        return (self.k if self.unrotated is None else self.unrotated).mean(dim=1)

# ---- LoRA ------------------------------------------------------------------------------------------------------------
def drop_mask(x, rate):
    """Which elements of x dropout keeps, as bools: a share of 1 - rate, to within 2^-16."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand(x.shape, device=x.device) >= rate
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # 16 per element: bernoulli_ takes a tenth of the time
    return bits.view(torch.int16)[: x.numel()].view(x.shape) >= min(round(rate * 2**16), 2**16 - 1) - 2**15

def with_update(linear, update):
    """The plain, frozen nn.Linear whose weight is that of `linear` plus the update (out, in), added in float32 before rounding."""
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter((linear.weight.float() + update).to(linear.weight.dtype), requires_grad=False), linear.bias
    return plain

class LoRALinear(nn.Linear):
    """A frozen linear map plus a low-rank update: y = W x + b + scale B A dropout(x). On qkv A (rank, c) is shared by q, k and v, as in the paper."""
    def __init__(self, linear, rank, dropout=0.0, scale=1.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = linear.in_features, linear.out_features, linear.weight, linear.bias
        self.lora_a = nn.Parameter(nn.init.kaiming_uniform_(linear.weight.new_empty(rank, self.in_features), a=math.sqrt(5)))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        self.dropout, self.scale, self.training = dropout, scale, linear.training

    def forward(self, x):
        if not (self.training and self.dropout):  # in the weights: tokens are many, and two wide outputs and their sum cost more than W's gradient
            return F.linear(x, self.weight + self.scale * self.lora_b @ self.lora_a, self.bias)
        low = F.linear(torch.where(drop_mask(x, self.dropout), x, 0), self.lora_a) / (1 - self.dropout)
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_b) * self.scale

    @torch.no_grad()
    def folded(self):
        """The plain nn.Linear whose weight is W + scale B A."""
        return with_update(self, self.scale * self.lora_b.float() @ self.lora_a.float())

# ---- Matching, merging, modulation -----------------------------------------------------------------------------------
class Matching(NamedTuple):
    order: torch.Tensor  # (b, n) a permutation: the tokens that stay, in their new order, then the sources, most similar first
    dst: torch.Tensor  # (b, r) for each source the index, among those that stay, of the token that it merges into

def most_merges(n, specials):
    """The most pairs that can merge among n tokens, `specials` of which never do."""
    return max((n - specials) // 2, 0)

def similarities(metric, specials=1):
    """metric (b, n, d) -> cosines of even with odd tokens (b, ceil(n / 2), floor(n / 2)), float32; -inf for the first `specials` tokens."""
    with torch.autocast(metric.device.type, enabled=False):  # in bf16 many would be equal
        metric = F.normalize(metric.float(), dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].mT
    for i in range(specials):
        scores.select(1 + i % 2, i // 2).fill_(-math.inf)
    return scores

def match(metric, r, specials=1):
    """Bipartite soft matching (ToMe §3): each even token proposes to its most similar odd one; the r best pairs merge.

    metric: (b, n, d), compared by cosine. r: at most most_merges(n, specials). specials: how many tokens stay in front and never merge (class
    token, registers). No gradient flows through the matching. Returns a Matching."""
    b, n, _ = metric.shape
    best, partner = similarities(metric.detach(), specials).max(dim=-1)  # (b, a)
    src, unmerged = best.argsort(dim=-1, descending=True, stable=True).tensor_split([r], dim=1)
    front, odd = (torch.arange(*ends, device=metric.device).expand(b, -1) for ends in ((specials,), (specials // 2 * 2 + 1, n, 2)))
    dst = partner.gather(1, src) + unmerged.shape[1]  # nothing merges into the odd special tokens: that they move to the front shifts no dst
    return Matching(torch.cat([front, 2 * unmerged.sort(dim=-1).values[:, (specials + 1) // 2:], odd, 2 * src], dim=1), dst)  # sorted: specials first

def rows(index, n):
    """index (b, m) into the n tokens of each image -> (b m), into the tokens of the whole batch."""
    return (index + n * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()

def one_hot_product(index, n, x, add=False):
    """x (b, n, c) at index (b, m) -> (b, m, c), or with add the sums of x (b, m, c) at index -> (b, n, c). As a product it adds up in a fixed order, and so
    does its gradient; on a GPU, index_add and the gradient of a gather do not."""
    with torch.autocast(x.device.type, enabled=False):  # which would round x
        one_hot = (index[..., None] == torch.arange(n, device=index.device)).to(x.dtype)  # (b, m, n)
        return (one_hot.mT if add else one_hot) @ x

def take(x, index, shared=False):
    """Tokens of x (b, n, c) at index (b, m) -> (b, m, c), by rows: a gather takes 20 times as long on a CPU. shared: index repeats tokens."""
    if shared and x.is_cuda:
        return one_hot_product(index, x.shape[1], x)
    return x.flatten(0, 1).index_select(0, rows(index, x.shape[1])).unflatten(0, index.shape)

def add_at(x, index, y):
    """x (b, n, c) plus y (b, m, c) at the tokens index (b, m); several may go to the same token."""
    if x.is_cuda:
        return x + one_hot_product(index, x.shape[1], y, add=True)
    return x.flatten(0, 1).index_add(0, rows(index, x.shape[1]), y.flatten(0, 1)).view_as(x)

def follow(source, new_index):
    """source (b, n0) after the tokens moved. new_index (b, n): the new place of each token; -1: it is gone, with the patches that it held."""
    return torch.where(source < 0, -1, new_index.gather(1, source.clamp(min=0)))

def widen(x):
    """x, but float16 as float32: sums of tokens, each times its size, go beyond float16's range."""
    return x.float() if x.dtype == torch.float16 else x

def merge(tokens, matching, modulate=None):
    """Size-weighted merging (ToMe §3) of living tokens: every source is averaged into its destination, each weighted by its size.

    modulate: None, or a function (sources, destinations) -> sources, all (b, r, c), weighted by size, the most similar pair
    first; what it returns is merged instead. The divisor stays the merged size. Returns Tokens with r fewer."""
    x, size, (order, dst) = widen(tokens.x), tokens.size, matching
    r, kept = dst.shape[1], order.shape[1] - dst.shape[1]
    x = x if size is None else x * size.to(x.dtype)
    stay, src = order.split([kept, r], dim=1)
    x, x_src = take(x, stay), take(x, src)
    x_src = x_src if modulate is None else modulate(x_src, take(x, dst, shared=True))
    x = add_at(x, dst, x_src.to(x.dtype))
    size = with_sizes(tokens).size.gather(1, order[..., None])
    size = size[:, :kept].scatter_add(1, dst[..., None], size[:, kept:])
    new_index = torch.cat([torch.arange(kept, device=dst.device).expand(dst.shape[0], -1), dst], dim=1)
    new_index = torch.empty_like(order).scatter(1, order, new_index)  # (b, n): old -> new
    return Tokens((x / size.to(x.dtype)).to(tokens.x.dtype), size, follow(tokens.source, new_index))

def modulate(src, dst, w_r, w_d):
    """PYRA's re-activation of the source tokens (§3.3 of the paper).

    src, dst: (b, r, c) weighted by size. w_r: (r, s), w_d: (s, c). Returns (b, r, c).
    With P = LN(src + dst), delta_D = W_r^T P (s, c) and delta_r = P W_D^T (r, s); W_D = 0 gives src in both cases:
    - s = 1: src + src * g_D * g_r, the channel gate g_D = 2 sigmoid(delta_D) in (0, 2), the token gate g_r = 2 sigmoid(delta_r) - 1 in (-1, 1).
    - s > 1 (supplement, "Modulation Matrix Rank"): src + src * W with W = delta_r delta_D (r, c). Our reading: Eq. 6, the
      channel gate, is left out, and W stands where g_r stood, without a squashing function, since none is mentioned."""
    p = F.layer_norm(src + dst, src.shape[-1:])
    delta_d, delta_r = w_r.mT @ p, F.linear(p, w_d)  # (b, s, c), (b, r, s)
    gate = 2 * delta_d.sigmoid() * (2 * delta_r.sigmoid() - 1) if w_r.shape[1] == 1 else delta_r @ delta_d  # (b, r, c)
    return torch.addcmul(src, src, gate)

class ToMe(nn.Module):
    """Token merging (Bolya et al., ICLR 2023): merges the r most similar pairs, or half of the patches where fewer are left."""
    modulate = None  # what becomes of the sources before they merge: (src, dst), each (b, r, c) and weighted by size, -> src
    def __init__(self, r, specials=1):
        super().__init__()
        self.r, self.specials = r, specials

    def tokens_after(self, n):
        return n - min(self.r, most_merges(n, self.specials))

    def match(self, qkv):
        return match(qkv.metric(), (n := qkv.k.shape[2]) - self.tokens_after(n), self.specials)

    def forward(self, tokens, qkv):
        return merge(tokens, self.match(qkv), self.modulate) if self.tokens_after(tokens.x.shape[1]) < tokens.x.shape[1] else tokens

    def extra_repr(self):
        return f"r={self.r}"

class PYRA(ToMe):
    """ToMe with modulation: w_r has one row per merged pair, in order of similarity: add_pyra refuses an r that the tokens don't allow."""
    def __init__(self, r, dim, s=1, specials=1):
        super().__init__(r, specials)
        self.w_r = nn.Parameter(torch.empty(r, s).uniform_(-1, 1) / math.sqrt(s))
        self.w_d = nn.Parameter(torch.zeros(s, dim))  # zeros: training starts at ToMe

    def modulate(self, src, dst):
        require(src.shape[1] == len(self.w_r), "w_r has one row per pair, and another number of pairs merges: PYRA's r can't change after training")
        return modulate(src, dst, widen(self.w_r), widen(self.w_d))

# ---- The Vision Transformer ------------------------------------------------------------------------------------------
def drop_path(x, rate):
    """Stochastic depth: drops a branch (b, n, c) for each sample with probability `rate`."""
    return x * (x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate) / (1 - rate)) if rate else x

def append_log_size(qkv, size):
    """q, k and v (b, h, n, d + 2 or more) whose attention at scale 1 / sqrt(d) is `attend`'s with sizes, without a mask, which flash attention doesn't take:
    k has log size in two more channels, its value in k's dtype and what that rounds off; q has ones there, v zeros. In 16 bits better than a mask."""
    d, extra = qkv.q.shape[-1], 8 * math.ceil((qkv.q.shape[-1] + 2) / 8) - qkv.q.shape[-1]  # flash attention needs multiples of 8
    log = (size.log() * d**0.5).clamp(min=-3e4)  # of dead tokens: finite, in float16 too, and far below all others
    rounded = log.to(qkv.k.dtype)
    log = repeat(F.pad(torch.cat([rounded, log - rounded], dim=-1).to(qkv.k.dtype), (0, extra - 2)), "b n e -> b h n e", h=qkv.k.shape[1])
    return F.pad(qkv.q, (0, extra), value=1.0), torch.cat([qkv.k, log], dim=-1), F.pad(qkv.v, (0, extra))

def attend(qkv, size=None):
    """Softmax(q k^T / sqrt(d) + log size) v, (b, h, n, d). With its size as weight, a merged token counts as all that it stands for."""
    if qkv.q.is_cuda and qkv.q.element_size() == 2 and size is not None:  # flash attention knows no float32
        return F.scaled_dot_product_attention(*append_log_size(qkv, size), scale=qkv.q.shape[-1] ** -0.5)[..., :qkv.q.shape[-1]]
    bias = None if size is None else rearrange(size.log().to(qkv.q.dtype), "b n 1 -> b 1 1 n")
    if qkv.q.device.type == "cpu" and (torch.is_grad_enabled() or qkv.q.dtype == torch.bfloat16):
        # on a CPU the fused kernel's backward takes two to five times as long as these lines, and in bf16 its forward 1.1 to 1.6 times
        q, k, v = (t.contiguous() for t in qkv[:3])
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(*qkv[:3], attn_mask=bias)

class RoPE(nn.Module):
    """DINOv3's rotary positions: turns pairs of channels of q and k by angles that grow with a token's place. Special tokens stay as they are.

    A merged token's sines and cosines are the mean of its patches': its scores are the mean of what theirs would be with its q and k. Our reading."""
    def __init__(self, grid, specials):
        super().__init__()
        centres = torch.cartesian_prod(*(2 * torch.arange(k) + 1 for k in grid))  # of the patches, in halves of a patch
        self.register_buffer("side", torch.tensor(grid), persistent=False)  # integers, so that a model in bf16 computes the same angles
        self.register_buffer("place", torch.cat([self.side.expand(specials, 2), centres]), persistent=False)  # (n0, 2); special: 0, no turn

    def forward(self, qkv, source):
        b, h, n, d = qkv.k.shape
        frequency = 2 * math.pi / 100 ** (torch.arange(d // 4, device=source.device) * 4 / d)  # 100: DINOv3's base
        angle = rearrange((self.place / self.side - 1)[..., None] * frequency, "n two f -> n (two f)")  # places are points in [-1, 1]^2
        waves = F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, 1), value=1.0).expand(b, -1, -1)  # (b, n0, d + 1): the 1 counts patches
        total = add_at(waves.new_zeros(b, n + 1, d + 1), torch.where(source < 0, n, source), waves)[:, None, :n]
        cos, sin = (total[..., :-1] / total[..., -1:].clamp(min=1)).chunk(2, dim=-1)
        turn = lambda u, v: torch.cat([u * cos - v * sin, v * cos + u * sin], dim=-1)
        rotate = lambda x: turn(*x.float().chunk(2, dim=-1)).to(x.dtype)
        return QKV(rotate(qkv.q), rotate(qkv.k), qkv.v, unrotated=qkv.k)

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attend = attend  # replaced by reducers whose sizes carry a gradient, see set_reducers

    def project(self, x):
        return QKV(*rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads))

    def forward(self, qkv, size=None):
        return self.proj(rearrange(self.attend(qkv, size), "b h n d -> b n (h d)"))

ACTS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
        "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1]}

class Mlp(nn.Module):
    def __init__(self, dim, hidden, act="gelu"):
        super().__init__()
        self.act, self.fc1, self.fc2 = act, nn.Linear(dim, 2 * hidden if act == "swiglu" else hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(ACTS[self.act](self.fc1(x)))

class AttentionPool(nn.Module):
    """SigLIP's pooling, (b, n, c) -> (b, c): a learned query attends to all tokens, to each as often as its size; then an MLP."""
    def __init__(self, dim, num_heads, hidden, eps, act):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm, self.mlp = nn.LayerNorm(dim, eps=eps), Mlp(dim, hidden, act)

    def forward(self, x, size):
        q, (k, v) = self.q(self.latent).expand(x.shape[0], -1, -1), self.kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, k, v))
        x = self.proj(rearrange(self.attend(QKV(q, k, v), size), "b h 1 d -> b (h d)"))
        return x + self.mlp(self.norm(x))

def residual(tokens, u, branch):
    """How a branch joins the stream: x + branch, (b, n, c). u, the branch's input LN(x), is there for a PEFT that reads it too."""
    return tokens.x + branch

class Block(nn.Module):
    """A transformer block that reduces its tokens between attention and MLP.

    A PEFT may replace any linear map, and the two joins `peft_attn` and `peft_mlp`, called as join(tokens, u, branch) -> x (b, n, c).
    What it adds is named peft_..., so that it is trained and saved; a module that adds work for n tokens has `macs(n)`.

    A reducer is a module called as reducer(tokens, qkv) -> Tokens. Besides:
    - tokens_after(n): how many of n tokens are left, special ones included; raises ValueError where the image decides;
    - r, settings: what an adapter's file records of it, pairs merged (an int) and anything else (a dict); both optional. Only where they apply:
    - per_image = True: how many tokens are left depends on the image. A batch is padded with tokens of size 0;
    - lrs: {parameter name: learning rate} of parameters that have their own, without weight decay;
    - tokens_expected(n): in training, how many of n tokens (b,) float32 stay, with a gradient; else those of size > 0 count;
    - budget_weight: the number of tokens is learned, towards a budget of operations whose loss has this weight;
    - after_step(): called after each step of the optimizer;
    - macs_saved(n, m, block): operations that the block saves beyond those of m instead of n tokens in its MLP."""
    def __init__(self, dim, num_heads, hidden, drop_path_rate=0.0, eps=1e-6, act="gelu", rope=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.rope, self.drop_path_rate = rope, drop_path_rate
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden, act)
        self.peft_attn = self.peft_mlp = residual
        self.reducer = None
        self.prop_attn = True  # proportional attention: weigh each key by its size

    def forward(self, tokens):
        rate = self.drop_path_rate if self.training else 0.0
        u = self.norm1(tokens.x)
        qkv = self.attn.project(u) if self.rope is None else self.rope(self.attn.project(u), tokens.source)
        branch = drop_path(self.attn(qkv, tokens.size if self.prop_attn else None), rate)
        tokens = tokens._replace(x=self.peft_attn(tokens, u, branch))
        tokens = tokens if self.reducer is None else self.reducer(tokens, qkv)
        u = self.norm2(tokens.x)
        return tokens._replace(x=self.peft_mlp(tokens, u, drop_path(self.mlp(u), rate)))

class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021) and those after it that differ little, with timm's parameter names.

    img_size: pixels, or (height, width). patch_size: pixels. drop_path_rate: of the last block; it rises linearly from 0. num_classes = 0: no
    head, the logits are the pooled features. What the families differ in:
    - class_token; distilled: DeiT's second special token and head; reg_tokens: registers. In this order they are in front and never merge;
    - global_pool: "token" (the class token's output is classified), "avg" (the patches' mean, each weighted by its size, with MAE's fc_norm
      after it, or with fc_norm=False the final norm before it) or "map" (SigLIP's attention pooling);
    - pre_norm: CLIP's norm before the first block; eps: of all norms; act: of the MLPs, a name in ACTS; rope: see RoPE.
    LayerScale is no switch: `load_pretrained` folds it into the weights. Raises ValueError."""
    def __init__(self, *, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, num_classes=1000, distilled=False,
                 global_pool="token", drop_path_rate=0.0, class_token=True, reg_tokens=0, fc_norm=True, pre_norm=False, eps=1e-6, act="gelu", rope=False):
        super().__init__()
        sides = [check_integer("img_size", side) for side in (img_size if isinstance(img_size, (list, tuple)) else [img_size] * 2)]
        sizes = dict(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        patch_size, embed_dim, depth, num_heads = (check_integer(name, value) for name, value in sizes.items())
        num_classes, reg_tokens = check_integer("num_classes", num_classes, least=0), check_integer("reg_tokens", reg_tokens, least=0)
        require(len(sides) == 2 and not any(side % patch_size for side in sides), f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        require(embed_dim % num_heads == 0, f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        require(not rope or embed_dim // num_heads % 4 == 0, f"rope needs heads as wide as a multiple of 4, not {embed_dim // num_heads}")
        require(global_pool in ("token", "avg", "map"), f"global_pool must be 'token', 'avg' or 'map', not {global_pool!r}")
        require(class_token or not distilled and global_pool != "token", "without a class token, global_pool must be 'avg' or 'map', and distilled False")
        require(act in ACTS, f"act must be one of {', '.join(ACTS)}, not {act!r}")
        require(0 <= drop_path_rate < 1, f"drop_path_rate must be at least 0 and less than 1, not {drop_path_rate!r}")
        self.img_size, self.grid = sides[0] if sides[0] == sides[1] else sides, [side // patch_size for side in sides]
        self.patch_size, self.embed_dim, self.num_classes, self.distilled, self.global_pool = patch_size, embed_dim, num_classes, distilled, global_pool
        self.num_patches, self.specials = math.prod(self.grid), class_token + distilled + reg_tokens
        given = dict(class_token=class_token, reg_tokens=reg_tokens, fc_norm=fc_norm, pre_norm=pre_norm, eps=eps, act=act, rope=rope)
        self.variant = {k: v for k, v in given.items() if v != VisionTransformer.__init__.__kwdefaults__[k]}  # for `describe`
        self.checkpoint = False  # in training: keep a block's input alone, and compute the block again in the backward pass
        self.layer_scale = False  # whether LayerScale was folded into the weights
        self.peft = self.folded = None  # a PEFT other than LoRA: its name and sizes, for `describe`; the PEFT that was folded into the weights
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)))
        for name, count in dict(cls_token=int(class_token), dist_token=int(distilled), reg_token=reg_tokens).items():
            if count:
                setattr(self, name, nn.Parameter(torch.zeros(1, count, embed_dim)))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.specials + self.num_patches, embed_dim))  # with RoPE: zeros
        self.norm_pre = nn.LayerNorm(embed_dim, eps=eps) if pre_norm else nn.Identity()
        hidden, shared, steps = int(embed_dim * mlp_ratio + 1e-6), RoPE(self.grid, self.specials) if rope else None, max(depth - 1, 1)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden, drop_path_rate * i / steps, eps, act, shared) for i in range(depth))
        self.norm, self.fc_norm = (nn.LayerNorm(embed_dim, eps=eps), nn.Identity())[::-1 if global_pool == "avg" and fc_norm else 1]
        self.attn_pool = AttentionPool(embed_dim, num_heads, hidden, eps, act) if global_pool == "map" else None
        for name in ("head", "head_dist")[:1 + distilled]:
            setattr(self, name, nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity())
        for name, p in self.named_parameters():
            if p.ndim > 1 and not p.is_meta and not (rope and name == "pos_embed"):  # on meta it only takes time
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embed(self, images):
        """images (b, 3, height, width), normalised -> the Tokens before the first block."""
        expected = (3, *(side * self.patch_size for side in self.grid))
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must be (b, {', '.join(map(str, expected))}), not {tuple(images.shape)}")
        weight = rearrange(self.patch_embed.proj.weight, "c k p q -> c (k p q)")  # a convolution of patches that don't overlap is a linear map of each
        patches = F.linear(rearrange(images, "b k (y p) (x q) -> b (y x) (k p q)", p=self.patch_size, q=self.patch_size), weight, self.patch_embed.proj.bias)
        specials = [repeat(getattr(self, name), "1 k c -> b k c", b=images.shape[0]) for name in SPECIALS if hasattr(self, name)]
        x = self.norm_pre(torch.cat([*specials, patches], dim=1) + self.pos_embed)
        return Tokens(x, None, source=repeat(torch.arange(x.shape[1], device=x.device), "n -> b n", b=x.shape[0]))

    def run_block(self, block, tokens):
        return torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False) if self.checkpoint and self.training else block(tokens)

    def forward_tokens(self, images, depth=None):
        """images (b, 3, height, width), normalised -> the Tokens after the first `depth` blocks, by default all."""
        tokens = self.embed(images)
        for block in self.blocks[:depth]:
            tokens = self.run_block(block, tokens)
        return with_sizes(tokens)

    def pool(self, tokens):
        """Tokens after the last block -> what the head reads, (b, c)."""
        if self.global_pool == "token":
            return self.norm(tokens.x[:, 0])
        x = self.norm(tokens.x)
        if self.global_pool == "map":
            return self.attn_pool(x, tokens.size)
        x = widen(x[:, self.specials:])
        size = tokens.size[:, self.specials:].to(x.dtype)
        return self.fc_norm(((x * size).sum(dim=1) / size.sum(dim=1)).to(tokens.x.dtype))

    def forward(self, images):
        """images (b, 3, height, width), normalised -> logits (b, num_classes) of the class head."""
        return self.head(self.pool(self.forward_tokens(images)))

    def forward_heads(self, images):
        """A distilled model's logits of both heads, two (b, num_classes); DeiT's and timm's answer is their mean."""
        require(self.distilled and self.global_pool == "token", "forward_heads is for a distilled model with global_pool='token'")
        x = self.norm(self.forward_tokens(images).x[:, :2])
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

SIZES = {f"vit_nano_patch4_{size}": dict(img_size=size, patch_size=4, embed_dim=96, num_heads=3) for size in (56, 28)}  # ours: data/README.md
WORDS = {  # what each word of a timm name says
    **dict.fromkeys(("vit", "deit", "deit3", "base", "miil", "qkvb"), {}), "distilled": dict(distilled=True),
    "tiny": dict(embed_dim=192, num_heads=3), "small": dict(embed_dim=384, num_heads=6), "medium": dict(embed_dim=512, num_heads=8),
    "large": dict(embed_dim=1024, num_heads=16, depth=24), "so400m": dict(embed_dim=1152, num_heads=16, depth=27, mlp_ratio=3.7362),
    "huge": dict(embed_dim=1280, num_heads=16, depth=32), "giant": dict(embed_dim=1536, num_heads=24, depth=40, mlp_ratio=2.66667, act="swiglu"),
    "clip": dict(pre_norm=True, eps=1e-5), "quickgelu": dict(act="quick_gelu"), "siglip": dict(class_token=False, global_pool="map"),
    "gap": dict(class_token=False, global_pool="avg", fc_norm=False), "dinov2": dict(img_size=518), "reg4": dict(reg_tokens=4),
    "dinov3": dict(img_size=256, reg_tokens=4, rope=True, eps=1e-5, global_pool="avg", fc_norm=False), "plus": dict(act="swiglu"),
}

def read_name(name):
    """VisionTransformer's kwargs for a timm name without the tag of its weights. Raises ValueError for a name that isn't of a plain ViT."""
    if name in SIZES:
        return SIZES[name]
    patch, words = re.search(r"_patch(\d+)", name), [word for word in name.split("_") if not word.startswith("patch")]
    more = re.search(r"_giant_(?!.*dinov2)|_plus_(?!.*dinov3)|huge_plus|reg4_gap|base_patch16_gap", name)  # than the words say
    tanh = re.search(r"so400m_patch16_siglip|large_patch16_siglip(_gap)?_512|base_patch32_siglip", name)
    require(patch and not more and all(word in WORDS or word.isdigit() for word in words),
            f"no model is called {name!r}: known are timm's names of plain ViTs, made of a patch size and the words {', '.join(WORDS)}")
    said = [WORDS.get(word) or (dict(img_size=int(word)) if word.isdigit() else {}) for word in words]
    return functools.reduce(dict.__or__, said, dict(patch_size=int(patch[1]), act="gelu_tanh" if tanh else "gelu"))

def create_model(name, **kwargs):
    """An untrained VisionTransformer, with its kwargs, by its timm name; a tag of weights (".mae") is ignored. Raises ValueError."""
    return VisionTransformer(**{**read_name(str(name).split(".")[0]), **kwargs})

# ---- Surgery: adapting and merging an existing model -----------------------------------------------------------------
def is_adapter(name):
    """Whether adaptation trains the parameter: a PEFT's, a reducer's, or the class head's (with global_pool="avg" also its norm's)."""
    return "lora_" in name or "peft_" in name or ".reducer." in name or name.startswith(("head.", "fc_norm."))

@on_model
def freeze(model):
    """Freezes the backbone: only the parameters of `is_adapter` are trained. Returns the model."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
    return model

@on_model
def check_peft(model, dropout=0.0, **sizes):
    """Checks what every PEFT needs: sizes that are positive integers, a dropout rate, and a model without a PEFT. Raises ValueError."""
    for name, value in sizes.items():
        check_integer(name, value)
    require(0 <= dropout < 1, f"dropout must be at least 0 and less than 1, not {dropout!r}")
    present = model.peft["name"] if model.peft else "LoRA" if lora_layers(model) else None
    require(not present, f"the model has {present} already, and takes one PEFT: fold that one in, or build another model")

LORA_TARGETS = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}  # linear maps of a block: where each one is

def lora_layers(model):
    """The maps with LoRA, {name of a map in a block: its LoRALinears, one per block}."""
    found = {name: [getattr(getattr(block, part), name) for block in model.blocks] for name, part in LORA_TARGETS.items()}
    return {name: layers for name, layers in found.items() if isinstance(layers[0], LoRALinear)}

@on_model
def add_lora(model, rank=8, dropout=0.1, targets=("qkv",), alpha=None):
    """Adds LoRA to linear maps of every block, by default attn.qkv, and freezes the backbone (see `freeze`). Returns the model.

    rank: h in the paper. dropout: on LoRA's input, in training. targets: names out of qkv, proj, fc1, fc2. alpha: the update is scaled by
    alpha / rank; None: by 1, as in the paper. Raises ValueError."""
    check_peft(model, dropout, rank=rank)
    known = isinstance(targets, (list, tuple)) and 0 < len({*targets} & {*LORA_TARGETS}) == len(targets)
    require(known, f"targets must be different names out of {', '.join(LORA_TARGETS)}, not {targets!r}")
    require(alpha is None or 0 < alpha < math.inf, f"alpha must be a finite number greater than 0, not {alpha!r}")
    for block in model.blocks:
        for name in targets:
            part = getattr(block, LORA_TARGETS[name])
            setattr(part, name, LoRALinear(getattr(part, name), rank, dropout, 1.0 if alpha is None else alpha / rank))
    model.folded = None
    return freeze(model)

@on_model
def merge_lora(model):
    """Folds LoRA into the weights, W + scale B A, and removes its tensors: the same logits for less work. Returns the model."""
    for name, layers in lora_layers(model).items():
        for block, layer in zip(model.blocks, layers):
            setattr(getattr(block, LORA_TARGETS[name]), name, layer.folded())
        model.folded = "LoRA"
    return model

@on_model
def check_schedule(model, r):
    """r, an int or a list, as a list of ints with one entry per block. Raises ValueError."""
    depth, entries = len(model.blocks), to_python(r)
    entries = [entries] * depth if isinstance(entries, int) else entries
    require(isinstance(entries, list), f"r must be an integer or a list with one entry per block, not {r!r}: merge_schedule gives one")
    require(len(entries) == depth, f"the schedule has {len(entries)} entries, the model {depth} blocks")
    return [check_integer(f"block {i}: r", entry, least=0) for i, entry in enumerate(entries)]

@on_model
def set_reducers(model, reducers, prop_attn=True, attend=attend):
    """Gives each block its reducer, or None, in place of the one that it had, and the attention that its sizes need. Returns the model."""
    for block, reducer in zip(model.blocks, reducers, strict=True):
        block.reducer = None if reducer is None else reducer.to(model.pos_embed.device).train(model.training)
        block.prop_attn, block.attn.attend = prop_attn, attend
    if model.attn_pool is not None:
        model.attn_pool.attend = attend
    return model

@on_model
def add_tome(model, r, prop_attn=True):
    """Merges tokens in every block with r > 0, in place of any reducer there is. Returns the model.

    r: pairs merged, an int or a list with one entry per block; at most half of its tokens. prop_attn: proportional attention. Raises ValueError."""
    return set_reducers(model, [ToMe(entry, model.specials) if entry else None for entry in check_schedule(model, r)], prop_attn)

@on_model
def add_pyra(model, r, s=1, prop_attn=True):
    """Merges with modulation in every block with r > 0, in place of any reducer there is. Returns the model.

    r as in `add_tome`, but more than half of the tokens are refused: w_r (r, s) has a row for each pair. s: the generators' rank. Raises ValueError."""
    s = check_integer("s", s)
    entries, n = check_schedule(model, r), model.num_patches + model.specials
    for i, entry in enumerate(entries):
        require(entry <= (most := most_merges(n, model.specials)), f"block {i}: {entry} pairs can't merge, {n} tokens are left and at most {most} pairs can")
        n -= entry
    return set_reducers(model, [PYRA(entry, model.embed_dim, s, model.specials).to(model.pos_embed) if entry else None for entry in entries], prop_attn)

@on_model
def param_groups(model, lr=1e-3, modulation_lr=None, weight_decay=1e-4):
    """The trained parameters as AdamW's groups, each with a "name": "decay", "no_decay", "modulation"; empty ones left out.

    Biases, norms, position embedding and special tokens don't decay. modulation_lr: of w_r and w_d (Table 4); None: lr. Parameters with a
    learning rate from their reducer (`lrs`) form groups of their names."""
    kinds = {"decay": dict(lr=lr, weight_decay=weight_decay), "no_decay": dict(lr=lr, weight_decay=0.0),
             "modulation": dict(lr=lr if modulation_lr is None else modulation_lr, weight_decay=weight_decay)}
    for name, own in [pair for block in model.blocks for pair in getattr(block.reducer, "lrs", {}).items()]:
        require(kinds.setdefault(name, new := dict(lr=own, weight_decay=0.0)) == new, f"lrs has two learning rates for {name}: rename one")
    groups = {kind: [] for kind in kinds}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own, plain = name.rpartition(".reducer.")[2], p.ndim <= 1 or name in ("pos_embed", "attn_pool.latent", *SPECIALS)
            groups[own if own in kinds else "modulation" if own in ("w_r", "w_d") else "no_decay" if plain else "decay"].append(p)
    return [dict(kinds[kind], name=kind, params=params) for kind, params in groups.items() if params]

# ---- Checkpoints -----------------------------------------------------------------------------------------------------
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")
# Other releases' names -> timm's, applied from top to bottom. Of timm's own only its Eva's gamma_1 and gamma_2 match.
RENAMES = [
    # Google's JAX release
    (r"^cls$", "cls_token"), (r"^embedding/", "patch_embed.proj/"), (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"), (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."), (r"LayerNorm_0/", "norm1/"),
    (r"LayerNorm_2/", "norm2/"), (r"MlpBlock_3/Dense_0/", "mlp.fc1/"), (r"MlpBlock_3/Dense_1/", "mlp.fc2/"), (r"/scale$", ".weight"),
    (r"MultiHead\w+_1/out/", "attn.proj/"), (r"MultiHead\w+_1/(query|key|value)/", r"attn.\1/"), (r"/(kernel|bias)$", r".\1"),
    # Hugging Face's ViT, DeiT and DINOv2: as files have it, and as modules have it since transformers 5
    (r"^embeddings\.cls_token$", "cls_token"), (r"^embeddings\.distillation_token$", "dist_token"), (r"^layernorm\.", "norm."),
    (r"^embeddings\.position_embeddings$", "pos_embed"), (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."), (r"layernorm_before\.", "norm1."), (r"layernorm_after\.", "norm2."),
    (r"attention\.attention\.(query|key|value)\.", r"attn.\1."), (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"attention\.q_proj\.", "attn.query."), (r"attention\.k_proj\.", "attn.key."), (r"attention\.v_proj\.", "attn.value."),
    (r"intermediate\.dense\.", "mlp.fc1."), (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."), (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."), (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"\.gamma_([12])$", r".ls\1.gamma"), (r"^(storage_tokens|(embeddings\.)?register_tokens)$", "reg_token"),
]
SIGNS = [  # among a checkpoint's names: why it may not fit
    (r"lora_|peft_|\.reducer\.", "an adapter, for load_adapter, or a model with one: fold its PEFT in and remove its reducer before saving"),
    (r"relative_position|rel_pos", "BEiT or Swin, with relative positions"), (r"running_mean|stages|stem|downsample", "a convolutional network"),
    (r"q_norm|mlp\.norm|attn\.norm|rope\.", "a ViT with norms or rotations of its own in its blocks"), (r"decoder", "an autoencoder with its decoder"),
    (r"pre_layrnorm|visual|text_|layer_norm1", "CLIP or SigLIP as OpenAI or Hugging Face name it: take timm's release of it"),
    (r"reg_token|norm_pre|attn_pool", "another family of ViT: create the model by the timm name of these weights"),
]

def first_line(error, most=300):
    """The first line of an exception's message, or of any other text, without a terminal's commands."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", (str(error).splitlines() or [type(error).__name__])[0][:most])

def listed(names):
    """A few of the names, and how many more there are."""
    return ", ".join(first_line(name, 80) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

def check_fit(source, own, given, optional=(), reason=""):
    """Raises ValueError unless the tensors `given` have the names and shapes of `own`, {name: tensor}; some names may be optional."""
    require(given.keys() & own.keys(), f"{source} doesn't fit the model: it has none of its names, but {listed([*given])}{reason}")
    odd = [f"{k} as {tuple(given[k].shape)}, not {tuple(p.shape)}" for k, p in own.items() if k in given and given[k].shape != p.shape]
    lacking, unexpected = [k for k in own if k not in given and not k.startswith(tuple(optional))], [k for k in given if k not in own]
    for what, names in {"has": odd, "lacks": lacking, "has unexpected": unexpected}.items():
        require(not names, f"{source} doesn't fit the model: it {what} {listed(names)}{reason}")
    odd = [k for k, v in given.items() if not (v.is_floating_point() and v.float().isfinite().all())]
    require(not odd, f"{source} doesn't fit the model: not all is a finite floating-point number in {listed(odd)}")

@on_model
@torch.no_grad()
def load_pretrained(model, source):
    """Loads a backbone's weights, strictly. Returns the model.

    source: a .safetensors, .pth / .pt / .bin / .ckpt / .tar or .npz file (Google's JAX release); a name on the Hugging Face hub, timm's or
    "owner/name"; a mapping of tensors; or a module. Names may be timm's, Google's or Hugging Face's, behind any wrappers' prefix; EMA weights
    come first, with a warning. A head of other classes is left out, as is what the model's pooling doesn't use (MAE trains a new fc_norm); the
    position embedding is resized, other parts are folded: see `fold_extras`. No code in a file is run. Raises FileNotFoundError, ValueError."""
    what, found = read_checkpoint(source)
    own = {k: v for k, v in model.state_dict().items() if "lora_" not in k and "peft_" not in k and ".reducer." not in k}
    weights = fold_extras(model, renamed := to_timm_names(what, found), own)
    shapes = {f"{head}.": getattr(weights.get(f"{head}.weight"), "shape", ()) for head in ("head", "head_dist")[: 1 + model.distilled]}
    left = [head for head, shape in shapes.items() if shape[1:] == (model.embed_dim,) and shape[0] != model.num_classes]
    left += [part for part in ("norm.", "attn_pool.") if not any(k.startswith(part) for k in own)]
    weights = {k: v for k, v in weights.items() if not k.startswith(tuple(left))}
    position = weights.get("pos_embed", own["pos_embed"])
    resized = position.shape != own["pos_embed"].shape and position.shape[-1:] == (model.embed_dim,)
    weights |= {"pos_embed": own["pos_embed"]} if resized else {}  # a model of another kind is told first
    reasons = [f"; it looks like {kind}" for pattern, kind in SIGNS if any(re.search(pattern, name) for name in found)]
    reasons += ["; is it of another size?" for k in ("cls_token", "patch_embed.proj.weight") if k in weights and weights[k].shape != own[k].shape]
    reasons += ["; is it a plain ViT?" if len(own.keys() & weights.keys()) < len(own) / 2 else ""]
    check_fit(what, own, weights, ("head.", "head_dist.", "fc_norm."), reasons[0])
    if resized:
        weights["pos_embed"] = resize_pos_embed(model, position)
        check_fit(what, own, weights, tuple(own))
    elif not isinstance(source, nn.Module) and model.grid[0] != model.grid[1] and math.isqrt(model.num_patches) ** 2 == model.num_patches:
        warnings.warn(f"{what}: its {model.num_patches} positions are taken for a grid of {model.grid[0]} x {model.grid[1]}, not a square's", stacklevel=4)
    model.load_state_dict(weights, strict=False)
    model.layer_scale, model.folded = any(name.endswith("ls1.gamma") for name in renamed), None
    return model

def read_checkpoint(source):
    """load_pretrained's source -> how messages call it, {name: tensor}."""
    source = unwrap(source).state_dict() if isinstance(source, nn.Module) else source
    if isinstance(source, Mapping):
        return "the source", find_weights("the source", source)
    require(isinstance(source, (str, os.PathLike)), f"weights must be a path, a name on the hub, tensors by name or a module, not {type(source).__name__}")
    path = os.path.expanduser(source)  # a link may have the suffix, or what it leads to
    suffix = next((end for p in (path, os.path.realpath(path)) if (end := os.path.splitext(p)[1].lower()) in SUFFIXES), None)
    if suffix is None:
        named = not os.path.exists(path) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
        require(named, f"weights must be a {', '.join(SUFFIXES)} file or a name on the hub, not {path!r}")
        from huggingface_hub import hf_hub_download
        try:
            path, suffix = hf_hub_download(path if "/" in path else f"timm/{path}", "model.safetensors"), ".safetensors"
        except Exception as error:  # the hub's client raises a dozen kinds: no such name, no network, no permission
            raise ValueError(f"{source!r} is no file here, and the hub did not give it: {first_line(error).split('. ')[0].rstrip('.')}; "
                             "without a network pass --weights FILE (data/README.md lists where to get it)") from error
    require(os.path.isfile(path), f"there is no file {path!r}", FileNotFoundError)
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        elif suffix == ".npz":
            import numpy as np
            with np.load(path, allow_pickle=False) as arrays:
                content = dict(arrays)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a training script's arguments: data, no code
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, another format, or pickled code
        why = first_line(error) if isinstance(error, (PermissionError, MemoryError)) else "it is damaged, incomplete or of another kind"
        code = [f"it holds {name}, which could run code: save its state dict alone" for name in re.findall(r"GLOBAL (\S+)", str(error))]
        raise ValueError(f"{path} can't be read as a {suffix} file of tensors: {[*code, why][0]}") from error
    return path, find_weights(path, content)

def find_weights(source, content):
    """The {name: tensor} in a training checkpoint, EMA weights first as in timm. Raises ValueError."""
    content = dict(content) if isinstance(content, Mapping) else {}
    content = {k: torch.as_tensor(v) if getattr(getattr(v, "dtype", 0), "kind", "-") in "fiub" else v for k, v in content.items()}  # NumPy's
    rest = [k for k, v in content.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and not v.is_meta)]
    if content and not rest:
        return content
    held = [k for k in rest if isinstance(content[k], (Mapping, list)) and content[k]]
    ema = [k for k in ("state_dict_ema", "model_ema", *held) if k in held and "ema" in re.split(r"[\W_]", str(k).lower())]
    keys = ema + [k for k in ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights") if k in held]
    require(keys, f"{source} holds no dictionary of tensors" + (f", but {listed(rest)}" if rest else ""))
    weights = find_weights(f"{source}: {keys[0]}", content[keys[0]])
    if ema:
        warnings.warn(f"{source} holds EMA weights, {ema[0]}: they are loaded instead of the last step's", stacklevel=6)
    return weights

def to_timm_names(source, weights):
    """{name: tensor} of any known release -> timm's names and layouts."""
    first = r"((?:[^./]+[./])*?)(embeddings\.)?(cls|cls_token|patch_embed\.proj\.weight)"  # some have no class token
    prefixes = sorted({found[1] for found in map(re.compile(first).fullmatch, weights) if found})
    require(len(prefixes) <= 1, f"{source} holds {len(prefixes)} models, {' and '.join(map(repr, prefixes))}: save one of them alone")
    parts = re.findall(r"[^./]+[./]", "".join(prefixes))  # of wrappers; a head may stand beside: model.head of model.vit.cls_token
    prefix, renamed = "^" + "".join(f"({re.escape(part)}" for part in parts) + ")?" * len(parts), {}
    for name, value in weights.items():
        for pattern, replacement in [(prefix, ""), *RENAMES]:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".kernel") and value.ndim > 1:  # JAX: inputs first, heads apart
            name = name.removesuffix("kernel") + "weight"
            into_heads = value.ndim == 3 and not name.endswith("attn.proj.weight")
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.flatten(1).mT if into_heads else value.flatten(0, -2).mT
        require(name not in renamed, f"{source} holds {name} twice, under different names")
        renamed[name] = value.flatten() if re.search(r"attn\.(query|key|value)\.bias$", name) else value
    unused = ("pre_logits.", "pooler.", "embeddings.mask_token", "mask_token", "n_averaged")  # of pre-training and averaging
    return {name: value for name, value in renamed.items() if not name.startswith(unused)}

def fold_extras(model, weights, own):
    """Weights by timm's names without what a plain ViT has no parameter for: exact rewrites, {name: tensor}.

    LayerScale goes into attn.proj and mlp.fc2; what is apart is joined: q, k and v, DINOv3's biases, SwiGLU's two maps. What is left out on
    purpose is zeros: biases (of qkv in all blocks, of CLIP's patch embedding), position embeddings (with RoPE)."""
    weights = weights | {name.replace("q_bias", "k_bias"): torch.zeros_like(q) for name, q in weights.items() if name.endswith("attn.q_bias")}
    for whole, parts in {"attn.qkv.": ("attn.query.", "attn.key.", "attn.value."), "attn.qkv.bias": ("attn.q_bias", "attn.k_bias", "attn.v_bias"),
                         "mlp.fc1.": ("mlp.fc1_g.", "mlp.fc1_x.")}.items():
        for name in [name for name in weights if parts[0] in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if len({weights[part].shape if part in weights else None for part in names}) == 1:
                weights[name.replace(parts[0], whole)] = torch.cat([weights.pop(part) for part in names])
    for name in [name for name in weights if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        prefix = name.replace("ls1.gamma", "attn.proj.").replace("ls2.gamma", "mlp.fc2.")
        scaled = {f"{prefix}{part}": weights.get(f"{prefix}{part}") for part in ("weight", "bias")}
        if all(w is not None and w.shape[:1] == weights[name].shape for w in scaled.values()):
            gamma = weights.pop(name).float()
            weights |= {full: torch.einsum("o, o... -> o...", gamma, w.float()) for full, w in scaled.items()}
    zeros = ["attn.qkv.bias"] + ["patch_embed.proj.bias"] * ("pre_norm" in model.variant) + ["pos_embed"] * ("rope" in model.variant)
    absent = [end for end in zeros if any("attn.qkv.weight" in name for name in weights) and not any(name.endswith(end) for name in weights)]
    return weights | {name: torch.zeros_like(p) for name, p in own.items() if name.endswith(tuple(absent))}

def resize_pos_embed(model, pos_embed):
    """A position embedding (1, k + n, c) as the model's: the grid resized, bicubic as in timm; zeros for special tokens that have none. Raises ValueError."""
    rows = pos_embed.shape[1] if pos_embed.ndim == 3 and pos_embed.shape[0] == 1 else 0
    firsts = [k for k in (model.specials, 1, 0) if k <= model.specials]
    k = next((k for k in firsts if rows - k == model.num_patches or rows > k and math.isqrt(rows - k) ** 2 == rows - k), None)
    require(k is not None, f"the position embedding {tuple(pos_embed.shape)} isn't {model.specials} special tokens and a square grid")
    first, patches = pos_embed.split([k, rows - k], dim=1)
    if patches.shape[1] != model.num_patches:
        patches = rearrange(patches.float(), "1 (y x) c -> 1 c y x", y=math.isqrt(rows - k))
        patches = rearrange(F.interpolate(patches, size=model.grid, mode="bicubic", antialias=True), "1 c y x -> 1 (y x) c").to(pos_embed.dtype)
    return torch.cat([first, first.new_zeros(1, model.specials - k, model.embed_dim), patches], dim=1)

@torch.no_grad()
def from_timm(timm_model):
    """timm's VisionTransformer, or its Eva of DINOv3's kind, as ours: same weights and logits, which are compared; without drop path. Raises ValueError."""
    theirs, kind = unwrap(timm_model), type(unwrap(timm_model)).__name__
    require(isinstance(theirs, nn.Module), f"from_timm takes a model that timm.create_model made, not {theirs!r}")
    has = lambda name: getattr(theirs, name, None) is not None and not isinstance(getattr(theirs, name), nn.Identity)
    try:
        block, embed, pool, x = theirs.blocks[0], theirs.patch_embed, theirs.global_pool, torch.linspace(-4, 4, 99)
        ours = VisionTransformer(
            img_size=embed.img_size, patch_size=embed.patch_size[0], embed_dim=theirs.embed_dim, depth=len(theirs.blocks), num_heads=block.attn.num_heads,
            mlp_ratio=block.mlp.fc2.in_features / theirs.embed_dim, num_classes=theirs.num_classes, distilled=has("dist_token"), global_pool=pool,
            class_token=has("cls_token"), reg_tokens=theirs.reg_token.shape[1] if has("reg_token") else 0, fc_norm=pool != "avg" or has("fc_norm"),
            pre_norm=has("norm_pre"), eps=block.norm1.eps, rope=has("rope"),
            act=next((act for act in ("gelu", "gelu_tanh", "quick_gelu") if torch.allclose(block.mlp.act(x), ACTS[act](x), atol=1e-5)), "swiglu"))
        probe = copy.deepcopy(theirs).float().eval()  # at random: a fresh model's weights are too small, or a head's bias too large, to show a difference
        for p in probe.parameters():
            p.copy_(torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim in (2, 4) else 1))
        load_pretrained(ours.to(probe.patch_embed.proj.weight).eval(), probe)
        images = torch.randn(2, 3, *embed.img_size).to(ours.pos_embed)
        expected, found = probe(images), sum(ours.forward_heads(images)) / 2 if ours.distilled else ours(images)
        require((found - expected).abs().max() < 1e-3 * expected.abs().max(), "its forward pass differs from a plain ViT's")
        load_pretrained(ours.to(embed.proj.weight), theirs)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reasons = [f"it looks like {why}" for pattern, why in SIGNS for name in theirs.state_dict() if re.search(pattern, name)]
        raise ValueError(f"{kind} can't be converted: {[*reasons, 'it is no plain ViT'][0]} ({first_line(error)})") from error
    return ours.train(theirs.training)

def frozen(model):
    """The backbone's frozen parameters, {name: tensor}, sorted."""
    return {k: p.detach() for k, p in sorted(model.named_parameters()) if not p.requires_grad and not is_adapter(k) and not k.startswith("head_dist.")}

def digest(tensors, dtype=None):
    """A hash of {name: tensor}, of the values as dtype where one is given."""
    found = hashlib.sha256()
    for name, p in tensors.items():
        found.update(name.encode() + p.to("cpu", dtype or p.dtype).flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

def sketch(model):
    """A projection of each frozen parameter, and how far rounding may move it, two (parameters,): a hash survives no rounding to float16."""
    wave = lambda n: torch.arange(1, n + 1).double().cos()
    flat = (p.cpu().double().reshape(-1, *p.shape[-1:]) for p in frozen(model).values())  # one at a time: doubles are large
    return torch.tensor([(wave(len(x)) @ x @ wave(x.shape[1]), 5e-3 * x.norm() + 1e-7 * x.numel() ** 0.5) for x in flat]).double().reshape(-1, 2).T

def same_in_float16(metadata, model):
    """Whether the file's frozen weights are the model's, where one of them is held in float16."""
    try:
        theirs, (ours, tolerance) = torch.tensor(json.loads(metadata["sketch"])), sketch(model)
        return "torch.float16" in (metadata["dtype"], str(model.pos_embed.dtype)) and bool(((theirs - ours).abs() <= tolerance).all())
    except (KeyError, TypeError, ValueError, RuntimeError):  # an older version's file, another number of parameters, or a damaged file
        return False

@on_model
def describe(model):
    """What an adapter must fit, as {str: str}: geometry, classes, PEFT, reducers, and a hash of the frozen weights."""
    reducers, lora = [block.reducer for block in model.blocks], lora_layers(model)
    settings, first = [getattr(reducer, "settings", None) for reducer in reducers], next(iter(lora.values()))[0] if lora else None
    fields = {name: getattr(model, name) for name in ("img_size", "patch_size", "embed_dim", "num_classes", "distilled", "global_pool", "peft")} | dict(
        depth=len(reducers), num_heads=model.blocks[0].attn.num_heads, lora_rank=len(first.lora_a) if lora else 0, variant=model.variant or None,
        lora=[list(lora), first.scale] if lora and (list(lora), first.scale) != (["qkv"], 1) else None,  # None: as before there was a choice
        settings=settings if any(settings) else None, reducers=sorted({type(reducer).__name__ for reducer in reducers if reducer is not None}),
        r=[0 if reducer is None else getattr(reducer, "r", None) for reducer in reducers], prop_attn=[block.prop_attn for block in model.blocks],
        s=max((reducer.w_r.shape[1] for reducer in reducers if isinstance(reducer, PYRA)), default=0),
        backbone=digest(frozen(model), torch.bfloat16),  # the same whether the backbone is held in float32 or in bf16
    )
    return {k: json.dumps(v, default=to_python) for k, v in fields.items()}

@on_model
def save_adapter(model, path):
    """Writes the trained parameters as safetensors, with what they fit in the metadata (see `describe`). Raises ValueError."""
    from safetensors.torch import save
    require(not model.folded, f"{model.folded} was folded into the backbone: save the adapter before folding")
    tensors = {name: p.detach().cpu().contiguous() for name, p in sorted(model.named_parameters()) if p.requires_grad}
    require(tensors, "the model has no trained parameters to save")
    own = {"sketch": json.dumps(sketch(model)[0].tolist()), "dtype": str(model.pos_embed.dtype), "digest": digest(tensors), "format": "pyra-adapter"}
    partial = f"{(path := os.path.expanduser(path))}.{os.getpid()}.partial"  # renamed when it is whole: killed at any time, path is complete or as it was
    with open(partial, "wb") as file:
        file.write(save(tensors, {**describe(model), **own}))
    os.replace(partial, path)

@on_model
@torch.no_grad()
def load_adapter(model, path):
    """Loads what save_adapter wrote. Returns the model. Raises FileNotFoundError, or ValueError naming what differs; the model is then as it was."""
    from safetensors import safe_open
    require(os.path.isfile(path := os.path.expanduser(path)), f"there is no adapter {path!r}", FileNotFoundError)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in sorted(file.keys())}
    except Exception as error:
        raise ValueError(f"{path} can't be read as a safetensors file: {first_line(error)}") from error
    require(metadata.get("format") == "pyra-adapter", f"{path} is not an adapter that save_adapter wrote")
    for key, value in describe(model).items():
        given = metadata.get(key, "null")  # a setting that an older version's file lacks counts as null
        differs = "its frozen weights are of another backbone" if key == "backbone" else f"its {key} is {first_line(given)}, the model's {value}"
        require(given == value or key == "backbone" and same_in_float16(metadata, model), f"{path} doesn't fit the model: {differs}")
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad} or {k: p for k, p in model.named_parameters() if is_adapter(k)}
    check_fit(path, trained, tensors)
    require(metadata.get("digest") in (None, digest(tensors)), f"{path} is damaged: its numbers are not those that save_adapter wrote")
    for name, p in trained.items():
        p.copy_(tensors[name])
    return model

# ---- Cost ------------------------------------------------------------------------------------------------------------
@on_model
def token_counts(model):
    """Tokens before the first block and after each, special ones included: depth + 1 ints. Raises ValueError where the image decides."""
    counts = [model.num_patches + model.specials]
    for block in model.blocks:
        counts.append(counts[-1] if block.reducer is None else block.reducer.tokens_after(counts[-1]))
    return counts

@on_model
def macs_of_counts(model, counts):
    """Multiply-accumulates of one image's forward pass with so many tokens before the first block and after each; see count_macs."""
    c = model.embed_dim
    macs = model.num_patches * c * 3 * model.patch_size**2 + c * model.num_classes
    for block, n, m in zip(model.blocks, counts, counts[1:]):
        a = block.attn.proj.in_features
        macs += 4 * n * c * a + 2 * n**2 * a + m * c * (block.mlp.fc1.out_features + block.mlp.fc2.in_features)
    if model.attn_pool is not None:  # one query: keys and values of all tokens, attention, then projection and MLP of one
        macs += 2 * counts[-1] * c * (c + 1) + 2 * c**2 + 2 * c * model.attn_pool.mlp.fc2.in_features
    return macs

@on_model
def count_macs(model):
    """Multiply-accumulates of one image's forward pass, LoRA folded in; the literature's "GFLOPs" are 1e9 of these.

    A block that gets n tokens and keeps m costs 4 n c a + 2 n^2 a (attention, a wide: c, less where heads are pruned) + 2 m c hidden
    (MLP; SwiGLU's is half as much again). Norms, softmax, activations, matching and modulation, together well below 1 %, are left out as is usual."""
    return macs_of_counts(model, token_counts(model))
