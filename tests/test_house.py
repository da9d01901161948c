"""The house rules of CONTRIBUTING.md: what may import what, where a method's name may stand, how long a file may be."""

import ast
import re
from graphlib import TopologicalSorter

from helpers import ROOT

from pyra_lab.methods import METHODS, PEFTS

MODULES = {"pyra": ROOT / "pyra.py"}  # pyra, pyra_lab, pyra_lab.files, pyra_lab.reducers.evit ...
for file in sorted((ROOT / "pyra_lab").rglob("*.py")):
    MODULES[".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = file
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imports(name):
    """The modules of ours that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in submodules}
    return found & MODULES.keys()


def test_imports_run_one_way():
    """No circle, not even one that an import inside a function hides."""
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()  # raises CycleError


def test_imports_run_as_contributing_says():
    """From right to left along its line of arrows, which names each module once."""
    line = re.search(r"^pyra ←.*?```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE)[0]
    layers = [re.findall(r"\w+", layer) for layer in line.split("←")]
    place = {name: number for number, layer in enumerate(layers) for name in layer}
    short = {name: name.removeprefix("pyra_lab.").split(".")[0] for name in MODULES if not name.endswith(("pyra_lab", "__main__"))}
    assert sorted(name for layer in layers for name in layer) == sorted(set(short.values()))
    for name in short:
        for other in imports(name):
            inside = short[name] == short[other] and short[name] in ("reducers", "pefts")
            assert inside or place[short[other]] < place[short[name]], f"{name} imports {other}"


def test_pyra_imports_nothing_of_ours():
    assert not imports("pyra")


def test_reducers_and_pefts_know_no_sister():
    """What several share is in shared.py."""
    for name in MODULES:
        for family in ("pyra_lab.reducers.", "pyra_lab.pefts."):
            sisters = {other for other in imports(name) if other.startswith(family)} - {f"{family}shared"}
            assert not name.startswith(family) or not sisters, f"{name} imports {sisters}"


def test_no_code_asks_which_method_or_peft_it_is():
    """What a row needs is a field of the row. Only plain, the absence of a method, may be asked for."""
    names = (METHODS.keys() | PEFTS.keys()) - {"plain"}
    for module in MODULES.keys() - {"pyra_lab.methods"}:
        for node in ast.walk(TREES[module]):
            if isinstance(node, (ast.Compare, ast.MatchValue)):
                asked = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)} & names
                assert not asked, f"{module}:{node.lineno} compares with {asked}"


def test_no_object_changes_its_class():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)), f"{module}:{node.lineno}"


def test_files_and_lines_are_short():
    """pyra.py, the method in one file, may be longer."""
    for module, file in MODULES.items():
        lines = file.read_text().splitlines()
        assert len(lines) <= (1000 if module == "pyra" else 400), f"{file.name} has {len(lines)} lines"
        too_long = [number for number, line in enumerate(lines, 1) if len(line) > 160]
        assert not too_long, f"{file.name} has lines above 160 characters: {too_long}"


def test_contributing_names_each_module_once():
    """In its table of places; reducers and PEFTs as folders."""
    places = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    named = re.findall(r"`(?:pyra_lab/)?(\w+)(?:\.py|/)`", " ".join(places))
    assert sorted(named) == sorted({name.removeprefix("pyra_lab.").split(".")[0] for name in MODULES} - {"pyra_lab", "__main__"})
