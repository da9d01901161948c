"""RaP, random channel pruning: cut heads and MLP units out of the backbone before it is adapted."""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import pyra
from pyra_lab import budget, files


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
    if model.peft or pyra.lora_layers(model):
        raise ValueError("the model has a PEFT already: prune first, then add it to the pruned model")
    if model.blocks[0].mlp.act == "swiglu":
        raise ValueError("pruning is for MLPs of two maps, and SwiGLU has three: take a backbone with another act")


@pyra.on_model
@torch.no_grad()
def prune_channels(model, keep):
    """Cuts attention heads and MLP units out of every block, in place; the residual stream stays c wide. Returns the model.

    keep: one (heads, units) per block, how many stay, at least 1: those with the largest L1 norm of all their weights (of a
    head: rows of q, k, v and columns of proj; of a unit: its row of fc1 and column of fc2). A head keeps its width d, so its softmax is
    scaled as before. Raises ValueError.
    """
    check_prunable(model)
    pairs = pyra.to_python(keep)
    if not isinstance(pairs, list) or len(pairs) != len(model.blocks):
        raise ValueError(f"keep must be a list with one (heads, units) for each of the {len(model.blocks)} blocks, not {keep!r}")
    for i, (block, pair) in enumerate(zip(model.blocks, pairs)):
        most = block.attn.num_heads, block.mlp.fc1.out_features
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(k) is int and 1 <= k <= full for k, full in zip(pair, most)):
            raise ValueError(f"block {i}: (heads, units) to keep must be integers from (1, 1) to {most}, not {keep[i]!r}")

    def choose(norms, k):
        return norms.topk(k).indices.sort().values

    for block, (heads, units) in zip(model.blocks, pairs):
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


def scale_to_budget(ratios, full, cost, macs):
    """full * ratios * t, each from 1 to full, with the factor t at which they cost `macs`, found by bisection. All 1-D."""
    low, high = 0.0, 1 / ratios.min().item()  # at high everything is full
    for _ in range(60):
        t = (low + high) / 2
        keep = torch.minimum((full * ratios * t).clamp(min=1), full)
        low, high = (t, high) if keep @ cost < macs else (low, t)
    return keep


@pyra.on_model
def random_keep(model, flops_ratio, generator):
    """Random (heads, units) to keep in each block, of which count_macs is within 1 % of the model's over flops_ratio.

    Ratios from U(0.1, 1), for each block one for heads and one for units, all scaled by one factor and at most 1; heads are
    rounded first, and units make up for it. Raises ValueError where none of 100 draws meets the budget.
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
    macs = target - (pyra.count_macs(model) - (full @ cost).item())  # patch embedding and head are not pruned
    for _ in range(100):
        ratios = torch.empty(2 * depth, dtype=torch.float64).uniform_(0.1, 1, generator=generator)
        heads = scale_to_budget(ratios, full, cost, macs)[:depth].round()
        units = scale_to_budget(ratios[depth:], full[depth:], cost[depth:], macs - (heads @ cost[:depth]).item()).round()
        if abs((torch.cat([heads, units]) @ cost).item() - macs) <= 0.01 * target:
            return [(int(a), int(b)) for a, b in zip(heads, units)]
    raise ValueError(f"no random pruning of this model meets 1/{flops_ratio:g} of its MACs within 1 %")


@pyra.on_model
def search_pruning(model, flops_ratio, score, candidates=20, seed=0, progress=True):
    """RaP, "Revisiting random channel pruning" (Li et al., CVPR 2022), for a ViT: the best of `candidates` random prunings.

    flops_ratio: F/f, the model's MACs over the pruned one's, met within 1 %. score(pruned) -> a number, the lower the better,
    such as `probe_loss`; it may train the model that it gets, which is thrown away. Returns what `prune_channels` is to keep; the model
    stays as it is. Raises ValueError.

    The paper prunes CNNs, and no code was published: heads and MLP units for channels are our choice. Its least-squares
    reconstruction of the features is left out, since adaptation trains the pruned model anyway.
    """
    check_prunable(model)
    pyra.check_flops_ratio(flops_ratio)
    pyra.check_integer("candidates", candidates)
    generator = torch.Generator().manual_seed(seed)
    best, best_score = None, math.inf
    for _ in files.progress(range(candidates), desc="scoring prunings", delay=2, show=progress):
        keep = random_keep(model, flops_ratio, generator)
        value = torch.as_tensor(score(prune_channels(copy.deepcopy(model), keep))).item()
        if value < best_score:  # never true of nan
            best, best_score = keep, value
    if best is None:
        raise ValueError(f"score gave no finite number for any of the {candidates} candidates")
    return best


def probe_loss(features, labels, held_out, held_out_labels, num_classes, weight_decay=1e-3):
    """Cross-entropy on held-out features of the linear head that fits the others best: how much a frozen model knows about a task.

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


def flops_ratio(model, config):
    """The model's MACs over those that merging at the config's rate would leave. Raises ValueError for a model or a rate to which nothing can be pruned."""
    check_prunable(model)
    ratio = pyra.count_macs(model) / budget.target_macs(config, model)
    if ratio == 1:
        raise ValueError(f"rap prunes to the operations that merging at rate would leave, and rate {config.rate} merges nothing")
    return ratio


def plan(config, context):
    """Before training: the best of 20 prunings by a linear head on their features, fitted to train800, judged on val200."""
    model = context.backbone()

    def score(pruned):
        features = lambda x: pruned.pool(pruned.forward_tokens(x))
        pruned.eval().to(context.device)
        return probe_loss(*context.predict_split(features, "train800"), *context.predict_split(features, "val200"), context.num_classes)

    return search_pruning(model, flops_ratio(model, config), score, seed=config.seed, progress=context.progress)


def add(model, config, plan):
    return prune_channels(model, plan)
