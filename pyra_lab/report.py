"""What notebooks show: checked parameters, tables, one colour per method, figures, and the picture of merged tokens.

matplotlib and IPython are imported where they are used: notebooks need them, this package doesn't.
"""

import ast
import difflib
import functools
import itertools
import re
import sys
import textwrap
import warnings

import torch
from einops import rearrange, repeat

import pyra
from pyra_lab.images import normalize
from pyra_lab.labels import label_points
from pyra_lab.methods import METHODS, PEFTS
from pyra_lab.records import OverSeeds, accuracy_over_seeds, measured_rows
from pyra_lab.tasks import is_own

# ---- Parameters ------------------------------------------------------------------------------------------------------


def check_parameters(namespace, may_be_empty=()):
    """Raises ValueError for parameters that papermill passed but the notebook doesn't define, and for values of another type.

    namespace: the notebook's globals(), where the parameters cell has written `name: type = default`. may_be_empty: lists that
    need no entry. papermill itself only warns of an unknown name, and runs the default.
    """
    known = namespace["__annotations__"]
    injected = [source for source in namespace.get("In", []) if source.startswith("# Parameters\n")]
    for name in [target.id for source in injected for line in ast.parse(source).body for target in line.targets]:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"there is no parameter {name!r}; " + (f"did you mean {near[0]}" if near else f"the parameters are {', '.join(known)}"))
    for name, kind in known.items():  # a str may stand for other types too, which Config checks
        value, expected = namespace[name], getattr(kind, "__name__", kind)
        allowed = {"int": int, "float": (int, float), "bool": bool, "list": list}.get(expected, object)
        if value == [] and name not in may_be_empty:
            raise ValueError(f"{name} needs an entry")
        if value is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and expected in ("int", "float"))):
            remedy = "; papermill takes a list with -y 'name: [1, 2]'" if expected == "list" else ""
            raise ValueError(f"{name} must be of type {expected}, not {value!r}{remedy}")
        for entry in value if isinstance(value, list) else []:
            if isinstance(entry, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", entry):
                raise ValueError(f"{name} has the text {entry!r} where a number belongs: YAML reads 1e-3 as text, and 1.0e-3 as a number")


# ---- Words and tables ------------------------------------------------------------------------------------------------


def title(method, peft=None, joint=" + "):
    """How tables and figures call a method, or a method with a PEFT: "PYRA", "LoRA + PYRA", "LoRA". joint: what stands between the two."""
    names = [PEFTS[peft].title] if peft else []
    if method != "plain" or not peft:
        names.append(METHODS[method].title)
    return joint.join(names)


def say(text):
    """Displays Markdown."""
    from IPython.display import Markdown, display
    display(Markdown(text))


def caution(groups, measured=True):
    """Says in bold, above numbers, that these are too few to judge by: fewer than 3 seeds or 10 epochs. groups: Results over seeds, one list per method.

    It points at what was measured over seeds, where that was measured; of images of one's own nobody has.
    """
    results = [result for group in groups for result in group]
    numbers = {"epoch": max(result.config["epochs"] for result in results), "seed": len({result.config["seed"] for result in results})}
    if numbers["epoch"] < 10 or numbers["seed"] < 3:
        counted = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in numbers.items())
        tasks = ", ".join(dict.fromkeys(result.config["task"].split("/")[-1] for result in results))
        own = all(is_own(result.config["task"]) for result in results)
        repeat = "Repeat it with at least 10 epochs and 3 seeds before you rely on it."
        remedy = repeat if own or not measured else "Results over seeds: [README.md](README.md)."
        say(f"**{counted}, {tasks}: an illustration of the procedure, not evidence. {remedy}**")


def compared(ours, theirs):
    """Two accuracies in %, such as OverSeeds' means -> "1.6 points above", "0.8 points below" or "level with"."""
    difference = round(ours - theirs, 1)
    return f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'}" if difference else "level with"


def best_of(means):
    """{name: accuracy in %} -> "b is the best", "a and b are the best", or, where no one is ahead, "all are level"."""
    best = [name for name, mean in means.items() if compared(mean, max(means.values())) == "level with"]
    if len(best) == len(means) > 1:
        return "all are level"
    return f"{', '.join(best[:-1])} and {best[-1]} are the best" if len(best) > 1 else f"{best[0]} is the best"


FORMATS = {"trained, % of backbone": ".2f", "speed-up": ".2f", "images/s": ",.0f", "MAC ratio": ".2f"}


def format_cell(value, spec):
    if value is None or value == "":
        return "–"
    if spec and not isinstance(value, str):
        return format(value, spec)
    if isinstance(value, int):  # True and False too
        return f"{value:,}" if value is not True and value is not False else str(value)
    return f"{value:,.1f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def markdown_table(rows, formats=None):
    """Rows, dicts of {column: value}, as a Markdown table. formats: {column: format spec}, by default one decimal for a float; None is "–"."""
    columns, formats = list(dict.fromkeys(itertools.chain(*rows))), formats or {}
    numeric = {c: all(isinstance(row.get(c), (int, float, OverSeeds, type(None))) for row in rows) for c in columns}
    lines = [columns, ["---:" if numeric[c] else "---" for c in columns]]
    lines += [[format_cell(row.get(c), formats.get(c)) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(rows, formats=None):
    """Displays rows as markdown_table writes them; columns that many tables have need no format."""
    say(markdown_table(rows, FORMATS | (formats or {})))


def measured(group):
    """The columns that many tables share, of one method's Results over seeds."""
    first = group[0]
    trained = sum(first.trained.values()) - first.trained["head"]
    return {"trained, % of backbone": 100 * trained / first.backbone_parameters,
            "MACs, M": sum(result.macs for result in group) / len(group) / 1e6, "seeds": len(group), "accuracy, %": accuracy_over_seeds(group)}


def as_json(group, **more):
    """What programs may want to know of one method's Results over seeds."""
    first = group[0]
    return {"accuracy": [r.accuracy_last for r in group], "seeds": [r.config["seed"] for r in group], "macs": first.macs, "trained": first.trained, **more}


def show_json(results):
    """Displays {name: dict} for the programs that read an executed notebook; a reader sees one line."""
    from IPython.display import display
    display({"application/json": results, "text/plain": f"{len(results)} results as JSON, for programs"}, raw=True)


# ---- Figures ---------------------------------------------------------------------------------------------------------

COLOURS = {"plain": "#7f7f7f", "tome": "#0072b2", "pyra": "#e66100", "pyra_row": "#8b0000"}
# of Okabe and Ito, and beyond
PALETTE = ("#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#5d3a9b", "#8c510a", "#00a6a6", "#d41159", "#000000", "#6b8e23", "#4169e1")
MARKERS = "osD^vP*X"


def colour(method):
    """One colour per method everywhere; those without a colour of their own take the palette's, in the order of METHODS."""
    others = [name for name in METHODS if name not in COLOURS]
    return COLOURS.get(method) or PALETTE[others.index(method) % len(PALETTE)]


def use_style():
    """Figures as all notebooks have them, and warnings as the command line shows them: each once, without a place in the code."""
    import matplotlib
    say = functools.cache(functools.partial(print, file=sys.stderr))
    warnings.showwarning = lambda message, *place: say(f"note: {' '.join(str(message).split())}")
    matplotlib.rcParams.update({
        "figure.dpi": 150, "figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.1, "font.size": 8, "axes.titlesize": 9,
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=[*COLOURS.values(), *PALETTE]), "legend.frameon": False, "lines.linewidth": 1.2, "lines.markersize": 4.5,
    })


def accuracy_axis(ax, values, least=10):
    """Limits that hold accuracies in % and span at least so many points, so that a small difference looks small."""
    low, high = min(values), max(values)
    room = max(0.12 * (high - low), (least - (high - low)) / 2, 1)
    ax.set(ylim=(max(low - room, -2), min(high + room, 102)), ylabel="accuracy, %")


def draw_accuracy(ax, x, accuracy, ink, marker="o"):
    """One point; an error bar, the standard deviation, where it is of several seeds or over_images."""
    if accuracy.n > 1:
        ax.errorbar(x, accuracy.mean, accuracy.std, fmt=marker, color=ink, capsize=2)
    else:
        ax.plot(x, accuracy.mean, marker, color=ink)


def draw_level(ax, accuracy, text, ink, linestyle="-"):
    """A horizontal line with its name above its right end, in a band of one standard deviation."""
    ax.axhline(accuracy.mean, color=ink, linestyle=linestyle)
    ax.axhspan(accuracy.mean - accuracy.std, accuracy.mean + accuracy.std, color=ink, alpha=0.15, linewidth=0)
    ax.annotate(text, (1, accuracy.mean), xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(0, 2), ha="right", color=ink, fontsize=7.5)


def tradeoff(points, costs):
    """Accuracy against costs, one panel per cost. Shows the figure.

    points: dicts with accuracy (OverSeeds or over_images, in %), label, method (whose colour it has), perhaps marker, and one value per cost.
    costs: {key: label of the axis}.
    """
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(costs), figsize=(1 + 3.5 * len(costs), 3), sharey=True, squeeze=False)
    for ax, (key, label) in zip(axes[0], costs.items()):
        for point in points:
            draw_accuracy(ax, point[key], point["accuracy"], colour(point["method"]), point.get("marker", "o"))
        ax.set(xlabel=label, xlim=(0, 1.3 * max(point[key] for point in points)))
    accuracy_axis(axes[0, 0], [mean + sign * std for mean, std, _ in (point["accuracy"] for point in points) for sign in (-1, 1)])
    for ax in axes[0, 1:]:
        ax.set(ylabel="")
    for ax, key in zip(axes[0], costs):
        label_points(ax, [(point[key], point["accuracy"].mean, point["label"], colour(point["method"])) for point in points])
    plt.show()


def dots(rows):
    """Accuracy as a dot, one panel per task, one line per label, one marker per group. Shows the figure.

    rows: dicts with task, label, method (whose colour the label and its dots have), accuracy (OverSeeds, in %) and group, "" where there is one.
    """
    import matplotlib.pyplot as plt
    labels = {row["label"]: row["method"] for row in rows}  # {label: method}, in their order
    tasks, groups = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "group"))
    markers = dict(zip([group for group in groups if group], MARKERS))
    figure, axes = plt.subplots(1, len(tasks), figsize=(1.5 + 2.4 * len(tasks), 0.9 + 0.2 * len(labels)), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks):
        for row in (row for row in rows if row["task"] == task):
            (mean, std, n), ink, marker = row["accuracy"], colour(row["method"]), markers.get(row["group"], "D" if markers else "o")
            bar = dict(xerr=std, capsize=2) if n > 1 else {}
            ax.errorbar(mean, list(labels).index(row["label"]), fmt=marker, color=ink, markerfacecolor=ink if marker in "oD" else "white", **bar)
        low, high = ax.get_xlim()
        room = max(0, 10 - (high - low)) / 2  # at least 10 points, so that a small difference looks small
        ax.set(title=task, xlabel="accuracy, %", xlim=(low - room, high + room))
        ax.grid(axis="y", linewidth=0.3)
    axes[0, 0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    for tick, method in zip(axes[0, 0].get_yticklabels(), labels.values()):
        tick.set_color(colour(method))
    if markers:
        handles = [plt.Line2D([], [], color="black", linestyle="", marker=m, markerfacecolor="black" if m == "o" else "white") for m in markers.values()]
        figure.legend(handles, markers, loc="outside upper right", ncols=len(markers))
    plt.show()


def show_measured(name, paper=None):
    """What was measured over seeds on the real tasks, notebooks/measured/<name>.csv, as a table and as dots, beside the paper's.

    paper: {(group, label): the paper's accuracy in %}. Columns of the file beyond those that `dots` needs are averaged over the tasks.
    """
    rows, shown, paper = measured_rows(name), {}, {key: value for key, value in (paper or {}).items() if value is not None}
    for row in rows:
        shown.setdefault((row["group"], row["label"]), []).append(row)
    known = ("group", "label", "method", "task", "accuracy")
    lines = []
    for key, of_task in shown.items():
        more = {column: sum(float(row[column]) for row in of_task) / len(of_task) for column in of_task[0] if column not in known}
        lines.append({"rate": key[0], "": key[1], **more, **{row["task"]: row["accuracy"] for row in of_task}, "paper": paper.get(key)})
    dropped = {column for column in ("rate", "paper") if not any(line[column] for line in lines)}
    table([{column: value for column, value in line.items() if column not in dropped} for line in lines],
          {"MACs, M": ",.0f", "s per epoch": ",.0f", "modulation": ",.0f", "paper": ".2f"})
    dots(rows + [dict(group=group, label=label, method=shown[group, label][0]["method"], task="the paper", accuracy=OverSeeds(value, 0, 1))
                 for (group, label), value in paper.items() if (group, label) in shown])


def learning_curves(results, names):
    """Loss and accuracy by epoch: the accuracy of each evaluation, or on the training images where only the last epoch has one. Shows the figure.

    results, names: {method: Result}, {method: label}.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    evaluated = all("accuracy" in entry for result in results.values() for entry in result.history)
    labels = {"loss": "training loss", "accuracy" if evaluated else "train_accuracy": f"accuracy{'' if evaluated else ' on training images'}, %"}
    for ax, (key, label) in zip(axes, labels.items()):
        ends = []
        for method, result in results.items():
            epochs = [entry["epoch"] + 1 for entry in result.history]
            values = [entry[key] * (1 if key == "loss" else 100) for entry in result.history]
            ax.plot(epochs, values, ".-", color=colour(method))
            ends.append((epochs[-1], values[-1], names[method], colour(method)))
        ax.set(xlabel="epoch", ylabel=label, xlim=(0.9, epochs[-1] + 0.3 * max(epochs[-1] - 1, 1)))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key != "loss":
            accuracy_axis(ax, [value for line in ax.lines for value in line.get_ydata()])
            ax.set(ylabel=label)
        label_points(ax, ends)
    plt.show()


def show_suite(rows):
    """The tables and the figure of what a GPU's suite has measured: rows as `gpu_suite.read_suite` gives them. Sections without figures are left out."""
    import matplotlib.pyplot as plt
    of = lambda *sections: [row for row in rows if row["section"] in sections and not {"error", "left_out"} & row.keys()]
    limit = max((row["tflops"] for row in of("product") if row["dtype"] == "bfloat16"), default=float("nan"))
    forward, show = of("eager", "graph", "compiled"), lambda rows, formats: rows and table(rows, formats)  # a section may be empty
    cards = ", ".join(str(row.get("name", row["device"])) for row in of("card") if "device" in row)
    say(f"{cards}, bf16; matrix products at most {limit:.1f} TFLOP/s.")
    show([{"model": row["model"], "mode": row["section"], "batch": row["batch"], "": row["what"], "images/s": row["images_per_second"],
           "ms per batch": row["latency"], "speed-up": row["speedup"], "speed-up / MAC ratio": row["share"],
           "of the product rate, %": 100 * row["tflops"] / limit} for row in forward],
         {"images/s": ",.0f", "speed-up / MAC ratio": ".2f", "of the product rate, %": ".0f"})
    show([{"model": row["model"], "training step": row["what"], "images/s": row["images_per_second"], "speed-up": row["speedup"],
           "peak memory, MB": row["peak_memory"] / 1e6} for row in of("training")], {"images/s": ",.0f", "peak memory, MB": ",.0f"})
    show([{"kernel": row["kernel"], "calls": row["calls"], "ms": row["ms"]} for row in of("profile") if row["what"] != "plain"],
         {"calls": ".0f", "ms": ".3f"})
    show([{"part": f"{row['section']}, {row['tokens']} tokens" + ", with gradient" * row.get("gradient", False), "how": how, "µs": us}
          for row in of("attention", "merge") for how, us in row["microseconds"].items() if not isinstance(us, str)], {"µs": ",.0f"})
    sizes = list(dict.fromkeys(row["model"] for row in forward))
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 3.6), squeeze=False, sharey=True)
    for ax, size in zip(axes[0], sizes):
        labels = []
        for (mode, marker), method in itertools.product(zip(("eager", "graph", "compiled"), MARKERS), ("tome", "pyra")):
            points = sorted((row["batch"], row["share"]) for row in forward
                            if (row["model"], row["section"], row["what"]) == (size, mode, method))
            if points:
                ax.plot(*zip(*points), marker + "-", color=colour(method))
                labels.append((*points[-1], f"{METHODS[method].title}, {mode}", colour(method)))
        ax.axhline(1, linestyle=":", color=colour("plain"))
        ax.set(xscale="log", xlim=(0.7, 4000), xlabel="batch", ylabel="speed-up / MAC ratio", title=size)
        label_points(ax, labels)
    plt.show()


def fill_tokens(image, held, patch):
    """An image (h, w, 3) whose patches have the mean colour of the token that holds them, held (y, x), with lines between tokens: (h', w', 3)."""
    scale = max(1, 24 // patch)  # so that a line between tokens is thin
    _, tokens = repeat(held, "y x -> (y p) (x q)", p=patch, q=patch).unique(return_inverse=True)
    sums = torch.zeros(tokens.max() + 1, 3).index_add_(0, tokens.flatten(), image.flatten(0, 1))
    filled = (sums / tokens.flatten().bincount()[:, None])[tokens]
    filled, tokens = (repeat(t, "h w ... -> (h p) (w q) ...", p=scale, q=scale).clone() for t in (filled, tokens))
    filled[1:][tokens[1:] != tokens[:-1]] = torch.tensor([0.9, 0.2, 0.2])
    filled[:, 1:][tokens[:, 1:] != tokens[:, :-1]] = torch.tensor([0.9, 0.2, 0.2])
    return filled.numpy()


@pyra.on_model
@torch.no_grad()
def held_patches(model, images, norm, block):
    """Which token holds each patch after so many blocks: images uint8 (b, 3, h, w) -> (b, y, x) int64."""
    tokens = model.forward_tokens(normalize(images, norm).to(model.pos_embed), block)
    return rearrange(tokens.source[:, model.specials :], "b (y x) -> b y x", y=model.grid[0]).cpu()


@pyra.on_model
def merged_tokens(model, images, norm, titles, blocks):
    """Which patches share a token: each is filled with the mean colour of its token, and a line separates tokens. Shows the figure.

    images: uint8 (b, 3, h, w); titles: one per image; blocks: after how many blocks, one column each.
    """
    import matplotlib.pyplot as plt
    pixels = rearrange(images.float() / 255, "b c h w -> b h w c")
    figure, axes = plt.subplots(len(images), 1 + len(blocks), figsize=(1.6 * (1 + len(blocks)), 1.75 * len(images)), squeeze=False)
    for ax, image, text in zip(axes[:, 0], pixels, titles):
        ax.imshow(image.numpy())
        ax.set_ylabel(textwrap.fill(text, 24))  # as many letters as a row is high
    for column, block in zip(axes.T[1:], blocks):
        for ax, image, held in zip(column, pixels, held_patches(model, images, norm, block)):
            ax.imshow(fill_tokens(image, held, model.patch_size))
            ax.set_title(f"{len(held[held >= 0].unique())} groups")  # -1: a patch that was pruned
    for ax, text in zip(axes[0], ["input", *(f"after block {block}" for block in blocks)]):
        ax.set_title(f"{text}\n{ax.get_title()}".strip())
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    plt.show()
