"""Checkpoints: what is saved comes back, onto another mesh too; which ones are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import checkpoints, sharding, train


def _items(seed: int = 0) -> dict:
    """The items of a training state, as `train.TrainState` lays them out."""
    rng = np.random.default_rng(seed)
    student = {
        "backbone": {"blocks_0": {"attn": {"qkv": {"kernel": rng.normal(size=(4, 24))}}}},
        "dino_head": {"last_layer": {"weight_v": rng.normal(size=(16, 4))}},
    }
    student = jax.tree.map(jnp.float32, student)
    state = train.TrainState(
        step=jnp.int32(seed), student=student, teacher=jax.tree.map(lambda x: x + 1, student),
        opt=optax.scale_by_adam().init(student), centres={"dino": jnp.arange(3.0)},
    )  # fmt: skip
    return state.items()


def _saved(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def _assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_state_comes_back_as_it_was_saved_and_becomes_a_state_again(tmp_path):
    items = _items(7)
    saved = checkpoints.Checkpoints(tmp_path)
    assert saved.latest() is None
    saved.save(7, items)
    saved.close()
    again = checkpoints.Checkpoints(tmp_path)
    assert again.latest() == 7
    found = again.restore(7, jax.tree.map(jnp.zeros_like, items))
    again.close()
    _assert_equal(found, items)
    empty = train.TrainState(None, None, None, None, None).with_items(found)
    assert empty.step == 7 and empty.opt.count == 0
    np.testing.assert_array_equal(empty.centres["dino"], np.arange(3.0))
    _assert_equal(empty.items(), items)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_state_of_one_mesh_is_restored_onto_another(tmp_path, fsdp):
    items = _items()
    here = sharding.make_mesh(jax.devices(), 4)
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(3, jax.device_put(items, sharding.shardings(items, here)))
    there = sharding.make_mesh(jax.devices()[: max(fsdp, 2)], fsdp)
    target = sharding.shardings(items, there)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), items, target
    )
    found = saved.restore(3, like)
    saved.close()
    _assert_equal(found, items)
    kernel = found["student"]["backbone"]["blocks_0"]["attn"]["qkv"]["kernel"]
    assert kernel.sharding == NamedSharding(there, P(None, "fsdp"))
    assert kernel.addressable_shards[0].data.shape == (4, 24 // fsdp)


def test_the_arrays_may_be_changed_as_soon_as_save_returns(tmp_path):
    """The step donates its state: what was saved must not follow."""
    saved = checkpoints.Checkpoints(tmp_path)
    items = _items()
    expected = jax.tree.map(np.array, items)
    saved.save(1, items)
    burn = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    jax.block_until_ready(burn(items))
    saved.close()
    again = checkpoints.Checkpoints(tmp_path)
    _assert_equal(again.restore(1, jax.tree.map(jnp.asarray, expected)), expected)
    again.close()


def test_the_newest_are_kept_and_every_so_many_steps_one_for_good(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        saved.save(step, {"teacher": {"w": jnp.float32(step)}})
    saved.close()
    assert _saved(tmp_path) == [4, 6, 7]


def test_without_keep_every_only_the_newest_and_the_initial_weights_are_kept(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, keep=1)
    for step in range(4):
        saved.save(step, {"teacher": {"w": jnp.float32(step)}})
    saved.close()
    assert _saved(tmp_path) == [0, 3]


def test_the_best_by_a_metric_is_kept_beside_the_newest(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, keep=1, best="probe_auprc")
    for step, score in [(1, 0.3), (2, 0.5), (3, None), (4, 0.4), (5, None)]:
        metrics = None if score is None else {"probe_auprc": score}
        saved.save(step, {"teacher": {"w": jnp.float32(step)}}, metrics)
    saved.close()
    assert _saved(tmp_path) == [2, 5]
    again = checkpoints.Checkpoints(tmp_path, keep=1, best="probe_auprc")
    assert again.newest_sound() == 5 == again.latest()
    for step in (6, 7):
        again.save(step, {"teacher": {"w": jnp.float32(step)}})
    again.close()
    assert _saved(tmp_path) == [2, 7], "a restart does not forget which one is the best"
    better = checkpoints.Checkpoints(tmp_path, keep=1, best="probe_auprc")
    better.save(8, {"teacher": {"w": jnp.float32(8)}}, {"probe_auprc": 0.6})
    better.save(9, {"teacher": {"w": jnp.float32(9)}})
    better.close()
    assert _saved(tmp_path) == [8, 9]


def test_of_another_metric_than_before_the_best_is_chosen_anew(tmp_path):
    """As after --force with another keep_best."""
    saved = checkpoints.Checkpoints(tmp_path, keep=1, best="probe_auprc")
    saved.save(1, {"teacher": {"w": jnp.float32(1)}}, {"probe_auprc": 0.9})
    saved.close()
    again = checkpoints.Checkpoints(tmp_path, keep=1, best="probe_auroc")
    for step, metrics in [(2, {"probe_auroc": 0.1}), (3, None)]:
        again.save(step, {"teacher": {"w": jnp.float32(step)}}, metrics)
    again.close()
    assert _saved(tmp_path) == [2, 3]


def test_a_damaged_score_is_a_damaged_checkpoint(tmp_path, capsys):
    saved = checkpoints.Checkpoints(tmp_path, best="probe_auprc")
    for step in (1, 2):
        saved.save(step, {"teacher": {"w": jnp.float32(step)}}, {"probe_auprc": step / 10})
    saved.close()
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(b"{\xff")
    again = checkpoints.Checkpoints(tmp_path, best="probe_auprc")
    assert again.newest_sound() == 1 == again.latest()
    assert "metrics/metrics has other bytes" in capsys.readouterr().err
    again.close()


def test_load_arrays_reads_one_item_of_the_newest_or_of_a_given_step_as_numpy(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    for step in (1, 2, 10):
        saved.save(step, _items(step))
    saved.close()
    for step, read in [(10, None), (2, 2)]:
        found = checkpoints.load_arrays(tmp_path, "teacher", read)
        expected = _items(step)["teacher"]
        _assert_equal(found, expected)
        assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}


@pytest.mark.parametrize("make", [False, True])
def test_a_workdir_without_a_complete_checkpoint_is_an_error_that_names_it(tmp_path, make):
    if make:  # what a killed save leaves behind
        (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        checkpoints.load_arrays(tmp_path, "teacher")


def test_an_unfinished_checkpoint_is_not_the_latest(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(4, {"teacher": {"w": jnp.zeros(2)}})
    saved.close()
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    again = checkpoints.Checkpoints(tmp_path)
    assert again.latest() == 4
    again.close()


def test_another_shape_is_an_error_instead_of_wrong_weights(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save(1, {"teacher": {"w": jnp.zeros((2, 3))}})
    with pytest.raises(ValueError, match=r"\(2, 3\)|\[2, ?3\]|2,3"):
        saved.restore(1, {"teacher": {"w": jnp.zeros((3, 3))}})
    saved.close()
