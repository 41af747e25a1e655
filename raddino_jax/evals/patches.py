"""What a language model is shown of a film: the patches of one layer of a frozen encoder, without its class token.

Letters: n films, S pixels per side, P patches of a film, C width of the encoder.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax import encoders
from raddino_jax.data.pairs import PairError, Pairs
from raddino_jax.evals import features, frames, heads

Array = jax.Array

# CLIP is read before its last block, as LLaVA does: that block serves the class token alone. All others end in a norm
# for their patches, or were read at the end by those who made them.
LAYERS = {"clip_vitl14_224": -2, "clip_vitl14_336": -2}


@dataclass(frozen=True)
class Eye:
    """Levels uint8 [n, S, S] -> patches float32 [n, P, C]; to be traced.

    layer: as `Encoder.block` counts. join: patches per side of a square that becomes one, its features side by side.
    """

    encoder: encoders.Encoder
    layer: int
    join: int = 1

    @classmethod
    def open(cls, config, dtype: str) -> "Eye":
        """The encoder of a config. Raises encoders.WeightsError, PairError for a layer that it has not."""
        encoder = heads.sized(encoders.load(config.encoder, config.weights, dtype), config.image_size)
        eye = cls(encoder, config.feature_layer or LAYERS.get(config.encoder, -1), config.join)
        side = encoder.image_size // encoder.patch_size
        if config.join < 1 or side % config.join:
            raise PairError(f"join={config.join} does not divide the {side} x {side} patches of {encoder.name}")
        try:
            _ = eye.shape
        except ValueError as error:
            raise PairError(f"feature_layer={config.feature_layer}: {error}") from error
        return eye

    @property
    def frozen(self) -> dict:
        """Parameters, on the host: whoever uses them knows on which devices."""
        return jax.device_get(self.encoder.params)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, C)."""
        levels = jax.ShapeDtypeStruct((1, self.encoder.image_size, self.encoder.image_size), jnp.uint8)
        return jax.eval_shape(self, self.encoder.params, levels).shape[1:]

    def levels(self, film: np.ndarray) -> np.ndarray:
        """A film uint8 [H, W] as the square [S, S] that the encoder sees."""
        return frames.framed(film, self.encoder.settings)[0]

    def __call__(self, frozen: dict, levels: Array) -> Array:
        films = heads.films_of(levels, self.encoder.settings)
        maps = self.encoder.block(frozen, films, self.layer)
        joined = einops.rearrange(maps, "n (h a) (w b) c -> n (h w) (a b c)", a=self.join, b=self.join)
        return jax.lax.stop_gradient(joined)

    def read(self, pairs: Pairs, batches: Iterator[Sequence[int]], threads: int) -> Iterator[np.ndarray]:
        """Levels [n, S, S] of batches of places; the next batch is read while this one is used."""
        with ThreadPoolExecutor(threads) as pool:

            def ahead(places):
                return [pool.submit(lambda place=place: self.levels(pairs.film(int(place)))) for place in places]

            waiting = None
            for places in batches:
                waiting, ready = ahead(places), waiting
                if ready is not None:
                    yield np.stack([future.result() for future in ready])
            if waiting is not None:
                yield np.stack([future.result() for future in waiting])

    def kept(self, pairs: Pairs, places: np.ndarray, folder: str, batch: int, threads: int) -> np.ndarray:
        """Patches [len(places), P, C] of films, computed once and kept in a folder, as `features` does it."""
        about = {
            "feature": f"patches of block {self.layer}, join {self.join}",
            "encoder": features.identity(self.encoder),
        }

        def compute(films: features.Films) -> Iterator[np.ndarray]:
            see, starts = self.encoder.compiled(self), range(0, len(places), batch)
            # Of one size, for one compilation.
            batches = (np.resize(places[start : start + batch], batch) for start in starts)
            for start, levels in zip(starts, self.read(pairs, batches, threads), strict=True):
                yield np.asarray(see(self.encoder.params, levels))[: len(places) - start]

        return features.kept(about, features.Films(pairs, places), Path(folder).expanduser(), compute)
