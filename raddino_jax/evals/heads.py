"""What predicts masks: a decoder on a frozen encoder, or a U-Net, behind one call from levels to logits.

Letters: n films, S pixels per side, C structures, L layers, h w patch rows and columns, D width.
"""

import copy
import dataclasses
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from raddino_jax import augment, encoders
from raddino_jax.data.cases import CaseError
from raddino_jax.encoders import Preprocess
from raddino_jax.models import decoders, unet

Array = jax.Array

DECODERS = {"linear": decoders.Linear, "vitdet": decoders.ViTDet, "upernet": decoders.UPerNet}
UNETS = ("unet", "effunet")
HEADS = (*DECODERS, *UNETS)


@dataclass(frozen=True)
class Head:
    """network: what is trained. settings: how films are prepared. encoder: the frozen one, None for U-Nets."""

    network: nn.Module
    settings: Preprocess
    encoder: encoders.Encoder | None = None

    @property
    def size(self) -> int:
        return self.settings.crop

    @property
    def frozen(self) -> dict:
        """Parameters that are read and not trained."""
        return {} if self.encoder is None else self.encoder.params

    def init(self, key: Array) -> dict:
        """{"params"[, "batch_stats"]} of the network, fresh."""
        if self.encoder is None:
            given = jax.ShapeDtypeStruct((1, self.size, self.size, 1), jnp.float32)
        else:
            side = self.size // self.encoder.patch_size
            given = jax.ShapeDtypeStruct((1, self.network.layers, side, side, self.encoder.width), jnp.float32)
        return jax.jit(lambda key: self.network.init(key, jnp.zeros(given.shape)))(key)

    def features(self, frozen: dict, levels: Array) -> Array:
        """Levels [n, S, S] -> what the network reads: the encoder's maps [n, L, h, w, D], or the film [n, S, S, 1]."""
        films = films_of(levels, self.settings)
        if self.encoder is None:
            return films
        return jax.lax.stop_gradient(self.encoder.maps(frozen, films, self.network.layers))

    def logits(self, variables: dict, features: Array) -> Array:
        """Logits float32 [n, S, S, C] of features; bilinear where the network's are coarser."""
        return decoders.resize(self.network.apply(variables, features), (self.size, self.size))

    def train_logits(self, variables: dict, features: Array, key: Array) -> tuple[Array, dict]:
        """The same in training mode, and the variables with the statistics that the batch moved."""
        out, moved = self.network.apply(
            variables, features, True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return decoders.resize(out, (self.size, self.size)), variables | moved


def films_of(levels: Array, settings: Preprocess) -> Array:
    """Levels [n, S, S] -> films float32 [n, S, S, 1] as a network with these settings sees them."""
    films = levels.astype(jnp.float32) * (settings.scale / 255)
    if settings.standardize:
        return augment.standardize(films)[..., None]
    return ((films - sum(settings.mean) / len(settings.mean)) / (sum(settings.std) / len(settings.std)))[..., None]


def build(config, structures: int) -> Head:
    """The head that `config.head` names. Raises CaseError, encoders.WeightsError."""
    if config.head not in HEADS:
        raise CaseError(f"head={config.head!r} must be one of {', '.join(HEADS)}")
    dtype = jnp.dtype(config.compute_dtype)
    if config.head in UNETS:
        size = config.image_size or config.unet_size
        settings = Preprocess(size, size, (config.mean,), (config.std,), standardize=True)
        if config.head == "unet":
            return Head(unet.ResidualUNet(structures, tuple(config.unet.filters), dtype), settings)
        effunet = config.effunet
        network = unet.EfficientUNet(structures, tuple(effunet.scale), tuple(effunet.decoder), effunet.drop, dtype)
        return Head(network, settings)
    encoder = sized(encoders.load(config.encoder, config.weights, config.compute_dtype), config.image_size)
    network = DECODERS[config.head](structures, config.head_width, dtype=dtype)
    if network.layers > 1 and encoder.name == "biovil_t":
        raise CaseError(f"head={config.head} reads four layers, which {encoder.name} lacks: use head=linear")
    return Head(network, encoder.settings, encoder)


def sized(encoder: encoders.Encoder, size: int) -> encoders.Encoder:
    """The encoder on squares of another size, with more patches or fewer; 0 leaves it as it is."""
    if not size or size == encoder.image_size:
        return encoder
    if size % encoder.patch_size or encoder.settings.pad:
        raise CaseError(f"image_size={size}: {encoder.name} takes multiples of {encoder.patch_size} pixels")
    other = copy.copy(encoder)
    resize = round(encoder.settings.resize * size / encoder.settings.crop)
    other.settings, other.image_size = dataclasses.replace(encoder.settings, resize=resize, crop=size), size
    return other
