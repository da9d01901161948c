"""What PYRA is compared with: PEFT modules other than LoRA, channel pruning, distillation.

    add_adapter(model) | add_convpass(model) | add_fact(model) | add_snf(model)     # instead of pyra.add_lora
    prune_channels(model, search_pruning(model, flops_ratio=3.4, score=...))        # then pyra.add_lora, or one of these
    loss = distillation_loss(student(images), teacher(images), labels)

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
        This needs a reducer that merges: a patch whose token is gone has no place in it.
        A token without a patch, such as a special one, is an image of its own, 1x1: of the kernel it sees the centre.
        """
        z = quick_gelu(self.down(x))  # (b, n, h)
        where = source[:, source.shape[1] - self.grid**2:]
        patches = self.conv(rearrange(pyra.take(z, where), "b (y x) h -> b h y x", y=self.grid))
        patches = F.pad(rearrange(patches, "b h y x -> b (y x) h").float(), (0, 1), value=1.0)  # a 1 more, which counts them
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
        x = tokens.x + self.drop_path(self.attn(qkv, tokens.size if self.prop_attn else None))
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
        x = self.peft_attn(tokens.x) + self.drop_path(self.attn(qkv, tokens.size if self.prop_attn else None))
        return tokens._replace(x=x), qkv

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
    if isinstance(flows, bool) or not isinstance(flows, int) or flows < 0:
        raise ValueError(f"flows must be an integer of at least 0, not {flows!r}")
    if not flows and not affine:
        raise ValueError("SNF without affine needs flows of at least 1")
    for block in model.blocks:
        block.__class__ = SNFBlock
        for name in ("peft_attn", "peft_mlp"):
            setattr(block, name, Flow(model.embed_dim, flows, bool(affine)).to(model.pos_embed))
    return finish_peft(model, "SNF", flows=flows, affine=bool(affine))


def peft_macs(model):
    """Multiply-accumulates that a PEFT adds to one image's forward pass; all in all the model costs count_macs + peft_macs.

    For what can't be folded in, Adapter, Convpass and SNF, and for FacT until merge_fact. LoRA counts as folded in: 0.
    Activations, biases and the gathering and averaging of Convpass's patches are left out, and what FacT spends once a
    batch, whatever its size, on Sigma U.
    """
    macs, counts = 0, pyra.token_counts(model)
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
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be a positive integer, not {candidates!r}")
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
