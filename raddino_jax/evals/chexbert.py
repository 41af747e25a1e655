"""CheXbert (Smit et al., arXiv 2004.09167): which of 14 findings a report says are there, in Flax.

The weights are chexbert.pth of its authors (https://github.com/stanfordmlgroup/CheXbert), the words those of
bert-base-uncased; neither can be shipped. A report is cut at 512 tokens, as there.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from raddino_jax import logs
from raddino_jax import params as trees
from raddino_jax.conversion import files, rules, tables
from raddino_jax.models.bert import CheXbert

CLASSES = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)
CHOICES = (4,) * 13 + (2,)  # "No Finding" is there or it is not

LONGEST = 512
BATCH = 32
STEP = 64  # lengths are padded to multiples: few programs to compile
HOME = "https://github.com/stanfordmlgroup/CheXbert"


class CheXbertError(RuntimeError):
    """Weights or words that cannot be used; the message says what to do."""


class Labeler:
    """Reports -> int [n, 14] of BLANK, POSITIVE, NEGATIVE, UNCERTAIN."""

    def __init__(self, weights: str, vocabulary: str = "", network: CheXbert | None = None):
        """weights: chexbert.pth. vocabulary: vocab.txt, "" = beside the weights. network: of another size.

        Raises CheXbertError with what is missing.
        """
        if not weights:
            raise CheXbertError(f"no weights: graders.chexbert=PATH of chexbert.pth ({HOME})")
        vocabulary = Path(vocabulary or Path(weights).with_name("vocab.txt"))
        self.network, self.tokenizer = network or CheXbert(CHOICES), _tokenizer(vocabulary)
        self.params = load(weights, self.network)
        self.apply = jax.jit(lambda params, *text: self.network.apply({"params": params}, *text))

    def __call__(self, reports: Sequence[str]) -> np.ndarray:
        """Equal reports are read once, short ones together."""
        texts = {clean(report): None for report in reports}
        tokens = dict(zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True))
        order = sorted(texts, key=lambda text: len(tokens[text].ids))
        found: dict[str, np.ndarray] = {}
        logs.say(f"report scores: CheXbert reads {len(order)} texts")
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            labels = self._read([tokens[text].ids for text in batch])
            found |= dict(zip(batch, labels, strict=True))
        return np.stack([found[clean(report)] for report in reports])

    def _read(self, ids: list[list[int]]) -> np.ndarray:
        length = min(-(-max(map(len, ids)) // STEP) * STEP, LONGEST)
        tokens, mask = np.zeros((2, BATCH, length), np.int32)
        for row, one in enumerate(ids):
            tokens[row, : len(one)], mask[row, : len(one)] = one, 1
        mask[len(ids) :, 0] = 1  # rows that fill the batch attend to something
        logits = self.apply(self.params, jnp.asarray(tokens), jnp.asarray(mask))
        return np.stack([np.argmax(one, axis=-1) for one in logits], axis=1)[: len(ids)]


def clean(report: str) -> str:
    """White space as CheXbert's own reading of a table leaves it: single spaces."""
    return " ".join(report.split())


def _tokenizer(vocabulary: Path):
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError:
        raise CheXbertError("tokenizers is not installed: pip install 'raddino_jax[report]'") from None
    if not vocabulary.is_file():
        raise CheXbertError(f"no words: {vocabulary} is not there; graders.vocab=PATH of bert-base-uncased's vocab.txt")
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


def load(path: str, network: CheXbert) -> dict:
    """The parameters of chexbert.pth, or of any file with its names. Raises CheXbertError."""
    try:
        foreign = files.read(Path(path))
        # What BertModel has beyond its layers: a pooler that CheXbert does not use, and a buffer of numbers.
        unused = ("bert.pooler.", "bert.embeddings.position_ids")
        named = {name.removeprefix("module."): value for name, value in foreign.items()}
        kept = {name: value for name, value in named.items() if not name.startswith(unused)}
        arrays = rules.read(tables.CHEXBERT, kept, path)
        blank = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        expected = jax.eval_shape(network.init, jax.random.key(0), blank, blank)["params"]
        return trees.merge(expected, trees.unflatten(arrays), path)
    except ValueError as error:  # WeightsError is one
        raise CheXbertError(str(error)) from None
