"""What an encoder sees in single films: attention of the class token, patches that look alike, principal components.

Figures 2, C.3, C.4 and C.5 of arXiv 2401.10815. Films are uint8 [H, W] of any size; a network sees a square of each,
and points are pixels (x, y) of the film. Every function returns plain arrays; the pictures of them are below.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import frames
from raddino_jax.evals.picture import Picture, films_grid
from raddino_jax.models import vit

POINTS = ((0.30, 0.40), (0.62, 0.66), (0.50, 0.18))  # shares of the square: a lung, the heart's side, the upper middle
MARKS = ("#ff3b30", "#34c8ff", "#ffd60a", "#32d74b", "#ff5ee0", "#ffffff")  # one colour per point


# --- where a square and its patches lie in a film -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Window:
    """The square of a film that an encoder sees, in its pixels, as h x w patches; padding lies outside the film."""

    left: float
    top: float
    side: float
    grid: tuple[int, int]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """As matplotlib's imshow wants it, pixel centres at whole numbers."""
        return self.left - 0.5, self.left + self.side - 0.5, self.top + self.side - 0.5, self.top - 0.5

    def patch(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the patch over a pixel. Raises DataError for a point that the encoder does not see."""
        right, down = (x + 0.5 - self.left) / self.side, (y + 0.5 - self.top) / self.side
        if not (0 <= right < 1 and 0 <= down < 1):
            raise DataError(
                f"the point ({x:g}, {y:g}) lies outside what the encoder sees of the film: x from {self.left:.0f} to "
                f"{self.left + self.side:.0f}, y from {self.top:.0f} to {self.top + self.side:.0f}"
            )
        return int(down * self.grid[0]), int(right * self.grid[1])

    def pixel(self, row: float, column: float) -> tuple[float, float]:
        """(x, y) of the middle of a patch."""
        x = self.left + (column + 0.5) * self.side / self.grid[1] - 0.5
        return x, self.top + (row + 0.5) * self.side / self.grid[0] - 0.5


def window(encoder, shape: tuple[int, int]) -> Window:
    """Where the encoder's square lies in a film of height x width pixels."""
    frame, patches = frames.seen(shape, encoder.settings), encoder.image_size // encoder.patch_size
    return Window(frame.left, frame.top, min(frame.height, frame.width), (patches, patches))


# --- arrays ---------------------------------------------------------------------------------------------------


def attention_maps(encoder, films: Sequence[np.ndarray], layer: int = -1) -> np.ndarray | None:
    """Attention [n, heads, h, w] of the class token to the patches in a block, the last by default.

    None for networks that are no vision transformer of models/vit.py. Raises DataError for a block that is not there.
    """
    network, params = encoder.network, encoder.params
    if hasattr(network, "trunk"):
        network, params = network.trunk, params["trunk"]
    if not isinstance(network, vit.ViT):
        return None
    if not -network.depth <= layer < network.depth:
        raise DataError(f"layer={layer}: expected a block from 0 to {network.depth - 1}, or from the end, -1 the last")
    shortened = network.clone(depth=layer % network.depth + 1)
    compiled = encoder.compiled(lambda params, batch: vit.attention_maps(shortened, params, batch))
    weights = np.asarray(compiled(params, encoder.preprocess(films)), np.float32)
    side = encoder.image_size // encoder.patch_size
    return weights[:, :, 0, 1 + network.registers :].reshape(len(films), -1, side, side)


def unit_patches(encoder, films: Sequence[np.ndarray]) -> np.ndarray:
    """Patch features [n, h, w, D] of length 1."""
    patches = np.asarray(encoder(encoder.preprocess(films))["patches"], np.float32)
    return patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)


def similarity_maps(encoder, films: Sequence[np.ndarray], points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Cosine [points, n, h, w] of every patch of several films with the patch under each point of the first."""
    patches, seen = unit_patches(encoder, films), window(encoder, films[0].shape)
    queries = np.stack([patches[0][seen.patch(*point)] for point in points])
    return np.einsum("pd,nhwd->pnhw", queries, patches)


def component_maps(encoder, films: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(scores [n, h, w, 3] on the first principal components of all their patches, share of variance of each).

    Each component points to where its largest weight is positive: a sign that no run changes.
    """
    patches = unit_patches(encoder, films)
    flat = patches.reshape(-1, patches.shape[-1])
    _, sizes, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], axis=1)
    scores = (flat - flat.mean(0)) @ (axes * np.sign(largest))[:3].T
    return scores.reshape(*patches.shape[:3], -1), sizes**2 / max((sizes**2).sum(), 1e-30)


def default_points(encoder, film: np.ndarray) -> list[tuple[float, float]]:
    """POINTS as pixels of a film."""
    seen = window(encoder, film.shape)
    return [(round(seen.left + x * seen.side), round(seen.top + y * seen.side)) for x, y in POINTS]


# --- pictures -------------------------------------------------------------------------------------------------


def attention(encoder, films: Sequence[np.ndarray], layer: int = -1, heads: Sequence[int] = ()) -> Picture | None:
    """Attention of the class token per head over a few films; None where the network has none."""
    maps = attention_maps(encoder, films, layer)
    if maps is None:
        return None
    shown = list(heads) or list(range(maps.shape[1]))
    wrong = [head for head in shown if not 0 <= head < maps.shape[1]]
    if wrong:
        raise DataError(f"heads={tuple(heads)}: expected numbers from 0 to {maps.shape[1] - 1}")
    figure, axes = films_grid(len(films), len(shown) + 2)
    for row, film in enumerate(films):
        axes[row, 0].imshow(film, cmap="gray")
        for column, values in enumerate([maps[row].mean(0), *maps[row][shown]], start=1):
            overlay(axes[row, column], film, values, window(encoder, film.shape))
    for axis, title in zip(axes[0], ["film", "all heads", *(f"head {head}" for head in shown)], strict=True):
        axis.set_title(title, fontsize=10)
    flat = maps / maps.sum((2, 3), keepdims=True)
    entropy = -(flat * np.log(np.maximum(flat, 1e-30))).sum((2, 3)) / np.log(flat[0, 0].size)
    numbers = [
        dict(film=i + 1, head=h, share_of_patches=float(maps[i, h].sum()), evenness=float(entropy[i, h]))
        for i in range(len(films)) for h in range(maps.shape[1])
    ]
    block = "last block" if layer == -1 else f"block {layer}"
    names = [f"head_{head}" for head in range(maps.shape[1])]
    return Picture(
        "attention", f"What the class token attends to ({block})",
        "Red patches weigh most in the summary of the film, blue ones least (each map from its least to its most). A "
        "head that is red everywhere has not specialised; one that is red on heart, lung borders or devices has.",
        figure, numbers, {"maps": _table(encoder, films, np.moveaxis(maps, 1, -1), names)},
    )


def similarity(encoder, films: Sequence[np.ndarray], points: Sequence[tuple[float, float]] = ()) -> Picture:
    """Where several films look like chosen points, pixels (x, y), of the first."""
    points = list(points) or default_points(encoder, films[0])
    maps = similarity_maps(encoder, films, points)
    figure, axes = films_grid(len(points), len(films) + 1)
    numbers = []
    for row, ((x, y), heat) in enumerate(zip(points, maps, strict=True)):
        colour = MARKS[row % len(MARKS)]
        axes[row, 0].imshow(films[0], cmap="gray")
        axes[row, 0].plot(x, y, "+", color=colour, ms=16, mew=3)
        axes[row, 0].set_ylabel(f"point ({x:g}, {y:g})", color="black", fontsize=9)
        for column, (film, values) in enumerate(zip(films, heat, strict=True), start=1):
            seen = window(encoder, film.shape)
            best = seen.pixel(*np.unravel_index(values.argmax(), values.shape))
            # One scale per point: a film that has nothing alike stays dark.
            overlay(axes[row, column], film, values, seen, low=max(heat.min(), 0), high=heat.max())
            axes[row, column].plot(*best, "o", mec=colour, mfc="none", ms=9, mew=2)
            numbers.append(dict(
                point=row + 1, x=x, y=y, film=column, best_x=best[0], best_y=best[1], cosine=float(values.max()),
                mean=float(values.mean()),
            ))
    titles = ["the point, in film 1", *(f"film {i + 1}" for i in range(len(films)))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    names = [f"point_{i + 1}" for i in range(len(points))]
    return Picture(
        "similarity", "Where films look like a point",
        "Each row: the cross marks a point of film 1. Red patches there and in the other films have the most similar "
        "features, blue ones the least, one scale for the row; the ring marks the most similar patch. Good features "
        "find the same anatomy.",
        figure, numbers, {"maps": _table(encoder, films, np.moveaxis(maps, 0, -1), names)},
    )


def components(encoder, films: Sequence[np.ndarray]) -> Picture:
    """First three principal components of patch features as red, green and blue."""
    scores, share = component_maps(encoder, films)
    low, high = np.percentile(scores, [2, 98], axis=(0, 1, 2))
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    figure, axes = films_grid(2, len(films))
    for column, (film, colour) in enumerate(zip(films, colours, strict=True)):
        axes[0, column].imshow(film, cmap="gray")
        axes[1, column].imshow(film, cmap="gray")  # so that both rows have the same frame
        axes[1, column].imshow(colour, extent=window(encoder, film.shape).extent, interpolation="bilinear")
        axes[0, column].set_title(f"film {column + 1}", fontsize=10)
    return Picture(
        "components", "Principal components of the patch features",
        f"Patches of the same colour have similar features; the three colours hold {share[:3].sum():.0%} of the "
        "variance. Lungs, the middle and what lies outside the body should part.",
        figure, [dict(component=i + 1, share=float(s)) for i, s in enumerate(share[:10])],
        {"maps": _table(encoder, films, scores, ["component_1", "component_2", "component_3"])},
    )


def overlay(axis, film: np.ndarray, values: np.ndarray, seen: Window, low=None, high=None) -> None:
    """A map [h, w] over the square of a film that it belongs to, from blue (low) over green to red (high)."""
    axis.imshow(film, cmap="gray")
    # Hues, not brightness: white parts of a film would look like bright parts of a map. Bicubic as in the paper.
    frame = axis.get_xlim(), axis.get_ylim()  # nothing is drawn beyond the film's edge
    axis.imshow(values, cmap="turbo", alpha=0.5, extent=seen.extent, interpolation="bicubic", vmin=low, vmax=high)
    axis.set_xlim(*frame[0])
    axis.set_ylim(*frame[1])


def _table(encoder, films, maps: np.ndarray, names: Sequence[str]) -> list[dict]:
    """Maps [n, h, w, columns] as one row per patch, with the pixel in its middle."""
    rows = []
    for index, (film, one) in enumerate(zip(films, maps, strict=True)):
        seen = window(encoder, film.shape)
        for place in np.ndindex(*one.shape[:2]):
            x, y = seen.pixel(*place)
            values = dict(zip(names, map(float, one[place]), strict=False))
            rows.append(dict(film=index + 1, row=place[0], column=place[1], x=x, y=y) | values)
    return rows
