"""pyra_lab/layouts.py: lists and trees on disk, how they are dealt out to splits, and what is refused."""

import pytest
from helpers import write_image, write_tree

from pyra_lab import layouts


def test_a_list_gives_paths_labels_and_line_numbers(tmp_path):
    (tmp_path / "test.txt").write_text("\ufeffa b/c.png 3\n\n d.png\t0 \ne.png -1\nf.png 1.5\n", encoding="utf-8")
    parsed = layouts.parse_list(tmp_path / "test.txt")
    assert parsed == [("a b/c.png", 3, 1), ("d.png", 0, 3), ("e.png -1", None, 4), ("f.png 1.5", None, 5)]
    assert layouts.read_classes(tmp_path) == ()
    (tmp_path / "classes.txt").write_text("crow\nsea gull\n\n")
    assert layouts.read_classes(tmp_path) == ("crow", "sea gull")


@pytest.mark.parametrize("content, sentence", [
    (b"a.png 0\nb.png\n", r"test.txt, line 2: expected `relative/path label` with a label of 0 or more, found 'b.png'$"),
    (b"a.png -1\n", r"test.txt, line 1: expected"),
    (b"\n", "test.txt lists no images$"),
    (b"\xff.png 1\n", "test.txt is not text in UTF-8"),
])
def test_broken_lists(tmp_path, content, sentence):
    (tmp_path / "test.txt").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        layouts.read_list(tmp_path / "test.txt")


def test_hold_out_takes_a_fifth_of_each_class():
    members = {"a": list(range(25)), "b": list(range(100, 150)), "c": [200]}
    kept, held = layouts.hold_out(members, 1)
    assert {name: len(part) for name, part in held.items()} == {"a": 5, "b": 10, "c": 0}
    assert all(sorted(kept[name] + held[name]) == members[name] for name in members)
    assert layouts.hold_out(members, 1) == (kept, held) != layouts.hold_out(members, 2)


def count_files(path):
    return {split: [len(files) for files in tree.values()] for split, tree in layouts.split_tree(path).items()}


def test_a_tree_with_and_without_parts(tmp_path):
    write_tree(tmp_path / "whole", {"cat": 25, "horse": 50})
    (tmp_path / "whole/cat/deeper").mkdir()
    (tmp_path / "whole/cat/0.png").rename(tmp_path / "whole/cat/deeper/0.PNG")
    (tmp_path / "whole/cat/notes.txt").write_text("no image")
    (tmp_path / "whole/.hidden").mkdir()
    assert count_files(tmp_path / "whole") == {"train800": [16, 32], "val200": [4, 8], "train800val200": [20, 40], "test": [5, 10]}
    splits = {split: {file for files in tree.values() for file in files} for split, tree in layouts.split_tree(tmp_path / "whole").items()}
    assert not splits["train800val200"] & splits["test"] and not splits["train800"] & splits["val200"]
    assert splits["train800"] | splits["val200"] == splits["train800val200"]

    parts = tmp_path / "parts"
    write_tree(parts / "train", {"a": 10, "b": 10})
    write_tree(parts / "val", {"a": 3, "b": 3})
    assert count_files(parts) == {"train800": [8, 8], "val200": [2, 2], "train800val200": [10, 10], "test": [3, 3]}
    write_tree(parts / "test", {"a": 4, "b": 4})
    assert count_files(parts) == {"train800": [10, 10], "val200": [3, 3], "train800val200": [13, 13], "test": [4, 4]}


def test_a_class_without_images_is_refused(tmp_path):
    write_tree(tmp_path, {"a": 5})
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"b holds no images \(.bmp .gif .*\)$"):
        layouts.split_tree(tmp_path)


@pytest.mark.parametrize("tree, sentence", [
    ({}, "has no sub-folders: a folder task is a tree with one folder per class$"),
    ({"a": 3, "b": 3}, "has too few images per class to hold out val200: a fifth of each class rounds to none$"),
    ({"train/a": 3, "train/b": 3}, "has train/ but neither val/ nor test/: add one, or point the task at .*train$"),
    ({"train/a": 3, "train/b": 3, "test/a": 1, "test/c": 1}, "must hold the same classes, and differ in b, c$"),
])
def test_trees_that_are_refused(tmp_path, tree, sentence):
    write_tree(tmp_path, tree)
    with pytest.raises(ValueError, match=sentence):
        layouts.split_tree(tmp_path)


@pytest.mark.parametrize("part", ["val", "validation"])
def test_a_stream_has_two_folders(tmp_path, part):
    with pytest.raises(FileNotFoundError, match=r"must hold train/ and val/ \(or valid/"):
        layouts.find_stream_folders(tmp_path)
    write_image(tmp_path / part / "ILSVRC2012_val_00000001.png")
    write_tree(tmp_path / "train", {"horse": 1, "cat": 1})
    assert layouts.find_stream_folders(tmp_path) == (tmp_path / "train", tmp_path / part)
    with pytest.raises(ValueError, match=f"{part} has no sub-folders: a stream has one folder per class in train/ and in {part}/$"):
        layouts.list_stream_classes(tmp_path)
    write_tree(tmp_path / part, {"cat": 1, "zebra": 1})
    with pytest.raises(ValueError, match=f"train and .*{part} must hold the same classes, and differ in horse, zebra$"):
        layouts.list_stream_classes(tmp_path)
    write_tree(tmp_path / part, {"horse": 1})
    write_tree(tmp_path / "train", {"zebra": 1})
    assert layouts.list_stream_classes(tmp_path) == ("cat", "horse", "zebra")
