"""Draw docs/layers.png, the layers of the library and their imports: `python docs/layers.py`.

Layers are those that tests/test_imports.py checks; imports are read from the source files by `ast`.
An import is left out if a chain of other imports through lower layers implies it.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "vit_rope"
IDEAS = {  # what a box says below its name
    "ops": "rotate channel pairs, fast",
    "positions": "functions of coordinates",
    "attention": "where positions meet q, k, v",
    "models": "ViT and DiT",
    "unet": "diffusers' U-Nets",
    "files": "safe reads, atomic writes",
    "convert": "timm's models made rotary",
    "analysis": "numbers about schemes",
    "sampling": "images from a denoiser",
    "training": "tasks, data, runs",
    "bench": "speed as ratios",
    "plots": "pictures",
    "cli": "one file per verb",
}
LEFT, MIDDLE, RIGHT = 1.4, 4.9, 8.4
COLUMNS = {  # x of the centre of each box
    "ops": MIDDLE, "positions": MIDDLE, "attention": MIDDLE,
    "files": LEFT, "models": MIDDLE, "unet": RIGHT,
    "sampling": LEFT, "convert": MIDDLE, "analysis": RIGHT,
    "training": LEFT, "bench": MIDDLE, "plots": RIGHT,
    "cli": MIDDLE,
}  # fmt: skip
OUTSIDE = {  # packages besides torch, heaviest last, with a colour of the box (Okabe and Ito, lightened)
    "timm": "#cfe6f5",
    "diffusers": "#bfe5d8",
    "matplotlib": "#f6f0b5",
    "lightning": "#f8dcae",
}
NOTE = (
    "An arrow points to what is imported: to a lower layer (up) or sideways within a layer, never down.\n"
    "Imports that follow from a chain of arrows are left out. The colour is that of the last package named in a box."
)
HEIGHT, STEP, WIDTH = 0.76, 1.3, 2.7


def layers() -> list[set[str]]:
    """The layers that the import test checks, lowest first."""
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text())
    values = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    return [layer - {"__main__"} for layer in ast.literal_eval(values[0])]


def imports(path: Path) -> set[tuple[str, ...]]:
    """Full names of the modules that a file of the library imports."""
    package = ("vit_rope", *path.relative_to(LIBRARY).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) + 1 - node.level] if node.level else ()
            full = (*stem, *(node.module.split(".") if node.module else ()))
            found |= {(*full, alias.name) for alias in node.names}
    return found


def graph() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What each package or module of the library imports of the library, and of `OUTSIDE`."""
    names = set().union(*layers())
    inside: dict[str, set[str]] = {name: set() for name in names}
    outside: dict[str, set[str]] = {name: set() for name in names}
    for path in LIBRARY.rglob("*.py"):
        name = path.relative_to(LIBRARY).with_suffix("").parts[0]
        if name not in names:
            continue
        for module in imports(path):
            if module[0] == "vit_rope":
                inside[name] |= {*module[1:2]} & names - {name}
            else:
                outside[name] |= {module[0]} & set(OUTSIDE)
    return inside, outside


def shown(inside: dict[str, set[str]], depth: dict[str, int]) -> list[tuple[str, str]]:
    """Imports that no chain of imports through lower layers implies."""

    def below(name: str) -> set[str]:
        lower = {other for other in inside[name] if depth[other] < depth[name]}
        return lower.union(*map(below, lower))

    edges = []
    for name, others in inside.items():
        lower = {other for other in others if depth[other] < depth[name]}
        implied = set().union(*map(below, lower))
        edges += [(name, other) for other in others if other not in implied]
    return sorted(edges)


def imports_shown() -> str:
    """The arrows of the picture as text, such as "attention positions, bench analysis"."""
    depth = {name: i for i, names in enumerate(layers()) for name in names}
    return ", ".join(f"{name} {other}" for name, other in shown(graph()[0], depth))


def route(name: str, other: str, depth: dict[str, int], lane: int) -> list[tuple[float, float]]:
    """Corners of an arrow, which passes the layers in between through a gap between two boxes."""
    x, y, to_x, to_y = COLUMNS[name], -STEP * depth[name], COLUMNS[other], -STEP * depth[other]
    if depth[name] == depth[other]:
        side = WIDTH / 2 if to_x > x else -WIDTH / 2
        return [(x + side, y), (to_x - side, y)]
    passed = range(depth[name] - 1, depth[other], -1)
    lean = 0.9 if to_x > x else -0.9 if to_x < x else 0.0
    if not passed:
        return [(x + lean, y + HEIGHT / 2), (to_x - lean, to_y - HEIGHT / 2)]
    gaps = [(LEFT + MIDDLE) / 2, (MIDDLE + RIGHT) / 2]
    gap = min(gaps, key=lambda gap: abs(gap - (x + 3 * to_x) / 4)) + (lane - 1.5) * 0.13
    start, end = (0.9 if gap > x else -0.9), (0.9 if gap > to_x else -0.9)
    middle = [(gap, -STEP * (level + offset)) for level in passed for offset in (0.3, -0.3)]
    return [(x + start, y + HEIGHT / 2), *middle, (to_x + end, to_y - HEIGHT / 2)]


def draw(out: Path) -> None:
    """Write the picture, with few colours, for a small file."""
    import io

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Line
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    order, (inside, outside) = layers(), graph()
    depth = {name: i for i, names in enumerate(order) for name in names}
    fig, ax = plt.subplots(figsize=(10.6, 9.4))
    fig.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(-1.1, 9.95), ylim=(-STEP * (len(order) - 0.5), 1.65))
    ax.axis("off")
    ax.text(-1, 1.4, "The layers of vit_rope and their imports", fontsize=15, weight="bold", va="center")
    ax.text(-1, 1.12, NOTE, fontsize=10.5, va="top", linespacing=1.35)
    for i in range(len(order)):
        y = -STEP * i
        ax.axhspan(y - STEP / 2, y + STEP / 2, color="#efefef" if i % 2 == 0 else "#fafafa", zorder=0, lw=0)
        ax.text(-0.95, y, f"layer {i}", fontsize=10, color="#444444", va="center")
    for lane, (name, other) in enumerate(shown(inside, depth)):
        style = {"arrowstyle": "->", "mutation_scale": 16, "lw": 1.4, "color": "#333333", "joinstyle": "round"}
        ax.add_patch(FancyArrowPatch(path=Line(route(name, other, depth, lane % 4)), fc="none", zorder=1, **style))
    for name, level in depth.items():
        x, y = COLUMNS[name], -STEP * level
        packages = [package for package in OUTSIDE if package in outside[name]]
        corner, style = (x - WIDTH / 2, y - HEIGHT / 2), "round,pad=0,rounding_size=0.08"
        fill = OUTSIDE[packages[-1]] if packages else "white"
        ax.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, fc=fill, ec="#333333", lw=1, zorder=2))
        label = f"{name}/" if (LIBRARY / name).is_dir() else f"{name}.py"
        ax.text(x, y + 0.21, label, fontsize=12, weight="bold", family="monospace", ha="center", va="center", zorder=3)
        ax.text(x, y - 0.03, IDEAS[name], fontsize=10, ha="center", va="center", zorder=3)
        needs = ", ".join(["torch", *packages]) if packages else "torch only"
        ax.text(x, y - 0.25, needs, fontsize=9, style="italic", color="#333333", ha="center", va="center", zorder=3)
    with io.BytesIO() as buffer:
        fig.savefig(buffer, dpi=90)
        text = PngInfo()
        text.add_text("imports", imports_shown())  # a test compares them with the source files
        Image.open(buffer).convert("RGB").quantize(32).save(out, optimize=True, pnginfo=text)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
