"""Plots of records: data in, a matplotlib Figure out, the same bytes every time.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# N samples, K members, C classes, P points of a grid

Row = Mapping[str, float]

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#666666",
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY, YELLOW)
ROLES = {
    "teacher": (RED, "s"),
    "assistant": (ORANGE, "o"),
    "ensemble": (GREEN, "D"),
    "student": (BLUE, "*"),
    "baseline": (GREY, "v"),
}
FONT = "DejaVu Sans"  # comes with matplotlib, so every machine draws the same
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": "cycler('color', ['" + "', '".join(COLOURS) + "'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.family": FONT,
    "font.size": 10,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 110,
}


@contextmanager
def _style() -> Iterator[None]:
    """This project's settings, ignoring the user's own."""
    import matplotlib

    settings: Any = {**matplotlib.rcParamsDefault, **STYLE}
    with matplotlib.rc_context(settings):
        yield


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, without matplotlib's version in it."""
    with _style():
        figure.savefig(path, format="png", metadata={"Software": None})


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers, as the functions below take them."""
    with path.open(newline="") as file:
        return [{key: float(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


@_style()
def learning(curves_by_name: Mapping[str, Sequence[Row]]) -> "Figure":
    """Validation accuracy by epoch, one line per network.

    Args:
        curves_by_name: Rows of each network's curves.csv: epoch, val_accuracy.
    """
    figure, axes = _axes(size=(8, 4.2))
    for index, (name, rows) in enumerate(curves_by_name.items()):
        axes.plot(
            [row["epoch"] for row in rows],
            [100 * row["val_accuracy"] for row in rows],
            color=COLOURS[index % len(COLOURS)],
            linestyle=("-", "--", ":")[index // len(COLOURS) % 3],
            label=name,
        )
    axes.set(title="Validation accuracy while training", xlabel="epoch", ylabel="%")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_style()
def confusion(confusion_CC: Sequence[Sequence[int]], class_names: Sequence[str]) -> "Figure":
    """How often each class (row) was predicted as each: counts, shaded by share of the row."""
    import numpy as np

    counts_CC = np.asarray(confusion_CC)
    shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    side = min(12.0, max(4.5, 0.45 * len(class_names) + 1.5))
    figure, axes = _axes(size=(side + 0.8, side))
    image = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    if len(class_names) <= 20:
        names = _drawable(class_names)
        ticks, turn = range(len(names)), 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(ticks, names, rotation=turn, parse_math=False)  # else $5-$10 is math
        axes.set_yticks(ticks, names, parse_math=False)
        for row, column in zip(*np.nonzero(counts_CC), strict=True):
            colour = "white" if shares_CC[row, column] > 0.5 else "black"
            text = str(counts_CC[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.grid(False)
    axes.set(title="Confusion", xlabel="predicted", ylabel="actual")
    figure.colorbar(image, label="share of the actual class", shrink=0.8)
    return figure


@_style()
def reliability(rows: Sequence[Row]) -> "Figure":
    """Accuracy against confidence: a calibrated network is on the diagonal.

    Args:
        rows: One per non-empty bin: its mean confidence and accuracy, in [0, 1], and its count.
    """
    figure, (above, below) = _axes(
        2, 1, size=(4.8, 5.4), sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    confidence = [row["confidence"] for row in rows]
    above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    above.plot(confidence, [row["accuracy"] for row in rows], "o-", color=BLUE, label="measured")
    above.set(title="Reliability", ylabel="accuracy", ylim=(-0.02, 1.02))
    above.legend()
    below.bar(confidence, [row["count"] for row in rows], width=0.03, color=SKY)
    below.set(xlabel="confidence", ylabel="images", xlim=(-0.02, 1.02), yscale="log")
    return figure


@_style()
def convergence(rows: Sequence[Row]) -> "Figure":
    """The search's objective by generation: best, median and worst of the population.

    Args:
        rows: From convergence.csv: generation, evaluations, best, median, worst.
    """
    figure, axes = _axes(size=(6, 3.8))
    generations = [row["generation"] for row in rows]
    best, median, worst = ([row[key] for row in rows] for key in ("best", "median", "worst"))
    axes.fill_between(generations, best, worst, color=SKY, alpha=0.25, linewidth=0)
    axes.plot(generations, worst, color=SKY, linewidth=1, label="worst")
    axes.plot(generations, median, color=ORANGE, label="median")
    axes.plot(generations, best, color=BLUE, label="best")
    evaluations = f"{int(rows[-1]['evaluations'])} evaluations"
    axes.set(title=f"Search for weights, {evaluations}", xlabel="generation", ylabel="objective")
    axes.legend()
    return figure


@_style()
def weights(record: Mapping[str, Any]) -> "Figure":
    """Each member's weight, one bar per weight set.

    Args:
        record: weights.json: members, and sets with their weights by member.
    """
    members, sets = record["members"], record["sets"]
    figure, axes = _axes(size=(max(5.0, 0.9 * len(members) * len(sets) ** 0.5 + 2), 3.6))
    width = 0.8 / len(sets)
    for i, (name, found) in enumerate(sets.items()):
        at = [k - 0.4 + width * (i + 0.5) for k in range(len(members))]
        heights = [found["weights"][member] for member in members]
        bars = axes.bar(at, heights, width, color=COLOURS[i % 8], label=name.replace("_", " "))
        if len(sets) * len(members) <= 24:
            axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(members)), members)
    axes.grid(axis="x", visible=False)
    axes.set(title="Ensemble weights", ylabel="weight", ylim=(0, 1.08))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_style()
def weights_path(rows: Sequence[Row]) -> "Figure":
    """The best weights by generation, stacked to 1.

    Args:
        rows: From path.csv: generation, and one column per member.
    """
    figure, axes = _axes(size=(6, 3.8))
    members = [key for key in rows[0] if key != "generation"]
    generations = [row["generation"] for row in rows]
    heights = [[row[member] for row in rows] for member in members]
    colours = [COLOURS[k % 8] for k in range(len(members))]
    axes.stackplot(generations, heights, labels=members, colors=colours, alpha=0.85, step="post")
    axes.set(title="The search's best weights", xlabel="generation", ylabel="weight")
    axes.set(ylim=(0, 1), xlim=(generations[0], max(generations[-1], generations[0] + 1)))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return figure


@_style()
def simplex_map(
    logits_KNC: "NDArray[np.floating[Any]]",
    labels_N: "NDArray[np.integer[Any]]",
    members: Sequence[str],
    path: Sequence[Row],
    tried: Sequence[Row],
) -> "Figure":
    """Validation NLL over all weights of three members, with the search's points and path.

    Args:
        logits_KNC: Of three members.
        labels_N: Class indices.
        members: Their names, in that order.
        path: From path.csv: generation, and one column per member.
        tried: From tried.csv: every candidate, one column per member.
    """
    import numpy as np

    from kd.weightings.objectives import MixtureNLL

    grid_PK = _triangle(60)
    nll_P = MixtureNLL(logits_KNC, labels_N)(grid_PK)
    figure, axes = _axes(size=(6.2, 5))
    x_P, y_P = _flat_triangle(grid_PK)
    levels = np.quantile(nll_P, np.linspace(0, 1, 24))
    filled = axes.tricontourf(x_P, y_P, nll_P, levels=np.unique(levels), cmap="cividis")
    figure.colorbar(filled, label="validation NLL", shrink=0.8, format="%.3f")
    x, y = _flat_triangle(np.array([[row[member] for member in members] for row in tried]))
    axes.plot(x, y, ".", color="black", markersize=2, alpha=0.4, label="tried")
    walk_PK = np.array([[row[member] for member in members] for row in path])
    x, y = _flat_triangle(walk_PK)
    axes.plot(x, y, "o-", color="white", markersize=3, linewidth=1, label="best by generation")
    axes.plot(x[-1], y[-1], "*", color=RED, markersize=15, markeredgecolor="white", label="found")
    corners = _flat_triangle(np.eye(3))
    for name, cx, cy in zip(members, *corners, strict=True):
        top = cy > 0.5
        axes.annotate(name, (cx, cy), (0, 6 if top else -6), textcoords="offset points",
                      ha="center", va="bottom" if top else "top", weight="bold")  # fmt: skip
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title("Every mixture of three members", pad=18)
    axes.legend(loc="upper left", labelcolor="black", facecolor="#BBBBBB", frameon=True)
    return figure


@_style()
def sizes(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Test accuracy against size on disk, every network of the table.

    Args:
        rows: From report.json: name, role, size_bytes, test_accuracy.
    """
    figure, axes = _axes(size=(7.5, 4.6))
    for role, (colour, marker) in ROLES.items():
        of_role = [row for row in rows if row["role"] == role]
        x = [row["size_bytes"] / 1e6 for row in of_role]
        y = [100 * row["test_accuracy"] for row in of_role]
        large = 160 if role == "student" else 55
        if of_role:
            axes.scatter(
                x, y, large, colour, marker=marker, label=role, zorder=3, edgecolors="white"
            )
    axes.set(title="Accuracy against size", xlabel="size (MB)", ylabel="test accuracy (%)")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    _name_points(axes, rows)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _drawable(class_names: Sequence[str]) -> list[str]:
    """The names, but the index for one with characters that the font lacks, such as Chinese."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(FONT))
    known = font.get_charmap().keys()
    return [
        name if known >= set(map(ord, name)) else str(index)
        for index, name in enumerate(class_names)
    ]


def _name_points(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    """Write each network's name beside its point; names at the same size are stacked."""
    low, high = axes.get_ylim()
    lines = (high - low) / 22  # height of a line of text
    last: dict[float, float] = {}
    for row in sorted(rows, key=lambda row: float(row["test_accuracy"])):
        x, y = row["size_bytes"] / 1e6, 100 * row["test_accuracy"]
        free = max(y, last.get(round(x, 2), low) + lines)
        last[round(x, 2)] = free
        name = row["name"].rpartition("/")[2].replace("_", " ")
        text, at = f"  {name}", (x, free)
        axes.annotate(text, (x, y), at, fontsize=8, va="center", color="#333333")


def _axes(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any
) -> "tuple[Figure, Any]":
    """A figure, without pyplot's global state, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _triangle(steps: int) -> "NDArray[np.floating[Any]]":
    """All weights of three members in multiples of 1/steps."""
    import numpy as np

    grid = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return np.array(grid, np.float64) / steps


def _flat_triangle(weights_PK: "NDArray[np.floating[Any]]") -> Any:
    """Weights of three members as x and y in an equilateral triangle."""
    import numpy as np

    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    return (weights_PK @ corners).T
