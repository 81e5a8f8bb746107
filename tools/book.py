"""The book's housekeeping.

python tools/book.py write   links from settings.ini into the notebooks, export to cpsample/, README.md from nbs/index.ipynb
python tools/book.py check   fail unless `write` would change nothing and every notebook is fit to be published
python tools/book.py run     run notebooks top to bottom and keep their outputs: all of nbs/, or those named
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE_BY_PROJECT = {"__init__.py", "_modidx.py"}


def owner():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]["user"], ini["DEFAULT"]["repo"], ini["DEFAULT"]["branch"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def save(path, nb):
    path.write_text(
        json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )


def link(text, name):
    "Point badge and install line of notebook `name` at the owner in settings.ini."
    user, repo, branch = owner()
    text = re.sub(
        r"colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/[\w.-]+/nbs/[\w.-]+\.ipynb",
        f"colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/{name}",
        text,
    )
    return re.sub(
        r"git\+https://github\.com/[\w.-]+/[\w.-]+", f"git+https://github.com/{user}/{repo}", text
    )


def write_links(root):
    for path in sorted((root / "nbs").glob("*.ipynb")):
        nb = read(path)
        for cell in nb["cells"]:
            cell["source"] = link("".join(cell["source"]), path.name).splitlines(keepends=True)
        save(path, nb)


def write_readme(root):
    "README.md: the prose, code and outputs of nbs/index.ipynb, without the cells marked `#| hide` or the code of `#| echo: false`."
    parts = []
    for cell in read(root / "nbs" / "index.ipynb")["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif "#| hide" not in source:
            if "#| echo: false" not in source:
                parts.append(f"```python\n{source}\n```")
            for out in cell["outputs"]:
                data = out.get("data", {})
                if "text/markdown" in data:
                    parts.append("".join(data["text/markdown"]))
                elif "text/plain" in data:
                    parts.append("```text\n" + "".join(data["text/plain"]) + "\n```")
                elif "text" in out:
                    parts.append("```text\n" + "".join(out["text"]).rstrip() + "\n```")
    text = (
        "<!-- Written from nbs/index.ipynb by tools/book.py: edit there. -->\n\n"
        + "\n\n".join(parts)
        + "\n"
    )
    text = (
        re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", text)
        .replace("](../", "](")
        .replace('src="../', 'src="')
    )
    (root / "README.md").write_text(text, encoding="utf-8")


def write(root=ROOT):
    write_links(root)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=root, check=True)
    write_readme(root)


def faults(path):
    "What is wrong with a notebook as published: a list of sentences."
    nb, found = read(path), []
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if path.stat().st_size > 1_000_000:
        found.append(f"{path.stat().st_size / 1e6:.1f} MB, at most 1 MB")
    if any(o["output_type"] == "error" for c in code for o in c["outputs"]):
        found.append("holds an error output")
    if not any(c["outputs"] for c in code):
        found.append("has no outputs: make book")
    counts = [c["execution_count"] for c in code if "".join(c["source"]).strip()]
    if counts != list(range(1, len(counts) + 1)):
        found.append("was not run top to bottom: make book")
    return [f"{path.name} {f}" for f in found]


def check():
    found = [f for path in sorted((ROOT / "nbs").glob("*.ipynb")) for f in faults(path)]
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(
                ".venv", ".git", "build", "dist", ".*cache", "*.egg-info"
            ),
        )
        for module in (copy / "cpsample").glob("*.py"):
            if module.name not in MADE_BY_PROJECT:
                module.unlink()
        write(copy)
        for folder in ("cpsample", "nbs"):
            names = {
                p.name
                for side in (ROOT, copy)
                for p in (side / folder).glob("*.*")
                if p.suffix in (".py", ".ipynb")
            }
            for name in sorted(names):
                old, new = ROOT / folder / name, copy / folder / name
                if not new.exists():
                    found.append(f"{folder}/{name} has no notebook that exports it")
                elif not old.exists() or old.read_bytes() != new.read_bytes():
                    found.append(f"{folder}/{name} is stale: make book")
        if (ROOT / "README.md").read_bytes() != (copy / "README.md").read_bytes():
            found.append("README.md is stale: make book")
    print("\n".join(found) or "export, links and README are fresh")
    return bool(found)


def run(names):
    import nbformat
    from nbclient import NotebookClient

    for path in [ROOT / "nbs" / Path(n).name for n in names] or sorted(
        (ROOT / "nbs").glob("*.ipynb")
    ):
        print(f"running {path.name}", flush=True)
        nb = nbformat.read(path, 4)
        NotebookClient(
            nb,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(ROOT / "nbs")}},
        ).execute()
        raw = json.loads(nbformat.writes(nb))
        raw["metadata"] = {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        }
        for cell in raw["cells"]:
            cell["metadata"] = {}
            for out in cell.get("outputs", []):
                if "data" in out:
                    out["data"].pop("application/vnd.jupyter.widget-view+json", None)
                if "metadata" in out:
                    out["metadata"] = {}
        save(path, raw)


if __name__ == "__main__":
    commands = {"write": lambda _: write(), "check": lambda _: check(), "run": run}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]](sys.argv[2:]))
