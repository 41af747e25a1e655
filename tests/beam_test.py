"""The same builders on Apache Beam's local runner; skipped where the beam extra is not installed."""

import fake_trees
import pytest
from fake_trees import SIZE

from raddino_jax import prepare
from raddino_jax.data.datasets.manifest import ManifestError

SMALL = dict(size=SIZE, workers=1)


def test_beam_gives_the_same_bytes(tmp_path):
    pytest.importorskip("apache_beam")
    tree = fake_trees.chexpert(tmp_path)
    contents = []
    for name, runner in (("plain", ""), ("beam", "DirectRunner")):
        data = tmp_path / name
        prepare.prepare("chexpert", str(tree.raw), str(data), **SMALL, shard_mib=0.002, beam_runner=runner)
        contents.append({str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*") if p.is_file()})
    assert len(contents[0]) > 6 and contents[0] == contents[1]


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    tree = fake_trees.chexpert(tmp_path)
    with pytest.raises(ManifestError, match=r"raddino_jax\[beam\]"):
        prepare.prepare("chexpert", str(tree.raw), str(tmp_path / "d"), **SMALL, beam_runner="DirectRunner")
