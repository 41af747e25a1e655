"""The model that writes: loss against transformers, adapters that begin as nothing and merge into the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from raddino_jax import params as trees
from raddino_jax.conversion import rules, tables
from raddino_jax.evals import writer
from raddino_jax.evals.writer import Writer
from raddino_jax.models import llava
from raddino_jax.models.llava import IMAGE

SIZES = dict(vocabulary=50, width=32, depth=2, heads=4, hidden=44, positions=64)
CHANNELS = 6


def made(lora=0, **more):
    """A writer, its parameters with adapters that do something, patches, and a batch of two texts."""
    model = Writer.of(SIZES, lora=lora, **more)
    params = model.init(jax.random.key(0), CHANNELS)
    if lora:
        params["lora"] = jax.tree.map(lambda x: x + 0.05, params["lora"])
    features = jax.random.normal(jax.random.key(1), (2, 3, CHANNELS))
    prompt = [1, 7, IMAGE, IMAGE, IMAGE, 8]
    examples = [([*prompt, *answer], [-100] * len(prompt) + answer) for answer in ([9, 10, 2], [11, 12, 13, 14, 2])]
    return model, params, features, llava.batch(examples, 12)


def oracle(params):
    """transformers' model with the same weights."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44,
        max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager",
    ))  # fmt: skip
    ours = {name: np.asarray(value) for name, value in trees.flatten(params["llama"]).items()}
    weights = {name: torch.tensor(value) for name, value in rules.write(tables.LLAMA, ours, "test").items()}
    theirs.load_state_dict(weights, strict=False)
    return theirs.eval()


@pytest.mark.parametrize("chunk", [512, 5])
def test_loss_is_that_of_transformers_on_spliced_embeddings(monkeypatch, chunk):
    monkeypatch.setattr(writer, "CHUNK", chunk)
    model, params, features, batch = made(remat=True)
    total, count = jax.jit(model.loss)(params, features, batch)
    theirs = oracle(params)
    projected = np.asarray(model.projector.apply({"params": params["projector"]}, features))
    with torch.no_grad():
        x = theirs.model.embed_tokens(torch.tensor(np.where(batch["tokens"] == IMAGE, 0, batch["tokens"]))).numpy()
        x[batch["tokens"] == IMAGE] = projected.reshape(-1, 32)
        wanted = theirs(
            inputs_embeds=torch.tensor(x), attention_mask=torch.tensor(batch["mask"].astype(int)),
            labels=torch.tensor(batch["labels"].astype(np.int64)),
        ).loss.item()  # fmt: skip
    assert count == 8
    np.testing.assert_allclose(total / count, wanted, rtol=2e-5)


def test_adapters_begin_as_nothing_and_are_what_is_trained():
    plain, params, features, batch = made()
    model = Writer.of(SIZES, lora=3)
    fresh = model.init(jax.random.key(0), CHANNELS)
    jax.tree.map(np.testing.assert_array_equal, fresh["llama"], params["llama"])
    assert model.loss(fresh, features, batch)[0] == plain.loss(params, features, batch)[0]
    trained, held = model.split(fresh)
    assert set(trained) == {"projector", "lora"} and set(held) == {"llama"}
    assert plain.split(params) == (params, {})
    assert len(trees.flatten(fresh["lora"])) == 2 * 7 * SIZES["depth"]
    assert fresh["lora"]["layers_0"]["gate"]["a"].shape == (32, 3)


@pytest.mark.parametrize("remat", [False, True])
def test_merged_adapters_are_the_same_function(remat):
    model, params, features, batch = made(lora=3, remat=remat)
    merged = model.merged(params)
    assert set(merged) == {"projector", "llama"}
    given, wanted = (float(model.loss(p, features, batch)[0]) for p in (merged, params))
    plain = float(model.loss({k: v for k, v in params.items() if k != "lora"}, features, batch)[0])
    assert given == pytest.approx(wanted, rel=1e-5) and abs(plain - wanted) > 1e-2


def test_adapters_have_gradients_and_the_language_model_is_read_alone():
    model, params, features, batch = made(lora=3)
    trained, held = model.split(params)
    grads = jax.grad(lambda trained: model.loss(trained | held, features, batch)[0])(trained)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_texts_are_those_of_transformers():
    model, params, features, _ = made(lora=3)
    tokens = np.tile(np.int32([1, 7, IMAGE, IMAGE, IMAGE, 8]), (2, 1))
    found = np.asarray(model.write(params, features, tokens, np.ones(tokens.shape, bool), 6))
    theirs = oracle(model.merged(params))
    with torch.no_grad():
        x = torch.tensor(np.array(model.embedded(params, features, tokens)))
        for _ in range(6):
            word = theirs(inputs_embeds=x).logits[:, -1].argmax(-1)
            x = torch.cat([x, theirs.model.embed_tokens(word)[:, None]], dim=1)
            assert (found[:, 0] == word.numpy()).all()  # no text ends so soon: </s> is one word of fifty
            found = found[:, 1:]
