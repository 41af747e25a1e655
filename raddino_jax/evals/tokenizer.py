"""Texts to the tokens of Llama and Vicuna and back, from the files that are released with them.

Both files say the same: tokenizer.model, SentencePiece's own, and tokenizer.json of Hugging Face's `tokenizers`.
A text is encoded as at release ("legacy"): a space is put before it, nothing is added, and white space is kept.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raddino_jax import logs
from raddino_jax.data.pipeline import DataError
from raddino_jax.models.llama import END, PADDING, START

NAMES = ("tokenizer.model", "tokenizer.json")
SPECIAL = {"<unk>": PADDING, "<s>": START, "</s>": END}  # as Llama numbers them; <unk> serves as padding


class TokenizerError(DataError):
    """A file that is no tokenizer of a Llama, or none at all; the message says what to do."""


@dataclass(frozen=True)
class Tokenizer:
    """encode: text -> tokens, without START and END. size: of the vocabulary. path: of the file."""

    encode: Callable[[str], list[int]]
    words: Callable[[list[int]], str]
    size: int
    path: Path

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to END, without the marks of SPECIAL and without white space around it."""
        tokens = [int(token) for token in tokens]
        tokens = tokens[: tokens.index(END)] if END in tokens else tokens
        return self.words([token for token in tokens if token not in SPECIAL.values()]).strip()

    def check(self, vocabulary: int) -> None:
        """Raise TokenizerError where it has other tokens than a language model of that vocabulary."""
        if self.size != vocabulary:
            raise TokenizerError(
                f"{self.path} has {self.size} tokens, the language model {vocabulary}: give the tokenizer that belongs "
                "to it (config.tokenizer), or, for a model from scratch, set config.llm_sizes.vocabulary"
            )


def load(path: str | Path) -> Tokenizer:
    """tokenizer.model, tokenizer.json, or a folder with one of them. Raises TokenizerError."""
    path = Path(path)
    found = next((path / name for name in NAMES if (path / name).is_file()), None) if path.is_dir() else path
    if found is None or not found.is_file():
        raise TokenizerError(
            f"{path}: expected a tokenizer ({' or '.join(NAMES)}), found none; config.tokenizer names it"
        )
    return _json(found) if found.suffix == ".json" else _sentencepiece(found)


def _sentencepiece(path: Path) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise TokenizerError("sentencepiece is not installed: pip install 'raddino_jax[report]'") from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path}: expected a model of SentencePiece, found another file ({error})") from None
    return _checked(Tokenizer(model.encode, model.decode, model.get_piece_size(), path), model.piece_to_id)


def _json(path: Path) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError("tokenizers is not installed: pip install 'raddino_jax[report]'") from None
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exceptions
        raise TokenizerError(f"{path}: expected a file of `tokenizers`, found another ({error})") from None

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return _checked(Tokenizer(encode, model.decode, model.get_vocab_size(), path), model.token_to_id)


def _checked(tokenizer: Tokenizer, number_of: Callable[[str], int | None]) -> Tokenizer:
    wrong = {mark: number_of(mark) for mark, number in SPECIAL.items() if number_of(mark) != number}
    if wrong:
        raise TokenizerError(f"{tokenizer.path}: expected {SPECIAL}, as Llama numbers them, found {wrong}")
    return tokenizer


def train(texts: Iterable[str], size: int, path: Path) -> Tokenizer:
    """Learn a tokenizer of `size` tokens at most from texts, and write it as SentencePiece's file.

    The kind that Llama has: byte pairs, digits apart, unknown signs as bytes. The same texts give the same file.
    Raises TokenizerError for fewer tokens than bytes and signs need.
    """
    import sentencepiece

    written, path = io.BytesIO(), Path(path)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=written, model_type="bpe", vocab_size=size,
            unk_id=PADDING, bos_id=START, eos_id=END, pad_id=-1, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
            character_coverage=1.0, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise TokenizerError(f"no tokenizer of {size} tokens can be learned from these texts ({error})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(written.getvalue())
    temporary.replace(path)
    found = load(path)
    logs.say(f"tokenizer: {found.size} tokens, learned from the texts, in {path}")
    return found
