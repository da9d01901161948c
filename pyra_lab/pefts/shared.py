"""What several PEFTs share. What a PEFT may replace in a block: `pyra.Block`."""

import math

import pyra


def check_scale(scale):
    number = pyra.to_python(scale)
    if type(number) not in (int, float) or not 0 < number < math.inf:
        raise ValueError(f"scale must be a finite number greater than 0, not {scale!r}")


def finish_peft(model, name, **settings):
    """Notes what an adapter of this model must fit, and freezes the backbone. Returns the model."""
    model.peft, model.folded = dict(name=name, **settings), None
    model.train(model.training)  # the new modules too
    pyra.freeze(model)
    return model


@pyra.on_model
def peft_macs(model, counts=None):
    """Multiply-accumulates that a PEFT adds to one image's forward pass; in all the model costs count_macs + peft_macs.

    counts: tokens before the first block and after each, where they are not the model's `pyra.token_counts`.

    Adapter, Convpass and SNF can't be folded in; FacT counts until it is, and LoRA always counts as folded in: 0.
    Activations, biases and the gathering and averaging of Convpass's patches are left out, and FacT's products Sigma U, which
    are computed once per batch.
    """
    macs, counts = 0, pyra.token_counts(model) if counts is None else counts
    for block, n, m in zip(model.blocks, counts, counts[1:]):
        for name, module in block.named_modules():
            if hasattr(module, "macs"):
                macs += module.macs(n if "attn" in name else m)
    return macs
