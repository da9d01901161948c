"""PiToMe: merges where tokens are crowded, by an energy that protects those that stand alone."""

import torch
import torch.nn.functional as F

import pyra
from pyra_lab import budget


def match_by_energy(metric, r, margin, specials=1):
    """metric (b, n, d) -> the Matching in which, of the 2 r patches of highest energy, every other merges into its most similar one of the rest.

    Energy of patch i: the mean over all patches j of elu(cos(i, j) - margin). Pairs are in the order of energy.
    """
    b, n, _ = metric.shape
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(metric[:, specials:].float(), dim=-1)
        similarity = unit @ unit.mT
        order = F.elu(similarity - margin).mean(dim=-1).argsort(dim=-1, descending=True, stable=True)
        src, targets, protected = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
        pairs = pyra.take(pyra.take(similarity, src).mT, targets)  # (b, targets, sources)
        front = torch.arange(specials, device=metric.device).expand(b, -1)
        return pyra.Matching(torch.cat([front, *(part + specials for part in (protected, targets, src))], dim=1), pairs.argmax(dim=1) + n - 2 * r)


class PiToMe(pyra.ToMe):
    """ToMe with another matching: by energy, above a margin."""

    def __init__(self, r, margin, specials=1):
        super().__init__(r, specials)
        self.margin, self.settings = margin, dict(margin=margin)

    def match(self, qkv):
        n = qkv.k.shape[2]
        return match_by_energy(qkv.metric(), n - self.tokens_after(n), self.margin, self.specials)

    def extra_repr(self):
        return f"r={self.r}, margin={self.margin:g}"


@pyra.on_model
def add_pitome(model, r):
    """PiToMe (Tran et al., NeurIPS 2024, arXiv 2405.16148): protects what is unlike all else, and merges within the crowds. Nothing is trained.

    r as in pyra.add_tome. The margin falls over the blocks, 0.9 - 0.8 l / L as in the authors' code for DeiT: early keys are more alike.
    Their mean keys, cosines and size-weighted averages are ToMe's. Returns the model. Raises ValueError.
    """
    entries = pyra.check_schedule(model, r)
    margins = [0.9 - 0.8 * l / len(entries) for l in range(len(entries))]
    return pyra.set_reducers(model, [PiToMe(entry, margin, model.specials) if entry else None for entry, margin in zip(entries, margins)])


def add(model, config, plan):
    return add_pitome(model, budget.schedule(config, model))
