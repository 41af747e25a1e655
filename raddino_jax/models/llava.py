"""LLaVA (arXiv 2304.08485) for reports: what is put before a language model, and which of its tokens are learned.

A prompt (vicuna_v1.1) is a system text, the patches of a film, an instruction, and the findings as the answer. Tokens
of an image are IMAGE until `splice` puts projected patches in their place.
Letters: n texts, T tokens, P patches of a film, C width of the encoder, D width of the language model.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax.models.llama import END, PADDING, START

Array = jax.Array
Encode = Callable[[str], Sequence[int]]  # text -> tokens, without the start

IMAGE = -200  # of LLaVA: no token of a vocabulary
IGNORED = -100  # a label that is not learned

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
INSTRUCTION = "\nProvide a description of the findings in the radiology image. ASSISTANT:"


class Projector(nn.Module):
    """Patches of an encoder [n, P, C] -> as many embeddings [n, P, D]: linear, exact GELU, linear."""

    width: int = 4096
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        x = nn.Dense(self.width, dtype=self.dtype, name="fc1")(patches)
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(nn.gelu(x, approximate=False))


def prompt(encode: Encode, patches: int) -> list[int]:
    """The tokens before an answer, with `patches` times IMAGE. The texts around the image are encoded apart."""
    return [START, *encode(SYSTEM), *[IMAGE] * patches, *encode(INSTRUCTION)]


def example(encode: Encode, patches: int, findings: str, limit: int = 2048) -> tuple[list[int], list[int]]:
    """(tokens, labels) of a film with its findings; IGNORED up to the answer, cut after `limit` tokens.

    The instruction is encoded with the answer, as at release. Raises ValueError if its tokens then differ from those
    of the prompt, since what is learned would not be what is asked, or if nothing of the answer is within the limit.
    """
    asked = prompt(encode, patches)
    tokens = [START, *encode(SYSTEM), *[IMAGE] * patches, *encode(f"{INSTRUCTION} {findings}"), END]
    if tokens[: len(asked)] != asked:
        raise ValueError("expected the tokenizer to keep the prompt apart from the answer, found a token across both")
    if limit <= len(asked):
        raise ValueError(f"expected a limit above the {len(asked)} tokens of the prompt, found {limit}")
    labels = [IGNORED] * len(asked) + tokens[len(asked) :]
    return tokens[:limit], labels[:limit]


def batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> dict[str, np.ndarray]:
    """Examples -> {tokens int32, labels int32, mask bool} [n, length], padded on the right.

    Raises ValueError for an example longer than `length`.
    """
    longest = max(len(tokens) for tokens, _ in examples)
    if longest > length:
        raise ValueError(f"expected at most {length} tokens, found {longest}: cut the examples to the length")
    out = {
        "tokens": np.full((len(examples), length), PADDING, np.int32),
        "labels": np.full((len(examples), length), IGNORED, np.int32),
        "mask": np.zeros((len(examples), length), bool),
    }
    for i, (tokens, labels) in enumerate(examples):
        for name, row in (("tokens", tokens), ("labels", labels), ("mask", True)):
            out[name][i, : len(tokens)] = row
    return out


def splice(embed: Callable[[Array], Array], tokens: Array, projected: Array) -> Array:
    """Tokens int [n, T] and projected patches [n, P, D] -> embeddings [n, T, D], patches in place of IMAGE in order.

    embed: tokens -> embeddings. Each text has exactly P times IMAGE, which `prompt` sees to.
    """
    image = tokens == IMAGE
    words = embed(jnp.where(image, PADDING, tokens))
    places = jnp.clip(jnp.cumsum(image, axis=1) - 1, 0, projected.shape[1] - 1)
    patches = jnp.take_along_axis(projected, places[..., None], axis=1)
    return jnp.where(image[..., None], patches.astype(words.dtype), words)


def loss(logits: Array, targets: Array) -> Array:
    """Logits [..., T, V], int [..., T] -> the sum of the cross-entropies of targets that are not IGNORED."""
    learned = targets != IGNORED
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    each = -jnp.take_along_axis(logs, jnp.where(learned, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(learned, each, 0))


def targets(labels: Array) -> Array:
    """Labels int [n, T] -> what each token has to foretell [n, T]: the label after it, and nothing by the last."""
    return jnp.pad(labels[:, 1:], [(0, 0), (0, 1)], constant_values=IGNORED)
