"""The tokenizer: equal to the release's own on prompts and sentences, from either file, and clear about wrong ones."""

import hashlib
import json

import pytest

from raddino_jax.data import synthetic
from raddino_jax.evals import tokenizer
from raddino_jax.evals.tokenizer import TokenizerError
from raddino_jax.models import llava

SENTENCES = [synthetic.sentence(synthetic.case(i)) for i in range(400)]
TEXTS = [
    llava.SYSTEM, llava.INSTRUCTION, f"{llava.INSTRUCTION} {SENTENCES[0]}", *SENTENCES[:50], "",
    "The ___ is 12.5 cm\n\nabove  the carina, unchanged; naïve Ä 肺 \t end ",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tokenizer.model learned from sentences, and tokenizer.json of transformers from it in json/."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train([*SENTENCES, llava.SYSTEM], 700, folder / "tokenizer.model")
    oracle = transformers.LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=False)
    oracle.save_pretrained(folder / "json")
    return folder


@pytest.fixture(scope="module")
def oracle(folder):
    import transformers

    return transformers.LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=False)


@pytest.mark.parametrize("name", ["tokenizer.model", "json/tokenizer.json", "", "json"])
def test_tokens_and_texts_are_those_of_transformers(folder, oracle, name):
    found = tokenizer.load(folder / name)
    assert found.size == len(oracle) == 700
    for text in TEXTS:
        tokens = oracle.encode(text, add_special_tokens=False)
        assert found.encode(text) == tokens, text
        marked = [1, *tokens, 2, 0, 0]
        assert found.decode(marked) == oracle.decode(marked, skip_special_tokens=True).strip()
        assert found.decode([*tokens, 2, *tokens]) == text.strip()  # what comes after the end is not said


def test_the_prompt_stands_apart_from_the_answer(folder):
    """Of every sentence the first learned token is the first of the answer: LLaVA's offset has nothing to mend here."""
    encode = tokenizer.load(folder).encode
    asked = llava.prompt(encode, patches=4)
    for sentence in SENTENCES[:50]:
        tokens, labels = llava.example(encode, 4, sentence)
        assert tokens[: len(asked)] == asked and labels[: len(asked)] == [llava.IGNORED] * len(asked)
        assert labels[len(asked) :] == [*encode(sentence), 2]


def test_the_same_texts_give_the_same_file(folder, tmp_path):
    again = tokenizer.train([*SENTENCES, llava.SYSTEM], 700, tmp_path / "a" / "tokenizer.model")
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in (again.path, folder / "tokenizer.model")}
    assert len(digests) == 1
    other = tokenizer.train(SENTENCES[:200], 700, tmp_path / "tokenizer.model")
    assert other.encode(llava.SYSTEM) != again.encode(llava.SYSTEM)


def test_a_vocabulary_that_is_not_the_models_is_refused(folder):
    found = tokenizer.load(folder)
    found.check(700)
    with pytest.raises(TokenizerError, match="has 700 tokens, the language model 32000"):
        found.check(32_000)


def test_wrong_files_are_told(folder, tmp_path):
    with pytest.raises(TokenizerError, match="expected a tokenizer .* found none"):
        tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="found none"):
        tokenizer.load(tmp_path / "gone" / "tokenizer.model")
    for name in tokenizer.NAMES:
        (tmp_path / name).write_text("{}")
        with pytest.raises(TokenizerError, match="found another"):
            tokenizer.load(tmp_path / name)
    with pytest.raises(TokenizerError, match="no tokenizer of 100 tokens"):
        tokenizer.train(SENTENCES, 100, tmp_path / "small.model")


def test_a_tokenizer_that_numbers_its_marks_otherwise_is_refused(folder, tmp_path):
    known = json.loads((folder / "json" / "tokenizer.json").read_text())
    vocabulary = known["model"]["vocab"]
    vocabulary["</s>"], vocabulary["<s>"] = 1, 2
    known["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(TokenizerError, match="as Llama numbers them, found"):
        tokenizer.load(tmp_path)
