"""The end of preparing: one table of all films, one summary, the list of rejects, and the metadata that closes it."""

import collections
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raddino_jax.data import images, shapes, shards, store
from raddino_jax.data.datasets.manifest import Manifest, ManifestError

INSPECTED = 32  # films that a dry run decodes


def finish(home: Path, work: Path, about: dict) -> dict:
    """Join what the shards report, write everything that is not pixels, TFDS metadata last."""
    plan = json.loads((work / "plan.json").read_text())
    kinds = {str: pa.string(), float: pa.float32(), int: pa.int32(), bool: pa.bool_()}
    columns = store.COLUMNS | {name: {"str": str, "float": float}[kind] for name, kind in plan["more"].items()}
    columns |= dict.fromkeys(plan["labels"], float)
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    histogram, rejects, splits, tables = np.zeros(256, np.int64), [], {}, []
    for shard in plan["shards"]:
        done = json.loads((work / "done" / shard["shard"]).read_text())
        split = splits.setdefault(_split_of(shard["shard"], plan["name"]), {"lengths": [], "bytes": 0})
        split["lengths"].append(len(done["rows"]))
        split["bytes"] += done["bytes"]
        histogram += np.array(done["histogram"])
        rejects += done["rejects"]
        tables.append(pa.Table.from_pylist(done["rows"], schema))
    table = pa.concat_tables(tables)
    if not len(table):
        raise ManifestError(f"none of the films could be read, e.g. {': '.join(rejects[0])}")
    summary = about | {"plan": plan["plan"]} | _counts(table, plan["labels"], histogram)
    rejects = sorted([*about["rejects"], *rejects])
    summary["rejects"] = dict(collections.Counter(_kind(reason) for _, reason in rejects).most_common())
    shards.write_whole(home / "rejects.csv", _csv([("path", "reason"), *rejects]))
    shards.write_whole(home / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    with shards.renamed(home / store.VERSION / "films.parquet") as path:
        pq.write_table(table, path)
    store.write_metadata(
        home / store.VERSION, plan["name"],
        store.features(plan["labels"], plan["masks"], {name: columns[name] for name in plan["more"]}), splits,
        about={
            "description": f"Chest radiographs ({plan['dataset']}), short side {plan['size']}, 8-bit grey.",
            "licence": about["licence"],
            "metadata": {key: summary[key] for key in ("labels", "masks", "mean", "std")},
        },
    )  # fmt: skip
    return summary


def _split_of(shard: str, name: str) -> str:
    return shard.removeprefix(f"{name}-").partition(".")[0]


def _kind(reason: str) -> str:
    """Reasons without their numbers, to be counted."""
    return re.sub(r"(?<!JPEG )\b\d+(?:[.,]\d+)*\b", "#", reason)


def _csv(rows) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def report(found: Manifest, settings: shards.Settings, licence: str) -> dict:
    """What the manifest alone tells, for summary.json; rejects as a list until the shards add theirs."""
    return {
        "dataset": settings.dataset, "name": settings.name, "size": settings.size, "mode": settings.mode,
        "encoding": settings.encoding, "licence": licence, "labels": list(found.labels),
        "masks": list(found.masks), "left_out": dict(found.dropped), "paper": found.paper, "notes": found.notes,
        "rejects": [list(reject) for reject in found.rejects],
    }  # fmt: skip


def _counts(table, label_names, histogram: np.ndarray) -> dict:
    """Counts by split, view and label, duplicates by their pixels, mean and standard deviation in [0, 1]."""
    column = {name: table[name].to_pylist() for name in ("split", "view", "patient", "pretrain", "pixels", "id")}
    groups = collections.defaultdict(list)
    for index, pixels in enumerate(column["pixels"]):
        groups[pixels].append(index)
    twins = [group for group in groups.values() if len(group) > 1]
    several = {name: sum(len({column[name][i] for i in group}) > 1 for group in twins) for name in ("patient", "split")}
    grey, films = np.arange(256) / 255, histogram.sum()
    mean = float(histogram @ grey / films)
    return {
        "films": len(table), "patients": len(set(column["patient"])), "pretrain": sum(column["pretrain"]),
        "splits": dict(sorted(collections.Counter(column["split"]).items())),
        "views": dict(sorted(collections.Counter(column["view"]).items())),
        "positives": {name: _values(table[name].to_pylist()) for name in label_names},
        "duplicates": {"groups": len(twins), "films": sum(map(len, twins)), "of_several_patients": several["patient"],
                       "across_splits": several["split"], "first": [[column["id"][i] for i in g] for g in twins[:20]]},
        "mean": round(mean, 6), "std": round(float(np.sqrt(histogram @ grey**2 / films - mean**2)), 6),
    }  # fmt: skip


def _values(values: list) -> dict:
    return {"present": values.count(1.0), "absent": values.count(0.0), "uncertain": values.count(-1.0)}


def inspect(found: Manifest, settings: shards.Settings, licence: str) -> dict:
    """A dry run: counts of the manifest, files that are not there, and some films decoded."""
    about = report(found, settings, licence)
    raw, films = Path(settings.raw_dir), found.films
    missing = [film.path for film in films if not (raw / film.path).is_file()]
    about["rejects"] += [[path, "the file is not there"] for path in missing]
    for film in films[:: max(len(films) // INSPECTED, 1)][:INSPECTED]:
        try:
            grey = images.read(raw / film.path, settings.mode)
            for shape in film.masks:
                _ = shape and shapes.draw(shape, *grey.shape)
        except (images.ImageError, shapes.ShapeError) as error:
            about["rejects"].append([film.path, str(error)])
    about["first_rejects"] = about["rejects"][:20]
    count = collections.Counter
    about["rejects"] = dict(count(_kind(reason) for _, reason in about["rejects"]).most_common())
    return about | {
        "dry_run": True, "films": len(films), "patients": len({film.patient for film in films}),
        "pretrain": sum(film.pretrain for film in films), "splits": dict(count(film.split for film in films)),
        "views": dict(count(film.view for film in films)),
        "positives": {n: _values([f.labels[i] for f in films]) for i, n in enumerate(found.labels)},
    }  # fmt: skip
