"""The model that writes reports: a projector from patches to embeddings, and a language model (2401.10815, E.3.3).

Parameters are {"projector", "llama"} and, with a LoRA rank, "lora": its pairs of narrow matrices by layer.
Letters: n texts, T tokens, P patches of a film, C width of the encoder, D width of the language model, r rank.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from raddino_jax import params as trees
from raddino_jax.models import llama, llava

Array = jax.Array

CHUNK = 512  # tokens whose logits are alive at a time: of 32,000 words, 2,048 tokens would take 250 MiB a text
ADAPTED = r"^layers_\d+/(attn/[qkvo]|gate|up|down)/kernel$"  # by LoRA: all linear layers but the last, as in LLaVA


@dataclass(frozen=True)
class Writer:
    """The networks without weights; lora: rank, 0 where the whole language model is trained."""

    llama: llama.Llama
    projector: llava.Projector
    lora: int = 0

    @classmethod
    def of(cls, sizes: Mapping, dtype: str = "float32", remat: bool = False, lora: int = 0) -> "Writer":
        """sizes: fields of `models.llama.Llama`, as conversion.llama.read gives them."""
        dtype = jnp.dtype(dtype)
        return cls(llama.Llama(**sizes, dtype=dtype, remat=remat), llava.Projector(sizes["width"], dtype), lora)

    def init(self, key: Array, channels: int) -> dict:
        """Parameters at random, for patches of width `channels`; LoRA's begin by changing nothing."""
        of_projector, of_llama, of_lora = jax.random.split(key, 3)
        one = jnp.zeros((1, 1, self.llama.width))
        found = {
            "projector": self.projector.init(of_projector, jnp.zeros((1, 1, channels)))["params"],
            "llama": self.llama.init(of_llama, one, jnp.ones((1, 1), bool))["params"],
        }
        return found | ({"lora": self._adapters(of_lora, found["llama"])} if self.lora else {})

    def _adapters(self, key: Array, weights: dict) -> dict:
        found = {}
        for number, (name, kernel) in enumerate(sorted(trees.flatten(weights).items())):
            if re.search(ADAPTED, name):
                (rows, columns), layer = kernel.shape, name.removesuffix("/kernel")
                bound = rows**-0.5  # as PEFT draws them
                found[f"{layer}/a"] = jax.random.uniform(
                    jax.random.fold_in(key, number), (rows, self.lora), minval=-bound, maxval=bound
                )
                found[f"{layer}/b"] = jnp.zeros((self.lora, columns))
        return trees.unflatten(found)

    def split(self, params: dict) -> tuple[dict, dict]:
        """(what is trained, what is held): with LoRA the language model itself is held."""
        held = {name for name in params if name == "llama" and self.lora}
        return {k: v for k, v in params.items() if k not in held}, {k: params[k] for k in held}

    def merged(self, params: dict) -> dict:
        """Parameters without "lora", its products added to the kernels: the same function, without adapters."""
        if "lora" not in params:
            return params
        weights, narrow = trees.flatten(params["llama"]), trees.flatten(params["lora"])
        for name in [name for name in weights if re.search(ADAPTED, name)]:
            a, b = (narrow[name.removesuffix("kernel") + letter] for letter in "ab")
            weights[name] = weights[name] + llama.LORA_SCALE * (a @ b)
        return {"projector": params["projector"], "llama": trees.unflatten(weights)}

    # --- the two things it does ---------------------------------------------------------------------------------

    def embedded(self, params: dict, features: Array, tokens: Array) -> Array:
        """Patches [n, P, C] and tokens [n, T], P of each text llava.IMAGE -> embeddings [n, T, D]."""
        projected = self.projector.apply({"params": params["projector"]}, features)
        weights = {"params": params["llama"]}
        return llava.splice(lambda tokens: self.llama.apply(weights, tokens, method="embed"), tokens, projected)

    def loss(self, params: dict, features: Array, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        """Patches [n, P, C] and `llava.batch` -> (sum of cross-entropies, number of tokens learned)."""
        variables = {"params": params["llama"]} | ({"lora": params["lora"]} if "lora" in params else {})
        x = self.embedded(params, features, batch["tokens"])
        states, _ = self.llama.apply(variables, x, batch["mask"], method="states")
        targets = llava.targets(batch["labels"])

        @jax.checkpoint
        def chunk(states, targets):
            return llava.loss(self.llama.apply(variables, states, method="logits"), targets)

        places = range(0, targets.shape[1], CHUNK)
        total = sum(chunk(states[:, i : i + CHUNK], targets[:, i : i + CHUNK]) for i in places)
        return total, jnp.sum(targets != llava.IGNORED)

    def write(self, params: dict, features: Array, tokens: Array, mask: Array, limit: int) -> Array:
        """Patches [n, P, C] and prompts [n, T] (mask false for padding) -> the likeliest tokens int [n, limit]."""
        params = self.merged(params)
        model = dataclasses.replace(self.llama, remat=False)
        return llama.greedy(model, params["llama"], self.embedded(params, features, tokens), mask, limit)
