"""Configs: the numbers of the paper, arguments after the colon, foreign recipes, refusals."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict

from configs import common, multicxr, quickstart
from raddino_jax import augment, params, sharding, train
from raddino_jax.data import pipeline

FILES = sorted(p.stem for p in Path(common.__file__).parent.glob("*.py") if p.stem != "common")


def _flat(config: ConfigDict) -> dict:
    return {name.replace("/", "."): value for name, value in params.flatten(config.to_dict()).items()}


# --- what the files say -------------------------------------------------------------------------

PAPER = {  # arXiv 2401.10815 and, where it is silent, DINOv2's defaults
    "steps": 60_000,
    "batch_size": 640,
    "koleo_group": 40,
    "compute_dtype": "bfloat16",
    "model.variant": "B",
    "model.patch_size": 14,
    "model.image_size": 518,
    "model.registers": 0,
    "model.layerscale": 1e-5,
    "model.offset": 0.1,
    "model.antialias": False,
    "model.drop_path": 0.3,
    "model.drop_path_uniform": True,
    "head.prototypes": 65_536,
    "head.bottleneck": 256,
    "head.hidden": 2048,
    "head.layers": 3,
    "head.separate": False,
    "loss.dino": 1.0,
    "loss.ibot": 1.0,
    "loss.koleo": 0.1,
    "loss.centring": "sinkhorn",
    "loss.sinkhorn_iterations": 3,
    "loss.centre_momentum": 0.9,
    "loss.student_temperature": 0.1,
    "masks.probability": 0.5,
    "masks.ratio": (0.1, 0.5),
    "views.global_size": 518,
    "views.local_size": 196,
    "views.local_crops": 8,
    "views.crop_scale_mode": "side",
    "views.global_scale": (259 / 518, 518 / 518),
    "views.local_scale": (0.2, 259 / 518),
    "views.crop_ratio": (3 / 4, 4 / 3),
    "views.flip": 0.5,
    "views.jitter": 0.8,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.blur_sigma": (0.1, 2.0),
    "views.solarize": 0.2,
    "optim.base_lr": 1e-3,
    "optim.final_lr": 1e-6,
    "optim.lr_scaling": "sqrt_1024",
    "optim.warmup": (10, "epochs"),
    "optim.weight_decay": (0.04, 0.4),
    "optim.clip": 3.0,
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.layer_decay": 0.9,
    "optim.patch_embed_factor": 0.2,
    "optim.momentum": (0.992, 1.0),
    "optim.teacher_temperature": (0.04, 0.07),
    "optim.teacher_temperature_warmup": (30, "epochs"),
    "optim.freeze_last_layer": (1, "epochs"),
    "optim.head_warmup": (0, "steps"),
    "data.image_size": 518,
    "data.mean": 0.5307,
    "data.std": 0.2583,
    "data.sources": ("brax", "chexpert", "mimic_cxr", "chestx_ray14", "padchest"),
}


def test_the_full_config_has_the_numbers_of_the_paper():
    found = _flat(multicxr.get_config())
    assert {name: found[name] for name in PAPER} == PAPER


def test_the_full_config_builds_the_network_and_the_schedules_of_the_paper():
    config = multicxr.get_config()
    objective, optimizer = train.objective_of(config, 16), train.optimizer_of(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    assert params.count(shapes["backbone"]) == 86_580_480
    assert params.count(shapes["dino_head"]) == 23_138_560 and "ibot_head" not in shapes
    assert objective.drop_rates == (0.3,) * 12 and objective.masked_budget * 64 > 0.28 * 1369 * 640
    assert (optimizer.depth, optimizer.clip, optimizer.eps) == (12, 3.0, 1e-8)
    schedules = train.schedules_of(config, train.run_steps(config, 838_336), 838_336)
    assert schedules.total == 60_000 and schedules.lr_warmup == 6000
    np.testing.assert_allclose(schedules.lr[0], 7.9057e-4, rtol=1e-5)
    assert schedules.teacher_temperature_warmup == 18_000 and schedules.freeze_last_layer == 600


def test_every_constant_of_the_config_reaches_the_objective_and_the_optimiser():
    config = multicxr.get_config(
        "loss.dino=2.0,loss.ibot=3.0,loss.koleo=4.0,loss.centring=softmax,loss.centre_momentum=0.8,"
        "loss.sinkhorn_iterations=5,loss.student_temperature=0.3,loss.logits_budget=99,group_size=4,"
        "koleo_group=8,model.drop_path=0.2,model.drop_path_uniform=False,optim.clip=1.0,"
        "optim.layer_decay=0.7,optim.patch_embed_factor=0.5,optim.betas=(0.8,0.99),optim.eps=0.001,"
        "head.separate=True,head.ibot_prototypes=7,head.ibot_layers=2,model.antialias=True,"
        "model.offset=0.0,model.registers=4,model.remat=full,model.ffn=swiglu"
    )
    o = train.objective_of(config, 2, "tpu")
    assert (o.dino_weight, o.ibot_weight, o.koleo_weight) == (2, 3, 4)
    assert (o.centring, o.centre_momentum, o.sinkhorn_iterations) == ("softmax", 0.8, 5)
    assert (o.student_temperature, o.logits_budget, o.shards) == (0.3, 99, 2)
    assert (o.group_size, o.koleo_group, o.ibot_head.prototypes, o.ibot_head.layers) == (4, 8, 7, 2)
    np.testing.assert_allclose(o.drop_rates, np.linspace(0, 0.2, 12))
    b = o.backbone
    assert (b.antialias, b.offset, b.registers, b.remat, b.ffn) == (True, 0.0, 4, "full", "swiglu")
    assert b.attention == "tpu" and b.dtype == o.dino_head.dtype == o.ibot_head.dtype == "bfloat16"
    a = train.optimizer_of(config)
    assert (a.clip, a.layer_decay, a.patch_embed_factor) == (1.0, 0.7, 0.5)
    assert (a.betas, a.eps) == ((0.8, 0.99), 0.001)


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_builds_and_says_in_its_docstring_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert isinstance(config, ConfigDict) and config.task
    assert f"--config=configs/{name}.py" in module.__doc__
    json.loads(config.to_json())


@pytest.mark.parametrize("name", ["multicxr", "quickstart"])
def test_a_pre_training_config_passes_its_checks_and_builds_its_step(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    devices = jax.devices()
    train.check(config, len(devices))
    mesh = sharding.make_mesh(devices, config.mesh.fsdp)
    step = train.step_of(config, train.run_steps(config, 4000), 4000, mesh)
    assert step.objective.shards == len(devices) and step.views.global_size == config.views.global_size


def test_a_config_read_back_from_json_is_the_same_run():
    """JSON has no tuples; what differs is named field by field."""
    old, new = (json.loads(multicxr.get_config(args).to_json()) for args in ("", ""))
    assert train.config_differences(old, new) == []
    new = json.loads(multicxr.get_config("optim.clip=1.0,views.local_crops=2").to_json())
    assert train.config_differences(old, new) == ["optim.clip: 3.0 -> 1.0", "views.local_crops: 8 -> 2"]
    del new["seed"]
    assert "seed: 0 -> null" in train.config_differences(old, new)


# --- the shrunk run -----------------------------------------------------------------------------


def test_the_quickstart_is_the_full_config_with_other_values():
    full, small = _flat(multicxr.get_config()), _flat(quickstart.get_config())
    assert small.keys() == full.keys()
    for name, value in small.items():
        assert type(value) is type(full[name]), name
    same = ("loss.centring", "loss.student_temperature", "masks.probability", "masks.ratio", "head.layers")
    assert {name: small[name] for name in same} == {name: full[name] for name in same}
    assert small["data.sources"] == ("synthetic",)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_quickstart_runs_unchanged_on_so_many_devices(devices):
    config = quickstart.get_config()
    train.check(config, devices)
    assert config.batch_size // config.group_size >= 8 and config.group_size >= 2


@pytest.mark.slow
def test_a_step_of_the_quickstart_is_the_same_on_one_two_four_and_eight_devices():
    """Losses of the first step, 1e-5 relative in float32."""
    config, losses = quickstart.get_config(), []
    spec = pipeline.MaskSpec(config.group_size, 96, 16, 0.5, (0.1, 0.5))
    rows = pipeline.Rows(0, config.batch_size, config.batch_size)
    batch = next(
        pipeline.batches(config.data, rows=rows, steps=1, start=0, seed=config.seed, masks=spec)
    )
    for devices in (1, 2, 4, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        step = train.step_of(config, config.steps, 4000, mesh)
        state = train.init_state(step, mesh)
        placed = sharding.to_devices({name: batch[name] for name in ("images", "masks")}, mesh)
        _, metrics = train.jit_step(step, state, mesh)(state, placed)
        losses.append([float(metrics[k]) for k in ("loss", "dino_global", "dino_local", "ibot", "koleo")])
    np.testing.assert_allclose(losses, np.broadcast_to(losses[0], (4, 5)), rtol=1e-5)


# --- arguments after the colon ------------------------------------------------------------------


def test_arguments_set_fields_and_apply_presets_from_left_to_right():
    config = multicxr.get_config("vits14_224, seed=3,batch_size=16")
    assert (config.model.variant, config.seed, config.batch_size) == ("S", 3, 16)
    assert (config.views.global_size, config.views.local_size) == (224, 98)
    assert (config.compute_dtype, config.model.drop_path) == ("float32", 0.0)
    train.check(config, 2)


@pytest.mark.parametrize(
    "argument, field, value",
    [
        ("data.sources=('folder:/a,b','synthetic')", "data.sources", ("folder:/a,b", "synthetic")),
        ("data.weights=(1.0,2.5)", "data.weights", (1.0, 2.5)),
        ("init=dinov2_vitb14", "init", "dinov2_vitb14"),
        ("init='a=b,c'", "init", "a=b,c"),
        ("optim.warmup=(5,'steps')", "optim.warmup", (5, "steps")),
        ("head.separate=True", "head.separate", True),
        ("optim.base_lr=1e-4", "optim.base_lr", 1e-4),
        ("optim.clip=1", "optim.clip", 1.0),
    ],
)
def test_an_argument_may_hold_commas_and_equals_signs_inside_quotes_and_brackets(argument, field, value):
    found = _flat(multicxr.get_config(f"seed=7,{argument}"))
    assert found[field] == value and found["seed"] == 7


def test_without_masked_images_the_students_crops_are_whole_too():
    config = multicxr.get_config("mim=off")
    train.check(config, 8)
    assert config.loss.ibot == 0 and train.objective_of(config).masked_budget == 0


def test_the_views_of_dinov2_are_those_of_the_reference():
    views = augment.ViewSettings(**multicxr.get_config("dinov2_views").views)
    for name in ("crop_scale_mode", "global_scale", "local_scale", "blur_global1", "blur_global2", "blur_local"):
        assert getattr(views, name) == getattr(augment.DINOV2, name), name


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("vitb99", "unknown preset 'vitb99'.*vits14_224"),
        ("model.widht=3", "'model.widht'.*fields here: .*variant, width"),
        ("no_such=3", "'no_such'.*batch_size"),
        ("seed.deeper=3", "'seed.deeper'.*fields here: none"),
        ("seed=abc", "seed"),
        ("steps=1.5", "steps"),
    ],
)
def test_an_unknown_preset_or_field_or_a_wrong_type_is_refused_by_name(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        multicxr.get_config(arguments)


# --- recipes of the reference -------------------------------------------------------------------

YAML = """
MODEL: {WEIGHTS: ''}
dino: {loss_weight: 0.5, head_n_prototypes: 4096, head_bottleneck_dim: 384, head_nlayers: 2,
       head_hidden_dim: 1024, koleo_loss_weight: 0.2}
ibot: {loss_weight: 0.7, mask_sample_probability: 0.6, mask_ratio_min_max: [0.2, 0.4],
       separate_head: true, head_n_prototypes: 8192, head_bottleneck_dim: 128, head_nlayers: 1,
       head_hidden_dim: 512}
train: {batch_size_per_gpu: 32, OFFICIAL_EPOCH_LENGTH: 1250, seed: 4, centering: centering,
        num_workers: 10}
student: {arch: vit_large, patch_size: 16, drop_path_rate: 0.4, layerscale: 1.0e-4,
          drop_path_uniform: false, pretrained_weights: weights.pth, ffn_layer: swiglufused,
          num_register_tokens: 4, interpolate_antialias: true, interpolate_offset: 0.0,
          block_chunks: 4, qkv_bias: true}
teacher: {momentum_teacher: 0.994, final_momentum_teacher: 0.999, warmup_teacher_temp: 0.03,
          teacher_temp: 0.06, warmup_teacher_temp_epochs: 20, ffn_layer: swiglufused}
optim: {epochs: 500, weight_decay: 0.05, weight_decay_end: 0.2, base_lr: 2.0e-4, min_lr: 1.0e-5,
        warmup_epochs: 80, clip_grad: 1.0, freeze_last_layer_epochs: 2, scaling_rule: sqrt_wrt_1024,
        patch_embed_lr_mult: 0.1, layerwise_decay: 1.0, adamw_beta1: 0.8, adamw_beta2: 0.95}
crops: {global_crops_scale: [0.32, 1.0], local_crops_number: 6, local_crops_scale: [0.05, 0.32],
        global_crops_size: 224, local_crops_size: 96}
"""
SET = {
    "loss.dino": 0.5, "head.prototypes": 4096, "head.bottleneck": 384, "head.layers": 2,
    "head.hidden": 1024, "loss.koleo": 0.2, "loss.ibot": 0.7, "masks.probability": 0.6,
    "masks.ratio": (0.2, 0.4), "head.separate": True, "head.ibot_prototypes": 8192,
    "head.ibot_bottleneck": 128, "head.ibot_layers": 1, "head.ibot_hidden": 512,
    "koleo_group": 32, "epoch_steps": 1250, "seed": 4, "loss.centring": "softmax",
    "model.variant": "L", "model.patch_size": 16, "model.drop_path": 0.4,
    "model.layerscale": 1e-4, "model.drop_path_uniform": False, "init": "weights.pth",
    "model.ffn": "swiglu", "model.registers": 4, "model.antialias": True, "model.offset": 0.0,
    "optim.momentum": (0.994, 0.999), "optim.teacher_temperature": (0.03, 0.06),
    "optim.teacher_temperature_warmup": (20, "epochs"), "duration": (500, "epochs"),
    "optim.weight_decay": (0.05, 0.2), "optim.base_lr": 2e-4, "optim.final_lr": 1e-5,
    "optim.warmup": (80, "epochs"), "optim.clip": 1.0, "optim.freeze_last_layer": (2, "epochs"),
    "optim.patch_embed_factor": 0.1, "optim.layer_decay": 1.0, "optim.betas": (0.8, 0.95),
    "views.global_scale": (0.32, 1.0), "views.local_scale": (0.05, 0.32), "views.local_crops": 6,
    "views.global_size": 224, "views.local_size": 96, "views.crop_scale_mode": "area",
    "model.image_size": 224,  # the reference's position grid is that of the global crop
}  # fmt: skip
UNMAPPED = [
    "MODEL.WEIGHTS: ''", "train.num_workers: 10", "student.block_chunks: 4", "student.qkv_bias: True",
    "teacher.ffn_layer: 'swiglufused'",
]  # fmt: skip


def test_a_recipe_of_the_reference_sets_every_field_it_names_and_no_other():
    config = multicxr.get_config()
    before = _flat(config)
    common.recipe(config, YAML)
    after = _flat(config)
    assert {name: after[name] for name in after if after[name] != before[name]} == SET
    assert all(type(after[name]) is type(before[name]) for name in SET)


def test_no_key_that_can_be_mapped_is_missing_from_the_recipe_above():
    assert {key for key, _ in common._leaves(yaml.safe_load(YAML))} >= set(common._RECIPE)


def test_a_recipe_tells_what_it_set_and_lists_what_it_could_not_map():
    told, unmapped = common.recipe(multicxr.get_config(), YAML)
    assert unmapped == UNMAPPED
    assert "optim.clip=1.0" in told and "views.local_crops=6" in told
    assert len(told) == len(set(told))


def test_a_value_of_a_recipe_that_has_no_counterpart_is_listed_and_not_guessed():
    config = multicxr.get_config()
    text = "optim: {scaling_rule: linear_wrt_256}\nstudent: {arch: vit_huge}\ntrain: {seed: 2}"
    told, unmapped = common.recipe(config, text)
    assert told == ["seed=2"]
    assert unmapped == ["optim.scaling_rule: 'linear_wrt_256'", "student.arch: 'vit_huge'"]
    assert (config.optim.lr_scaling, config.model.variant) == ("sqrt_1024", "B")


def test_an_empty_recipe_changes_nothing():
    config = multicxr.get_config()
    assert common.recipe(config, "") == ([], []) and _flat(config) == _flat(multicxr.get_config())


# --- refusals -----------------------------------------------------------------------------------

def _small(arguments: str = "") -> ConfigDict:
    """The shrunk run with the sizes that the tests below count with, then `arguments`."""
    sizes = (
        "batch_size=32,group_size=4,koleo_group=16,steps=1000,epoch_steps=100,eval_every=250,"
        "model.width=128,model.heads=4,model.patch_size=16,model.image_size=96,"
        "views.global_size=96,views.local_size=48,views.local_crops=2"
    )
    return quickstart.get_config(f"{sizes},{arguments}")


IMPOSSIBLE = [  # (arguments, devices, hosts, words of the one complaint)
    ("views.global_size=100", 1, 1, "views.global_size=100 .*patch_size=16: use 96"),
    ("views.local_size=50", 1, 1, "views.local_size=50 .*patch_size=16: use 48"),
    ("views.local_size=9", 1, 1, "views.local_size=9 .*patch_size=16: use 16"),
    ("model.image_size=100", 1, 1, "model.image_size=100 .*use 96"),
    ("group_size=5", 1, 1, "batch_size=32 .*group_size=5: the largest group_size that fits is 32"),
    ("group_size=0", 1, 1, "group_size=0: the largest group_size that fits is 32"),
    ("group_size=8", 8, 1, "4 groups .* over 8 devices: the largest group_size that fits is 4"),
    ("", 3, 1, "8 groups .* over 3 devices: make batch_size a multiple of 3"),
    ("koleo_group=5", 1, 1, "batch_size=32 .*koleo_group=5: use a divisor"),
    ("koleo_group=0", 1, 1, "koleo_group=0: use a divisor"),
    ("", 8, 64, "batch_size=32 rows cannot be shared by 64 hosts: use a multiple"),
    ("mesh.fsdp=3", 8, 1, "mesh.fsdp=3 does not divide 8 devices: use a divisor"),
    ("data.weights=(1.0,2.0)", 1, 1, r"data.weights has 2 entries for 1 sources: .*or \(\)"),
    ("data.weights=(0.0,)", 1, 1, "data.weights must be positive"),
    ("data.weights=('1',)", 1, 1, "data.weights must be positive numbers"),
    ("data.sources=()", 1, 1, r"data.sources is empty.*\('synthetic',\)"),
    ("data.sources=(3,)", 1, 1, "data.sources must be names in quotes"),
    ("data.window=left", 1, 1, "data.window='left' must be 'random' or 'centre'"),
    ("data.fraction=0.0", 1, 1, r"data.fraction=0.0 must be in \(0, 1\]"),
    ("steps=0", 1, 1, "steps=0 must be at least 1"),
    ("log_every=0", 1, 1, "log_every and checkpoint_every must be at least 1"),
    ("views.local_crops=-1", 1, 1, "views.local_crops=-1 must be 0 or more"),
    ("model.variant=XL", 1, 1, "model.variant='XL' must be one of Ti, S, B, L, g"),
    ("model.remat=some", 1, 1, "model.remat='some' must be one of none, dots, full, auto"),
    ("model.ffn=moe", 1, 1, "model.ffn='moe' must be one of mlp, swiglu"),
    ("model.heads=3", 1, 1, "model.width=128 is not divided by model.heads=3: use a divisor"),
    ("model.drop_path=1.0", 1, 1, r"model.drop_path=1.0 must be in \[0, 1\)"),
    ("optim.lr_scaling=cubic", 1, 1, "optim.lr_scaling='cubic' must be one of none, sqrt_1024"),
    ("optim.warmup=(3,'days')", 1, 1, "optim.warmup=.*'steps' . 'epochs' . 'images' . 'percent'"),
    ("optim.horizon=(3,)", 1, 1, "optim.horizon=.*must be .number"),
    ("loss.centring=none", 1, 1, "loss.centring=.* must be one of sinkhorn, softmax"),
    ("compute_dtype=float16", 1, 1, "compute_dtype='float16' must be one of float32, bfloat16"),
    ("masks.ratio=(0.5,0.1)", 1, 1, r"masks.ratio=\(0.5, 0.1\) must be an interval"),
    ("masks.probability=0.0", 1, 1, "no patch is ever masked .*set loss.ibot=0 as well"),
    ("keep_best=probe_auprc,eval_every=0", 1, 1, "keep_best needs online evaluation: set eval_every"),
    ("group_size=0,accumulate=2,masks.probability=0.0,loss.ibot=0.0", 1, 1, "not divided by group_size=0"),
    ("koleo_group=0,accumulate=2", 1, 1, "not divided by koleo_group=0: use a divisor"),
    ("model.patch_size=0", 1, 1, "model.patch_size=0 must be at least 1"),
    ("mesh.fsdp=0", 4, 1, "mesh.fsdp=0 does not divide 4 devices"),
    ("views.crop_scale_mode=sidee", 1, 1, "views: crop_scale_mode is 'sidee', not 'side' or 'area'"),
    ("views.local_scale=(0.5,0.2)", 1, 1, r"views: local_scale is \(0.5, 0.2\), not an interval"),
    ("views.blur_sigma=(0.1,)", 1, 1, "views: "),
    ("stop_after=3", 1, 1, "stop_after needs a metric: set keep_best"),
]


@pytest.mark.parametrize("arguments, devices, hosts, words", IMPOSSIBLE)
def test_an_impossible_combination_is_refused_with_its_mend(arguments, devices, hosts, words):
    config = _small(arguments)
    with pytest.raises(train.ConfigError, match=words) as error:
        train.check(config, devices, hosts)
    assert str(error.value).count("\n  - ") == 1, error.value


def test_all_that_is_impossible_is_listed_at_once():
    arguments = "views.local_size=50,koleo_group=5,data.weights=(1.0,2.0),model.remat=some,steps=0"
    with pytest.raises(train.ConfigError) as error:
        train.check(_small(arguments))
    for words in ("views.local_size=50", "koleo_group=5", "data.weights has 2", "model.remat='some'", "steps=0"):
        assert words in str(error.value)
    assert str(error.value).count("\n  - ") == 5


@pytest.mark.parametrize("batch, group", [(32, 4), (16, 2), (640, 10), (24, 3)])
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8, 16])
def test_the_group_size_that_a_refusal_names_does_fit(batch, group, devices):
    config = _small(f"batch_size={batch},group_size={group},koleo_group={group}")
    try:
        train.check(config, devices)
        assert batch % (group * devices) == 0
    except train.ConfigError as error:
        _, named, largest = str(error).partition("the largest group_size that fits is ")
        if named:
            assert batch // devices == int(largest)
            train.check(_small(
                f"batch_size={batch},group_size={largest},koleo_group={group}"
            ), devices)  # fmt: skip
        else:
            assert batch % devices and f"a multiple of {devices}" in str(error)


@pytest.mark.parametrize(
    "arguments", ["duration=(5,'epochs'),steps=1", "optim.horizon=(2000,'steps')", "mim=off", ""]
)
def test_a_possible_combination_passes(arguments):
    train.check(_small(arguments), 8, 2)


@pytest.mark.parametrize(
    "duration, steps", [((), 123), ((3, "epochs"), 300), ((3200, "images"), 100), ((7, "steps"), 7)]
)
def test_a_duration_replaces_the_number_of_steps(duration, steps):
    config = _small("steps=123")
    config.duration = duration
    assert train.run_steps(config, 4000) == steps


def test_without_epoch_steps_an_epoch_is_one_pass_over_the_films():
    config = _small("epoch_steps=0,duration=(2,'epochs'),optim.warmup=(10,'epochs')")
    assert train.run_steps(config, 4000) == 250  # 2 x 4000 / 32
    assert train.schedules_of(config, 250, 4000).lr_warmup == 1250


def test_recipe_files_apply_in_order_and_say_what_they_did(tmp_path, capsys):
    first, second = tmp_path / "default.yaml", tmp_path / "cxr.yaml"
    first.write_text("optim:\n  base_lr: 0.004\n  epochs: 100\nevaluation:\n  eval_period_iterations: 12500\n")
    second.write_text("optim:\n  base_lr: 0.001\n")
    config = multicxr.get_config(f"recipe={first},recipe={second},seed=7")
    assert config.optim.base_lr == 0.001 and config.duration == (100, "epochs") and config.seed == 7
    said = capsys.readouterr().err
    assert "recipe: optim.base_lr=0.001" in said
    assert "recipe: no field for evaluation.eval_period_iterations: 12500" in said
