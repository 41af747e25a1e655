"""The table of encodings: sizes against the bytes themselves, and what each gives back."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from raddino_jax.data import encodings


def test_sizes_and_losses_are_those_of_the_encodings(tmp_path):
    side = 256  # records large enough that what ArrayRecord adds is small
    grey = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    smooth = np.add.outer(np.arange(side), np.arange(side)).astype(np.uint8) // 2
    for index in range(8):
        Image.fromarray(grey).save(tmp_path / f"noise{index}.png")
        Image.fromarray(smooth).save(tmp_path / f"smooth{index}.png")
    data = ConfigDict(dict(sources=(f"folder:{tmp_path}",), data_dir="", image_size=side, weights=(), subset="",
                           fraction=1.0, cache_gib=0.0))  # fmt: skip
    rows = {row["encoding"]: row for row in encodings.compare(data, films=16, seconds=0.05, threads=1)}
    assert list(rows) == list(encodings.ENCODINGS) == ["raw", "zstd", "png", "jpeg 95"]
    assert side**2 < rows["raw"]["bytes_per_image"] < 1.3 * side**2 and rows["raw"]["of_raw"] == 1
    assert rows["png"]["of_raw"] < rows["raw"]["of_raw"]  # half of the films compress well
    assert [row["difference"] > 0 for row in rows.values()] == [False, False, False, True]
    assert all(row["images_per_second"] > 0 for row in rows.values())
    text = encodings.show(list(rows.values()))
    assert text.count("\n") == 4 and "jpeg 95" in text
