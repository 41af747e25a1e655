"""Planning on the devices at hand: the row, the verdict, the collectives of a compiled program."""

import json

from configs import common, quickstart
from raddino_jax import plan

TINY = (
    "batch_size=16,group_size=2,koleo_group=8,model.width=32,model.depth=2,model.heads=2,model.patch_size=8,"
    "model.image_size=32,views.global_size=32,views.local_size=16,head.prototypes=64,head.bottleneck=16,"
    "head.hidden=32,data.image_size=32"
)


def test_the_row_of_a_config_on_the_devices_at_hand():
    row, text = plan.plan(common.apply(quickstart.get_config(), TINY, {}), "")
    assert row["chips"] == 8 and row["batch_size"] == 16 and row["images_per_chip"] == 2
    assert row["fits"] is None and row["peak_hbm_gib"] > 0 and row["flops_per_step"] > 0
    assert row["collectives"]["all-reduce"]["count"] > 0 and "all-reduce" in text
    assert {"topology", "image_size", "prototypes", "parameters"} <= json.loads(json.dumps(row)).keys()


def test_collectives_are_counted_with_their_bytes():
    text = """
      %all-reduce.1 = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %x), replica_groups={}
      %ag = (bf16[2]{0}, bf16[16]{0}) all-gather-start(bf16[2]{0} %y), dimensions={0}
      %add = f32[8,4]{1,0} add(f32[8,4]{1,0} %x, f32[8,4]{1,0} %all-reduce.1)
    """
    assert plan.collectives(text) == {"all-reduce": {"count": 1, "bytes": 128}, "all-gather": {"count": 1, "bytes": 36}}


def test_the_verdict_names_by_how_much_and_the_first_knob():
    config = common.apply(quickstart.get_config(), TINY, {})
    chip = plan.flops.CHIPS["TPU v5e"]
    assert plan._verdict(config, 9.0, chip) == "fits: 9.0 of 16 GiB per chip"
    assert plan._verdict(config, 20.0, chip) == "does not fit by 4.0 GiB per chip; first try model.remat=dots"
    config.model.remat = "full"
    assert "logits_budget" in plan._verdict(config, 20.0, chip)
