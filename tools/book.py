"""The book's housekeeping.

python tools/book.py write   links from settings.ini into the notebooks, the way from page to
                             page, export to cpsample/, README.md from nbs/index.ipynb, the map
                             in CONTRIBUTING.md
python tools/book.py check   fail unless `write` would change nothing and every notebook is fit
                             to be published
python tools/book.py run     run notebooks top to bottom and keep their outputs: all of nbs/,
                             or those named (nbs/1_core/08_guard.ipynb, 1_core/08_guard, guard)
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BADGE = re.compile(
    r"colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/[\w.-]+/nbs/[\w./-]+\.ipynb"
)
INSTALL = re.compile(r"git\+https://github\.com/[\w.-]+/[\w.-]+")
CHAPTER = re.compile(r"\[((?:[Cc]hapters? )?)(\d\.\d+)\]\(([\w./]+\.ipynb)\)")
MAP = re.compile(r"(<!-- map[^>]*-->\n).*?(<!-- /map -->)", re.DOTALL)
WAYS = ("way-on-top", "way-at-the-end")  # the ids of cells
PICTURE = "data/architecture.png"
NOT_COPIED = (".venv", ".git", "build", "dist", ".*cache", "*.egg-info", ".ipynb_checkpoints")


def notebooks(root=ROOT):
    "All notebooks of the book, in reading order: the parts, then the pages on top."
    paths = (root / "nbs").rglob("*.ipynb")
    paths = [path for path in paths if ".ipynb_checkpoints" not in path.parts]
    return sorted(paths, key=lambda path: (path.parent == root / "nbs", path))


def modules(root=ROOT):
    "All modules that notebooks export."
    made_otherwise = {"__init__.py", "__main__.py", "_modidx.py"}
    return sorted(p for p in (root / "cpsample").rglob("*.py") if p.name not in made_otherwise)


def owner():
    "(user, repository, branch) from settings.ini: the one place where they stand."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["user"], ini["DEFAULT"]["repo"], ini["DEFAULT"]["branch"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def save(path, notebook):
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def link(text, name):
    "Point badge and install line of the notebook `name` (below nbs/) at the owner."
    user, repo, branch = owner()
    place = f"colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/{name}"
    text = BADGE.sub(place, text)
    return INSTALL.sub(f"git+https://github.com/{user}/{repo}", text)


def chapter_number(path):
    "`1.8` for nbs/1_core/08_guard.ipynb, or None for a page on top."
    numbers = re.search(r"(\d)_\w+/(\d+)_\w+\.ipynb$", path.as_posix())
    return f"{numbers[1]}.{int(numbers[2])}" if numbers else None


def number_chapters(text, folder):
    "Links that are called `chapter 1.8` get the number of the chapter that they lead to."

    def renumber(found):
        number = chapter_number((folder / found[3]).resolve())
        return f"[{found[1]}{number or found[2]}]({found[3]})"

    return CHAPTER.sub(renumber, text)


def write_links(root):
    "Bring the links of every notebook up to date."
    for path in notebooks(root):
        notebook, name = read(path), path.relative_to(root / "nbs").as_posix()
        for cell in notebook["cells"]:
            source = link("".join(cell["source"]), name)
            if cell["cell_type"] == "markdown":
                source = number_chapters(source, path.parent)
            cell["source"] = source.splitlines(keepends=True)
        save(path, notebook)


def heading(path):
    "What a page is called in links: its number, if it has one, and its title."
    title = "".join(read(path)["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
    return " ".join(filter(None, [chapter_number(path), title]))


def way(path, pages, start):
    """The line at both ends of a page: the page before it, the map, the page behind it.

    pages: all of them, in reading order.
    start: the page with the map.
    """
    place = pages.index(path)
    before, behind = pages[max(place - 1, 0) : place], pages[place + 1 : place + 2]

    def link_to(page):
        return f"({Path(os.path.relpath(page, path.parent)).as_posix()})"

    steps = [f"[← {heading(page)}]{link_to(page)}" for page in before]
    steps.append(f"[map]{link_to(start)}")
    steps += [f"[{heading(page)} →]{link_to(page)}" for page in behind]
    return " · ".join(steps)


def write_ways(root):
    "At both ends of every page but the start page, which is the map: the way to the others."
    start = root / "nbs" / "index.ipynb"
    pages = [path for path in notebooks(root) if path != start]
    for path in pages:
        notebook, line = read(path), way(path, pages, start)
        top, end = (
            {"cell_type": "markdown", "id": name, "metadata": {}, "source": [line]} for name in WAYS
        )
        cells = [cell for cell in notebook["cells"] if cell["id"] not in WAYS]
        notebook["cells"] = [cells[0], top, *cells[1:], end]
        save(path, notebook)


def output_text(output):
    "An output as Markdown for the README, or None where it has nothing to read."
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = data.get("text/plain") or output.get("text")
    return None if text is None else "```text\n" + "".join(text).rstrip() + "\n```"


def write_readme(root):
    """README.md: the prose, code and outputs of nbs/index.ipynb.

    Left out are cells marked `#| hide` and the code of those marked `#| echo: false`.
    """
    parts = ["<!-- Written from nbs/index.ipynb by tools/book.py: edit there. -->"]
    for cell in read(root / "nbs" / "index.ipynb")["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        if "#| hide" in source:
            continue
        if "#| echo: false" not in source:
            parts.append(f"```python\n{source}\n```")
        parts += [text for text in map(output_text, cell["outputs"]) if text is not None]

    # What is a neighbour in nbs/ lies one folder down as seen from the README.
    text = "\n\n".join(parts) + "\n"
    text = re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", text)
    text = text.replace("](../", "](").replace('src="../', 'src="')
    (root / "README.md").write_text(text, encoding="utf-8")


def with_map(text, root):
    "CONTRIBUTING.md with the map of parts and modules as they are."
    import architecture

    words = architecture.as_markdown(architecture.read_modules(root), PICTURE)
    return MAP.sub(lambda found: f"{found[1]}{words}\n{found[2]}", text)


def write_map(root):
    "The picture of parts and modules, and CONTRIBUTING.md with it."
    import architecture

    if not architecture.is_fresh(root, root / PICTURE):
        architecture.draw(root, root / PICTURE)
    path = root / "CONTRIBUTING.md"
    path.write_text(with_map(path.read_text(encoding="utf-8"), root), encoding="utf-8")


def write(root=ROOT):
    "Links, ways, package, README and map, from the notebooks."
    write_links(root)
    write_ways(root)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=root, check=True)
    write_readme(root)
    write_map(root)


def faults(path):
    "What is wrong with a notebook as published: a list of sentences."
    notebook, sentences = read(path), []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = sum((cell["outputs"] for cell in code), [])
    counts = [cell["execution_count"] for cell in code if "".join(cell["source"]).strip()]

    # What a reader could not open, would frown at, or could not trust.
    if path.stat().st_size > 1_000_000:
        sentences.append(f"{path.stat().st_size / 1e6:.1f} MB, at most 1 MB")
    if any(output["output_type"] == "error" for output in outputs):
        sentences.append("holds an error output")
    if not outputs:
        sentences.append("has no outputs: make book")
    if counts != list(range(1, len(counts) + 1)):
        sentences.append("was not run top to bottom: make book")
    return [f"{path.relative_to(ROOT).as_posix()} {sentence}" for sentence in sentences]


def differences(old_root, new_root):
    "Which notebooks, modules and README differ between two checkouts: a list of sentences."
    sentences, names = [], {Path("README.md"), Path("CONTRIBUTING.md")}
    for root in (old_root, new_root):
        names |= {path.relative_to(root) for path in [*notebooks(root), *modules(root)]}
    for name in sorted(names):
        old, new = old_root / name, new_root / name
        if not new.exists():
            sentences.append(f"{name.as_posix()} has no notebook that exports it")
        elif not old.exists() or old.read_bytes() != new.read_bytes():
            sentences.append(f"{name.as_posix()} is stale: make book")
    return sentences


def check():
    "Print what is stale or unfit to be published; True if anything is."
    sentences = sum(map(faults, notebooks()), [])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for module in modules(copy):
            module.unlink()
        write(copy)
        sentences += differences(ROOT, copy)
    print("\n".join(sentences) or "export, links and README are fresh")
    return bool(sentences)


def named(name):
    "The notebook that `name` means: a path, a path below nbs/, or a module's name."
    for path in notebooks():
        below = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        module = re.sub(r"^\d+_", "", path.stem)
        if name in (below, path.stem, module) or Path(name).resolve() == path:
            return path
    sys.exit(f"there is no notebook {name} below nbs/")


def without_places(line):
    "A printed line, without the folders of this machine that warnings name."
    line = re.sub(r"/[\w./-]+/(?=cpsample/[\w/]+\.py:\d)", "", line)
    return re.sub(r"/\S*/ipykernel_\d+/\d+\.py:", "this page, line ", line)


def run(names):
    "Run notebooks in their own folders and keep what they show, without what machines add."
    import nbformat
    from nbclient import NotebookClient

    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    for path in [named(name) for name in names] or notebooks():
        print(f"running {path.relative_to(ROOT).as_posix()}", flush=True)
        notebook = nbformat.read(path, 4)
        where = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()

        # Kept is what a reader sees; widgets and the machine's notes go.
        raw = json.loads(nbformat.writes(notebook))
        raw["metadata"] = {"kernelspec": kernel}
        for cell in raw["cells"]:
            cell["metadata"] = {}
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
                if "metadata" in output:
                    output["metadata"] = {}
                if "text" in output:
                    output["text"] = [without_places(line) for line in output["text"]]
        save(path, raw)


if __name__ == "__main__":
    commands = {"write": lambda _: write(), "check": lambda _: check(), "run": run}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
