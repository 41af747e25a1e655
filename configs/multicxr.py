"""RAD-DINO's pre-training: ViT-B/14 at 518/196 px, batch 640, 60k steps, the Multi-CXR mix.

    python -m raddino_jax.main --config=configs/multicxr.py --config.init=dinov2_vitb14 --config.data.data_dir=DIR

The paper used 16 A100 of 80 GB (arXiv 2401.10815, 3.2 and E.1). Arguments after a colon set fields or name
presets: --config=configs/multicxr.py:vits14_224,seed=1. Every number names its source:
    [P] the paper, arXiv 2401.10815        [D] DINOv2's ssl_default_config.yaml, which the paper builds on
    [H] the Hugging Face release           [open] not stated anywhere: our reading, change it freely
A duration is (number, unit) with unit "steps", "epochs", "images" or "percent" (of the run).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """The paper's run, changed by `arguments` (see the module's docstring)."""
    config = ConfigDict(dict(
        task="pretrain",
        then=(),  # tasks to run on the finished workdir
        seed=0,
        steps=60_000,  # [P] 3.2
        duration=(),  # instead of steps, e.g. (100, "epochs") or (5e6, "images")
        epoch_steps=600,  # [P] 100 epochs = 60k steps; 0: one pass over the data
        batch_size=640,  # [P] 16 x 40
        group_size=10,  # images that share mask strata and drop-path subsets; never spans devices
        koleo_group=40,  # [P] images per GPU, among which KoLeo looks for neighbours
        accumulate=1,  # parts that a step takes its batch in, one after the other: less memory, the same trajectory
        compute_dtype="bfloat16",  # parameters, losses and statistics stay float32
        init="",  # "" or "random": fresh. Else weights to continue from
        init_head="",
        log_every=10,
        checkpoint_every=1000,
        keep=3,  # newest checkpoints kept
        keep_every=10_000,  # and every so many steps one for good; 0: none
        eval_every=0,  # steps between online evaluations; 0: none
        keep_best="",  # metric of metrics.jsonl whose best checkpoint is kept, e.g. "probe_auprc" [P] E.1
        stop_after=0,  # end after so many evaluations without a better keep_best; 0: never
    ))
    config.eval = ConfigDict(dict(  # labelled films for the online evaluation and the probe
        films=1600,  # at most so many
        seeds=5,  # splits by patient
        feature="cls",  # [P] class token; "cls+patches": with the patches' mean, as DINOv2's own linear evaluation
        csv="", columns=(), where="",  # folder sources: table, label columns, e.g. "source=nih"
        file_column="file", patient_column="patient_id",
    ))
    config.model = ConfigDict(dict(
        variant="B",  # [P] ViT-B; sizes of models/vit.py VARIANTS
        width=0, depth=0, heads=0, ffn="",  # 0 and "": as the variant has them
        patch_size=14,  # [P]
        image_size=518,  # side of the stored position grid, in pixels
        registers=0,  # [H]
        layerscale=1e-5,  # [D] overwritten by the weights to continue from
        antialias=False, offset=0.1,  # [D] resizing of position embeddings
        init_std=0.02,  # [D] of fresh linear layers; their width asks for more when it is small
        init_position=0.0,  # [D] 0: drawn; else the amplitude of sines and cosines that position embeddings start from
        drop_path=0.3,  # [D] [open]
        drop_path_uniform=True,  # [D] False: grows linearly with depth
        remat="auto",  # what the backward pass recomputes: none, dots (all but linear layers), full; auto: by memory
        attention="auto",  # auto: by backend
    ))
    config.head = ConfigDict(dict(
        prototypes=65_536, bottleneck=256, hidden=2048, layers=3,  # [H] dino_head.safetensors has this form
        separate=False,  # [D] one head for DINO and iBOT; the release has one file
        ibot_prototypes=65_536, ibot_bottleneck=256, ibot_hidden=2048, ibot_layers=3,  # where separate
    ))
    config.loss = ConfigDict(dict(
        dino=1.0, ibot=1.0, koleo=0.1,  # [D] weights; KoLeo's is per global crop
        centring="sinkhorn",  # [open] sinkhorn or softmax
        sinkhorn_iterations=3, centre_momentum=0.9, student_temperature=0.1,  # [D]
        logits_budget=0,  # prototype logits alive at once per device, in floats; 0: 2**26, on small chips 2**24
    ))
    config.masks = ConfigDict(dict(
        probability=0.5, ratio=(0.1, 0.5),  # [D] share of crops masked; range of the masked share
    ))
    config.views = ConfigDict(dict(
        global_size=518, local_size=196,  # [P] E.1, pixels
        local_crops=8,  # [D] [open]
        crop_scale_mode="side",  # [P] "crop size" read as side length; "area": torchvision's scale
        global_scale=(0.5, 1.0), local_scale=(0.2, 0.5),  # [P] 259 to 518 and 104 to 259 of 518 pixels
        crop_ratio=(3 / 4, 4 / 3),  # [D]
        flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,  # [D] hue and saturation do nothing to grey
        blur_global1=0.0, blur_global2=0.1, blur_local=0.5,  # [P] "less severe blurring" [open]; DINOv2: 0, 0.9, 0.5
        blur_sigma=(0.1, 2.0), solarize=0.2, solarize_threshold=128,  # [D]
        gamma=0.0, noise=0.0, standardize=False,  # not in the paper
    ))
    config.optim = ConfigDict(dict(
        base_lr=1e-3,  # [P]
        lr_scaling="sqrt_1024",  # [D] peak = base * sqrt(batch / 1024) [open]
        final_lr=1e-6,  # [D]
        warmup=(10, "epochs"),  # [D] linear [P]
        weight_decay=(0.04, 0.4), clip=3.0, betas=(0.9, 0.999), eps=1e-8,  # [D]
        layer_decay=0.9, patch_embed_factor=0.2,  # [D]
        momentum=(0.992, 1.0),  # [D] of the teacher
        teacher_temperature=(0.04, 0.07), teacher_temperature_warmup=(30, "epochs"),  # [D]
        freeze_last_layer=(1, "epochs"),  # [D]
        head_warmup=(0, "steps"),  # frozen backbone at the start: helps when only the backbone continues
        horizon=(),  # end of the cosines where it is not the end of the run, e.g. (100_000, "steps")
    ))
    config.data = ConfigDict(dict(
        sources=common.MULTI_CXR,  # [P] Table D.1
        weights=(),  # () : in proportion to size
        data_dir="",  # prepared datasets
        subset="",  # a file that lists the films to train on, by id or path, e.g. the release's training_images.csv
        image_size=518,  # [H] side of the square window handed to the device
        window="random",  # random or centre window of the film's short side
        mean=common.RAD_DINO_MEAN, std=common.RAD_DINO_STD,  # [H]
        fraction=1.0,  # share of every source's films, for the ablation of dataset size
        synthetic_size=4000,  # films of the source "synthetic"
        threads=8, prefetch=8,  # batches in the making and batches ahead, per host
        cache_gib=0.0,  # decoded films kept in host memory
    ))
    config.mesh = ConfigDict(dict(fsdp=1))  # devices over which parameters are sharded
    return common.apply(config, arguments, PRESETS)


def vits14_224(config: ConfigDict) -> None:
    """ViT-S/14 at 224/98 px, 8 images, float32, no drop path: small enough to time side by side on a CPU."""
    config.model.update(variant="S", image_size=224, drop_path=0.0)
    config.views.update(global_size=224, local_size=98)
    config.update(batch_size=8, group_size=8, koleo_group=8, compute_dtype="float32")
    config.data.update(image_size=224)


def without_mim(config: ConfigDict) -> None:
    """No masked image modelling: the student sees whole crops too, else it would still be masked [P] ablation."""
    config.loss.ibot, config.masks.probability = 0.0, 0.0


def dinov2_views(config: ConfigDict) -> None:
    """The views of the original DINOv2 as far as they act on grey films; see `augment.DINOV2`."""
    config.views.update(crop_scale_mode="area", global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), blur_global2=0.9)


def at_resolution(size: int):
    """Pre-training at another resolution, local crops in proportion, on the grid of patches [P] Figures B.1, C.1."""
    def preset(config: ConfigDict) -> None:
        patch = config.model.patch_size
        config.views.update(global_size=size, local_size=round(196 / 518 * size / patch) * patch)
        config.model.image_size = config.data.image_size = size

    return preset


def on_films(*sources: str):
    """Pre-training on other films, in proportion to their number [P] Figure B.2, Table 4."""
    def preset(config: ConfigDict) -> None:
        config.data.update(sources=sources, weights=())

    return preset


PRESETS = {
    "vits14_224": vits14_224, "mim=off": without_mim, "dinov2_views": dinov2_views,
    **{f"resolution={size}": at_resolution(size) for size in (224, 322, 420, 518)},
    "data=mimic": on_films("mimic_cxr"),  # RAD-DINO-Control
    "data=frontal": on_films(*(f"{name}:frontal" for name in common.MULTI_CXR)),
    "data=public": on_films(*common.MULTI_CXR),
    "data=all": on_films("multicxr"),  # with the private part
}  # fmt: skip
