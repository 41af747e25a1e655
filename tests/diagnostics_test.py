"""Collapse is told from health: closed forms of the measures, and the verdict over log lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from raddino_jax import diagnostics, logs, train


def test_spread_of_known_shapes():
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(4000, 8))
    found = diagnostics.spread(jnp.asarray(ball), "cls")
    assert found["cls_rank"] == pytest.approx(8, rel=0.02) and abs(found["cls_cosine"]) < 0.01
    line = np.outer(rng.normal(size=200), rng.normal(size=8)) + 5
    assert diagnostics.spread(jnp.asarray(line), "cls")["cls_rank"] == pytest.approx(1, rel=1e-3)
    constant = diagnostics.spread(jnp.ones((20, 8)), "cls")
    assert constant["cls_cosine"] == pytest.approx(1) and np.isfinite(constant["cls_rank"])


def test_spread_does_not_depend_on_scale():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 6)))
    small = diagnostics.spread(x * 1e-8, "cls")["cls_rank"]
    assert small == pytest.approx(float(diagnostics.spread(x, "cls")["cls_rank"]), rel=1e-4)


def teacher(rows, temperature):
    k = rows.shape[-1]
    return {"rows": rows, "prototypes": jnp.eye(k), "bias": jnp.zeros(k), "temperature": temperature}


def test_matching_of_sharp_uniform_and_single_targets():
    rows = jax.nn.one_hot(jnp.arange(8), 8)
    sharp = diagnostics.matching(rows, jnp.eye(8), teacher(rows, 0.01))
    assert sharp["target_entropy"] < 1e-3 and sharp["prototypes_used"] == pytest.approx(1) and sharp["agreement"] == 1
    uniform = diagnostics.matching(rows[::-1], jnp.eye(8), teacher(rows, 1e4))
    assert uniform["target_entropy"] == pytest.approx(np.log(8), rel=1e-4)
    single = diagnostics.matching(rows, jnp.eye(8), teacher(jnp.tile(rows[:1], (8, 1)), 0.01))
    assert single["prototypes_used"] == pytest.approx(1 / 8, rel=1e-3) and single["agreement"] == pytest.approx(1 / 8)


HEALTHY = dict(step=50, target_entropy=4.0, prototypes_used=0.8, cls_cosine=0.4, patch_rank=4.0)


@pytest.mark.parametrize(
    "sign, words",
    [
        (dict(target_entropy=np.log(256)), "temperature is too high"),
        (dict(target_entropy=np.log(256), cls_cosine=1.0, patch_rank=1.05), "learning rate far too high"),
        (dict(prototypes_used=1.2 / 256), "same target"),
        (dict(cls_cosine=0.9999), "all but the same"),
    ],
)
def test_verdict_waits_and_names_cause_and_mend(sign, words):
    ill = HEALTHY | sign
    assert diagnostics.verdict([HEALTHY] * 5, 256) is None
    assert diagnostics.verdict([HEALTHY, ill, ill], 256) is None
    text = diagnostics.verdict([HEALTHY, ill, ill, ill], 256)
    assert diagnostics.verdict([row | {"step": 3} for row in (HEALTHY, ill, ill, ill)], 256) is None
    assert words in text and "optim." in text or "loss." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake, cause",
    [
        ("optim.base_lr=0.1", "learning rate far too high"),
        ("loss.centring=softmax,loss.centre_momentum=1.0", "no working centring"),
        ("optim.teacher_temperature=(0.2,0.2)", "temperature is too high"),
        ("seed=1", None),
    ],
)
def test_a_real_run_is_called_collapsed_within_100_steps_and_a_healthy_one_never(tmp_path, mistake, cause):
    config = quickstart.get_config(f"{mistake},steps=100,eval_every=0,then=()")
    (tmp_path / "config.json").write_text(config.to_json())
    train.run(config, tmp_path)
    verdicts = [row["collapse"] for row in logs.read_metrics(tmp_path)]
    assert (cause in verdicts[-1]) if cause else not any(verdicts)
