"""BERT against transformers' BertModel, and CheXbert: its checkpoint, its words, its labels."""

import jax
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from raddino_jax import params
from raddino_jax.evals import chexbert, report_scores
from raddino_jax.models.bert import Bert, CheXbert

SIZES = dict(vocabulary=60, width=24, depth=2, heads=3, hidden=48, positions=64)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "there", "is", "heart", "effusion", "pleural", "large",
         "pneumo", "##thorax", "##s", "normal", "size", ".", ",", "left", "/"]  # fmt: skip
REPORTS = ["No pleural effusion.", "Heart size is normal,  no pneumothorax.\n", "", "large left/pleural hearts " * 40]


class Reference(torch.nn.Module):
    """CheXbert as its authors wrote it: a BertModel, and a linear layer per class on its first token."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.bert = BertModel(BertConfig(
            vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
            max_position_embeddings=64,
        ))  # fmt: skip
        self.linear_heads = torch.nn.ModuleList([torch.nn.Linear(24, n) for n in chexbert.CHOICES])
        for parameter in self.parameters():  # so that no bias is zero and no scale one
            parameter.data += 0.3 * torch.randn_like(parameter)

    def forward(self, tokens, mask):
        return [head(self.bert(tokens, attention_mask=mask)[0][:, 0]) for head in self.linear_heads]


@pytest.fixture
def reference():
    return Reference().eval()


@pytest.fixture
def released(tmp_path, reference):
    """chexbert.pth as released, and the vocabulary beside it."""
    named = {f"module.{name}": value for name, value in reference.state_dict().items()}
    named["module.bert.embeddings.position_ids"] = torch.arange(64)[None]  # of the transformers of its day
    torch.save({"epoch": 3, "model_state_dict": named, "optimizer_state_dict": {}}, tmp_path / "chexbert.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "chexbert.pth"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(chexbert, "LONGEST", 64)
    return CheXbert(chexbert.CHOICES, Bert(**SIZES))


def test_every_layer_is_that_of_transformers(reference, released, small):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60, (3, 20))
    mask = (np.arange(20) < np.array([[20], [13], [1]])).astype(int)
    loaded = chexbert.load(str(released), small)
    last = small.bert.apply({"params": loaded["bert"]}, tokens, mask)
    logits = small.apply({"params": loaded}, tokens, mask)
    with torch.no_grad():
        given = torch.tensor(tokens), torch.tensor(mask)
        expected = reference.bert(given[0], attention_mask=given[1])[0].numpy()
        expected_logits = reference(*given)
    kept = mask[..., None] > 0
    np.testing.assert_allclose(np.where(kept, last, 0), np.where(kept, expected, 0), atol=2e-5)
    for ours, theirs in zip(logits, expected_logits, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_bert_base_has_as_many_parameters_as_transformers_says():
    blank = jax.ShapeDtypeStruct((1, 1), "int32")
    shapes = jax.eval_shape(CheXbert(chexbert.CHOICES).init, jax.random.key(0), blank, blank)["params"]
    with torch.device("meta"):
        theirs = sum(p.numel() for p in BertModel(BertConfig(), add_pooling_layer=False).parameters())
    assert params.count(shapes["bert"]) == theirs == 108_891_648
    assert params.count(shapes) - theirs == 769 * (13 * 4 + 2)


def test_labels_are_those_of_the_authors_reading(reference, released, small):
    """Their way: tokens of the cleaned text, cut at the longest with [SEP] last, padded; the largest logit."""
    words = BertTokenizer(str(released.with_name("vocab.txt")), do_lower_case=True)
    labels = chexbert.Labeler(str(released), network=small)(REPORTS)
    for report, found in zip(REPORTS, labels, strict=True):
        inner = words.convert_tokens_to_ids(words.tokenize(" ".join(report.split())))
        ids = torch.tensor([[words.cls_token_id, *inner[:62], words.sep_token_id]])
        with torch.no_grad():
            expected = [int(logits.argmax()) for logits in reference(ids, torch.ones_like(ids))]
        assert found.tolist() == expected


def test_equal_reports_have_equal_labels_whatever_stands_beside_them(released, small):
    read = chexbert.Labeler(str(released), network=small)
    labels = read(REPORTS * 12)  # more than one batch, each text once
    np.testing.assert_array_equal(labels.reshape(12, 4, 14), np.broadcast_to(read(REPORTS), (12, 4, 14)))


def test_macro_f1_counts_uncertain_as_negative(released, monkeypatch):
    """Of the reports, named by number: positive in class 0 or uncertain there."""
    labels = np.array([[1, *[0] * 13], [3, *[0] * 13], [2, *[0] * 13]])
    monkeypatch.setattr(chexbert, "Labeler", lambda *_: lambda reports: labels[[int(r) for r in reports]])
    rows = report_scores.score(["0", "1", "2", "0"], ["0", "0", "1", "2"], resamples=3)
    whole = {row["class"]: row["whole"] for row in rows if row["metric"] == "chexbert_f1"}
    assert len(whole) == 15
    assert whole["Enlarged Cardiomediastinum"] == pytest.approx(2 / (2 + 1 + 1))
    assert whole["macro"] == pytest.approx(0.5 / 14)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.unlink(), "chexbert.pth"),
        (lambda path: path.with_name("vocab.txt").unlink(), "vocab.txt is not there.*graders.vocab"),
        (lambda path: path.write_text("<html>"), "an HTML or XML page"),
        (lambda path: torch.save({"a": torch.ones(2)}, path), "a .2,.: matched by 0 rules"),
    ],
)
def test_weights_and_words_that_cannot_be_used_are_named(released, small, spoil, words):
    spoil(released)
    with pytest.raises(chexbert.CheXbertError, match=words):
        chexbert.Labeler(str(released), network=small)


def test_weights_of_another_size_are_refused(released):
    with pytest.raises(chexbert.CheXbertError, match=r"bert/kinds: expected \(2, 768\), found \(2, 24\)"):
        chexbert.Labeler(str(released))


def test_more_tokens_than_positions_are_refused():
    blank = jax.ShapeDtypeStruct((1, 65), "int32")
    with pytest.raises(ValueError, match="at most 64 tokens, found 65"):
        jax.eval_shape(Bert(**SIZES).init, jax.random.key(0), blank, blank)
