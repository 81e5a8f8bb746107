"The house: parts import only from parts before them, names are found, the front door is light."

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import architecture  # noqa: E402
import book  # noqa: E402

PARTS = ("core", "practice", "judgement", "production")


def git_files(pattern):
    "The files of a pattern that git knows: what no glob may overlook."
    listed = subprocess.run(
        ["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()}


def position(path):
    "(part, number within the part) of the notebook that exports a module."
    notebook = re.search(r"File to edit: \S*nbs/(?:(\d)_\w+/(\d+)_)?\w+\.ipynb", path.read_text())
    return (int(notebook[1]), int(notebook[2])) if notebook[1] else (9, 0)


def test_no_notebook_and_no_module_is_overlooked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    made_by_hand = {"__init__.py", "_modidx.py", "__main__.py"}
    modules = {path for path in git_files("cpsample/*.py") if path.name not in made_by_hand}
    assert set(book.notebooks()) == git_files("nbs/*.ipynb")
    assert set(book.modules()) == modules
    drawn = {module.name for module in architecture.read_modules(ROOT)}
    assert drawn == {path.stem for path in modules}


def test_a_part_imports_only_from_parts_before_it_and_from_the_workshop():
    places = {
        (path.parent.name if path.parent.name != "cpsample" else "top", path.stem): position(path)
        for path in book.modules()
    }
    for module in architecture.read_modules(ROOT):
        part, number = places[module.part, module.name]
        for other in module.imports:
            other_part, other_number = places[other]
            if module.part == "top":
                continue
            allowed = (
                (other_part, other_number) < (part, number)
                if other_part == part
                else (other[0] == "workshop" or (module.part != "workshop" and other_part < part))
            )
            assert allowed, f"{module.part}.{module.name} imports {'.'.join(other)}"


def test_an_import_against_the_order_would_be_seen(tmp_path):
    "The reader of imports is tried on a module that does what is forbidden."
    package = tmp_path / "cpsample"
    for part in ("core", "workshop"):
        (package / part).mkdir(parents=True)
    edit = "# File to edit: ../../nbs/{}.ipynb.\n"
    upward = edit.format("5_workshop/01_files") + "def f():\n    from ..core.guard import Guard\n"
    (package / "workshop" / "files.py").write_text(upward)
    (package / "core" / "guard.py").write_text(edit.format("1_core/08_guard"))
    modules = {module.name: module for module in architecture.read_modules(tmp_path)}
    assert modules["files"].imports == {("core", "guard")}
    assert modules["guard"].chapter == "1.8"


def test_no_module_has_the_name_of_a_function_in_it():
    for path in book.modules():
        tree = ast.parse(path.read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert path.stem not in names, path


def test_the_map_in_contributing_is_fresh():
    assert architecture.is_fresh(ROOT, ROOT / "data" / "architecture.png"), "make book"
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert book.with_map(text, ROOT) == text, "make book"


def exported_functions(tree):
    "The public functions of a module, and the public methods of its public classes."
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node


@pytest.mark.parametrize("path", book.modules(), ids=lambda path: path.stem)
def test_the_public_boundary_is_annotated(path):
    "Every parameter and result of what a module exports, `forward` of networks apart."
    missing = []
    for name, function in exported_functions(ast.parse(path.read_text())):
        if name.endswith(".forward"):
            continue
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [p.arg for p in parameters if p.annotation is None and p.arg not in ("self", "cls")]
        is_property = any(ast.unparse(d) == "property" for d in function.decorator_list)
        if bare or (function.returns is None and not is_property and name.count(".") == 0):
            missing.append(f"{name}({', '.join(bare)})")
    assert not missing, missing


@pytest.mark.parametrize("path", book.modules(), ids=lambda path: path.stem)
def test_optional_parameters_after_the_third_are_keyword_only(path):
    "Except for commands, whose parameters nobody writes by position."
    by_position = []
    for name, function in exported_functions(ast.parse(path.read_text())):
        if any("command" in ast.unparse(d) for d in function.decorator_list):
            continue
        parameters = [p for p in function.args.args if p.arg not in ("self", "cls")]
        required = len(parameters) - len(function.args.defaults)
        if len(parameters) > max(3, required):
            by_position.append(name)
    assert not by_position, by_position


# What notebooks of readers call their own things.
COMMON = {"run", "main", "x", "t", "plt", "np", "data", "images", "model", "seed", "step", "loss"}


def test_a_star_import_replaces_nothing_common():
    "Neither a builtin nor a name that every second notebook has."
    for path in sorted((ROOT / "cpsample").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                public = set(ast.literal_eval(node.value))
                assert not public & (COMMON | set(dir(builtins))), path
