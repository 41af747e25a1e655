"""What the configs share: arguments after the colon, the shrink to two CPU cores, data mixes, statistics."""

import ast
import sys

import yaml
from ml_collections import ConfigDict

# Mean and standard deviation of grey values in [0, 1]: preprocessor_config.json of microsoft/rad-dino.
RAD_DINO_MEAN, RAD_DINO_STD = 0.5307, 0.2583

# Multi-CXR, arXiv 2401.10815, Table D.1 without its private part; () weighs sources by their size.
MULTI_CXR = ("brax", "chexpert", "mimic_cxr", "chestx_ray14", "padchest")


def apply(config: ConfigDict, arguments: str, presets: dict) -> ConfigDict:
    """Apply what stands after the colon of --config=FILE:ARGUMENTS.

    arguments: comma-separated preset names, "field=value" pairs and "recipe=PATH" of a DINOv2-style yaml, in order,
      e.g. "vits14_224,seed=1".
    Raises ValueError that lists the presets, or the fields beside an unknown one.
    """
    for argument in _split(arguments):
        name, equals, value = argument.partition("=")
        if argument in presets:
            presets[argument](config)
        elif name == "recipe":
            _read_recipe(config, value)
        elif equals:
            config.update_from_flattened_dict({_known(config, name): _literal(value)})
        else:
            known = f"presets: {', '.join(presets)}" if presets else "this config has none"
            raise ValueError(f"unknown preset {name!r}; {known}; fields are set as field=value")
    return config


def _split(arguments: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in arguments:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _known(config: ConfigDict, name: str) -> str:
    node = config
    for key in name.split("."):
        if not isinstance(node, ConfigDict) or key not in node:
            fields = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "none"
            raise ValueError(f"unknown config field {name!r}; fields here: {fields}")
        node = node[key]
    return name


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def shrink(config: ConfigDict) -> ConfigDict:
    """The same run on synthetic radiographs, small enough for minutes on two CPU cores.

    A few hundred steps from random weights want what continuing from DINOv2 does not: milder views, sharper targets,
    a teacher that follows soon, one learning rate for all layers, few prototypes, linear layers scaled for their
    width and position embeddings that know their place. KoLeo, which spreads class tokens before there is anything to
    spread, slowed this run down and is off.
    """
    config.compute_dtype = "float32"
    config.batch_size, config.group_size, config.koleo_group = 32, 4, 16
    config.model.update(width=128, depth=4, heads=4, patch_size=16, image_size=96)
    config.model.update(layerscale=1.0, drop_path=0.0, init_std=0.05, init_position=0.5)
    config.head.update(prototypes=128, bottleneck=64, hidden=256)
    config.views.update(global_size=96, local_size=48, local_crops=4, global_scale=(0.75, 1.0), local_scale=(0.3, 0.6))
    config.views.update(flip=0.0, jitter=0.5, brightness=0.15, contrast=0.15, standardize=True)
    config.views.update(blur_global2=0.0, blur_local=0.2, solarize=0.0)
    config.optim.update(base_lr=1e-3, lr_scaling="none", layer_decay=1.0, patch_embed_factor=1.0)
    config.optim.update(weight_decay=(0.04, 0.04), momentum=(0.9, 1.0), teacher_temperature=(0.02, 0.02))
    config.optim.update(warmup=(10, "percent"), freeze_last_layer=(0, "steps"))
    config.data.update(sources=("synthetic",), weights=(), image_size=96, synthetic_size=4000)
    config.loss.koleo = 0.0
    config.data.update(threads=2, prefetch=2, cache_gib=1.0)
    return config


# DINOv2's yaml keys -> our fields, with what turns their value into ours.
_ARCHITECTURES = {"vit_small": "S", "vit_base": "B", "vit_large": "L", "vit_giant2": "g"}
_RECIPE = {
    "dino.loss_weight": "loss.dino",
    "dino.koleo_loss_weight": "loss.koleo",
    "dino.head_n_prototypes": "head.prototypes",
    "dino.head_bottleneck_dim": "head.bottleneck",
    "dino.head_nlayers": "head.layers",
    "dino.head_hidden_dim": "head.hidden",
    "ibot.loss_weight": "loss.ibot",
    "ibot.mask_sample_probability": "masks.probability",
    "ibot.mask_ratio_min_max": ("masks.ratio", tuple),
    "ibot.separate_head": "head.separate",
    "ibot.head_n_prototypes": "head.ibot_prototypes",
    "ibot.head_bottleneck_dim": "head.ibot_bottleneck",
    "ibot.head_nlayers": "head.ibot_layers",
    "ibot.head_hidden_dim": "head.ibot_hidden",
    "train.batch_size_per_gpu": "koleo_group",
    "train.OFFICIAL_EPOCH_LENGTH": "epoch_steps",
    "train.seed": "seed",
    "train.centering": ("loss.centring", {"centering": "softmax", "sinkhorn_knopp": "sinkhorn"}.__getitem__),
    "student.arch": ("model.variant", _ARCHITECTURES.__getitem__),
    "student.patch_size": "model.patch_size",
    "student.drop_path_rate": "model.drop_path",
    "student.drop_path_uniform": "model.drop_path_uniform",
    "student.layerscale": "model.layerscale",
    "student.ffn_layer": ("model.ffn", {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}.__getitem__),
    "student.num_register_tokens": "model.registers",
    "student.interpolate_antialias": "model.antialias",
    "student.interpolate_offset": "model.offset",
    "student.pretrained_weights": "init",
    "teacher.momentum_teacher": "optim.momentum.0",
    "teacher.final_momentum_teacher": "optim.momentum.1",
    "teacher.warmup_teacher_temp": "optim.teacher_temperature.0",
    "teacher.teacher_temp": "optim.teacher_temperature.1",
    "teacher.warmup_teacher_temp_epochs": ("optim.teacher_temperature_warmup", lambda n: (n, "epochs")),
    "optim.epochs": ("duration", lambda n: (n, "epochs")),
    "optim.weight_decay": "optim.weight_decay.0",
    "optim.weight_decay_end": "optim.weight_decay.1",
    "optim.base_lr": "optim.base_lr",
    "optim.min_lr": "optim.final_lr",
    "optim.warmup_epochs": ("optim.warmup", lambda n: (n, "epochs")),
    "optim.clip_grad": "optim.clip",
    "optim.freeze_last_layer_epochs": ("optim.freeze_last_layer", lambda n: (n, "epochs")),
    "optim.scaling_rule": ("optim.lr_scaling", {"sqrt_wrt_1024": "sqrt_1024"}.__getitem__),
    "optim.patch_embed_lr_mult": "optim.patch_embed_factor",
    "optim.layerwise_decay": "optim.layer_decay",
    "optim.adamw_beta1": "optim.betas.0",
    "optim.adamw_beta2": "optim.betas.1",
    "crops.global_crops_scale": ("views.global_scale", tuple),
    "crops.local_crops_scale": ("views.local_scale", tuple),
    "crops.global_crops_size": "views.global_size",
    "crops.local_crops_size": "views.local_size",
    "crops.local_crops_number": "views.local_crops",
}


def recipe(config: ConfigDict, text: str) -> tuple[list[str], list[str]]:
    """Read a DINOv2-style yaml over a config; returns (fields set, yaml keys that were not mapped).

    text: e.g. the RAD-DINO release's vitb14_cxr.yaml, after ssl_default_config.yaml. The reference has no batch size of
    its own (images per GPU times GPUs), so `batch_size` is left alone; its crop scales are areas.
    """
    given, unmapped = {}, []
    for key, value in _leaves(yaml.safe_load(text) or {}):
        target, convert = _RECIPE.get(key, ""), None
        if isinstance(target, tuple):
            target, convert = target
        try:
            given[target] = convert(value) if convert else value
        except KeyError:
            target = ""
        if not target:
            given.pop("", None)
            unmapped.append(f"{key}: {value!r}")
    if "views.global_scale" in given or "views.local_scale" in given:
        given["views.crop_scale_mode"] = "area"
    if "views.global_size" in given:  # the reference's position grid is that of the global crop
        given["model.image_size"] = given["views.global_size"]
    for field, value in given.items():
        _set(config, field, value)
    return [f"{field}={value!r}" for field, value in given.items()], unmapped


def _read_recipe(config: ConfigDict, path: str) -> None:
    """Apply the recipe in a file and say on stderr what it set and what it could not."""
    with open(path) as file:
        given, unmapped = recipe(config, file.read())
    for line in given:
        print(f"recipe: {line}", file=sys.stderr)
    for line in unmapped:
        print(f"recipe: no field for {line}", file=sys.stderr)


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(config: ConfigDict, field: str, value) -> None:
    """Set a dotted field, or one element of a tuple ("optim.betas.0"), in the type the field has."""
    *path, leaf = field.split(".")
    if leaf.isdigit():
        old = config
        for key in path:
            old = old[key]
        value = tuple(value if i == int(leaf) else v for i, v in enumerate(old))
        *path, leaf = path
    node = config
    for key in path:
        node = node[key]
    node[leaf] = type(node[leaf])(value) if isinstance(node[leaf], (int, float, str)) else value
