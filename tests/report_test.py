"""task=report from one end to the other on small films: what is written, what is gone on with, what is refused."""

import json
import os
import signal
from pathlib import Path

import fake_trees
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import report as report_config
from raddino_jax import encoders, hosts, logs, prepare
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.data.pairs import PairError
from raddino_jax.evals import decode, figures, patches, report, tune, writer_folder
from raddino_jax.evals.report import ReportError
from raddino_jax.evals.tokenizer import TokenizerError
from raddino_jax.models import llava
from raddino_jax.models.clip import CLIPViT
from raddino_jax.models.vit import ViT

SIZE = 32


def encoder(network=None):
    network = network or ViT(width=16, depth=2, heads=2, patch_size=8, image_size=SIZE, layerscale=1.0)
    settings = Preprocess(SIZE, SIZE, (0.5,), (0.25,))
    return encoders.Encoder("tiny", network, encoders.random_params(network, SIZE), settings)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(encoders, "load", lambda *_, **__: encoder())


def config(folder: Path, arguments="", **fields) -> ConfigDict:
    """The real config on 60 films of 32 pixels, with a language model of a few thousand parameters."""
    given = report_config.get_config(f"tiny,{arguments}")
    given.data.update(films=60, image_size=SIZE)
    given.llm_sizes.update(vocabulary=450, width=32, depth=2, heads=2, hidden=48, positions=256)
    given.update(batch_size=8, steps=4, length=256, new_tokens=12, decode_batch=4, log_every=1, checkpoint_every=4)
    given.update(join=1, lr=1e-3, encoder="tiny", features_dir=str(folder / "features"), eval_every=2)
    given.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return given


def start(given, workdir: Path) -> list[dict]:
    """As main does it."""
    workdir.mkdir(parents=True, exist_ok=True)
    report.run(given, workdir)
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, its config and its rows."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "load", lambda *_, **__: encoder())
        given = config(folder)
        return folder / "run", given, start(given, folder / "run")


def task_of(given, workdir: Path) -> report.Task:
    return report.Task.open(given, workdir)


def predictions(workdir: Path) -> list[str]:
    return [line["prediction"] for line in decode.read(workdir)]


# --- what a run leaves --------------------------------------------------------------------------------------------


def test_a_run_trains_writes_and_scores(done):
    workdir, given, rows = done
    metrics = logs.read_metrics(workdir)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4] and metrics[-1]["loss"] < metrics[0]["loss"]
    assert [("val_loss" in row) for row in metrics] == [False, True, False, True]
    task = task_of(given, workdir)
    lines = decode.read(workdir)
    expected = [task.source.pairs[place] for place in task.source.split("test")]
    assert [(line["id"], line["reference"]) for line in lines] == [(pair.id, pair.text) for pair in expected]
    found = {(row["metric"], row["class"]): row for row in rows}
    for metric in ("rouge_l", "bleu_4", "findings_f1", "names_f1"):
        assert 0 <= found[metric, "macro"]["value"] <= 1
    assert found["chexbert_f1", "macro"]["value"] is None and "weights" in found["chexbert_f1", "macro"]["reason"]
    assert {(row["task"], row["dataset"], row["encoder"], row["data"]) for row in rows} == {
        ("report", "synthetic", "tiny", "synthetic")
    }


def test_the_first_films_are_kept_and_shown_with_what_is_written_for_them(done):
    workdir, given, _ = done
    task, picture = task_of(given, workdir), decode.gallery(workdir)
    lines = decode.read(workdir)[: decode.SHOWN]
    assert [row["prediction"] for row in picture.numbers] == [line["prediction"] for line in lines]
    for number, place in enumerate(task.tested[: decode.SHOWN]):
        kept = np.asarray(Image.open(workdir / "films" / f"{number}.png"))
        np.testing.assert_array_equal(kept, task.source.film(place))
    drawn = [axis.texts[0].get_text() for axis in picture.figure.axes if axis.texts]
    assert [text.replace("\n", " ") for text in drawn] == [line["reference"] for line in lines]
    assert decode.gallery(workdir / "none") is None
    (workdir / "config.json").write_text(given.to_json())
    figures.run(given, workdir)
    assert {p.stem for p in (workdir / "figures").glob("*.png")} == {"training", "results", "reports"}
    assert "SYNTHETIC" in (workdir / "report.html").read_text()


def test_whatever_a_model_writes_can_be_drawn(tmp_path):
    (tmp_path / "films").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "films" / "0.png")
    line = {"id": "a", "reference": "", "prediction": "$\\frac$ " + "word " * 200}
    (tmp_path / decode.WHOLE).write_text(json.dumps(line) + "\n")
    assert decode.gallery(tmp_path).png()[:4] == b"\x89PNG"


def test_transformers_writes_the_same_reports_from_the_exported_folder(done):
    """Its Llama, the projector by hand, greedy from spliced embeddings."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    workdir, given, _ = done
    folder = workdir / "writer"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    p = {name: torch.tensor(value) for name, value in load_file(folder / "projector.safetensors").items()}
    task, eye = task_of(given, workdir), encoder()
    for place, line in zip(task.source.split("test")[:3], decode.read(workdir), strict=False):
        seen = torch.tensor(np.array(eye(eye.preprocess([task.source.film(place)]))["patches"]).reshape(1, 16, 16))
        hidden = torch.nn.functional.gelu(seen @ p["model.mm_projector.0.weight"].T + p["model.mm_projector.0.bias"])
        projected = hidden @ p["model.mm_projector.2.weight"].T + p["model.mm_projector.2.bias"]
        before, after = ([1, *words.encode(llava.SYSTEM, add_special_tokens=False)],
                         words.encode(llava.INSTRUCTION, add_special_tokens=False))  # fmt: skip
        embed = model.get_input_embeddings()
        x = torch.cat([embed(torch.tensor([before])), projected, embed(torch.tensor([after]))], dim=1)
        with torch.no_grad():
            found = model.generate(
                inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), max_new_tokens=12, do_sample=False,
                pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
        assert task.tokenizer.decode(found[0]) == line["prediction"]


def test_a_finished_run_is_only_told(done, monkeypatch, capsys):
    workdir, given, rows = done
    monkeypatch.setattr(report.Task, "open", lambda *_: pytest.fail("a finished run was opened again"))
    assert start(given, workdir) == rows
    assert "report: tiny  findings_f1 micro" in capsys.readouterr().err


def test_a_tuned_model_writes_the_same_without_training(done, tmp_path):
    workdir, given, _ = done
    again = config(
        tmp_path, init="weights", llm=str(workdir / "writer"), steps=0, epochs=0, features_dir=given.features_dir
    )
    start(again, tmp_path / "again")
    assert (tmp_path / "again" / "reports.jsonl").read_text() == (workdir / "reports.jsonl").read_text()
    assert not (tmp_path / "again" / "checkpoints").exists()


def test_iu_xray_is_an_external_test_of_a_tuned_model(done, tmp_path):
    workdir, _, _ = done
    tree = fake_trees.iu_xray(tmp_path)
    prepare.prepare("iu_xray", str(tree.raw), str(tmp_path / "prepared"), size=tree.size, workers=1)
    given = config(tmp_path, "dataset=iu_xray", init="weights", llm=str(workdir / "writer"))
    given.data.data_dir = str(tmp_path / "prepared")
    rows = start(given, tmp_path / "iu")
    assert len(decode.read(tmp_path / "iu")) == 2 and not (tmp_path / "iu" / "writer").exists()
    assert {(row["dataset"], row["data"]) for row in rows} == {("iu_xray", "real")}
    assert "findings_f1" not in {row["metric"] for row in rows}


def test_the_film_decides_what_is_written(tmp_path):
    """Learned by heart, each of a few films calls forth its own text, whichever text it is set beside."""
    given = config(
        tmp_path, data__films=24, steps=60, lr=3e-3, batch_size=16, split="train", new_tokens=44, eval_every=0
    )
    given.llm_sizes.update(width=64, heads=4, hidden=128)
    (tmp_path / "run").mkdir()
    assert report.write(given, tmp_path / "run")
    lines = decode.read(tmp_path / "run")
    texts = [line["reference"] for line in lines]
    assert len(set(texts)) > 10 and [line["prediction"] for line in lines] == texts
    other = given.copy_and_resolve_references()
    other.update(init="weights", llm=str(tmp_path / "run" / "writer"), steps=0, epochs=0, shuffle_images=True)
    task = task_of(other, tmp_path)
    decode.run(task, task.params, tmp_path)
    assert predictions(tmp_path) == [task.source.pairs[task.shown[place]].text for place in task.tested]


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 700])
def test_writing_goes_on_where_it_was_cut(done, tmp_path, monkeypatch, cut):
    workdir, given, _ = done
    whole = (workdir / "reports.jsonl").read_text()
    task = task_of(given, workdir)
    (tmp_path / decode.PART).write_text(whole[:cut])
    params, left = tune_params(workdir, task), []
    real = decode.answers
    monkeypatch.setattr(
        decode, "answers", lambda task, params, batches: real(task, params, (left.append(b) or b for b in batches))
    )
    decode.run(task, params, tmp_path)
    assert (tmp_path / decode.WHOLE).read_text() == whole and not (tmp_path / decode.PART).exists()
    assert len(left) == -(-(len(task.tested) - whole[:cut].count("\n")) // 4)  # what was there is not written again


def tune_params(workdir: Path, task: report.Task) -> dict:
    """Of a finished run."""
    path = workdir / "writer"
    own = task.config.copy_and_resolve_references()
    own.update(init="weights", llm=str(path))
    return report.Task.open(own, workdir).params


def test_asked_to_end_while_writing_keeps_what_is_written_and_goes_on_to_the_same_text(done, tmp_path, capsys):
    workdir, given, _ = done
    task = task_of(given, workdir)
    params, said = tune_params(workdir, task), []

    def beat(count, doing):
        said.append((count, doing))
        if len(said) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert decode.run(task, params, tmp_path, beat) is False
    assert said == [(4, "writing")] and "asked to end" in capsys.readouterr().err
    assert (tmp_path / decode.PART).read_text().count("\n") == 4 and not (tmp_path / decode.WHOLE).exists()
    assert decode.run(task, params, tmp_path)
    assert (tmp_path / decode.WHOLE).read_text() == (workdir / decode.WHOLE).read_text()


def test_reports_of_other_films_are_not_gone_on_with(done, tmp_path):
    workdir, given, _ = done
    whole = (workdir / "reports.jsonl").read_text()
    other = {"id": "synthetic-0", "reference": "x", "prediction": "y"}
    (tmp_path / decode.PART).write_text(json.dumps(other) + "\n")
    task = task_of(given, workdir)
    decode.run(task, tune_params(workdir, task), tmp_path)
    assert (tmp_path / decode.WHOLE).read_text() == whole


@pytest.mark.parametrize("fields", [dict(decode_batch=1), dict(decode_batch=8), dict(features_gib=0.0)])
def test_batches_and_where_features_come_from_change_no_report(done, tmp_path, fields):
    workdir, given, _ = done
    given = config(tmp_path, **fields)
    given.update(init="weights", llm=str(workdir / "writer"), steps=0, epochs=0)
    report.write(given, tmp_path)
    assert predictions(tmp_path) == predictions(workdir)


def test_features_in_the_step_train_as_those_kept_do(done, tmp_path):
    workdir, _, _ = done
    given = config(tmp_path, features_gib=0.0)
    start(given, tmp_path / "run")
    found, kept = ([row["loss"] for row in logs.read_metrics(folder)] for folder in (tmp_path / "run", workdir))
    np.testing.assert_allclose(found, kept, rtol=1e-5)
    assert not (tmp_path / "features").exists()


def test_who_is_asked_to_stop_scores_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "run", lambda *_, **__: None)
    (tmp_path / "run").mkdir()
    assert report.write(config(tmp_path), tmp_path / "run") is False
    report.run(config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


# --- batches ------------------------------------------------------------------------------------------------------


def test_batches_hold_the_text_and_the_patches_of_a_pair(done):
    workdir, given, _ = done
    task, eye = task_of(given, workdir), encoder()
    batch = next(task.batches(0))
    assert batch["features"].shape == (8, 16, 16) and batch["tokens"].shape == batch["labels"].shape
    assert batch["tokens"].shape[1] % report.ROUND == 0
    by_text = {}
    for place in task.source.split("train"):
        by_text.setdefault(task.source.pairs[place].text, []).append(place)
    for row in range(8):
        text = task.tokenizer.decode(batch["labels"][row][batch["labels"][row] >= 0])
        films = [eye(eye.preprocess([task.source.film(place)]))["patches"] for place in by_text[text]]
        nearest = min(np.abs(np.asarray(film).reshape(16, 16) - batch["features"][row]).max() for film in films)
        assert nearest < 1e-4


def test_a_batch_depends_on_its_step_alone_and_an_epoch_has_every_pair_once(done):
    workdir, given, _ = done
    task = task_of(given, workdir)
    whole, later = task.batches(0), task.batches(2)
    for _ in range(2):
        next(whole)
    third = next(whole)
    for name, value in next(later).items():
        np.testing.assert_array_equal(value, third[name])
    train = task.source.split("train")
    given = given.copy_and_resolve_references()
    given.update(steps=0, epochs=1, batch_size=len(train))
    batch = next(task_of(given, workdir).batches(0))
    texts = sorted(task.tokenizer.decode(row[row >= 0]) for row in batch["labels"])
    assert texts == sorted(task.source.pairs[place].text for place in train)


def test_processes_share_out_the_rows_of_a_batch(done, monkeypatch):
    workdir, given, _ = done
    alone = next(task_of(given, workdir).batches(0))
    task, parts = task_of(given, workdir), []
    _ = task.features
    for index in range(2):
        monkeypatch.setattr(hosts, "count", lambda: 2)
        monkeypatch.setattr(hosts, "index", lambda index=index: index)
        parts.append(next(task.batches(0)))
    for name, value in alone.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_validation_counts_every_pair_once(done):
    workdir, given, _ = done
    task = task_of(given, workdir)
    batches = list(task.val_batches())
    texts = [task.tokenizer.decode(row[row >= 0]) for batch in batches for row in batch["labels"] if (row >= 0).any()]
    assert texts == [task.source.pairs[place].text for place in task.source.split("val")]
    assert {len(batch["labels"]) for batch in batches} == {8}


def test_long_texts_are_cut_and_counted(done, capsys):
    workdir, given, _ = done
    task = task_of(given, workdir)
    given = given.copy_and_resolve_references()
    given.length = len(task.prompt) + 5
    examples, length = task_of(given, workdir).examples(task.source.split("train"))
    assert length == len(task.prompt) + 5 and max(len(tokens) for tokens, _ in examples.values()) == length
    assert "are cut" in capsys.readouterr().err


def test_shuffled_images_are_of_other_patients_of_the_same_split(done, tmp_path):
    workdir, given, _ = done
    given = given.copy_and_resolve_references()
    given.shuffle_images = True
    task = task_of(given, workdir)
    pairs = task.source.pairs
    for place, shown in enumerate(task.shown):
        assert pairs[place].patient != pairs[shown].patient and pairs[place].split == pairs[shown].split
    own = task_of(config(tmp_path, features_dir=given.features_dir), workdir)
    train = task.source.split("train")
    (_, exchanged), (_, true) = next(task.seen([train])), next(own.seen([train]))
    np.testing.assert_array_equal(exchanged["features"], own.features[np.searchsorted(own.used, task.shown[train])])
    assert np.abs(exchanged["features"] - true["features"]).max() > 0.01
    assert report.called(given) == "tiny (shuffled images)"
    decode._keep_films(task, tmp_path / "films")
    kept = np.asarray(Image.open(tmp_path / "films" / "0.png"))
    np.testing.assert_array_equal(kept, task.source.film(task.shown[task.tested[0]]))  # what the model was shown


def test_a_narrow_model_from_scratch_begins_with_sums_as_large_as_llamas(done):
    """0.02 at a width of 4,096; words are drawn as they are."""
    workdir, given, _ = done
    weights = task_of(given, workdir).params["llama"]
    layer = weights["layers_0"]
    for kernel in (layer["attn"]["q"]["kernel"], layer["down"]["kernel"], weights["lm_head"]["kernel"]):
        assert kernel.std() * len(kernel) ** 0.5 == pytest.approx(0.02 * 64, rel=0.1)
    assert weights["words"].std() == pytest.approx(0.02, rel=0.05) and (weights["norm"]["scale"] == 1).all()


# --- encoders -----------------------------------------------------------------------------------------------------


def test_clip_is_read_before_its_last_block_and_others_at_the_end(monkeypatch):
    clip = encoder(CLIPViT(16, 3, 2, patch_size=8, image_size=SIZE))
    monkeypatch.setattr(encoders, "load", lambda *_, **__: clip)
    film = np.arange(48 * 40, dtype=np.uint32).reshape(48, 40).astype(np.uint8)
    for name, layer, given in (("clip_vitl14_336", 0, -2), ("tiny", 0, -1), ("clip_vitl14_336", -3, -3)):
        fields = report_config.get_config(f"encoder={name},feature_layer={layer}")
        eye = patches.Eye.open(fields, "float32")
        assert eye.layer == given and eye.shape == (16, 16)
        found = np.asarray(eye(eye.frozen, eye.levels(film)[None]))
        block = clip.stages(clip.preprocess([film]))[f"blocks_{3 + given}"][:, 1:]
        np.testing.assert_allclose(found, block, atol=2e-4)
    with pytest.raises(PairError, match="feature_layer=-4: tiny has 3 blocks, no block -4"):
        patches.Eye.open(report_config.get_config("encoder=tiny,feature_layer=-4"), "float32")


def test_neighbouring_patches_may_be_joined():
    film = np.arange(48 * 40, dtype=np.uint32).reshape(48, 40).astype(np.uint8)
    one = patches.Eye.open(report_config.get_config("encoder=tiny"), "float32")
    four = patches.Eye.open(report_config.get_config("encoder=tiny,join=2"), "float32")
    assert one.shape == (16, 16) and four.shape == (4, 64)
    each, joined = (np.asarray(eye(eye.frozen, eye.levels(film)[None]))[0] for eye in (one, four))
    for token, of in enumerate([(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]):
        np.testing.assert_allclose(joined[token], each[list(of)].ravel(), atol=1e-5)
    with pytest.raises(PairError, match="join=3 does not divide the 4 x 4 patches of tiny"):
        patches.Eye.open(report_config.get_config("encoder=tiny,join=3"), "float32")


# --- LoRA ---------------------------------------------------------------------------------------------------------


def test_lora_is_exported_merged_and_told_apart(done, tmp_path):
    _, given, _ = done
    given = config(tmp_path, lora=2, lr=1e-2, features_dir=given.features_dir)
    rows = start(given, tmp_path / "run")
    assert {row["encoder"] for row in rows} == {"tiny (LoRA 2)"}
    again = config(tmp_path, steps=0, epochs=0, init="weights", llm=str(tmp_path / "run" / "writer"))
    start(again, tmp_path / "again")
    assert predictions(tmp_path / "again") == predictions(tmp_path / "run")
    base, tuned = task_of(given, tmp_path / "run").params, task_of(again, tmp_path / "again").params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), base["llama"], tuned["llama"])
    assert moved["layers_0"]["attn"]["q"]["kernel"] > 0 and moved["words"] == moved["lm_head"]["kernel"] == 0


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, told", [
    (dict(init="weights"), "llm is empty: the folder of a language model"),
    (dict(dataset="chexpert"), "dataset='chexpert' must be one of mimic_cxr, iu_xray, folder, synthetic"),
    (dict(dataset="iu_xray"), "iu_xray is an external test: set llm to the writer/"),
    (dict(encoder=""), "encoder is empty"),
    (dict(llm="vicuna"), "init=random makes no use of llm"),
    (dict(batch_size=10, accumulate=4), "batch_size=10 must be a multiple of accumulate=4"),
    (dict(split="dev"), "split='dev' must be one of"),
    (dict(lr=0.0), "lr=0.0 must be positive"),
    (dict(lora=-1), "lora=-1 is a rank"),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused_before_anything_is_read(tmp_path, monkeypatch, fields, told):
    monkeypatch.setattr(report.Task, "open", lambda *_: pytest.fail("something was read"))
    with pytest.raises(ReportError, match=told):
        report.run(config(tmp_path, **fields), tmp_path)


def test_on_a_tpu_reports_are_written_by_all_chips(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ReportError, match="decode_batch=4 must be a multiple of the 8 chips"):
        report.check(config(tmp_path))
    report.check(config(tmp_path, decode_batch=16))


def _fails_to_load(*_, **__):
    pytest.fail("an encoder was loaded")


def test_a_tokenizer_of_another_model_is_refused_before_the_encoder_is_loaded(done, tmp_path, monkeypatch):
    workdir, _, _ = done
    monkeypatch.setattr(encoders, "load", _fails_to_load)
    path = workdir / "writer" / "tokenizer.model"
    with pytest.raises(TokenizerError, match="has 450 tokens, the language model 512"):
        task_of(config(tmp_path, llm_sizes__vocabulary=512, tokenizer=str(path)), tmp_path)
    with pytest.raises(WeightsError, match="config.json: no config of a Llama"):
        (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
        task_of(config(tmp_path, init="weights", llm=str(tmp_path)), tmp_path)
    with pytest.raises(ReportError, match="strata: synthetic has no column ward; it has effusion"):
        task_of(config(tmp_path, strata=("ward",)), tmp_path)


@pytest.mark.parametrize("fields, told", [
    (dict(length=400), "a prompt has .* the language model 256 positions"),
    (dict(length=20), "a prompt has .* 16 of them patches"),
    (dict(new_tokens=250), "room for new_tokens=250"),
    (dict(data__films=3), "has no pairs"),
])  # fmt: skip
def test_what_has_no_room_is_refused(tmp_path, fields, told):
    with pytest.raises(ReportError, match=told):
        task_of(config(tmp_path, **fields), tmp_path)


def test_a_projector_reads_the_patches_it_was_made_for(done, tmp_path):
    workdir, _, _ = done
    other = config(tmp_path, init="weights", llm=str(workdir / "writer"), encoder="mrm")
    with pytest.raises(WeightsError, match="was tuned to encoder 'tiny', not 'mrm'"):
        task_of(other, tmp_path)


def test_a_folder_is_written_whole_and_never_over_another(done, tmp_path, monkeypatch):
    workdir, given, _ = done
    task = task_of(given, workdir)
    with pytest.raises(WeightsError, match="is there already"):
        writer_folder.write(workdir / "writer", task.params, task.sizes, task.tokenizer.path, task.made)
    monkeypatch.setattr(writer_folder.rules, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer_folder.write(tmp_path / "new", task.params, task.sizes, task.tokenizer.path, task.made)
    assert list(tmp_path.iterdir()) == []


def test_strata_are_scored_apart(done, tmp_path):
    workdir, given, _ = done
    given = config(
        tmp_path, init="weights", llm=str(workdir / "writer"), steps=0, epochs=0, strata=("sex",),
        features_dir=given.features_dir,
    )  # fmt: skip
    rows = start(given, tmp_path / "run")
    strata = {row["stratum"] for row in rows if row["metric"] == "rouge_l"}
    assert strata == {"", "sex=F", "sex=M", "sex: all", "sex: worst"}
    line = decode.read(tmp_path / "run")[0]
    known = {pair.id: pair.facts["sex"] for pair in task_of(given, tmp_path).source.pairs}
    assert line["sex"] == known[line["id"]]
