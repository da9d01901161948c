"""FacT: low-rank updates of all linear maps of the network from factors that they share."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange

import pyra
from pyra_lab.pefts.shared import check_scale, finish_peft

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
    """add_fact's form, rank and scale for a task of VTAB-1k, by its name in vtab.VTAB; for any other rank 16 (tk: 32), scale 1."""
    tt_rank, tt_scale, tk_rank, tk_scale = FACT.get(task, (16, 1.0, 32, 1.0))
    return dict(form=form, rank=tt_rank, scale=tt_scale) if form == "tt" else dict(form=form, rank=tk_rank, scale=tk_scale)


class FacTLinear(nn.Linear):
    """A frozen linear map whose weight, cut into outs x ins pieces of at most c x c, gets s V Sigma U added to each piece.

    u: (r, c) and v: (c, r) are the whole network's; each piece has its own Sigma, (r, r). In the TT form that is core
    (outs, ins, r, r) as it stands. In the TK form Sigma = sum_k core[:, :, k] p[k], core (r, r, r) shared by the network too
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
    def folded(self):
        """The plain nn.Linear with the update in its weight."""
        update = self.up().float() @ rearrange(self.down().float(), "(o q) c -> o q c", o=self.outs)
        return pyra.with_update(self, self.scale * rearrange(update, "o d c -> (o d) c")[:self.out_features])

    def macs(self, n):
        return n * self.outs * (self.peft_u.shape[0] * self.in_features + self.up().numel())


def linears(block):
    """A block's four linear maps as (module, name, outs, ins): in how many pieces FacT cuts each."""
    k = math.ceil(block.mlp.fc1.out_features / block.mlp.fc1.in_features)
    return (block.attn, "qkv", 3, 1), (block.attn, "proj", 1, 1), (block.mlp, "fc1", k, 1), (block.mlp, "fc2", 1, k)


@pyra.on_model
def add_fact(model, form="tt", rank=16, scale=1.0, dropout=0.1):
    """FacT (Jie & Deng, AAAI 2023, arXiv 2212.03145): low-rank updates of all linear maps from factors that they share.

    form: "tt" (tensor train) or "tk" (Tucker). rank, scale: the paper picks them task by task, see `fact_settings`. dropout:
    between Sigma and V, in training. V starts at zero: training starts at the pre-trained model. q, k, v and proj are one
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


@pyra.on_model
def fold_fact(model):
    """Folds FacT into the linear maps, W + s V Sigma U, and removes its tensors: the same logits for less work. Returns the model."""
    if model.peft and model.peft["name"] == "FacT":
        for block in model.blocks:
            for module, name, *_ in linears(block):
                setattr(module, name, getattr(module, name).folded())
        for name in [name for name in model._parameters if name.startswith("peft_")]:
            delattr(model, name)
        model.peft, model.folded = None, "FacT"
    return model


def defaults(form, task):
    settings = fact_settings(task, form)
    return dict(peft_dim=settings["rank"], peft_scale=settings["scale"])


def add(form, model, config):
    return add_fact(model, form, config.peft_dim, config.peft_scale, config.dropout)
