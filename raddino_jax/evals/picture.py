"""What a picture is here: a figure with a title, a sentence on what it shows, and the numbers behind it."""

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DPI = 100
CELL = 1.8  # inches of a film in a grid of them
COLOURS = ("#1f5a99", "#c2772b", "#3f8f4f", "#a8324a", "#6b5aa8", "#7a7a7a", "#b59b1f", "#2b9aa6")


@dataclass
class Picture:
    """figure: of matplotlib. numbers: rows of {column: value}. more: further tables by name."""

    name: str
    title: str
    sentence: str
    figure: Figure
    numbers: Sequence[Mapping]
    more: Mapping[str, Sequence[Mapping]] = field(default_factory=dict)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=DPI, bbox_inches="tight")
        return out.getvalue()

    def save(self, folder: Path) -> None:
        """Write NAME.png, NAME.csv, and NAME_TABLE.csv per further table."""
        (folder / f"{self.name}.png").write_bytes(self.png())
        for suffix, rows in {"": self.numbers, **{f"_{name}": rows for name, rows in self.more.items()}}.items():
            _write_csv(folder / f"{self.name}{suffix}.csv", rows)

    def html(self) -> str:
        """Title, sentence and picture, with nothing outside the text."""
        title, data = html.escape(self.title), base64.b64encode(self.png()).decode()
        sentence = html.escape(self.sentence)
        return f"<h2>{title}</h2><p>{sentence}</p><img alt='{title}' src='data:image/png;base64,{data}'>"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return self.html()


def _write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns axes, each `width` x `height` inches."""
    figure = Figure(figsize=(width * columns, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False)


def films_grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of axes for films: no ticks, little space between."""
    figure, axes = panels(rows, columns, CELL, CELL * 1.03)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    return figure, axes
