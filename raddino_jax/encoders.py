"""The seam between networks and everything that uses them: films in, image and patch features out.

    e = encoders.load("rad_dino")                     # a row of ENCODERS, a workdir, a folder, a file, hf:owner/name
    out = e(e.preprocess([images.read("film.dcm")]))  # {"cls": [n, D], "patches": [n, h, w, D]}

Every encoder sees one grey channel. Those whose statistics differ by channel see the same numbers as with three: the
difference is folded into the first layer, exactly.
Letters: n films, S pixels per side, h w patch rows and columns, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from raddino_jax import params as trees
from raddino_jax import sharding, workdirs
from raddino_jax.conversion import formats, huggingface, sources
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.conversion.sources import Source
from raddino_jax.models.attention import BACKENDS
from raddino_jax.models.clip import CLIPViT, Projected
from raddino_jax.models.heads import DINOHead
from raddino_jax.models.ops import LayerNorm, products
from raddino_jax.models.resnet import BioViLT
from raddino_jax.models.vit import VARIANTS, ViT
from raddino_jax.preprocess import fold_grey, square

Array = jax.Array


@dataclass(frozen=True)
class Row:
    """A released encoder.

    network: without weights. formats: of its files (conversion.formats.FORMATS).
    feature: what is probed: "cls", "patch_mean", or another vector that the network names.
    parameters: of the network built here. repository, file: of its weights on the Hugging Face Hub; home: where
      they are, when not there. source: where the numbers of this row are from.
    """

    network: nn.Module
    formats: tuple[str, ...]
    preprocess: Preprocess
    parameters: int
    source: str
    feature: str = "cls"
    repository: str = ""
    file: str = "model.safetensors"
    home: str = ""


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
RAD_DINO = dict(mean=(0.5307,), std=(0.2583,))


def _dinov2(variant: str, parameters: int, repository: str, statistics: dict, source: str) -> Row:
    network = ViT(**VARIANTS[variant], layerscale=1.0)
    return Row(
        network, formats.DINOV2, Preprocess(518, 518, **statistics), parameters, source, repository=repository
    )


def _clip(size: int, parameters: int, repository: str) -> Row:
    network = CLIPViT(1024, 24, 16, patch_size=14, image_size=size, projection=768)
    return Row(
        network,
        ("clip_hf", "clip_openai"),
        Preprocess(size, size, **OPENAI),
        parameters,
        "arXiv 2103.00020",
        repository=repository,
    )


ENCODERS = {
    "rad_dino": _dinov2("B", 86_580_480, "microsoft/rad-dino", RAD_DINO, "arXiv 2401.10815"),
    "dinov2_vits14": _dinov2("S", 22_056_576, "facebook/dinov2-small", IMAGENET, "arXiv 2304.07193"),
    "dinov2_vitb14": _dinov2("B", 86_580_480, "facebook/dinov2-base", IMAGENET, "arXiv 2304.07193"),
    "dinov2_vitl14": _dinov2("L", 304_368_640, "facebook/dinov2-large", IMAGENET, "arXiv 2304.07193"),
    "dinov2_vitg14": _dinov2("g", 1_136_480_768, "facebook/dinov2-giant", IMAGENET, "arXiv 2304.07193"),
    "clip_vitl14_224": _clip(224, 303_966_208, "openai/clip-vit-large-patch14"),
    "clip_vitl14_336": _clip(336, 304_293_888, "openai/clip-vit-large-patch14-336"),
    "biomedclip": Row(
        Projected(
            ViT(**VARIANTS["B"], patch_size=16, image_size=224, layerscale=0.0, mask_token=False, offset=0.0),
            512,
        ),
        ("biomedclip",),
        Preprocess(224, 224, **OPENAI, centre="round"),
        86_191_872,
        "arXiv 2303.00915",
        repository="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        file="open_clip_pytorch_model.bin",
    ),
    # Statistics are those of levels 0 to 255, and films are made square by padding. "pad" in Preprocess says how.
    "chexzero": Row(
        CLIPViT(768, 12, 12, patch_size=32, image_size=224, projection=512),
        ("clip_openai",),
        Preprocess(224, 224, (101.48761,), (83.43944,), scale=255.0, pad=320),
        87_849_216,
        "doi 10.1038/s41551-022-00936-9",
        home="https://github.com/rajpurkarlab/CheXzero",
    ),
    # Pre-training read 448 pixels, but its encoder saw them at 224: 448 is what it reconstructed.
    "mrm": Row(
        ViT(**VARIANTS["B"], patch_size=16, image_size=224, layerscale=0.0, mask_token=False, offset=0.0),
        ("mrm",),
        Preprocess(224, 224, (0.4978,), (0.2449,), resample="bilinear", centre="round"),
        85_798_656,
        "arXiv 2301.13155",
        feature="patch_mean",
        home="https://github.com/RL4M/MRM-pytorch",
    ),
    "biovil_t": Row(
        BioViLT(),
        ("biovil_t",),
        Preprocess(512, 448, (0.0,), (1.0,), resample="bilinear", centre="round", stretch=True),
        24_168_256,
        "arXiv 2301.04558",
        feature="patch_mean",
        repository="microsoft/BiomedVLP-BioViL-T",
        file="biovil_t_image_model_proj_size_128.pt",
    ),
}


# --- the encoder --------------------------------------------------------------------------------------------


class Encoder:
    """A network with weights: batch float32 [n, S, S, 1] -> {"cls" [n, D], "patches" [n, h, w, D]}, float32.

    A batch is split over this host's devices. Attributes: image_size S, patch_size, width D, name, dtype, network,
    params, settings (Preprocess), feature, notes (lines for a person: what came from where, what was assumed).
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        params: dict,
        settings: Preprocess,
        feature: str = "cls",
        dtype: str = "float32",
        notes: Sequence[str] = (),
    ):
        """params: as released, that is for three normalised channels where `settings` has three statistics."""
        self.mesh = sharding.make_mesh(jax.local_devices())
        platform = jax.local_devices()[0].platform
        self.name, self.settings, self.feature = name, settings, feature
        self.dtype, self.notes = dtype, list(notes)
        self.network = computing(network, platform, jnp.dtype(dtype))
        self.image_size, self.patch_size = settings.crop, _of(network, "patch_size")
        folded = trees.unflatten(fold_grey(trees.flatten(params), settings.mean, settings.std))
        self.params = jax.device_put(folded, NamedSharding(self.mesh, P()))
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 1), jnp.float32)
        self.width = jax.eval_shape(self._features, self.params, blank)["cls"].shape[-1]
        self._compiled = self.compiled(self._features)
        self._staged = self.compiled(lambda params, batch: self.network.apply({"params": params}, batch))

    def preprocess(self, films: Sequence[np.ndarray]) -> np.ndarray:
        """Films uint8 [H, W] of any sizes -> float32 [n, S, S, 1]."""
        return np.stack([square(np.asarray(film), self.settings) for film in films])[..., None]

    def __call__(self, batch: np.ndarray) -> dict[str, Array]:
        return self._run(self._compiled, batch)

    def stages(self, batch: np.ndarray) -> dict[str, Array]:
        """Every intermediate by the name that the network gives it."""
        return self._run(self._staged, batch)

    def compiled(self, function: Callable, **options) -> Callable:
        """`function`, which uses the network, by `jax.jit` with these options, and with the encoder's mesh in sight.

        A TPU's attention kernel has to be told how a batch is split; without the mesh several chips refuse it.
        """
        program = jax.jit(function, **options)

        def call(*args):
            with jax.set_mesh(self.mesh), products(self.dtype):
                return program(*args)

        return call

    def maps(self, params: dict, batch: Array, count: int = 4) -> Array:
        """Patch features float32 [n, count, h, w, D] after blocks spread evenly, the last block last; to be traced.

        Of 12 blocks and count 4: the 3rd, 6th, 9th and 12th, each under the final norm, as far as the network has one
        for its patches. count 1 is "patches". Raises ValueError for networks that are not made of blocks.
        """
        if count == 1:
            return self._features(params, batch)["patches"][:, None]
        depth = self._depth(f"of which {count} could be read")
        return self._blocks(params, batch, [-(-(k + 1) * depth // count) - 1 for k in range(count)])

    def block(self, params: dict, batch: Array, place: int = -1) -> Array:
        """Patch features float32 [n, h, w, D] of the block at a place, to be traced: -1 is the last, and "patches".

        Of others the norm is that of `maps`. Raises ValueError where there is no such block.
        """
        if place == -1:
            return self._features(params, batch)["patches"]
        depth = self._depth(f"of which number {place} could be read")
        if not -depth <= place < depth:
            raise ValueError(f"{self.name} has {depth} blocks, no block {place}")
        return self._blocks(params, batch, [place % depth])[:, 0]

    def _depth(self, wanted: str) -> int:
        trunk = self.network.trunk if isinstance(self.network, Projected) else self.network
        if not hasattr(trunk, "depth"):
            raise ValueError(f"{self.name} has no blocks, {wanted}; only its last features")
        return trunk.depth

    def _blocks(self, params: dict, batch: Array, places: Sequence[int]) -> Array:
        trunk, own = self.network, params
        if isinstance(trunk, Projected):
            trunk, own = trunk.trunk, params["trunk"]
        out = self.network.apply({"params": params}, batch)
        tokens = jnp.stack([out[f"blocks_{place}"] for place in places], axis=1)
        if isinstance(trunk, ViT):
            tokens = LayerNorm(trunk.dtype).apply({"params": own["norm"]}, tokens)
        grid = [side // self.patch_size for side in batch.shape[1:3]]
        patches = tokens[:, :, tokens.shape[2] - grid[0] * grid[1] :].astype(jnp.float32)
        return patches.reshape(*patches.shape[:2], *grid, -1)

    def _run(self, compiled, batch: np.ndarray) -> dict[str, Array]:
        n = len(batch)
        if batch.ndim != 4 or batch.shape[-1] != 1 or not n:
            raise ValueError(
                f"expected films [n, S, S, 1] as `preprocess` gives them, found {list(batch.shape)}"
            )
        extra = -n % self.mesh.size
        if extra:
            batch = np.concatenate([batch, np.zeros((extra, *batch.shape[1:]), np.float32)])
        out = compiled(self.params, jax.device_put(batch, sharding.batch_sharding(self.mesh)))
        return {name: value[:n] for name, value in out.items()} if extra else out

    def _features(self, params, batch: Array) -> dict[str, Array]:
        out = self.network.apply({"params": params}, batch)
        patches = out["patches"]
        if patches.ndim == 3:
            grid = [side // self.patch_size for side in batch.shape[1:3]]
            patches = patches.reshape(len(patches), *grid, -1)
        patches = patches.astype(jnp.float32)
        vectors = {name: value for name, value in out.items() if value.ndim == 2} | {
            "patch_mean": patches.mean((1, 2))
        }
        if self.feature not in vectors:
            raise ValueError(f"feature={self.feature!r} is none of {', '.join(vectors)}")
        return {"cls": vectors[self.feature].astype(jnp.float32), "patches": patches}


def expected_params(network: nn.Module, image_size: int) -> dict:
    """Shapes and dtypes of a network's parameters, without memory."""
    blank = jax.ShapeDtypeStruct((1, image_size, image_size, 1), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), blank)["params"]


def fitted(expected: dict, arrays: dict, what: str) -> dict:
    """Arrays by name as a tree like `expected`. Raises WeightsError that lists what does not fit."""
    try:
        return trees.merge(expected, trees.unflatten(arrays), what)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def random_params(network: nn.Module, image_size: int) -> dict:
    """Parameters as training would start from them."""
    blank = jnp.zeros((1, image_size, image_size, 1))
    return jax.device_get(jax.jit(network.init)(jax.random.key(0), blank)["params"])


def _of(network: nn.Module, field: str):
    return getattr(network.trunk if isinstance(network, Projected) else network, field)


def computing(network: nn.Module, platform: str, dtype: jnp.dtype) -> nn.Module:
    """The network in a compute type, with the attention that is fast on a platform."""
    if isinstance(network, Projected):
        return network.clone(trunk=computing(network.trunk, platform, dtype))
    attention = (
        {"attention": platform if platform in BACKENDS else "xla"} if hasattr(network, "attention") else {}
    )
    return network.clone(dtype=dtype, **attention)


# --- finding weights ----------------------------------------------------------------------------------------


def load(name_or_path: str, weights: str = "", dtype: str = "float32", feature: str = "") -> Encoder:
    """An encoder by name (ENCODERS), or from a workdir, a Hugging Face folder, a weights file, or hf:owner/name.

    weights: a file or folder with the weights of a named encoder, "" to take them from the Hugging Face Hub (its
      cache first), "random" to build it without any file. dtype: float32 or bfloat16, of the computation.
    feature: what "cls" holds, instead of the feature that the encoder's paper probes.
    Raises WeightsError, with what to do.
    """
    if name_or_path in ENCODERS:
        return open_row(name_or_path, ENCODERS[name_or_path], weights, dtype, feature)
    source = open_source(name_or_path)
    network, settings = (CLIPViT if source.format == "clip_hf" else ViT)(**source.fields), source.preprocess
    if weights == "random":
        params = random_params(network, settings.crop)
    else:
        given = _find(weights, _FORMATS) if weights else source
        params = fitted(expected_params(network, settings.crop), _backbone(given), given.what)
    return Encoder(name_or_path, network, params, settings, feature or "cls", dtype, source.notes)


def open_row(name: str, row: Row, weights: str = "", dtype: str = "float32", feature: str = "") -> Encoder:
    """An encoder of a row; see `load`."""
    network, settings, feature = row.network, row.preprocess, feature or row.feature
    if weights == "random":
        params = random_params(network, settings.crop)
        return Encoder(name, network, params, settings, feature, dtype, ["random weights"])
    source = _find(weights, row.formats) if weights else _released(name, row)
    arrays = _backbone(source)
    if isinstance(network, CLIPViT) and "proj/kernel" not in arrays:
        network = network.clone(projection=0)  # CLIPVisionModel, saved without what joins it to text
    params = fitted(expected_params(network, settings.crop), arrays, f"{source.what} as {name}")
    return Encoder(name, network, params, settings, feature, dtype, source.notes)


def open_source(name_or_path: str, with_heads: bool = False) -> Source:
    """Weights of a DINOv2 or CLIP network with all that is needed to use them; names and paths as in `load`.

    with_heads: of a folder, also the heads that are in files of their own. Raises WeightsError, with what to do.
    """
    source = _find(name_or_path, with_heads=with_heads)
    if source.format == "workdir":
        return source
    sources.describe(source, Path(source.what))
    if name_or_path in ENCODERS:
        source.preprocess = ENCODERS[name_or_path].preprocess
    elif source.preprocess is None:
        source.preprocess = Preprocess(source.fields["image_size"], source.fields["image_size"], **IMAGENET)
        source.notes.append(
            "no preprocessor_config.json beside the weights: films are prepared as for DINOv2, "
            "with ImageNet's mean and std"
        )
    return source


def load_modules(name_or_path: str) -> tuple[dict[str, dict | None], list[str]]:
    """Weights to continue training from; names and paths as in `load`.

    Returns ({"backbone": tree or None, "dino_head": ..., "ibot_head": ...}, lines that say what came from where).
    Trees are nested dicts of numpy arrays in the types they are stored in; position embeddings have the stored grid.
    Raises WeightsError, with what to do.
    """
    source = _find(name_or_path, with_heads=True)
    modules = dict(source.modules)
    if source.format == "biomedclip":
        tower = {name: value for name, value in modules["backbone"].items() if name.startswith("trunk/")}
        modules["backbone"] = {name.removeprefix("trunk/"): value for name, value in tower.items()}
    elif source.format not in (*formats.DINOV2, "workdir", "dino_head", "mrm"):
        raise WeightsError(
            f"{source.what} holds {source.format} weights: no network that DINOv2 training can continue"
        )
    lines = list(source.notes)
    for name, arrays in modules.items():
        size = sum(value.size for value in arrays.values())
        lines.append(f"{name}: {len(arrays)} arrays, {size:,} parameters from {source.what}")
    if "backbone" in modules and not np.any(modules["backbone"].get("mask_token", 1)):
        lines.append("its mask token is zero: this backbone was never trained with masks")
    return {
        m: trees.unflatten(modules[m]) if m in modules else None for m in ("backbone", *formats.HEADS)
    }, lines


def whole_trees(source: Source) -> dict[str, dict]:
    """The modules of a DINOv2 source as trees. Raises WeightsError where one lacks a part."""
    network = ViT(**source.fields)
    fitted(expected_params(network, network.image_size), _backbone(source), source.what)
    for name in formats.HEADS:
        if name in source.modules:
            _check_head(source.modules[name], f"{source.what} ({name})")
    return {name: trees.unflatten(arrays) for name, arrays in source.modules.items()}


def _check_head(arrays: dict, what: str) -> None:
    nothing, layers = np.zeros((1, 1)), sum(name.endswith("kernel") for name in arrays)
    first = arrays.get("mlp_0/kernel", arrays.get("mlp/kernel", nothing))
    prototypes, bottleneck = arrays.get("last_layer/weight_v", nothing).shape
    head = DINOHead(prototypes, first.shape[1], bottleneck, max(layers, 1))
    blank = jax.ShapeDtypeStruct((1, first.shape[0]), jnp.float32)
    fitted(jax.eval_shape(head.init, jax.random.key(0), blank)["params"], arrays, what)


_FORMATS = (*formats.DINOV2, "clip_hf")  # of which a file or folder can be used without naming the encoder


def _find(name_or_path: str, among: Sequence[str] = (), with_heads: bool = False) -> Source:
    """Weights by name or path. among: formats to expect, all by default."""
    if name_or_path in ENCODERS:
        return _released(name_or_path, ENCODERS[name_or_path], with_heads)
    if not name_or_path:
        raise WeightsError(f"expected an encoder ({', '.join(ENCODERS)}) or a path, found an empty name")
    kind, _, repository = name_or_path.partition(":")
    path = huggingface.fetch_folder(repository) if kind == "hf" else Path(name_or_path)
    if (path / "checkpoints").is_dir():
        return workdirs.open_workdir(path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return workdirs.open_workdir(path.parent.parent, int(path.name))
    if not path.exists():
        raise WeightsError(
            f"{name_or_path!r} is neither an encoder ({', '.join(ENCODERS)}) nor a path that is there; "
            "a repository of the Hugging Face Hub is written hf:owner/name"
        )
    return sources.open_path(path, among, with_heads)


def _released(name: str, row: Row, with_heads: bool = False) -> Source:
    if not row.repository:
        raise WeightsError(
            f"the weights of {name} are not on the Hugging Face Hub; get them from {row.home} and give their path: "
            f"encoders.load({name!r}, weights='PATH') or --encoder={name} --weights=PATH"
        )
    file = huggingface.fetch(row.repository, row.file)
    for head in formats.HEADS if with_heads else ():
        huggingface.fetch(row.repository, f"{head}.safetensors", optional=True)
    return sources.open_path(file.parent if with_heads else file, row.formats, with_heads)


def _backbone(source: Source) -> dict:
    if "backbone" not in source.modules:
        raise WeightsError(f"{source.what} holds {', '.join(source.modules)}: no encoder")
    return dict(source.modules["backbone"])
