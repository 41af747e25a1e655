"""Planning on the devices at hand: the row, the verdict, the collectives of a compiled program."""

import json
import re

import jax
import numpy as np
import pytest

from configs import common, multicxr, quickstart
from configs import report as reports
from raddino_jax import plan, train

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


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_a_step_in_float32_multiplies_in_float32_wherever_it_runs(dtype, exact):
    """Products of float32 numbers ask for it; those of half precision take what is fast."""
    config = common.apply(quickstart.get_config(), f"{TINY},compute_dtype={dtype}", {})
    text = plan.lower(config, jax.devices()[:1])[0].as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    wide = [line for line in products if re.search(r"\(tensor<\S*xf32>, tensor<\S*xf32>\)", line)]
    assert len(products) > 40 and (len(wide) == len(products)) == exact
    assert not exact or all("HIGHEST" in line for line in wide)
    assert exact or not any("HIGHEST" in line for line in products if line not in wide)


SMALL = (
    "encoder=dinov2_vits14,image_size=28,batch_size=16,length=40,compute_dtype=float32,llm_sizes.vocabulary=64,"
    "llm_sizes.width=32,llm_sizes.depth=2,llm_sizes.heads=2,llm_sizes.hidden=48,llm_sizes.positions=64"
)


def test_the_row_of_tuning_a_writer_spreads_what_is_trained_over_all_devices():
    row, text = plan.plan(reports.get_config(SMALL), "")
    language = 2 * 64 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32) + 32
    projector = 384 * 32 + 32 + 32**2 + 32
    assert row["parameters"] == row["trained"] == language + projector
    assert row["patches"] == 4 and row["texts_per_chip"] == 2 and row["fsdp"] == row["chips"] == 8
    assert row["fits"] is None and row["peak_hbm_gib"] > 0 and row["flops_per_step"] > 16 * 3 * 2 * 40 * language / 2
    assert row["collectives"]["all-gather"]["count"] > 0 and "all-gather" in text
    json.dumps(row)


def test_the_row_of_adapters_has_few_trained_parameters_and_holds_less():
    whole, _ = plan.plan(reports.get_config(f"{SMALL},mesh.fsdp=1"), "")
    few, _ = plan.plan(reports.get_config(f"{SMALL},mesh.fsdp=1,lora=2"), "")
    adapters = 2 * 2 * (4 * 64 + 3 * (32 + 48))
    assert few["trained"] == adapters + 384 * 32 + 32 + 32**2 + 32
    assert few["parameters"] == whole["parameters"] + adapters
    moments = 2 * 4 * (whole["trained"] - few["trained"]) - 4 * adapters
    assert whole["argument_gib"] - few["argument_gib"] == pytest.approx(moments / plan.GIB, rel=0.01)
    assert few["flops_per_step"] < whole["flops_per_step"]


@pytest.mark.parametrize(("arguments", "told"), [
    ("batch_size=12", "multiple of accumulate=1 times the 8 chips"),
    ("accumulate=4", "multiple of accumulate=4 times the 8 chips"),
    ("task=probe", "has no plan"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(arguments, told):
    with pytest.raises(train.ConfigError, match=told):
        plan.plan(reports.get_config(f"{SMALL},{arguments}"), "")


def test_the_sizes_of_a_folder_are_those_that_are_planned(tmp_path):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    rest = dict(model_type="llama", max_position_embeddings=64, rms_norm_eps=1e-5, rope_scaling=None)
    (tmp_path / "config.json").write_text(json.dumps(sizes | rest))
    config = reports.get_config(SMALL)
    config.llm = str(tmp_path)
    found = plan._tuning(config, "cpu").writer.llama
    assert (found.vocabulary, found.width, found.depth, found.hidden) == (50, 16, 1, 24)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("topology", "gib"), [("v5p:4x4x4", 9), ("v5e:8x16", 5)])
def test_a_language_model_of_seven_billion_parameters_fits_and_travels_a_layer_at_a_time(topology, gib):
    """Minutes of compilation each; 7.5 and 3.9 GiB a chip, of 95 and 16."""
    pytest.importorskip("libtpu", reason="planning for a TPU needs the extra tpu")
    row, text = plan.plan(reports.get_config(), topology)
    assert row["fits"] and row["peak_hbm_gib"] <= gib, row["verdict"]
    assert row["parameters"] == row["trained"] == 6_738_415_616 + 768 * 4096 + 4096 + 4096**2 + 4096
    scores = [dims for _, dims in _shapes(text) if dims[-2:] == (2048, 2048)]
    assert not scores  # attention goes in blocks of queries


def test_collectives_are_counted_with_their_bytes():
    text = """
      %all-reduce.1 = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %x), replica_groups={}
      %all-reduce.2 = (f32[2]{0}, /*index=1*/f32[2]{0}) all-reduce(%x, /*index=1*/%y), channel_id=7
      %again = (f32[2]{0}, /*index=1*/f32[2]{0}) all-reduce(%x, /*index=1*/%y), channel_id=7
      %ag = (bf16[2]{0}, bf16[16]{0}) all-gather-start(bf16[2]{0} %y), dimensions={0}
      %add = f32[8,4]{1,0} add(f32[8,4]{1,0} %x, f32[8,4]{1,0} %all-reduce.1)
    """
    assert plan.collectives(text) == {"all-reduce": {"count": 2, "bytes": 144}, "all-gather": {"count": 1, "bytes": 36}}


@pytest.mark.parametrize("arguments, task", [(TINY, quickstart), (SMALL, reports)], ids=["pretrain", "report"])
def test_the_command_shows_a_table_and_last_the_row(capsys, arguments, task):
    """As it is called: with remat left to choose itself."""
    plan.run(common.apply(task.get_config(), arguments, {}), "", swept=False)
    out, err = capsys.readouterr()
    table, row = out.split("\n\n")
    assert json.loads(row)["peak_hbm_gib"] > 0 and "peak_hbm_gib" in table and "compiling 1 of 1" in err


def test_chips_that_nobody_can_describe_are_refused():
    """With libtpu the name is unknown to it; without, the extra is named that brings it."""
    with pytest.raises(train.ConfigError, match=r"v9z:1x1: no such TPU|pip install -e '\.\[tpu\]'"):
        plan.devices_of("v9z:1x1")


def test_the_verdict_names_by_how_much_and_the_first_knob():
    config = common.apply(quickstart.get_config(), TINY, {})
    chip = plan.flops.CHIPS["TPU v5e"]
    assert plan._verdict(config, "none", 8, 9.0, chip) == "fits: 9.0 of 16 GiB per chip"
    assert plan._verdict(config, "none", 8, 20.0, chip) == (
        "does not fit by 4.0 GiB per chip; first try model.remat=dots"
    )
    assert "mesh.fsdp" in plan._verdict(config, "full", 8, 20.0, chip)  # one group on each already
    assert "more accumulate" in plan._verdict(config, "full", 2, 20.0, chip)
    config.mesh.fsdp = 8
    assert "more chips" in plan._verdict(config, "full", 8, 20.0, chip)
    config = reports.get_config()
    assert "remat=True" in plan._verdict(config, "none", 8, 20.0, chip)
    assert "lora=64" in plan._verdict(config, "full", 8, 20.0, chip)
    config.lora = 64
    assert plan._verdict(config, "full", 8, 20.0, chip).endswith("first try more accumulate or more chips")


def test_a_sweep_leaves_out_what_cannot_run_and_its_frontier_what_needs_more():
    config = common.apply(quickstart.get_config(), TINY, {})
    found = list(plan.sweep(config, 8))
    assert {c.batch_size for c in found} == {16, 32}  # 8 films are four groups, too few for eight devices
    assert len(found) == 2 * 3 * 3 and {c.model.remat for c in found} == {"full", "dots", "none"}
    rows = [
        dict(images_per_chip=n, remat=remat, logits_budget=budget, peak_hbm_gib=gib, verdict="fits")
        for n, remat, budget, gib in [
            (2, "full", 1, 5.0), (2, "full", 2, 4.0), (2, "none", 1, 9.0), (4, "full", 1, 7.0),
        ]
    ]
    for row in rows:
        row["fits"] = row["peak_hbm_gib"] < 6
    beyond = [plan.hopeless(c, 8, rows) for c in found]
    assert beyond == [c.model.remat == "none" or c.batch_size == 32 for c in found]
    assert [row["peak_hbm_gib"] for row in plan.frontier(rows)] == [4.0, 7.0, 9.0]
    lines = []
    plan.show_frontier(rows, lines.append)
    assert len(lines) == 4 and "4.0" in lines[1]


def _shapes(text):
    """(type, dimensions) of every array that a compiled program names."""
    for kind, dims in set(re.findall(r"\b(f32|bf16)\[([\d,]+)\]", text)):
        yield kind, tuple(int(d) for d in dims.split(","))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_compiled_step_of_the_papers_run_holds_no_logits_and_updates_in_one_pass():
    pytest.importorskip("libtpu", reason="planning for a TPU needs the extra tpu")
    config = multicxr.get_config()
    row, text = plan.plan(config, "v5e:4x8")
    assert row["remat"] == "full"
    assert row["fits"] and row["peak_hbm_gib"] <= 10
    k, budget = config.head.prototypes, row["logits_budget"]
    with_prototypes = [np.prod(dims) for _, dims in _shapes(text) if k in dims]
    assert with_prototypes and max(with_prototypes) <= budget  # 8,340 masked tokens a chip would be eight times as many
    # Weights, both moments and the teacher of a layer leave one fusion, and no other makes them.
    of_layer = r"f32\[768,3072\]\S*"
    fused = re.findall(rf"= \((?:[^=]*?{of_layer}){{4}}[^=]*?\) fusion\(", text)
    assert len(fused) >= 12, len(fused)
    assert not re.search(r"is_host_transfer=true|infeed\(|outfeed\(|\bsend\(|\brecv\(", text)


def test_what_the_compiler_refuses_becomes_a_verdict_and_other_errors_stay_errors():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.50G) is"
    assert plan._reserved(plan.Refused.of(RuntimeError(message), 2 * plan.GIB)) == 19.5 * plan.GIB
    with pytest.raises(RuntimeError, match="something else"):
        plan.Refused.of(RuntimeError("something else"), 0)
