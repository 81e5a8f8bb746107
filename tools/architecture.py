"""The map of the package: parts and modules, drawn from the imports.

python tools/architecture.py [ROOT] [PICTURE]   draw it (default: data/architecture.png)

Read from the exported modules only: nothing is imported or run. An import that the layout forbids
is drawn in red.
"""

import ast
import hashlib
import io
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line
from matplotlib.patheffects import Normal, Stroke
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PACKAGE = "cpsample"
TOP = "top"  # modules of no part: the command line and the front door
BAND = "workshop"  # the part below all others

# Every part in reading order: what it is about, and its colour (a palette for all eyes).
PARTS = {
    "core": ("the method, on digits", "#0072B2"),
    "practice": ("images, networks, training", "#009E73"),
    "judgement": ("attacks, rivals, audit", "#B9770E"),
    "production": ("your own model", "#AA3377"),
    BAND: ("plumbing", "#555555"),
}
COLUMNS = [part for part in PARTS if part != BAND]
ORDER = [BAND, *COLUMNS, TOP]  # each imports only from those before it
TOP_COLOUR = "#222222"
AGAINST_ORDER = "#D00000"  # an import that the layout forbids

# Inches. Text is measured for 100 dots per inch.
WIDTH = 10.0
MARGIN = 0.15
GUTTER = 0.62  # between columns: room for an arrow and its number
COLUMN = (WIDTH - 2 * MARGIN - 3 * GUTTER) / 4
HEADER = 0.5
NODE = 0.23
STEP = 0.31  # from node to node in a column
CURVES = 0.4  # right of a column's nodes: room for the imports within a part
LANE = 0.24  # between arrows that pass over a column
DPI = 100


class Module(NamedTuple):
    "An exported module: its part, name, chapter (`1.5`, or empty), and the modules it imports."

    part: str
    name: str
    chapter: str
    imports: frozenset[tuple[str, str]]  # {(part, name)}


class Box(NamedTuple):
    "A rectangle: left, bottom, width, height, in inches."

    x: float
    y: float
    w: float
    h: float


# Reading


def read_modules(root: Path) -> list[Module]:
    "The modules of the package below `root`, by part and chapter."
    files = {}
    for path in sorted((root / PACKAGE).glob("**/*.py")):
        parents = path.relative_to(root / PACKAGE).parts[:-1]
        if not path.name.startswith("_") and parents in [(), *((part,) for part in PARTS)]:
            files[(parents[0] if parents else TOP, path.stem)] = path

    # What a module imports counts only where it is a module, not a name within one.
    modules = []
    for (part, name), path in files.items():
        text = path.read_text(encoding="utf-8")
        imports = imported(ast.parse(text), part) & files.keys() - {(part, name)}
        modules.append(Module(part, name, chapter_of(text), frozenset(imports)))
    return sorted(modules, key=reading_order)


def reading_order(module: Module) -> tuple[int, list[int], str]:
    "Parts as in `PARTS`, chapters by number, modules without a chapter last."
    numbers = [int(number) for number in module.chapter.split(".") if number]
    return [*PARTS, TOP].index(module.part), numbers or [999], module.name


def chapter_of(text: str) -> str:
    "`1.5` from nbdev's line `File to edit: ../../nbs/1_core/05_guard.ipynb`, or nothing."
    notebook = re.search(r"File to edit: \S*nbs/(\d+)_\w+/(\d+)\w*\.ipynb", text)
    return f"{int(notebook[1])}.{int(notebook[2])}" if notebook else ""


def imported(tree: ast.Module, part: str) -> set[tuple[str, str]]:
    "Every (part, name) that may be meant by an import anywhere in a module of `part`."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {as_module(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, part)
            found.add(as_module(base))
            found |= {as_module([*base, alias.name]) for alias in node.names}
    return found


def absolute(node: ast.ImportFrom, part: str) -> list[str]:
    "The dotted name after `from`, its leading dots resolved for a module of `part`."
    names = node.module.split(".") if node.module else []
    here = [PACKAGE] if part == TOP else [PACKAGE, part]
    return here[: len(here) + 1 - node.level] + names if node.level else names


def as_module(names: list[str]) -> tuple[str, str]:
    "(part, name) of a dotted name below the package; of anything else, something that is none."
    match names:
        case [package, part, name] if package == PACKAGE:
            return part, name
        case [package, name] if package == PACKAGE:
            return TOP, name
    return "", ""


def between_parts(modules: list[Module]) -> Counter:
    "How many pairs of modules import across each pair of parts: {(importer, imported): n}."
    pairs = Counter()
    for module in modules:
        pairs.update((module.part, part) for part, _ in module.imports if part != module.part)
    return pairs


def fingerprint(modules: list[Module]) -> str:
    "A short hash of all that the picture shows; it is written into the file."
    lines = [f"{m.part} {m.chapter} {m.name}: {sorted(m.imports)}" for m in modules]
    code = hashlib.sha256(Path(__file__).read_bytes())  # how it is drawn counts, too
    code.update("\n".join(lines).encode())
    return code.hexdigest()[:16]


def is_fresh(root: Path, picture: Path) -> bool:
    "Whether a picture shows the package as it is, whatever matplotlib it was drawn with."
    if not picture.exists():
        return False
    with Image.open(picture) as image:
        return image.info.get("Description") == fingerprint(read_modules(root))


def as_markdown(modules: list[Module], picture: str) -> str:
    "The picture by its address, and the same map in words for those who cannot see it."
    lines = [f"![The parts of the package and what each imports]({picture})", ""]
    pairs = between_parts(modules)
    for part, (about, _) in PARTS.items():
        names = ", ".join(f"`{m.name}`" for m in modules if m.part == part)
        used = [other for other in PARTS if pairs[part, other]]
        text = f"imports from {', '.join(used)}" if used else "imports from no other part"
        lines.append(f"- **{part}** ({about}): {names}; {text}.")
    return "\n".join(lines)


# Laying out


def layout(modules: list[Module]) -> tuple[dict, dict, float]:
    "The boxes of the parts, the boxes of the modules, and the height of the figure."
    names = {part: [m.name for m in modules if m.part == part] for part in PARTS}
    parts = part_boxes(max(len(names[part]) for part in COLUMNS))

    # Modules stand below one another in a column, beside one another in the workshop.
    nodes = row_of_nodes(BAND, names[BAND], parts[BAND], left=1.25)
    for part in COLUMNS:
        nodes |= column_of_nodes(part, names[part], parts[part])
    return parts, nodes, parts[TOP].y + parts[TOP].h + MARGIN


def part_boxes(most: int) -> dict[str, Box]:
    "The boxes of the parts, for at most so many modules in a column."
    full_width = WIDTH - 2 * MARGIN
    height = HEADER + most * STEP + 0.1

    # From the bottom: a line of words, the workshop, a gap, columns, lanes, what sits on top.
    band = Box(MARGIN, 0.42, full_width, 0.56)
    bottom = band.y + band.h + 0.5
    top = bottom + height + 3 * LANE + 0.42
    boxes = {BAND: band, TOP: Box(MARGIN, top, full_width, 0.36)}
    for i, part in enumerate(COLUMNS):
        boxes[part] = Box(MARGIN + i * (COLUMN + GUTTER), bottom, COLUMN, height)
    return boxes


def column_of_nodes(part: str, names: list[str], box: Box) -> dict:
    "The boxes of modules below one another in the box of their part."
    top = box.y + box.h - HEADER - NODE
    x, width = box.x + 0.12, box.w - 0.12 - CURVES
    return {(part, name): Box(x, top - i * STEP, width, NODE) for i, name in enumerate(names)}


def row_of_nodes(part: str, names: list[str], box: Box, left: float) -> dict:
    "The boxes of modules beside one another in the box of their part."
    gap = 0.07
    width = min(1.6, (box.w - left - gap) / max(len(names), 1) - gap)
    y = box.y + (box.h - NODE) / 2
    return {
        (part, n): Box(box.x + left + i * (width + gap), y, width, NODE)
        for i, n in enumerate(names)
    }


# Drawing


def draw(root: Path, picture: Path) -> None:
    "Write the map of the package below `root` as a PNG: the same bytes for the same package."
    modules = read_modules(root)
    settings = {name: value for name, value in rcParamsDefault.items() if name != "backend"}
    settings |= {"font.family": "DejaVu Sans", "font.size": 8.5, "text.hinting": "none"}
    with rc_context(settings):
        parts, nodes, height = layout(modules)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        ax.set_axis_off()

        # From back to front: boxes, what passes within them, what passes between them.
        draw_boxes(ax, modules, parts, nodes)
        draw_imports_within(ax, modules, nodes)
        draw_imports_between(ax, modules, parts)
        draw_words(ax)
        save(figure, picture, fingerprint(modules))


def save(figure: Figure, picture: Path, description: str) -> None:
    "Write a figure as PNG in 256 colours, with a description and nothing about time or program."
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=DPI, format="png")
    with Image.open(pixels) as image:
        few_colours = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)

    # A new image carries over no metadata.
    about = PngInfo()
    about.add_text("Description", description)
    few_colours.info.clear()
    few_colours.save(picture, format="PNG", optimize=True, pnginfo=about)


def draw_boxes(ax: Axes, modules: list[Module], parts: dict, nodes: dict) -> None:
    "Parts with their names, modules with their chapters."
    for number, (part, (about, colour)) in enumerate(PARTS.items(), 1):
        box = parts[part]
        y = box.y + box.h / 2 + 0.1 if part == BAND else box.y + box.h - 0.17
        style = {"x": box.x + 0.12, "color": colour, "va": "center"}
        rounded(ax, box, colour, fill=0.09)
        ax.text(y=y, s=f"{number} {part}", size=11, weight="bold", **style)
        ax.text(y=y - 0.2, s=about, size=8, **style)

    # Each module in its part; what is in none sits on top.
    draw_top(ax, [module.name for module in modules if module.part == TOP], parts[TOP])
    for module in modules:
        if module.part != TOP:
            draw_node(ax, module, nodes[module.part, module.name])


def draw_top(ax: Axes, names: list[str], box: Box) -> None:
    "The modules of no part: their names in one box."
    style = {"color": TOP_COLOUR, "va": "center", "y": box.y + box.h / 2}
    rounded(ax, box, TOP_COLOUR, fill=0.07)
    ax.text(box.x + 0.12, s=", ".join(names), size=11, weight="bold", **style)
    ax.text(box.x + box.w - 0.12, s="on top of all parts", size=8, ha="right", **style)


def draw_node(ax: Axes, module: Module, box: Box) -> None:
    "A module: a white box with its chapter and its name."
    colour = PARTS[module.part][1]
    rounded(ax, box, colour, face="white", width=0.8)
    y = box.y + box.h / 2 - 0.005
    ax.text(box.x + 0.06, y, module.chapter, color=colour, size=7, va="center")
    size = 8.5 if len(module.name) <= 16 and module.part != BAND else 7.6
    ax.text(box.x + 0.32, y, module.name, color="black", size=size, va="center")


def draw_imports_within(ax: Axes, modules: list[Module], nodes: dict) -> None:
    "Light curves beside the nodes, from a module to those before it."
    for module in modules:
        start = nodes.get((module.part, module.name))
        for part, name in sorted(module.imports):
            if part == module.part and part != TOP:
                draw_curve(ax, part, start, nodes[part, name])


def draw_curve(ax: Axes, part: str, start: Box, end: Box) -> None:
    "One light curve, from the importing node of a part to the imported one."
    if part == BAND:
        line, right_order = curve_below(start, end), start.x > end.x
    else:
        line, right_order = curve_beside(start, end), start.y < end.y
    if right_order:
        arrow(ax, line, PARTS[part][1], width=0.7, head=4.5, alpha=0.45, zorder=2)
    else:
        arrow(ax, line, AGAINST_ORDER, width=1.4, head=6, zorder=2.5)


def curve_beside(start: Box, end: Box) -> Line:
    "From the right side of a node to that of another, the further the wider."
    x, y_start, y_end = start.x + start.w, start.y + start.h / 2, end.y + end.h / 2
    steps = abs(y_start - y_end) / STEP
    reach = x + min(0.1 + 0.06 * steps, 1.25 * CURVES)
    return Line([(x, y_start), (reach, y_start), (reach, y_end), (x, y_end)], [1, 4, 4, 4])


def curve_below(start: Box, end: Box) -> Line:
    "From the lower side of a node to that of another in the same row."
    y, x_start, x_end = start.y, start.x + start.w / 2, end.x + end.w / 2
    return Line([(x_start, y), (x_start, y - 0.15), (x_end, y - 0.15), (x_end, y)], [1, 4, 4, 4])


def draw_imports_between(ax: Axes, modules: list[Module], parts: dict) -> None:
    "Arrows between parts, as thick as there are pairs of modules."
    pairs = between_parts(modules)
    most = max(pairs.values(), default=1)
    lines = arrow_lines(parts, set(pairs))

    # The thickest first, so that the thin ones stay visible where they cross.
    for (part, other), count in sorted(pairs.items(), key=lambda pair: -pair[1]):
        line, number_place = lines[part, other]
        colour = TOP_COLOUR if part == TOP else PARTS[part][1]
        if ORDER.index(part) < ORDER.index(other):
            colour = AGAINST_ORDER
        width = 1 + 4.5 * count / most
        arrow(ax, line, colour, width, head=9 + width, zorder=3)
        number(ax, number_place, count, colour)


def arrow_lines(parts: dict, pairs: set) -> dict:
    "For every pair of parts the line that its arrow takes, and where its number stands."
    lines = {}
    for pair in pairs:
        start, end = (parts[part] for part in pair)
        places = [COLUMNS.index(part) for part in pair if part in COLUMNS]
        if len(places) < 2:
            lines[pair] = line_down(start, end)
        elif abs(places[0] - places[1]) == 1:
            lines[pair] = line_across(start, end)
        else:
            lines[pair] = line_over(start, end, lane_of(*places))
    return lines


def line_across(start: Box, end: Box) -> tuple[Line, tuple]:
    "Straight from a column to its neighbour, lower where the order is broken."
    y = start.y + start.h - 0.25
    x_start, x_end = start.x, end.x + end.w
    if x_start < x_end:
        x_start, x_end, y = start.x + start.w, end.x, y - 0.5
    return Line([(x_start, y), (x_end, y)]), (0.56 * x_start + 0.44 * x_end, y)


def lane_of(i: int, j: int) -> int:
    "Which lane above the columns an arrow from column i to column j takes: long ones are highest."
    return 3 if abs(i - j) == 3 else 1 + min(i, j)


def line_over(start: Box, end: Box, lane: int) -> tuple[Line, tuple]:
    "Up from a column, along a lane above the columns, down to another."
    top = start.y + start.h
    y = top + LANE * lane + 0.06
    x_start = start.x + start.w * (0.2 if lane == 3 else 0.36)
    x_end = end.x + end.w * (0.64 if lane == 3 else 0.8)
    x_number = x_start - 0.75 * COLUMN

    # Where the order is broken: a little lower, so that both directions can be seen.
    if x_start < x_end:
        y, x_number = y - LANE / 2, x_start + 0.75 * COLUMN
    points = [(x_start, top), (x_start, y), (x_end, y), (x_end, top)]
    return rounded_corners(points, 0.12), (x_number, y)


def rounded_corners(points: list[tuple], radius: float) -> Line:
    "The polygon through four points at right angles, its two corners rounded."
    (x0, y0), (_, y), (x1, y1) = points[0], points[1], points[3]
    side = radius if x1 > x0 else -radius
    vertices = [(x0, y0), (x0, y - radius), (x0, y), (x0 + side, y)]
    vertices += [(x1 - side, y), (x1, y), (x1, y - radius), (x1, y1)]
    return Line(vertices, [1, 2, 3, 3, 2, 3, 3, 2])


def line_down(start: Box, end: Box) -> tuple[Line, tuple]:
    "Straight down from a box to one below it, or up where the order is broken."
    narrow = min(start, end, key=lambda box: box.w)
    x = narrow.x + narrow.w / 2
    if narrow.w > COLUMN:  # both are as wide as the picture: between the last two columns
        x = WIDTH - MARGIN - COLUMN - 0.2 * GUTTER

    # Two that go up and down between the same boxes stand beside each other.
    if start.y > end.y:
        return Line([(x, start.y), (x, end.y + end.h)]), (x, start.y - 0.2)
    x += 0.3
    return Line([(x, start.y + start.h), (x, end.y)]), (x, start.y + start.h + 0.2)


def arrow(ax: Axes, line: Line, colour: str, width: float, head: float, **style) -> None:
    "An arrow along a line, with a thin white rim where it passes over others."
    tip = f"-|>,head_length={0.45 * head / 10},head_width={0.3 * head / 10}"
    settings = {"color": colour, "lw": width, "mutation_scale": 10, **style}
    patch = FancyArrowPatch(path=line, arrowstyle=tip, joinstyle="miter", **settings)
    patch.set_capstyle("butt")
    if width > 1:
        patch.set_path_effects([Stroke(linewidth=width + 2, foreground="white"), Normal()])
    ax.add_patch(patch)


def number(ax: Axes, place: tuple, count: int, colour: str) -> None:
    "How many imports an arrow stands for, in a small white disc on it."
    disc = {"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": colour, "lw": 0.8}
    ax.text(*place, str(count), size=7, color=colour, ha="center", va="center", bbox=disc, zorder=4)


def rounded(
    ax: Axes, box: Box, colour: str, fill: float = 0, face: str = "", width: float = 1
) -> None:
    "A rectangle with round corners, filled with its own colour made pale, or with `face`."
    style = "round,pad=0,rounding_size=0.07"
    size = {"xy": (box.x, box.y), "width": box.w, "height": box.h, "boxstyle": style}
    face = face or to_rgba(colour, fill)
    ax.add_patch(FancyBboxPatch(**size, facecolor=face, edgecolor=colour, lw=width, zorder=1))


def draw_words(ax: Axes) -> None:
    "What the arrows mean."
    text = (
        "An arrow points to what is imported. Thick, with a number: between parts, so many pairs "
        "of modules. Thin: within a part."
    )
    ax.text(WIDTH / 2, 0.2, text, color="#444444", size=8, ha="center", va="center")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    draw(root, Path(sys.argv[2]) if len(sys.argv) > 2 else root / "data" / "architecture.png")
