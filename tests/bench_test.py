"""Timing: the row, turns taken alike, and the PyTorch step as an oracle of ours over several updates."""

import itertools
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from configs import common, multicxr, quickstart
from raddino_jax import bench, rival, sharding

TINY = (
    "batch_size=16,group_size=2,koleo_group=8,model.width=32,model.depth=2,model.heads=2,model.patch_size=8,"
    "model.image_size=32,views.global_size=32,views.local_size=16,head.prototypes=64,head.bottleneck=16,"
    "head.hidden=32,data.image_size=32"
)


def _tiny(extra=""):
    return common.apply(quickstart.get_config(), f"{TINY},{extra}", {})


@pytest.mark.parametrize("what", ["step", "augment", "encode"])
def test_the_row_says_what_was_timed_and_where(what):
    row, timings = bench.alone(_tiny(), what, images=4, real=False, count=2, warm_up=1)
    assert row["what"] == what and row["count"] == 2 and len(timings["ours"].seconds) == 2
    assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["step_seconds"])
    assert row["mfu"] is None and row["peak_memory_gib"] > 0 and row["device"] == "cpu"
    assert row["batch_size"] == (4 if what == "encode" else 16)
    promised = {"dtype", "drop_path", "threads", "versions", "date", "data_wait_fraction"}
    assert promised <= json.loads(json.dumps(row)).keys()


def test_reading_the_real_sources_is_timed_with_the_wait_for_them():
    config = _tiny("data.synthetic_size=40")
    row, _ = bench.alone(config, "step", images=4, real=True, count=2, warm_up=1)
    assert row["data"] == "real" and 0 < row["data_wait_fraction"] < 1
    row, _ = bench.alone(config, "data", images=4, real=True, count=2, warm_up=1)
    assert row["what"] == "data" and row["images_per_second"] > 0
    assert row["encodings"][0]["of_raw"] == 1.0 and len(row["encodings"]) >= 4


def test_rivals_take_turns_and_the_warm_up_does_not_count():
    order = []

    def turn(name):
        order.append(name)
        return {"value": len(order), "seconds": len(order), "waited": 0.0, "peak_memory_gib": 1.0}

    timings = bench.take_turns({"a": lambda: turn("a"), "b": lambda: turn("b")}, count=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert timings["a"].seconds == [3, 5] and timings["b"].seconds == [4, 6]
    assert timings["a"].first == 1 and timings["b"].median == 5


def test_the_torch_step_walks_our_trajectory():
    """Five updates with a learning rate that moves: losses equal to 1e-5 relative, float32."""
    pytest.importorskip("transformers")
    config = bench.fair(_tiny("masks.probability=0.5,optim.warmup=(2,'steps'),optim.layer_decay=0.8,optim.clip=0.5"))
    mesh = sharding.make_mesh(jax.devices()[:1], 1)
    work, arrays, constants = bench.views_and_update(config, mesh)
    steps = itertools.count()

    def requests():
        return {name: float(value) for name, value in constants.schedules.at(next(steps)).items()}

    with bench.torch_rival(config, arrays, requests) as torch:
        theirs = [torch()["value"] for _ in range(5)]
    ours = [work.turn()[0] for _ in range(5)]
    assert max(ours) - min(ours) > 0.01  # it does move
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_torch_encoder_sees_the_same_films():
    pytest.importorskip("transformers")
    row, _ = bench.against_torch(_tiny(), "encode", images=2, count=1, warm_up=1)
    assert row["ratio"] > 0 and row["first_value"] == pytest.approx(row["torch_first_value"], rel=1e-4)


def test_what_the_rival_cannot_do_is_refused():
    with pytest.raises(bench.BenchError, match="loss.centring"):
        bench.fair(_tiny("loss.centring=softmax"))


def test_a_chip_is_not_compared_with_pytorch_on_a_cpu(monkeypatch):
    monkeypatch.setattr(bench.jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    with pytest.raises(bench.BenchError, match="computes on gpu: set JAX_PLATFORMS=cpu"):
        bench.against_torch(_tiny(), "encode", images=2, count=1, warm_up=1)


def test_memory_is_measured_anew_after_it_is_forgotten():
    held = np.ones(2**25)  # 256 MiB
    high = rival.peak_memory()
    del held
    rival.forget_peak()
    if np.isnan(high):
        pytest.skip("no /proc here")
    assert rival.peak_memory() < high - 0.2


def test_the_command_line_ends_with_one_json_object():
    command = [sys.executable, "-m", "raddino_jax.bench", "--what=augment", "--count=1", "--warm_up=1"]
    done = subprocess.run([*command, f"--config=configs/quickstart.py:{TINY}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["what"] == "augment"
    command += ["--against=torch", "--config=configs/quickstart.py"]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and "times step and encode" in wrong.stderr


def test_the_full_config_is_described_without_being_run():
    config = multicxr.get_config("vits14_224")
    given = bench.batch(config)
    assert given["images"].shape == (8, 224, 224) and given["masks"].shape == (8, 2, 32)
    assert 0 < np.unpackbits(given["masks"]).sum() <= 16 * 256
