"""Llama against transformers' LlamaForCausalLM: logits, cache, greedy texts, and its files both ways."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raddino_jax import params
from raddino_jax.conversion import llama as folders
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.models import llama
from raddino_jax.models.llama import PADDING, Llama, greedy

CLOSE = dict(rtol=0, atol=2e-5)
LIMIT = 12
PROMPTS = [[1, 5, 9, 33, 7, 20], [1, 8], [1, 40, 41, 42]]


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44,
        max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # so that no scale is one, and texts are not one token over and over
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def save(reference, folder, kind):
    """The released forms: safetensors in shards, or .bin files and their index, as older releases have."""
    reference.save_pretrained(folder, max_shard_size="20KB")
    if kind == "bin":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        state = {name: value.clone() for name, value in reference.state_dict().items()}
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        names = sorted(state)
        index = {}
        for i, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch.save({name: state[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def ours(request, reference, tmp_path_factory):
    folder = save(reference, tmp_path_factory.mktemp(request.param), request.param)
    assert len(list(folder.glob(f"*.{request.param}"))) > 1
    sizes, flat = folders.read(folder)
    model = Llama(**sizes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 32)), jnp.ones((1, 1), bool))
    return model, params.merge(shapes["params"], params.unflatten(flat), "tiny Llama")


def padded(prompts, side):
    """Tokens and mask [n, T]; the padding is a token that would be seen if it were not hidden."""
    length = max(map(len, prompts))
    rows = [([17] * (length - len(p)), p) for p in prompts]
    tokens = [pad + p if side == "left" else p + pad for pad, p in rows]
    mask = [[0] * len(pad) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(pad) for pad, p in rows]
    return np.array(tokens), np.array(mask, bool)


def embed(ours, tokens):
    return ours[0].apply({"params": ours[1]}, jnp.asarray(tokens), method="embed")


def texts(ours, tokens, mask, limit=LIMIT, end=2):
    decode = jax.jit(greedy, static_argnums=(0, 4, 5))
    return np.asarray(decode(ours[0], ours[1], embed(ours, tokens), mask, limit, end))


@functools.cache
def expected(reference, prompt, end=2):
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=LIMIT, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    text = out[0, len(prompt) :].tolist()
    return text + [PADDING] * (LIMIT - len(text))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(reference, ours, side):
    tokens, mask = padded(PROMPTS, side)
    found, _ = ours[0].apply({"params": ours[1]}, embed(ours, tokens), mask)
    for row, keep, prompt in zip(found, mask, PROMPTS, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(row[keep], logits, **CLOSE)


def test_logits_through_the_cache(reference, ours):
    model, weights = ours
    tokens = np.array([[1, 5, 9, 33, 7, 20, 11, 2, 30]])
    with torch.no_grad():
        logits = reference(torch.tensor(tokens)).logits.numpy()
    mask, x = np.ones((1, 12), bool), embed(ours, tokens)
    found, cache = model.apply({"params": weights}, x[:, :4], mask, model.empty(1, 12))
    parts = [found]
    for i in range(4, 9):
        found, cache = model.apply({"params": weights}, x[:, i : i + 1], mask, cache, i)
        parts.append(found)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), logits, **CLOSE)


@pytest.mark.parametrize("start", [0, 7, "traced"])
def test_attention_in_blocks_is_attention_at_once_with_its_gradient(start):
    """Of 1,100 tokens in three blocks, some slots hidden, `start` slots before them."""
    first = 7 if start == "traced" else start
    tokens, slots = 1100, 1100 + first
    assert tokens > 2 * llama.QUERIES
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, n, 2, 4)) for key, n in zip(keys, (tokens, slots, slots), strict=False))
    seen = (jnp.arange(slots) <= first + jnp.arange(tokens)[:, None]) & (jnp.arange(slots) % 5 != 3)
    weights = jax.random.normal(keys[3], q.shape)

    def summed(attend, *more):
        return jax.value_and_grad(lambda q, k, v: jnp.sum(weights * attend(q, k, v, seen[None], *more)), (0, 1, 2))

    wanted = summed(llama._attend)(q, k, v)
    if start == "traced":
        found = jax.jit(lambda q, k, v, start: summed(llama.attend, start)(q, k, v))(q, k, v, 7)
    else:
        found = summed(llama.attend, start)(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_in_a_loop_are_the_layers_one_after_the_other(ours, side):
    model, weights = ours
    tokens, mask = padded(PROMPTS, side)
    x = embed(ours, tokens)
    wanted, _ = model.apply({"params": weights}, x, mask)
    found, cache = model.clone(remat=True).apply({"params": weights}, x, mask)
    assert not cache
    np.testing.assert_allclose(found[mask], wanted[mask], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_texts_of_a_batch_are_those_of_each_prompt(reference, ours, side):
    found = texts(ours, *padded(PROMPTS, side))
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row.tolist() == expected(reference, tuple(prompt))
        assert row.tolist() == texts(ours, *padded([prompt], side))[0].tolist()


def test_a_text_ends_and_the_others_go_on(reference, ours):
    end = expected(reference, tuple(PROMPTS[0]), end=-1)[3]
    wanted = [expected(reference, tuple(p), end) for p in PROMPTS]
    assert wanted[0].index(end) <= 3 and wanted[0][-1] == PADDING
    assert any(end not in text for text in wanted)
    assert texts(ours, *padded(PROMPTS, "left"), end=end).tolist() == wanted


def test_too_long(ours):
    with pytest.raises(ValueError, match="at most 64 positions, found 6"):
        texts(ours, *padded(PROMPTS, "left"), limit=59)


def test_back_to_a_folder_that_transformers_opens(reference, tmp_path):
    sizes, flat = folders.read(save(reference, tmp_path / "theirs", "safetensors"))
    folders.write(tmp_path / "ours", sizes, flat, shard=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.rms_norm_eps == 1e-5 and again.config.max_position_embeddings == 64
    state = again.state_dict()
    assert state.keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(state[name], value), name
    sizes_again, flat_again = folders.read(tmp_path / "ours")
    assert sizes_again == sizes and flat_again.keys() == flat.keys()
    assert all(np.array_equal(flat_again[name], flat[name]) for name in flat)


def test_the_tokenizer_goes_along_and_nothing_else(reference, tmp_path):
    sizes, flat = folders.read(save(reference, tmp_path / "theirs", "safetensors"))
    given = {name: name.encode() for name in (*folders.TOKENIZER[:3], "README.md")}
    for name, content in given.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    folders.write(tmp_path / "ours", sizes, flat, tmp_path / "theirs")
    there = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    for name in folders.TOKENIZER[:3]:
        assert there[name] == given[name]
    assert "README.md" not in there


def test_a_folder_is_written_whole_or_not_at_all(reference, tmp_path, monkeypatch):
    sizes, flat = folders.read(save(reference, tmp_path / "theirs", "safetensors"))
    write, target = folders.files.write, tmp_path / "new" / "ours"

    def full(path, arrays):
        assert not target.exists()
        if path.name.startswith("model-00002"):
            raise OSError("No space left on device")
        write(path, arrays)

    with monkeypatch.context() as broken:
        broken.setattr(folders.files, "write", full)
        with pytest.raises(OSError, match="No space"):
            folders.write(target, sizes, flat, shard=20_000)
    assert not any((tmp_path / "new").iterdir())
    folders.write(target, sizes, flat, shard=20_000)
    with pytest.raises(WeightsError, match="is there already"):
        folders.write(target, sizes, flat)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]


@pytest.mark.parametrize("change", [
    {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"rope_parameters": {"rope_type": "linear"}},
])  # fmt: skip
def test_other_llamas_are_refused(reference, tmp_path, change):
    save(reference, tmp_path, "safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match="expected a plain Llama 2"):
        folders.read(tmp_path)
