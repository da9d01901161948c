"""What every row of METHODS and of PEFTS promises, those added at run time too."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers import BACKBONE, ONE_STEP, R, ROOT, batch, count_flops, rows, tiny, trained
from safetensors.torch import load_file

import pyra
from pyra_lab import Config, Method, Peft, budget, build_model, config, epochs, evaluation, fold, load_run, methods, pruning, recorded, run
from pyra_lab.methods import METHODS, PEFTS
from pyra_lab.pefts import adapter, fact, snf
from pyra_lab.pefts.shared import peft_macs
from pyra_lab.reducers import diffrate, ltmp

ADAPTERS = Path(__file__).parent / "golden" / "adapters"

# One line per method: what a small model needs; and which of its trained parameters can't learn there, as the beginnings of their names.
METHOD_CASES = {
    "plain": dict(),
    "tome": dict(),
    "pyra": dict(idle=("blocks.2.reducer.",)),  # nothing of the last block's merging reaches the class token
    "evit": dict(),
    "tofu": dict(),
    "ats": dict(plan=[27, 21, 18]),
    "ltmp": dict(),
    "diffrate": dict(plan=[[36, 36], [25, 20], [30, 18]]),
    "rap": dict(plan=[[2, 20], [1, 48], [2, 11]]),
    "pyra_row": dict(idle=("blocks.2.reducer.",)),
    "fpet": dict(),
    "pitome": dict(),
    "dtem": dict(idle=("blocks.2.reducer.",)),
}
# The same per PEFT, together with PYRA; whether it folds into the weights; and, with ToMe, what it multiplies element by element, which
# PyTorch's counter leaves out. Tokens before each block's merging: 37, 27 and 21; after it: 27, 21 and 18; channels: 24.
PEFT_CASES = {
    "lora": dict(folds=True),
    "adapter": dict(),
    "convpass": dict(),
    "fact_tt": dict(folds=True),
    "fact_tk": dict(folds=True),
    "snf": dict(uncounted=24 * (37 + 27 + 21) + 24 * (27 + 21 + 18)),
    "full": dict(),
}
CASES = [(method, "lora") for method in METHOD_CASES] + [("pyra", peft) for peft in PEFT_CASES if peft != "lora"]
UNLIKE_DEFAULT = dict(rate=R, s=2, modulation_lr=0.5, lora_rank=3, lora_targets="fc1", lora_alpha=6.0, dropout=0.25, peft_dim=3, peft_scale=2.0, layer_decay=0.5,
                      rise=0.5, any_rate=True, train_rate="low")

pytestmark = pytest.mark.usefixtures("small_backbone")


def small_config(method="pyra", peft="lora", **fields):
    return Config(**{**ONE_STEP, "method": method, "peft": peft, "peft_dim": 4, "weight_decay": 0.0, **fields})


# ----------------------------------------------------------------------------------------------------------------------
# Every row


def test_every_row_has_its_cases_here():
    assert METHOD_CASES.keys() == METHODS.keys() and PEFT_CASES.keys() == PEFTS.keys()


def test_every_row_is_in_the_guide():
    """In a table whose first column has its name."""
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "guide.md").read_text(), flags=re.MULTILINE)
    assert not [name for name in (*METHODS, *PEFTS) if name not in listed]


@pytest.mark.parametrize("method, peft", CASES)
def test_a_row_trains_saves_loads_and_folds(tmp_path, method, peft):
    """In its second step, when no factor is zero any more, each trained parameter has a gradient and moves, and nothing else does."""
    case, c = METHOD_CASES[method], small_config(method, peft).resolved()
    idle = case.get("idle", ()) + PEFT_CASES[peft].get("idle", ())
    model = build_model(c, 5, case.get("plan"))
    loss_of, optimizer = epochs.make_loss(model, c, 5), epochs.make_optimizer(model, c)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(batch(6), torch.arange(6) % 5, None)[0].backward()
        optimizer.step()
        for block in model.blocks:
            getattr(block.reducer, "after_step", lambda: None)()
    for name, p in model.named_parameters():
        learns = p.requires_grad and not name.startswith(idle)
        assert (p.grad is not None and bool(p.grad.any())) == learns, name
        assert torch.equal(p, start[name]) != learns, name
    counts = methods.count_trained(model)
    assert sum(counts.values()) == sum(p.numel() for p in trained(model).values())
    assert counts["backbone" if PEFTS[peft].trains_backbone else "peft"] > 0  # only what has peft_ in its name is trained and saved

    pyra.save_adapter(model.eval(), tmp_path / "a.safetensors")
    fresh = build_model(c, 5, case.get("plan")).eval()
    logits = model(batch())
    assert not torch.equal(fresh(batch()), logits)
    assert torch.equal(pyra.load_adapter(fresh, tmp_path / "a.safetensors")(batch()), logits)

    folded = fold(copy.deepcopy(model))
    torch.testing.assert_close(folded(batch()), logits, rtol=1e-4, atol=1e-5)
    assert bool(folded.folded) == (PEFTS[peft].fold is not None) == PEFT_CASES[peft].get("folds", False)
    assert not folded.folded or {name for name in folded.state_dict() if ".reducer." not in name} == tiny().state_dict().keys()


@rows("method", [name for name, row in METHODS.items() if "rate" in row.uses and row.plan is None and row.dial is None])
def test_a_method_without_plan_or_dial_meets_its_budget_as_it_is_built(method):
    """From the start, within 5 %."""
    c = small_config(method)
    model = build_model(c, 5)
    assert pyra.count_macs(model) == pytest.approx(budget.target_macs(c, model), rel=0.05)


@rows("method", METHOD_CASES)
def test_a_method_leaves_as_many_tokens_as_it_says(method):
    """After each block: by tokens_after, or image by image, where padding of size 0 doesn't count."""
    model = build_model(small_config(method), 5, METHOD_CASES[method].get("plan")).eval()
    images, left = batch(), [model.forward_tokens(batch(), depth) for depth in range(4)]
    assert all(((-1 <= tokens.source) & (tokens.source < tokens.x.shape[1])).all() for tokens in left)
    if budget.depends_on_image(model):
        assert torch.equal(budget.forward_counted(model, images)[1], torch.stack([(tokens.size > 0).sum(dim=(1, 2)) for tokens in left]).float())
    else:
        assert pyra.token_counts(model) == [tokens.x.shape[1] for tokens in left]


@rows("peft", [name for name, row in PEFTS.items() if row.fold is None])
def test_a_pefts_operations_are_what_pytorch_counts(peft):
    """Without a `macs(n)` on its modules, a PEFT that can't be folded in would look as cheap as LoRA."""
    model = build_model(small_config("tome", peft), 5)
    beyond = count_flops(model, batch(1)) - count_flops(pyra.add_tome(tiny(), R), batch(1))
    assert peft_macs(model) == beyond + PEFT_CASES[peft].get("uncounted", 0)


@rows("peft", PEFTS)
def test_a_model_takes_one_peft(peft):
    """Whichever comes first."""
    row, c = PEFTS[peft], small_config(peft=peft).resolved()
    with pytest.raises(ValueError, match="the model has LoRA already, and takes one PEFT"):
        row.add(pyra.add_lora(tiny()), c)
    if not row.trains_backbone:  # that leaves nothing but what is trained
        with pytest.raises(ValueError, match="takes one PEFT"):
            pyra.add_lora(row.add(tiny(), c))


@rows("method, peft", CASES)
def test_fields_that_a_row_does_not_use_are_reset(method, peft):
    """And so don't tell one run from another; those that method or PEFT use do."""
    uses = METHODS[method].uses | PEFTS[peft].uses
    assert uses <= methods.OPTIONAL == UNLIKE_DEFAULT.keys()
    c = Config(method=method, peft=peft, backbone=BACKBONE, device="cpu", **UNLIKE_DEFAULT)
    for name, value in UNLIKE_DEFAULT.items():
        default = Config.__dataclass_fields__[name].default
        assert getattr(c.resolved(), name) == (value if name in uses else default), name
        assert (dataclasses.replace(c, **{name: default}).id() != c.id()) == (name in uses), name


class Recorder:
    """A Config that notes which fields are read."""

    def __init__(self, c):
        self.c, self.read = c, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.c, name)


@rows("method, peft", CASES)
def test_a_row_uses_the_fields_that_it_reads(method, peft):
    """Else a run would be trained with another value than its Config has. The rate is the budget's too, and some fields are the training's."""
    c, elsewhere = small_config(method, peft).resolved(), {"rate", "rise", "any_rate", "train_rate", "modulation_lr", "layer_decay"}
    by_method, by_peft = Recorder(c), Recorder(c)
    model = PEFTS[peft].add(tiny(), by_peft)
    METHODS[method].add(tiny() if METHODS[method].before_peft else model, by_method, METHOD_CASES[method].get("plan"))
    for row, recorder in ((METHODS[method], by_method), (PEFTS[peft], by_peft)):
        read = recorder.read & methods.OPTIONAL
        assert read <= row.uses <= read | elsewhere, row.title


def test_rows_say_what_they_are():
    """A title for tables and figures, no two alike, and a help text for the command line."""
    for table in (METHODS, PEFTS):
        assert len({row.title for row in table.values()}) == len(table) and all(row.help and not row.help.endswith(".") for row in table.values())


# ----------------------------------------------------------------------------------------------------------------------
# Rows added at run time


def test_a_method_added_at_run_time(monkeypatch, task, tmp_path):
    """Works in Config, on the command line, in build_model, run and load_run, and is found again; before and after it is refused."""
    with pytest.raises(ValueError, match="method 'half' is unknown; it must be one of plain, "):
        Config(method="half")
    half = Method("Half", "merges half as many pairs", lambda model, c, plan: pyra.add_tome(model, [r // 2 for r in budget.schedule(c, model)]))
    monkeypatch.setitem(METHODS, "half", half)
    c = Config(task=task, method="half", **ONE_STEP)
    assert config.parse(config.arguments(c)) == c
    assert pyra.token_counts(build_model(c, 3)) == [37, 32, 29, 28]
    with pytest.warns(UserWarning, match="misses its MAC budget by"):
        result = run(c, tmp_path, progress=False)
    assert result.token_counts == [37, 32, 29, 28] and "-half-" in result.folder
    assert load_run(result).blocks[0].reducer.r == 5
    assert run(c, tmp_path, progress=False) == result == recorded(c, ["method"], tmp_path)[0]
    assert dataclasses.replace(c, s=3).id() == c.id() != dataclasses.replace(c, rate=[8, 6, 4]).id()


class Shift(torch.nn.Module):
    """A reducer that removes nothing, with a trained number and a learning rate for it."""

    lrs = {"shift": 0.25}

    def __init__(self):
        super().__init__()
        self.shift, self.settings = torch.nn.Parameter(torch.tensor(0.5)), dict(kind="shift")

    def tokens_after(self, n):
        return n

    def forward(self, tokens, qkv):
        return tokens._replace(x=tokens.x + self.shift)


def shifting(reducer=Shift, **fields):
    """A row whose reducers shift."""
    return Method("Shift", "shifts", lambda model, c, plan: pyra.set_reducers(model, [reducer() for _ in model.blocks]), **fields)


def test_a_reducer_with_a_trained_parameter_needs_its_class_and_its_row(monkeypatch, task, tmp_path):
    """It trains at its own learning rate, without decay, is recorded as the reducer's, and comes back with the adapter."""
    monkeypatch.setitem(METHODS, "shift", shifting(uses=frozenset({"s"})))
    c = Config(task=task, method="shift", s=2, **ONE_STEP)
    assert c.resolved().s == 2 and c.resolved().rate == "high"  # what it uses, and what it doesn't
    groups = {group["name"]: group for group in epochs.make_optimizer(build_model(c, 3), c.resolved()).param_groups}
    assert groups["shift"]["lr"] == 0.25 and groups["shift"]["weight_decay"] == 0 and len(groups["shift"]["params"]) == 3
    result = run(c, tmp_path, progress=False)
    assert result.trained["reducer"] == 3
    shifts = [block.reducer.shift.item() for block in load_run(result).blocks]
    assert all(abs(shift - 0.5) > 0.1 for shift in shifts)  # Adam's first step is as long as the learning rate


def train_biases(model, c):
    """BitFit."""
    for name, p in model.named_parameters():
        p.requires_grad_(pyra.is_adapter(name) or name.startswith("blocks.") and name.endswith(".bias"))
    return model


def test_a_peft_added_at_run_time(monkeypatch, task, tmp_path):
    monkeypatch.setitem(PEFTS, "bitfit", Peft("BitFit", "trains the biases", train_biases, frozenset()))
    c = Config(task=task, method="tome", peft="bitfit", **ONE_STEP)
    result = run(c, tmp_path, progress=False)
    model = load_run(result)
    biases = {name for name, _ in model.named_parameters() if name.startswith("blocks.") and name.endswith("bias")}
    assert trained(model).keys() == biases | {"head.weight", "head.bias"}
    assert dataclasses.replace(c, lora_rank=7).id() == c.id()


class Unwritable(Shift):
    """Its settings are no JSON."""

    def __init__(self):
        super().__init__()
        self.settings = dict(shift=self.shift)


class Miscounted(Shift):
    """Says that it removes one token."""

    def tokens_after(self, n):
        return n - 1


BROKEN = [  # table, name, row, what the sentence says
    (METHODS, "shift", shifting(torch.nn.Identity), r"the Identity of Shift needs a method tokens_after\(n\): see pyra.Block$"),
    (METHODS, "shift", shifting(Miscounted), r"block 0: tokens_after\(37\) of its Miscounted says 36 tokens, and 37 are left$"),
    (METHODS, "shift", shifting(Unwritable), "the settings of Shift's Unwritable must be JSON: Object of type Parameter is not JSON serializable$"),
    (METHODS, "shift", shifting(uses=frozenset({"ratio"})), "Shift uses ratio: uses may name any_rate, dropout, layer_decay, .*, s, train_rate$"),
    (METHODS, "lost", Method("Lost", "forgets to return", lambda model, c, plan: None), "add of Lost must return the model, not None$"),
    (PEFTS, "lost", Peft("Lost", "forgets to return", lambda model, c: None), "add of Lost must return the model, not None$"),
    (PEFTS, "none", Peft("None", "does nothing", lambda model, c: model, frozenset({"width"})), "None uses width: uses may name any_rate, dropout, .*, s, train_rate$"),
    (evaluation.METRICS, "mean", lambda logits, labels: 1 / 0, "metric mean gives no number or list of numbers: ZeroDivisionError"),
    (evaluation.METRICS, "mean", lambda logits, labels: logits.mean(), "metric mean gives no number or list of numbers: TypeError: Object of type Tensor"),
    (evaluation.METRICS, "seed", lambda logits, labels: 0.5, "a metric can't be called seed: a run's record has that name already$"),
    (evaluation.METRICS, "loss", lambda logits, labels: 0.5, "a metric can't be called loss: a run's record has that name already$"),
]


@rows("table, name, row, sentence", BROKEN)
def test_a_broken_row_is_refused_before_a_run(monkeypatch, task, tmp_path, table, name, row, sentence):
    """In a sentence, and nothing is written."""
    monkeypatch.setitem(table, name, row)
    fields = dict(method=name) if table is METHODS else dict(peft=name) if table is PEFTS else {}
    with pytest.raises(ValueError, match=sentence):
        run(Config(task=task, **ONE_STEP, **fields), tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Adapters of an earlier version


@pytest.mark.parametrize("name, add", [
    ("pyra-lora", lambda model: pyra.add_pyra(pyra.add_lora(model, rank=2), R)),
    ("ltmp-snf", lambda model: ltmp.add_ltmp(snf.add_snf(model))),
    ("diffrate-fact_tk", lambda model: diffrate.freeze_diffrate(
        diffrate.add_diffrate(fact.add_fact(model, "tk", rank=4, scale=10)), [(36, 36), (25, 20), (30, 9)])),
    ("rap-adapter", lambda model: adapter.add_adapter(pruning.prune_channels(model, [(2, 20), (1, 48), (3, 7)]), dim=4)),
])
def test_adapters_of_the_first_version_still_load(name, add):
    """With the logits that they gave there: names, metadata and the hash of the backbone are as they were."""
    model = pyra.load_adapter(add(tiny()), ADAPTERS / f"{name}.safetensors").eval()
    torch.testing.assert_close(model(batch()), load_file(ADAPTERS / "logits.safetensors")[name], rtol=1e-4, atol=1e-5)
