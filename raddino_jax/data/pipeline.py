"""The host side of a batch: films as uint8 squares and block masks, by global batch slot, through Grain.

Global slot s = step * batch_size + j names its example by a stateless shuffle, so the position in the data is the
step: nothing to save, any number of hosts, exact resume. A host reads the slots of its own rows.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from raddino_jax import masking
from raddino_jax.data import images, labels, store, synthetic
from raddino_jax.data.datasets import manifest

SUFFIXES = {".png", ".jpg", ".jpeg", ".jp2", ".tif", ".tiff", ".webp", ".bmp", ".dcm", ".dicom"}


# What `prepare --dataset=` knows by name.
DATASETS = (
    "brax", "chexpert", "mimic_cxr", "chestx_ray14", "padchest", "vindr_cxr", "candid_ptx", "rsna_pneumonia",
    "mimic_lungs", "chest_imagenome", "vindr_ribcxr", "iu_xray", "mimic_iv",
)  # fmt: skip


ALLOWED = 10  # films that cannot be decoded, at least
ELSEWHERE = 1_000_003  # slots from one that cannot be filled to the one that fills in: far from its own batch, prime


class DataError(ValueError):
    """A source that is not there or holds nothing; the message says what to do."""


# --- sources: len(source), source.film(i) -> uint8 [H, W] of any size --------------------------------------


class Folder:
    """Every image file below a folder, as 8-bit grey films with the short side resized to `image_size`."""

    kind = "real"

    def __init__(self, path: str, image_size: int):
        self.root, self.image_size = Path(path), image_size
        if not self.root.is_dir():
            raise DataError(f"folder {path!r} is not there; a folder source is written 'folder:PATH'")
        self.files = [path for path in visible(self.root) if _may_be_film(path)]
        if not self.files:
            raise DataError(f"folder {path!r} holds no image files ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def film(self, index: int) -> np.ndarray:
        try:
            return images.resize_short_side(images.read(self.files[index]), self.image_size)
        except images.ImageError as error:
            raise DataError(f"{self.files[index]}: {error}") from error

    def labels(self, spec) -> labels.Labels | None:
        """Labels of the CSV that `config.eval` names, None where it names none."""
        if not spec.csv:
            return None
        return labels.read_csv(spec.csv, self.files, spec.columns, spec.file_column, spec.patient_column, spec.where)


def visible(root: Path) -> list[Path]:
    """The files below a folder, sorted; those with a dot in front, or in such folders, are no one's films."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]


def _may_be_film(path: Path) -> bool:
    """By its suffix; without one, by how the file begins."""
    return path.suffix.lower() in SUFFIXES or (not path.suffix and images.is_candidate(path))


class Synthetic:
    """Procedural radiographs, square already."""

    kind = "synthetic"

    def __init__(self, films: int, image_size: int, seed: int = 0):
        self.source = synthetic.Synthetic(films, image_size, seed)

    def __len__(self) -> int:
        return len(self.source)

    def film(self, index: int) -> np.ndarray:
        return self.source[index]

    def labels(self, spec) -> labels.Labels:
        """The findings drawn into each film."""
        rows = [self.source.labels(i) for i in range(len(self))]
        values = np.array([[row[name] for name in synthetic.FINDINGS] for row in rows], np.float32)
        patients = np.array([row["patient_id"] for row in rows])
        return labels.Labels(synthetic.FINDINGS, values, patients, np.arange(len(rows)))


class Fraction:
    """A share of a source's films, always the same ones, and of a smaller share only such as are in the larger."""

    def __init__(self, source, share: float):
        self.source, self.kind = source, source.kind
        self.films = np.random.default_rng(0).permutation(len(source))[: max(round(share * len(source)), 1)]

    def __len__(self) -> int:
        return len(self.films)

    def film(self, index: int) -> np.ndarray:
        return self.source.film(int(self.films[index]))


class Cached:
    """Films of a source kept in host memory, up to a budget in bytes."""

    def __init__(self, source, budget: float):
        self.source, self.kind, self.budget = source, source.kind, budget
        self.films: dict[int, np.ndarray] = {}
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def film(self, index: int) -> np.ndarray:
        film = self.films.get(index)
        if film is None:
            film = self.source.film(index)
            with self.lock:
                if index not in self.films and film.nbytes <= self.budget:
                    self.films[index] = film
                    self.budget -= film.nbytes
        return film


# The paper's mixes, arXiv 2401.10815 Table D.1: source -> films, in proportion to which they are drawn. `private` is
# what `prepare --dataset=folder --name=private` made. BRAX is printed as 41,620; only 41,260 adds up to the total.
MIXES = {
    "multicxr": {
        "brax": 41_260, "chexpert": 223_648, "mimic_cxr": 210_491, "chestx_ray14": 112_120, "padchest": 160_817,
        "private": 90_000,
    },
    "multicxr_public": {
        "brax": 41_260, "chexpert": 223_648, "mimic_cxr": 210_491, "chestx_ray14": 112_120, "padchest": 160_817,
    },
}  # fmt: skip


def weighted(data) -> tuple[list[str], list[float]]:
    """Names of `config.data.sources` with every mix written out, and their weights; () in proportion to size.

    A source beside a mix counts by its weight of `config.data.weights`, which a mix shares out among its members.
    """
    if not any(name in MIXES for name in data.sources):
        return list(data.sources), list(data.weights)
    weights = list(data.weights) or [1.0] * len(data.sources)
    if len(data.sources) > 1 and not data.weights:
        raise DataError("a mix beside other sources needs config.data.weights, one per source")
    names, found = [], []
    for name, weight in zip(data.sources, weights, strict=True):
        members = MIXES.get(name, {name: 1})
        names += members
        found += [weight * films / sum(members.values()) for films in members.values()]
    return names, found


def open_sources(data) -> list:
    """The sources named in `config.data`, in order. Raises DataError for one that is not there."""
    sources = _subset([_open(name, data) for name in weighted(data)[0]], data.get("subset", ""))
    if data.fraction < 1:
        sources = [Fraction(source, data.fraction) for source in sources]
    return [Cached(s, data.cache_gib * 2**30 / len(sources)) for s in sources] if data.cache_gib else sources


def _open(name: str, data, part: str = "pretrain"):
    """A source by its word in `config.data.sources`; of a prepared one NAME or NAME:frontal, NAME:lateral."""
    kind, _, argument = name.partition(":")
    if kind == "synthetic":
        return Synthetic(data.synthetic_size, data.image_size)
    if kind == "folder" and argument:
        return Folder(argument, data.image_size)
    if data.data_dir and store.is_prepared(data.data_dir, kind):
        try:
            source = store.Prepared(data.data_dir, kind, data.image_size, part, argument)
            _ = source.records  # a missing shard is told now, not hours later
            return source
        except store.StoreError as error:
            raise DataError(str(error)) from error
    dataset = kind if kind in ("folder", *DATASETS) else f"folder --name={kind}"
    raise DataError(
        f"dataset {kind!r} is not prepared in data_dir {data.data_dir!r}: python -m raddino_jax.prepare "
        f"--dataset={dataset} --raw_dir=DIR --data_dir={data.data_dir or 'DIR'}; sources that need no preparation are "
        "'synthetic' and 'folder:PATH'"
    )


def _subset(sources: list, path: str) -> list:
    """The sources with those films alone that a file lists by id or path; sources without any are an error."""
    if not path:
        return sources
    try:
        listed = manifest.listed(path)
    except OSError as error:
        raise DataError(f"config.data.subset={path}: {error.strerror}") from error
    for source in sources:
        if not isinstance(source, store.Prepared):
            raise DataError("config.data.subset names films of prepared datasets; other sources have no ids")
        if not len(source.only(listed)):
            raise DataError(f"config.data.subset={path} lists no film of {source.name}")
    return sources


def labelled_films(data, spec) -> tuple[list[np.ndarray], labels.Labels, str] | None:
    """Films to evaluate on: (films, labels, "synthetic" or "real"), at most `spec.films`; None without labels.

    data: `config.data`; spec: `config.eval`. Synthetic films are others than those trained on; films of a folder are
    trained on too, without their labels. Raises LabelError, DataError.
    """
    for name in weighted(data)[0]:
        source = Synthetic(spec.films, data.image_size, seed=1) if name == "synthetic" else _open(name, data, "all")
        found = source.labels(spec)
        if found is not None:
            found = found.take(np.arange(len(found))[: spec.films])
            return [square(data)(source.film(i)) for i in found.films], found, source.kind
    return None


# --- batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows [first, first + count) of a global batch of `batch_size` that this host feeds."""

    first: int
    count: int
    batch_size: int

    def slot(self, index: int) -> int:
        """Global slot of this host's index-th example, counted from step 0."""
        step, row = divmod(index, self.count)
        return step * self.batch_size + self.first + row


@dataclass(frozen=True)
class MaskSpec:
    """What `masking.group_masks` needs beside (seed, step, group)."""

    group_size: int
    image_size: int
    patch_size: int
    probability: float
    ratio: tuple[float, float]


class Rejects:
    """Films that could not be decoded: told once each, ten, or one in a hundred, are put up with."""

    def __init__(self, sources: Sequence, tell: Callable[[str], None]):
        self.sources, self.tell, self.lock = sources, tell, threading.Lock()
        self.limit = max(ALLOWED, sum(map(len, sources)) // 100)
        self.films: set[tuple[int, int]] = set()
        self.last_word = ""

    def add(self, number: int, film: int, error: Exception) -> None:
        """Count a film. Raises DataError, which names it, once there are too many."""
        name = name_of(self.sources[number], film) or f"film {film} of source {number}"
        why = str(error) if name in str(error) else f"{name}: {error}"
        with self.lock:
            known = (number, film) in self.films
            self.films.add((number, film))
            if len(self.films) > self.limit:  # several threads get here; all say what the first found
                self.last_word = self.last_word or (
                    f"{len(self.films)} films cannot be decoded, {self.limit} are put up with; the last is {why}. "
                    "Mend the source, or prepare it (python -m raddino_jax.prepare), which leaves such films out"
                )
                raise DataError(self.last_word)
            if not known:
                self.tell(f"skipped, {len(self.films)} so far ({self.limit} are put up with): {why}")


class _Slots:
    """Random access by this host's example index: the mixed, shuffled, endless stream of examples."""

    def __init__(self, sources: Sequence, weights: Sequence[float], rows: Rows, steps: int, seed: int, square, rejects):
        shuffled = [_endless(source, number, seed) for number, source in enumerate(sources)]
        weights = list(weights) or [len(source) for source in sources]
        self.stream = grain.MapDataset.mix(shuffled, weights) if len(shuffled) > 1 else shuffled[0]
        self.sources, self.rows, self.steps, self.square, self.rejects = sources, rows, steps, square, rejects

    def __len__(self) -> int:
        return self.steps * self.rows.count

    def __getitem__(self, index: int) -> dict:
        slot = self.rows.slot(index)
        for place in range(slot, slot + ELSEWHERE * (self.rejects.limit + 2), ELSEWHERE):
            number, film = self.stream[place]
            try:
                pixels = self.sources[number].film(film)
            except Exception as error:  # each decoder has its own; too many of them end the run
                self.rejects.add(number, film, error)
            else:
                return {"image": self.square(pixels, slot), "source": number, "film": film}
        raise DataError("no film that can be decoded was found; prepare the source, which leaves such films out")


def _endless(source, number: int, seed: int) -> grain.MapDataset:
    """(source number, film index) without end; every pass over the source in a new order."""
    order = grain.MapDataset.range(len(source)).seed(seed + number).shuffle().repeat()
    return order.map(lambda film: (number, int(film)))


def name_of(source, film: int) -> str:
    """The file or id of a film, "" where the source has none."""
    while isinstance(source, Fraction | Cached):
        film = int(source.films[film]) if isinstance(source, Fraction) else film
        source = source.source
    if isinstance(source, Folder):
        return str(source.files[film])
    return source.ids()[film] if isinstance(source, store.Prepared) else ""


def batches(
    data, *, rows: Rows, steps: int, start: int, seed: int, masks: MaskSpec, sources: Sequence | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """Batches for steps start .. steps - 1 of this host's rows.

    data: `config.data`. Yields {"images" uint8 [rows, S, S], "masks" uint8 [rows, 2, ceil(N / 8)] (bits, see
    `pack`), "film" int64 [rows, 2] (source number and film index, the identity of each row)}. A film that cannot be
    decoded is told to `tell` and another, always the same one, takes its slot; too many raise DataError.
    """
    sources = open_sources(data) if sources is None else sources
    slots = _Slots(sources, weighted(data)[1], rows, steps, seed, _Square(data.image_size, data.window, seed),
                   Rejects(sources, tell))

    def finish(step: int, examples: dict) -> dict:
        groups = range(rows.first // masks.group_size, (rows.first + rows.count) // masks.group_size)
        drawn = [_group_masks(seed, step, group, masks) for group in groups]
        return {
            "images": examples["image"],
            "masks": pack(np.concatenate(drawn)),
            "film": np.stack([examples["source"], examples["film"]], axis=1),
        }

    dataset = grain.MapDataset.source(slots)[start * rows.count :].batch(rows.count, drop_remainder=True)
    dataset = dataset.map_with_index(lambda index, examples: finish(start + index, examples))
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, 1))
    return iter(dataset.to_iter_dataset(options))


def _group_masks(seed: int, step: int, group: int, spec: MaskSpec) -> np.ndarray:
    """Masks of one group's images, bool [group_size, 2, N]."""
    drawn = masking.group_masks(
        seed, step, group, crops=2 * spec.group_size, image_size=spec.image_size, patch_size=spec.patch_size,
        probability=spec.probability, ratio=spec.ratio,
    )
    return drawn.reshape(spec.group_size, 2, -1)


def pack(masks: np.ndarray) -> np.ndarray:
    """bool [..., N] -> uint8 [..., ceil(N / 8)]; the device unpacks with jnp.unpackbits(count=N)."""
    return np.packbits(masks, axis=-1)


def square(data) -> Callable[[np.ndarray], np.ndarray]:
    """film -> its centre window of `data.image_size`, as evaluations see it."""
    window = _Square(data.image_size, "centre", 0)
    return lambda film: np.ascontiguousarray(window(film, slot=0))


@dataclass(frozen=True)
class _Square:
    """A square window of the film's short side: at a random place keyed by (seed, slot), or in the centre.

    A view: stacking a batch copies it once.
    """

    size: int
    window: str
    seed: int

    def __call__(self, film: np.ndarray, slot: int) -> np.ndarray:
        spare = np.array(film.shape) - self.size
        if self.window == "random":
            rng = np.random.default_rng((self.seed, slot))
            top, left = rng.integers(0, spare + 1)
        else:
            top, left = spare // 2
        return film[top : top + self.size, left : left + self.size]
