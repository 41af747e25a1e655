"""What the run decides: where it starts from, which checkpoint it keeps, when it gives up."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import common, quickstart
from raddino_jax import checkpoints, encoders, logs, starts, train
from raddino_jax import params as trees

TINY = (
    "batch_size=16,group_size=2,koleo_group=8,model.width=32,model.depth=2,model.heads=2,model.patch_size=8,"
    "model.image_size=32,views.global_size=32,views.local_size=16,head.prototypes=64,head.bottleneck=16,"
    "head.hidden=32,data.image_size=40,data.synthetic_size=32,eval.films=30,log_every=1,checkpoint_every=2,steps=4,"
    "eval_every=1,keep=1,optim.warmup=(0,'steps'),optim.freeze_last_layer=(0,'steps')"
)


def config(more=""):
    return common.apply(quickstart.get_config(), f"{TINY},{more}", {})


def run(workdir, scores=None, more=""):
    """A run, or the next start of one, whose online evaluation says `scores` in turn."""
    workdir.mkdir(exist_ok=True)
    settings = config(more)
    (workdir / "config.json").write_text(settings.to_json())
    told = iter(scores or [])
    observe = (lambda step, features, labels: {"probe_auprc": next(told)}) if scores else None
    train.run(settings, workdir, observe=observe)
    return [row["step"] for row in logs.read_metrics(workdir)]


def steps_kept(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    run(tmp_path / "a", [0.1, 0.9, 0.2, 0.3], "keep_best=probe_auprc")
    assert steps_kept(tmp_path / "a") == [0, 2, 4]
    run(tmp_path / "a", [0.8, 0.3], "keep_best=probe_auprc,steps=6")
    assert steps_kept(tmp_path / "a") == [0, 2, 6], "a later start keeps it too"
    run(tmp_path / "b", [0.1, 0.9, 0.2, 0.3])
    assert steps_kept(tmp_path / "b") == [0, 4]


def test_a_run_without_gain_ends_early_with_a_checkpoint(tmp_path):
    steps = run(tmp_path, [0.5, 0.4, 0.4, 0.9, 0.9, 0.9], "keep_best=probe_auprc,stop_after=2,steps=6")
    assert steps == [1, 2, 3] and steps_kept(tmp_path)[-1] == 3


def test_a_run_that_ended_without_gain_is_finished_until_it_is_given_more_patience(tmp_path, capsys):
    scores, fields = [0.5, 0.4, 0.4], "keep_best=probe_auprc,steps=6,stop_after="
    run(tmp_path, scores, f"{fields}2")
    kept = steps_kept(tmp_path)
    capsys.readouterr()
    for _ in range(2):
        assert run(tmp_path, [0.4], f"{fields}2") == [1, 2, 3] and steps_kept(tmp_path) == kept == [0, 1, 3]
        out, said = capsys.readouterr()
        assert "is finished at step 3: probe_auprc has not improved since step 1" in said
        assert json.loads(out.splitlines()[-1])["step"] == 3
    assert run(tmp_path, [0.4, 0.4, 0.4], f"{fields}3") == [1, 2, 3, 4] and steps_kept(tmp_path) == [0, 1, 4]


@pytest.mark.parametrize("more", ["keep_best=probe_auprc", "keep_best=probe_auprc,stop_after=2"])
def test_the_best_of_films_without_labels_is_refused_before_anything_is_computed(tmp_path, more):
    films = tmp_path / "films"
    films.mkdir()
    for i in range(16):
        Image.fromarray(np.full((40, 40), i, np.uint8)).save(films / f"{i}.png")
    with pytest.raises(train.ConfigError, match="keep_best=.*no labels.*eval.csv"):
        run(tmp_path / "run", [0.5], f"data.sources=('folder:{films}',),{more}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "parameters.txt").exists()
    here = starts.Workdir(tmp_path / "run")
    here.settle(config(), train.config_differences)  # a start that computed nothing does not claim the workdir


def test_a_run_continues_from_the_weights_of_another(tmp_path):
    run(tmp_path / "first")
    first = trees.flatten(checkpoints.load_arrays(tmp_path / "first", "teacher"))
    run(tmp_path / "second", more=f"init={tmp_path / 'first'},init_head={tmp_path / 'first'},seed=5,steps=1")
    start = trees.flatten(checkpoints.load_arrays(tmp_path / "second", "teacher", 0))
    for name, value in first.items():
        np.testing.assert_array_equal(start[name], value, err_msg=name)


def test_position_embeddings_follow_the_resolution(tmp_path):
    run(tmp_path / "first")
    larger = "model.image_size=48,views.global_size=48,data.image_size=48,steps=1"
    run(tmp_path / "second", more=f"init={tmp_path / 'first'},{larger}")
    start = checkpoints.load_arrays(tmp_path / "second", "teacher", 0)["backbone"]
    first = checkpoints.load_arrays(tmp_path / "first", "teacher")["backbone"]
    assert start["pos_embed"].shape == (1, 37, 32) and first["pos_embed"].shape == (1, 17, 32)
    kernels = [tree["blocks_1"]["attn"]["qkv"]["kernel"] for tree in (start, first)]
    np.testing.assert_array_equal(*kernels)


def test_weights_of_another_architecture_are_refused(tmp_path):
    run(tmp_path / "first")
    for more in ("model.width=48,model.heads=4", f"head.hidden=16,init_head={tmp_path / 'first'}"):
        with pytest.raises(encoders.WeightsError, match="does not fit this model"):
            run(tmp_path / "second", more=f"init={tmp_path / 'first'},{more}")
        assert not (tmp_path / "second" / "metrics.jsonl").exists()
    here = starts.Workdir(tmp_path / "second")
    here.settle(config(), train.config_differences)  # with what fits the same workdir will do


def test_without_mim_nothing_is_masked_and_the_term_is_zero(tmp_path):
    run(tmp_path, more="loss.ibot=0.0,masks.probability=0.0,steps=2")
    row = logs.read_metrics(tmp_path)[-1]
    assert row["ibot"] == 0 and row["masked_tokens"] == 0 and np.isfinite(row["loss"])


def test_differences_between_configs_are_named():
    old, new = (json.loads(config(f"seed={seed}").to_json()) for seed in (0, 1))
    assert train.config_differences(old, new) == ["seed: 0 -> 1"]
    assert train.config_differences(old, old) == []
    assert jax.device_count() == 8  # the runs above were split over eight devices


@pytest.mark.parametrize("more", ["", "loss.centring=softmax", "loss.ibot=0.0,masks.probability=0.0"])
def test_a_batch_in_parts_walks_the_same_trajectory(tmp_path, more):
    """Two parts on four devices: groups, masks, drop path, Sinkhorn over the whole batch, KoLeo inside its groups."""
    rows, students = {}, {}
    for parts in (1, 2):
        where = tmp_path / str(parts)
        fields = f"batch_size=32,koleo_group=2,loss.koleo=0.1,model.drop_path=0.3,accumulate={parts},{more}"
        fields += ",optim.eps=0.001"  # else Adam makes a whole step of a gradient that is rounding noise
        run(where, more=fields + ",steps=3,eval_every=0")
        rows[parts] = logs.read_metrics(where)
        students[parts] = trees.flatten(checkpoints.load_arrays(where, "student"))
    names = ("dino_global", "dino_local", "ibot", "grad_norm_backbone", "masked_tokens")
    for whole, split in zip(rows[1], rows[2], strict=True):
        np.testing.assert_allclose([whole[n] for n in names], [split[n] for n in names], rtol=2e-5)
        # KoLeo is the logarithm of distances between class tokens that are all but the same.
        np.testing.assert_allclose(whole["koleo"], split["koleo"], atol=2e-3)
    assert rows[1][0]["loss"] != rows[1][-1]["loss"]
    for name, value in students[1].items():
        np.testing.assert_allclose(students[2][name], value, atol=1e-5, err_msg=name)


def test_parts_that_would_tear_a_group_are_refused():
    settings = config("batch_size=32,accumulate=4")
    with pytest.raises(train.ConfigError, match="multiple of accumulate x 8 x 8"):
        train.check(settings, 8)
    train.check(settings, 1)
