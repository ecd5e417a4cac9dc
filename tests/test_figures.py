"""Figures show their data, and are the same bytes every time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kd import figures

MEMBERS = ["small", "medium", "large"]
PATH = [{"generation": g, "small": 0.5, "medium": 0.3, "large": 0.2} for g in range(4)]
RECORD = {
    "members": MEMBERS,
    "sets": {
        "chosen": {"weights": {"small": 0.5, "medium": 0.3, "large": 0.2}},
        "best_single": {"weights": {"small": 0.0, "medium": 0.0, "large": 1.0}},
    },
}


def every_figure():
    """One of each, by name."""
    random = np.random.default_rng(0)
    labels_N = random.integers(0, 3, 50)
    search = [
        {"generation": g, "evaluations": 9 * g, "best": 1.0, "median": 2.0, "worst": 3.0}
        for g in range(4)
    ]
    epochs = [
        {"epoch": e, "train_loss": 1 / e, "val_nll": 1 / e, "val_accuracy": 1 - 1 / e}
        for e in range(1, 5)
    ]
    rows = [
        {"name": "teacher", "role": "teacher", "size_bytes": 10**6, "test_accuracy": 0.98},
        {"name": "student", "role": "student", "size_bytes": 10**4, "test_accuracy": 0.95},
    ]
    bins = [{"confidence": c, "accuracy": c - 0.1, "count": 7} for c in (0.5, 0.9)]
    counts_CC = random.integers(0, 9, (3, 3))
    logits_KNC = random.normal(size=(3, 50, 3))
    return {
        "learning": figures.learning({"teacher": epochs, "student": epochs}),
        "confusion": figures.confusion(counts_CC, ["cat", "dog", "ox"]),
        "many_classes": figures.confusion(np.eye(100), [str(c) for c in range(100)]),
        "reliability": figures.reliability(bins),
        "convergence": figures.convergence(search),
        "weights": figures.weights(RECORD),
        "weights_path": figures.weights_path(PATH),
        "one_generation": figures.weights_path(PATH[:1]),
        "simplex": figures.simplex_map(logits_KNC, labels_N, MEMBERS, PATH, PATH),
        "sizes": figures.sizes(rows),
    }


def test_every_figure_is_the_same_bytes_in_another_process(tmp_path):
    from PIL import Image

    for name, figure in every_figure().items():
        figures.save(figure, tmp_path / f"{name}.png")
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert image.std() > 5, f"{name} is blank"
    other = tmp_path / "other"
    other.mkdir()
    code = (
        "import sys; from pathlib import Path; import matplotlib; matplotlib.rc('font', size=30)\n"
        "from tests.test_figures import every_figure, figures\n"
        "for name, figure in every_figure().items():\n"
        "    figures.save(figure, Path(sys.argv[1], name + '.png'))"
    )
    root = Path(figures.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(other)], cwd=root, check=True)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_a_png_says_neither_when_nor_by_what_it_was_made(tmp_path):
    figures.save(figures.weights(RECORD), tmp_path / "w.png")
    content = (tmp_path / "w.png").read_bytes()
    assert b"Software" not in content
    assert b"tEXt" not in content


def test_confusion_has_rows_for_the_actual_class():
    figure = figures.confusion([[0, 2], [0, 1]], ["a", "b"])
    (axes, _) = figure.axes
    shown = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert shown == {(0, 1): "2", (1, 1): "1"}, "row (actual), column (predicted)"


def test_class_names_are_drawn_as_they_are(tmp_path):
    names = ["$5-$10", r"$\frac{$", "_x", "café"]
    figure = figures.confusion(np.eye(4, dtype=int), names)
    figures.save(figure, tmp_path / "c.png")
    for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
        labels = axis.get_ticklabels()
        assert [label.get_text() for label in labels] == names
        assert not any(label.get_parse_math() for label in labels)


def test_a_class_name_that_the_font_cannot_draw_is_its_index(tmp_path):
    figure = figures.confusion(np.eye(3, dtype=int), ["cat", "猫", "dog 🐕"])
    figures.save(figure, tmp_path / "c.png")  # a missing glyph would warn
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["cat", "1", "2"]


def test_weights_are_drawn_as_high_as_they_are():
    (axes,) = figures.weights(RECORD).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.5, 0.3, 0.2, 0, 0, 1])


def test_the_simplex_map_is_lowest_where_the_nll_is():
    labels_N = np.zeros(30, int)
    logits_KNC = np.zeros((3, 30, 2))
    logits_KNC[2, :, 0] = 5  # the third member knows
    best = [{"generation": 0, "a": 0.0, "b": 0.0, "c": 1.0}]
    axes = figures.simplex_map(logits_KNC, labels_N, ["a", "b", "c"], best, best).axes[0]
    found = axes.lines[-1].get_xydata()[0]
    assert found == pytest.approx([0.5, 3**0.5 / 2]), "the third corner is the top"
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]


def test_importing_figures_needs_no_matplotlib():
    code = "import sys, kd.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
