"""What notebooks show: parameters, tables, colours, figures."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT, rows, tiny

import pyra
from pyra_lab import METHODS, Method, Result, report
from pyra_lab.labels import gap
from pyra_lab.records import OverSeeds, over_images, over_seeds
from pyra_lab.reducers.tofu import add_tofu

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def canvas():
    """No window; figures stay open until the test has looked at them."""
    plt = pytest.importorskip("matplotlib.pyplot")
    with matplotlib.rc_context():
        matplotlib.use("Agg")
        report.use_style()
        yield plt
        plt.close("all")


@pytest.fixture
def said(monkeypatch):
    """The texts that the notebook would show."""
    texts = []
    monkeypatch.setattr(report, "say", texts.append)
    return texts


def result(accuracy=0.5, seed=0, epochs=1, method="pyra", **other):
    config = dict(task="folder:/home/of/shapes", epochs=epochs, seed=seed, method=method)
    known = dict(config=config, folder="", accuracy_last=accuracy, accuracy_best=accuracy, best_epoch=0, history=[], num_classes=3, classes=[], macs=95_000_000,
                 token_counts=[], trained=dict(peft=300, reducer=50, head=9, backbone=0), backbone_parameters=1000)
    return Result(**{**known, **other})


# ---- Parameters ------------------------------------------------------------------------------------------------------


NAMESPACE = {"__annotations__": dict(s=int, lr=float, task=str, seeds=list, fast=bool), "s": 1, "lr": 1e-3, "task": "digits", "seeds": [0], "fast": False}


@pytest.mark.parametrize("changed", [{}, {"s": None, "lr": 1}, {"task": 7}, {"In": ["", "s: int = 1  # x", "# Parameters\ns = 4\n", "rank = 5"]}], ids=str)
def test_good_parameters_pass(changed):
    report.check_parameters({**NAMESPACE, **changed})


@rows("changed, sentence", [
    ({"In": ["# Parameters\nsed = 4\n"]}, "there is no parameter 'sed'; did you mean seeds"),
    ({"In": ["# Parameters\nrank = 4\n"]}, "there is no parameter 'rank'; the parameters are s, lr, task, seeds, fast"),
    ({"s": "4"}, "s must be of type int, not '4'"), ({"s": 1.0}, "s must be of type int"), ({"s": True}, "s must be of type int"),
    ({"lr": "1e-3"}, "lr must be of type float"),
    ({"fast": 1}, "fast must be of type bool"), ({"seeds": 0}, "seeds must be of type list, not 0; papermill takes a list with -y"),
    ({"seeds": []}, "seeds needs an entry"), ({"seeds": [1, "1e-3"]}, "seeds has the text '1e-3' where a number belongs: YAML reads 1e-3 as text"),
])
def test_wrong_parameters_are_named(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        report.check_parameters({**NAMESPACE, **changed})


def test_a_list_may_be_allowed_to_be_empty():
    report.check_parameters({**NAMESPACE, "seeds": []}, may_be_empty=["seeds"])


# ---- Words and tables ------------------------------------------------------------------------------------------------


def test_table_aligns_numbers_fills_gaps_and_escapes_bars():
    rows = [{"": "a|b", "n": 1234, "x": 2.345, "accuracy": OverSeeds(50.0, 1.25, 3)},
            {"": "c", "x": None, "accuracy": OverSeeds(51.0, 0.0, 1), "late": True}]
    assert report.markdown_table(rows, {"x": "+.2f"}).splitlines() == [
        "|  | n | x | accuracy | late |", "| --- | ---: | ---: | ---: | ---: |",
        "| a\\|b | 1,234 | +2.35 | 50.0 ± 1.2 | – |", "| c | – | – | 51.0 | True |"]


def test_table_knows_the_formats_of_columns_that_many_tables_have(said):
    report.table([{"speed-up": 2.345, "images/s": 1234.5}])
    report.table([{"speed-up": 2.345}], {"speed-up": ".0f"})
    assert [text.splitlines()[-1] for text in said] == ["| 2.35 | 1,234 |", "| 2 |"]


def test_measured_averages_over_seeds():
    row = report.measured([result(0.5), result(0.6, seed=1, macs=97_000_000)])
    assert row.pop("accuracy, %") == pytest.approx((55.0, 5 * 2**0.5, 2))
    assert row == {"trained, % of backbone": 35.0, "MACs, M": 96.0, "seeds": 2}
    everything = dataclasses.replace(result(0.5), trained=dict(peft=0, reducer=0, head=7, backbone=1000), backbone_parameters=1000)
    assert report.measured([everything])["trained, % of backbone"] == 100


def test_titles_and_comparisons(capsys):
    """And warnings, which are one line each, once."""
    report.use_style()
    for i in range(4):
        warnings.warn(f"of two\nlines, {i % 2}", stacklevel=1)
    assert capsys.readouterr().err == "note: of two lines, 0\nnote: of two lines, 1\n"
    assert [report.title("pyra"), report.title("plain", "lora"), report.title("tome", "snf")] == ["PYRA", "LoRA", "SNF + ToMe"]
    assert [report.compared(*pair) for pair in ((71.64, 70.0), (70.0, 70.84), (70.0, 70.04))] == ["1.6 points above", "0.8 points below", "level with"]
    assert [report.best_of(dict(zip("abc", means))) for means in ([70.0, 71.0, 69.0], [70.0, 70.04, 69.0], [70.0] * 3, [70.0])] == [
        "b is the best", "a and b are the best", "all are level", "a is the best"]


def test_caution_where_runs_are_few_or_short(said):
    report.caution([[result()], [result()]])
    report.caution([[result(seed=seed, epochs=10) for seed in range(2)]])
    report.caution([[result(seed=seed, epochs=10) for seed in range(3)]])
    report.caution([[dataclasses.replace(result(), config={**result().config, "task": "digits"})]])
    report.caution([[dataclasses.replace(result(), config={**result().config, "task": "digits"})]], measured=False)
    assert len(said) == 4 and said[0].startswith("**1 epoch, 1 seed, shapes: an illustration") and said[1].startswith("**10 epochs, 2 seeds,")
    assert ["Repeat it with at least" in text for text in said] == [True, True, False, True] and "README.md" in said[2]


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_every_method_has_a_colour_of_its_own_and_a_new_row_gets_the_next(monkeypatch):
    before = {method: report.colour(method) for method in METHODS}
    assert len(set(before.values())) == len(METHODS) and before["pyra"] == report.COLOURS["pyra"]
    monkeypatch.setitem(METHODS, "mine", Method("Mine", "", lambda model, config, plan: model))
    assert report.colour("mine") not in before.values() and {method: report.colour(method) for method in before} == before


def points(n):
    rng = np.random.default_rng(0)
    return [dict(method=method, label=f"{METHODS[method].title}, a label", accuracy=over_seeds([float(a), float(a) + 1][: 1 + i % 2]), macs=95.0,
                 speed=float(s))
            for i, (method, a, s) in enumerate(zip(list(METHODS)[:n], rng.uniform(50, 60, n), rng.uniform(100, 300, n)))]


def test_labels_overlap_neither_each_other_nor_points(canvas):
    """Eight points with equally many operations, one above the other."""
    report.tradeoff(points(8), {"macs": "MACs", "speed": "images/s"})
    figure = canvas.gcf()
    figure.canvas.draw()
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 8 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        frame = ax.get_window_extent().expanded(1.05, 1.05)
        assert all(frame.containsx(box.x0) and frame.containsx(box.x1) and frame.containsy(box.y0) and frame.containsy(box.y1) for box in boxes)


def test_labels_keep_clear_of_error_bars(canvas):
    """Of a single run on few images too, where bars are long; and they stand where they can't be read as another mark's."""
    speeds = {"merged, float32": 338.0, "merged, int8": 420.0, "merged, bfloat16": 445.0}
    accuracies = dict(zip(speeds, (89.0, 88.0, 89.0)))
    report.tradeoff([dict(method="pyra", label=name, accuracy=over_images(accuracies[name], 200), speed=speed) for name, speed in speeds.items()],
                    {"speed": "images/s"})
    ax, = canvas.gcf().axes
    canvas.gcf().canvas.draw()
    bars = [ax.transData.transform(path.vertices) for lines in ax.collections for path in lines.get_paths()]
    marks = ax.transData.transform([(speed, accuracies[name]) for name, speed in speeds.items()])
    assert len(bars) == 3
    for text in ax.texts:
        box, own = text.get_window_extent(), list(speeds).index(text.get_text())
        assert not any(box.x0 < x < box.x1 and low < box.y1 and high > box.y0 for (x, low), (_, high) in bars)
        assert np.argmin([gap(box, mark[None]) for mark in marks]) == own
        (x, y), end = marks[own], np.clip(marks[own], box.min, box.max)  # on the way from a mark to its label stands no other's bar
        assert not any(min(x, end[0]) < bar < max(x, end[0]) and low < max(y, end[1]) and high > min(y, end[1]) for (bar, low), (_, high) in bars)

    canvas.close("all")  # of marks that coincide the later one is a ring around the earlier
    report.tradeoff([dict(method=method, label=method, accuracy=over_seeds([80.0]), speed=9.0) for method in ("tome", "pyra")], {"speed": "images/s"})
    (inner, outer), _ = canvas.gcf().axes[0].lines, canvas.gcf().canvas.draw()
    assert outer.get_markerfacecolor() == "none" != inner.get_markerfacecolor() and outer.get_markersize() > 1.5 * inner.get_markersize()


def test_error_bars_only_for_several_seeds_and_axes_at_true_size(canvas):
    report.tradeoff(points(4), {"speed": "images/s"})
    ax, = canvas.gcf().axes
    assert len(ax.containers) == 2  # of four points, two have two seeds
    assert ax.get_xlim()[0] == 0 and ax.get_ylim()[1] - ax.get_ylim()[0] >= 10


@pytest.mark.parametrize("evaluated", [True, False])
def test_learning_curves_are_in_per_cent(canvas, evaluated):
    history = [dict(epoch=i, loss=2.0 - i, train_accuracy=0.4 + 0.1 * i, **({"accuracy": 0.3} if evaluated else {})) for i in range(2)]
    report.learning_curves({"pyra": result(history=history)}, {"pyra": "PYRA"})
    loss, accuracy = canvas.gcf().axes
    assert list(loss.lines[0].get_ydata()) == [2.0, 1.0] and list(accuracy.lines[0].get_ydata()) == pytest.approx([30.0, 30.0] if evaluated else [40.0, 50.0])
    assert ("training" in accuracy.get_ylabel()) != evaluated and accuracy.lines[0].get_color() == report.COLOURS["pyra"]


def test_merged_tokens_fills_each_token_with_its_mean_colour(canvas):
    model = pyra.add_tome(tiny(), [12, 8, 4])
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    report.merged_tokens(model, images, "half", ["first", "SeaLake predicted as HerbaceousVegetation"], blocks=[1, 3])
    axes = np.array(canvas.gcf().axes).reshape(2, 3)
    canvas.gcf().canvas.draw()
    first, second = [ax.yaxis.label for ax in axes[:, 0]]  # a long one has lines, and so leaves the other its place
    assert first.get_text() == "first" and second.get_text() == "SeaLake predicted as\nHerbaceousVegetation"
    assert second.get_window_extent().height < canvas.gcf().get_window_extent().height / 2
    with torch.no_grad():
        source = model.forward_tokens((images.float() / 255 - 0.5) / 0.5, 3).source[:, model.specials:].reshape(2, 6, 6)
    for ax, image, held in zip(axes[:, 2], images, source):
        picture = np.asarray(ax.get_images()[0].get_array())
        scale = len(picture) // 24
        for row, column in ((0, 0), (2, 5), (5, 3)):
            same = (held == held[row, column]).repeat_interleave(4, 0).repeat_interleave(4, 1)
            mean = (image.float() / 255)[:, same].mean(dim=1)
            middle = picture[int((row + 0.5) * 4 * scale), int((column + 0.5) * 4 * scale)]  # a line runs along the upper and left edges
            assert middle == pytest.approx(mean.numpy(), abs=1e-5)

    canvas.close("all")
    model = add_tofu(tiny(), [12, 8, 4])  # pruned patches are no token
    with torch.no_grad():
        report.merged_tokens(model, torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "half", ["one"], blocks=[3])
    assert canvas.gcf().axes[1].get_title() == f"after block 3\n{36 - 12 - 8 - 4} groups"


# ---- What was measured ------------------------------------------------------------------------------------------------


def written(monkeypatch, tmp_path, text):
    """notebooks/measured/mine.csv in a home of its own."""
    (tmp_path / "notebooks" / "measured").mkdir(parents=True)
    (tmp_path / "notebooks" / "measured" / "mine.csv").write_text(text)
    monkeypatch.setattr(report.measured_rows.__globals__["files"], "home", lambda: tmp_path)


def test_measured_rows_are_shown_per_task_beside_the_papers(canvas, said, monkeypatch, tmp_path):
    written(monkeypatch, tmp_path, 'group,label,method,task,"MACs, M",seeds,accuracy,std\n'
            'low,ToMe,tome,a,620,3,60.0,1.5\nlow,ToMe,tome,b,622,1,80.0,0\nhigh,ToMe,tome,a,367,3,50.0,2.0\nhigh,PYRA,pyra,a,367,3,55.5,1.0\n')
    report.show_measured("mine", {("low", "ToMe"): 74.1, ("high", "ToMe"): None, ("high", "EViT"): 65.79})
    assert said[0].splitlines() == [
        "| rate |  | MACs, M | a | b | paper |", "| --- | --- | ---: | ---: | ---: | ---: |", "| low | ToMe | 621 | 60.0 ± 1.5 | 80.0 | 74.10 |",
        "| high | ToMe | 367 | 50.0 ± 2.0 | – | – |", "| high | PYRA | 367 | 55.5 ± 1.0 | – | – |"]
    axes = canvas.gcf().axes
    assert [ax.get_title() for ax in axes] == ["a", "b", "the paper"] and [tick.get_text() for tick in axes[0].get_yticklabels()] == ["ToMe", "PYRA"]
    drawn = [sorted(float(x) for container in ax.containers for x in container.lines[0].get_xdata()) for ax in axes]
    assert drawn == [[50.0, 55.5, 60.0], [80.0], [74.1]]
    assert [sum(bool(container.lines[2]) for container in ax.containers) for ax in axes] == [3, 0, 0]  # bars of several seeds alone
    assert all(np.ptp(ax.get_xlim()) >= 9.99 for ax in axes) and axes[0].get_yticklabels()[1].get_color() == report.COLOURS["pyra"]


def test_a_file_without_groups_has_no_rates_and_no_legend(canvas, said, monkeypatch, tmp_path):
    written(monkeypatch, tmp_path, "group,label,method,task,seeds,accuracy,std\n,LoRA,plain,a,3,60.0,1.5\n,LoRA + ToMe,tome,a,3,50.0,1.5\n")
    report.show_measured("mine")
    assert said[0].splitlines()[0] == "|  | a |" and not canvas.gcf().legends


def test_each_measured_file_is_drawn_in_the_notebook_of_its_name():
    for file in (ROOT / "notebooks" / "measured").glob("*.csv"):
        if "std" in file.read_text().splitlines()[0].split(","):
            assert f'show_measured(\\"{file.stem}\\"' in (ROOT / "notebooks" / f"{file.stem}.ipynb").read_text()
            assert {row["method"] for row in report.measured_rows(file.stem)} <= METHODS.keys()
