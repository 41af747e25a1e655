"""A prepared dataset on disk: TFDS records in ArrayRecord, and a table of all that is known about each film.

    DATA_DIR/NAME/1.0.0/      what training reads; may be copied anywhere
        NAME-SPLIT.array_record-00000-of-00012   one tf.train.Example per film, pixels as plain bytes
        films.parquet                            the same whitelist without pixels, in the order of the records
        features.json, dataset_info.json, ...    written last: `tfds.builder_from_directory` opens the folder
    DATA_DIR/NAME/            what stays with the archive
        summary.json, rejects.csv                rejects.csv names files of the source

The whitelist is `COLUMNS`, the labels, masks and further columns that a builder names. Nothing else is ever written.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raddino_jax.data import images, labels
from raddino_jax.data.datasets.manifest import NAN

VERSION = "1.0.0"
COLUMNS = {
    "id": str, "patient": str, "study": str, "split": str, "view": str, "projection": str, "sex": str, "age": float,
    "pretrain": bool, "height": int, "width": int, "original_height": int, "original_width": int, "pixels": str,
}  # fmt: skip
IN_RECORDS = [name for name in COLUMNS if name not in ("split", "height", "width")]  # those a record tells anyway
# ArrayRecord's own options. One film per chunk: a read at random unpacks nothing else.
ENCODINGS = {"raw": "group_size:1,uncompressed", "zstd": "group_size:1,zstd:3"}


class StoreError(ValueError):
    """A prepared dataset that is missing, incomplete or does not fit; the message says what to do."""


def features(label_names: Sequence[str], mask_names: Sequence[str], more: dict[str, type]):
    """The TFDS features of one film. Labels and masks lie in one array each; metadata.json has their names."""
    import tensorflow_datasets as tfds

    text, tensor, encoding = tfds.features.Text, tfds.features.Tensor, tfds.features.Encoding
    scalar = {float: np.float32, int: np.int64, bool: np.bool_}
    kinds = COLUMNS | more
    found = {"image": tensor(shape=(None, None, 1), dtype=np.uint8, encoding=encoding.BYTES)}
    for name in (*IN_RECORDS, *more):
        found[name] = text() if kinds[name] is str else tensor(shape=(), dtype=scalar[kinds[name]])
    if label_names:
        found["labels"] = tensor(shape=(len(label_names),), dtype=np.float32)
    if mask_names:
        found["masks"] = tensor(shape=(None, None, len(mask_names)), dtype=np.uint8, encoding=encoding.ZLIB)
    return tfds.features.FeaturesDict(found)


def serializer(found) -> Callable[[dict], bytes]:
    """`features` -> what turns an example into a record, the same bytes every time.

    `FeaturesDict.serialize_example` leaves the order of the fields to a hash.
    """
    from tensorflow_datasets.core import example_serializer

    write = example_serializer.ExampleSerializer(found.get_serialized_info())
    return lambda example: write.get_tf_example(found.encode_example(example)).SerializeToString(deterministic=True)


def write_metadata(folder: Path, name: str, found, shards: dict[str, dict], *, about: dict) -> None:
    """The files that make the folder a TFDS dataset; dataset_info.json, without which it is none, comes last.

    found: `features`. shards: split -> {"lengths": films per shard, "bytes": of all}. about: description, licence,
    homepage, metadata.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming, splits

    hidden = folder / ".metadata"
    hidden.mkdir(exist_ok=True)
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name="raddino_jax.prepare"
    )
    info = dataset_info.DatasetInfo(
        builder=identity, features=found, description=about["description"], license=about["licence"],
        metadata=tfds.core.MetadataDict(about["metadata"]),
    )  # fmt: skip
    info.set_file_format("array_record")
    info.set_splits(splits.SplitDict([
        splits.SplitInfo(
            name=split, shard_lengths=shard["lengths"], num_bytes=shard["bytes"],
            filename_template=naming.ShardedFileTemplate(
                data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
            ),
        )
        for split, shard in sorted(shards.items())
    ]))  # fmt: skip
    info.write_to_directory(hidden)
    last = "dataset_info.json"
    for path in sorted(hidden.iterdir(), key=lambda path: (path.name == last, path.name)):
        path.rename(folder / path.name)
    hidden.rmdir()


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """As TFDS spells it."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def is_prepared(data_dir: str, name: str) -> bool:
    return (Path(data_dir) / name / VERSION / "dataset_info.json").exists()


class _Part(NamedTuple):
    """A shard as ArrayRecordDataSource wants to be told of it: without the lengths it would open every file first."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared:
    """A prepared dataset as a source of films: `len`, `film(i)` -> uint8 [H, W] with short side `image_size`.

    part: "pretrain" holds the films that encoders are trained on, "all" every film. view: "frontal" or "lateral" for
    those alone. Reads bytes, decodes nothing. Raises StoreError.
    """

    kind = "real"

    def __init__(self, data_dir: str, name: str, image_size: int, part: str = "pretrain", view: str = ""):
        self.folder, self.name, self.image_size = Path(data_dir) / name / VERSION, name, image_size
        self.summary = json.loads((self.folder.parent / "summary.json").read_text())
        if self.summary["size"] < image_size:
            raise StoreError(
                f"{name} was prepared with a short side of {self.summary['size']} pixels, config.data.image_size asks "
                f"for {image_size}: prepare it again with --size={image_size} under another --name"
            )
        chosen = np.ones(len(self.table), bool) if part == "all" else self.table["pretrain"].to_numpy()
        if view:
            chosen = chosen & (np.array(self.table["view"].to_pylist()) == view)
        self.films = np.flatnonzero(chosen)
        if not len(self.films):
            raise StoreError(
                f"none of the {len(self.table)} films of {name} is meant for pre-training"
                + (f" and of the view {view!r}; views: {self.summary['views']}" if view else "; it serves evaluations")
            )

    @cached_property
    def table(self):
        """pyarrow table of all films, row i of which is record i."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / "films.parquet")

    @cached_property
    def widths(self) -> list[int]:
        return self.table["width"].to_pylist()

    @cached_property
    def records(self):
        """ArrayRecord's random access to all shards, in the order of the table."""
        from array_record.python import array_record_data_source as source

        parts = []
        for split in json.loads((self.folder / "dataset_info.json").read_text())["splits"]:
            lengths = [int(length) for length in split["shardLengths"]]
            for number, length in enumerate(lengths):
                path = self.folder / shard_name(self.name, split["name"], number, len(lengths))
                if not path.exists():
                    raise StoreError(f"{path} is missing: copy the folder again, or remove it and prepare again")
                parts.append(_Part(str(path), 0, length, length))
        return source.ArrayRecordDataSource([part for part in parts if part.take])

    def __len__(self) -> int:
        return len(self.films)

    def film(self, index: int) -> np.ndarray:
        record = int(self.films[index])
        film = pixels(self.records[record], self.widths[record])
        if min(film.shape) == self.image_size:
            return film
        return images.resize_short_side(film, self.image_size)

    def ids(self) -> list[str]:
        return self.table["id"].take(self.films).to_pylist()

    def only(self, wanted: set[str]) -> np.ndarray:
        """Keep the films whose id is wanted; which ids were found."""
        ids = np.array(self.ids())
        keep = np.array([name in wanted for name in ids], bool)
        self.films = self.films[keep]
        return ids[keep]

    def labels(self, spec) -> labels.Labels | None:
        """What the films are labelled with; films kept out of pre-training first.

        spec: `config.eval`; `columns` () takes every label with both classes among the first `spec.films` films,
        `where` "column=value" keeps films by any column of the table. Uncertain labels count as not assessed. None
        where the dataset has no labels.
        """
        names = list(spec.columns) or list(self.summary["labels"])
        if not names:
            return None
        column, _, value = spec.where.partition("=")
        lacking = [name for name in (*names, *filter(None, [column])) if name not in self.table.column_names]
        if lacking:
            raise labels.LabelError(
                f"{self.name} has no column {', '.join(map(repr, lacking))}; "
                f"it has {', '.join(self.table.column_names)}"
            )
        values = np.stack([self.table[name].to_numpy() for name in names], axis=1).astype(np.float32)
        values[(values != 0) & (values != 1)] = NAN
        keep = ~np.isnan(values).all(axis=1)
        if column:
            keep &= np.array([str(cell) == value for cell in self.table[column].to_pylist()])
        trained_on = self.table["pretrain"].to_numpy()
        place = {record: index for index, record in enumerate(self.films)}
        order = [r for r in np.argsort(trained_on, kind="stable") if keep[r] and r in place][: spec.films]
        patients = np.array(self.table["patient"].to_pylist())
        if not order:
            raise labels.LabelError(f"{self.name}: no film has a label" + (f" and {spec.where}" if column else ""))
        found = labels.Labels(tuple(names), values[order], patients[order], np.array([place[r] for r in order]))
        return found if spec.columns else found.informative()


def pixels(record: bytes, width: int) -> np.ndarray:
    """One record (a tf.train.Example) -> uint8 [H, width], a view of its bytes.

    Walks the protocol buffer by hand: parsing it would copy the pixels twice, which halves the rate.
    """
    features, _ = _field(record, 0)
    position, end = features
    while position < end:
        (entry, stop), position = _field(record, position)
        (key, key_end), value = _field(record, entry)
        if record[key:key_end] == b"image/value":
            for _ in range(3):  # Feature, BytesList, its one value
                (value, stop), _ = _field(record, value)
            return np.frombuffer(record, np.uint8, stop - value, value).reshape(-1, width)
    raise StoreError("expected a record with image/value, found none")


def _field(record: bytes, position: int) -> tuple[tuple[int, int], int]:
    """The length-delimited field at `position`, its tag being one byte -> ((start, end), next position)."""
    position, length, shift = position + 1, 0, 0
    while True:
        byte = record[position]
        length |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return (position, position + length), position + length
