"""What several reducers share: moving and dropping tokens, attention as a score, and training which tokens die.

What a reducer is and which attributes it may have: `pyra.Block`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

import pyra


def ranking_queries(model):
    """How many tokens' attention ranks the patches: 1, the class token's, where that is classified; else None, all tokens'."""
    return 1 if model.global_pool == "token" else None


def gather_tokens(tokens, order):
    """The tokens at order (b, m), in that order. The patches of all others are gone, and those of dead tokens."""
    x, size, source = tokens
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    if size is not None:
        size = pyra.take(size, order)
        place = torch.where(size[..., 0] > 0, place, -1)
    new_index = order.new_full(x.shape[:2], -1).scatter(1, order, place)
    return pyra.Tokens(pyra.take(x, order), size, pyra.follow(source, new_index))


def attention_rows(qkv, size=None, queries=None):
    """The attention that a block's q, k, v and sizes give, of the first `queries` tokens or of all: (b, h, queries, n) float32."""
    with torch.autocast(qkv.q.device.type, enabled=False):  # in bf16 many ranks would be equal
        scores = (qkv.q[:, :, :queries].float() * qkv.q.shape[-1] ** -0.5) @ qkv.k.float().mT
        if size is not None:
            scores = scores + rearrange(size.log(), "b n 1 -> b 1 1 n")
        return scores.softmax(dim=-1)


def attention_received(qkv, size=None, queries=1):
    """The attention that each token gets, (b, h, n) float32: from the class token, or with queries=None the mean from all living tokens."""
    rows = attention_rows(qkv, size, queries)
    if queries == 1 or size is None:
        return rows.mean(dim=2)
    alive = rearrange((size > 0).float(), "b n 1 -> b 1 n 1")
    return (rows * alive).sum(dim=2) / alive.sum(dim=2)


# While a reducer learns which tokens die, none is removed. A dead token's size becomes 0 in value only: straight through the
# size, the gradient reaches the threshold or the rate that killed it. `budget.alive_mask` reads that gradient.


def size_with_gradient(number, alive):
    """The size (b, n, 1) of tokens that stand for `number` tokens (no gradient) where `alive` is 1, else 0; with the gradient of `alive`."""
    return torch.where(alive.detach() > 0, number, 1) * alive


def straight_through(hard, soft):
    """The value of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def attend_with_gradient(qkv, size=None):
    """pyra.attend with the size as a factor, e^score size, instead of log size: dead keys, whose log is infinite, get a gradient too."""
    if size is None or not size.requires_grad:
        return pyra.attend(qkv, size)
    size = rearrange(size, "b n 1 -> b 1 1 n")
    scores = ((qkv.q * qkv.q.shape[-1] ** -0.5) @ qkv.k.mT).float()
    top = scores.detach().masked_fill(size == 0, -math.inf).amax(dim=-1, keepdim=True)  # a dead key's score could leave the living 0 / 0
    weight = (scores - top).clamp(max=20).exp() * size
    return (weight / weight.sum(dim=-1, keepdim=True)).to(qkv.v.dtype) @ qkv.v


# ---- Matchings that learn --------------------------------------------------------------------------------------------


def merge_learned(tokens, metric, matching, targets, modulate=None):
    """pyra.merge, with a gradient to the metric (b, n, d) that the matching came from: FPET's straight-through assignment.

    The merged token of a source i is its best target, M_ij = [j is i's best], with the gradient of P_ij = sigmoid(C_ij - t_i): C_ij cosines,
    t_i halfway between i's best and second best. x_j = (s_j x_j + sum_i M_ij s_i x_i) / s'_j, and the size s'_j = s_j + sum_i M_ij s_i has
    a gradient too. targets: (b, kept) bool, which of the tokens that stay a source may choose. Without gradients it is pyra.merge itself.
    """
    merged = pyra.merge(tokens, matching, modulate)
    if not torch.is_grad_enabled():
        return merged
    order, dst = matching
    stay, src = order.split([order.shape[1] - dst.shape[1], dst.shape[1]], dim=1)
    with torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(metric.float(), dim=-1)
        cosines = (pyra.take(unit, src) @ pyra.take(unit, stay).mT).masked_fill(~targets[:, None], -math.inf)  # (b, r, kept)
        threshold = cosines.topk(min(2, cosines.shape[-1]), dim=-1).values.clamp(min=-1).mean(dim=-1, keepdim=True)  # -1: there may be one target alone
        soft = (cosines - threshold).sigmoid()
    chosen = straight_through(F.one_hot(dst, stay.shape[1]).float(), soft)
    x, size, _ = pyra.with_sizes(tokens._replace(x=pyra.widen(tokens.x)))
    x = x * size.to(x.dtype)
    x, x_src, size, size_src = pyra.take(x, stay), pyra.take(x, src), pyra.take(size, stay), pyra.take(size, src)
    if modulate is not None:
        x_src = modulate(x_src, pyra.take(x, dst))
    with torch.autocast(metric.device.type, enabled=False):
        x, size = x + chosen.mT.to(x.dtype) @ x_src.to(x.dtype), size + chosen.mT @ size_src
    return merged._replace(x=(x / size.to(x.dtype)).to(tokens.x.dtype), size=size)
