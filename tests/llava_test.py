"""Prompts, labels and spliced images by hand; the projector and the loss against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from raddino_jax.models import llava
from raddino_jax.models.llava import END, IGNORED, IMAGE, START

WORDS = {"SYSTEM": 10, "\nProvide": 20, "ASSISTANT:": 21, "Clear": 30, "lungs.": 31}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(llava, "SYSTEM", "SYSTEM ")
    monkeypatch.setattr(llava, "INSTRUCTION", "\nProvide ASSISTANT:")


def encode(text):
    return [WORDS[word] for word in text.split(" ") if word]


def test_texts_are_those_of_the_release():
    assert llava.SYSTEM + "<image>" + llava.INSTRUCTION == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nProvide a description of the findings "
        "in the radiology image. ASSISTANT:"
    )


def test_prompt_and_labels_by_hand(short):
    assert llava.prompt(encode, 2) == [START, 10, IMAGE, IMAGE, 20, 21]
    tokens, labels = llava.example(encode, 2, "Clear lungs.")
    assert tokens == [START, 10, IMAGE, IMAGE, 20, 21, 30, 31, END]
    assert labels == [IGNORED] * 6 + [30, 31, END]


def test_the_tail_is_cut(short):
    tokens, labels = llava.example(encode, 2, "Clear lungs.", limit=8)
    assert tokens == [START, 10, IMAGE, IMAGE, 20, 21, 30, 31] and labels == [IGNORED] * 6 + [30, 31]
    with pytest.raises(ValueError, match="above the 6 tokens of the prompt, found 6"):
        llava.example(encode, 2, "Clear lungs.", limit=6)


def test_a_token_across_prompt_and_answer_is_refused(short):
    def merges(text):
        return [99] if text.endswith("Clear") else encode(text)

    with pytest.raises(ValueError, match="apart from the answer"):
        llava.example(merges, 2, "Clear")


def test_batch_is_padded_on_the_right():
    found = llava.batch([([1, 5, 2], [-100, 5, 2]), ([1, 2], [-100, 2])], 4)
    assert found["tokens"].tolist() == [[1, 5, 2, 0], [1, 2, 0, 0]]
    assert found["labels"].tolist() == [[-100, 5, 2, -100], [-100, 2, -100, -100]]
    assert found["mask"].tolist() == [[True, True, True, False], [True, True, False, False]]
    with pytest.raises(ValueError, match="at most 2 tokens, found 3"):
        llava.batch([([1, 5, 2], [-100, 5, 2])], 2)


def test_splice_by_hand():
    table = jnp.arange(20.0).reshape(10, 2)
    tokens = jnp.array([[1, IMAGE, IMAGE, 3], [IMAGE, 4, IMAGE, 0]])
    projected = jnp.array([[[100, 101], [102, 103]], [[200, 201], [202, 203]]])
    found = llava.splice(lambda t: table[t], tokens, projected)
    assert found.tolist() == [[[2, 3], [100, 101], [102, 103], [6, 7]], [[200, 201], [8, 9], [202, 203], [0, 1]]]


def test_projector_is_pytorchs():
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    model = llava.Projector(7)
    weights = model.init(jax.random.key(0), x)["params"]
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 7))
    for layer, name in ((theirs[0], "fc1"), (theirs[2], "fc2")):
        layer.weight.data = torch.tensor(np.array(weights[name]["kernel"]).T)
        layer.bias.data = torch.tensor(np.array(weights[name]["bias"]))
    with torch.no_grad():
        wanted = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model.apply({"params": weights}, x), wanted, rtol=0, atol=1e-6)


def test_projector_size():
    shapes = jax.eval_shape(llava.Projector().init, jax.random.key(0), jnp.zeros((1, 1, 768)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 769 * 4096 + 4097 * 4096  # 19.93 M


def test_loss_is_pytorchs():
    logits = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)
    labels = np.array([[IGNORED, IGNORED, 3, 2, IGNORED], [IGNORED, 4, 0, 5, 2]])
    targets = llava.targets(jnp.asarray(labels))
    total, count = llava.loss(jnp.asarray(logits), targets), jnp.sum(targets != IGNORED)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:, :-1].reshape(-1, 6)), torch.tensor(labels[:, 1:].reshape(-1)), reduction="sum"
    )
    assert count == 6
    np.testing.assert_allclose(total, wanted.item(), rtol=1e-6)
