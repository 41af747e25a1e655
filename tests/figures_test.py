"""Pictures and the numbers behind them: maps against closed forms, curves against the rows they draw, the page."""

import csv
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.decomposition import PCA

from configs import figures as config_file
from raddino_jax import encoders, preprocess
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.data import synthetic
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import curves, figures, heads, maps, overlays, picture
from raddino_jax.models.clip import CLIPViT
from raddino_jax.models.vit import ViT

SIDE, PATCH = 40, 8


@pytest.fixture(scope="module")
def encoder():
    """A small transformer with weights large enough that patches and heads differ."""
    network = ViT(width=32, depth=3, heads=4, patch_size=PATCH, image_size=SIDE, layerscale=1.0)
    settings = Preprocess(SIDE, SIDE, (0.5,), (0.25,))
    weights = encoders.random_params(network, SIDE)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: x + 0.15 * rng.normal(size=x.shape).astype(np.float32), weights)
    return encoders.Encoder("small", network, weights, settings)


@pytest.fixture(scope="module")
def films():
    source = synthetic.Synthetic(4, 96)
    return [source[i] for i in range(4)]


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- where patches lie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, settings", [
    ((40, 40), {}), ((100, 160), {}), ((160, 100), {}), ((90, 120), dict(resize=48, crop=40)),
    ((60, 100), dict(pad=80)),
])  # fmt: skip
def test_a_point_and_its_patch_find_each_other(shape, settings):
    """Against preprocessing itself: a bright patch of pixels comes out in the patch that the window says."""
    stated = Preprocess(**(dict(resize=SIDE, crop=SIDE, mean=(0.0,), std=(1.0,)) | settings))
    where = maps.window(SimpleNamespace(settings=stated, image_size=SIDE, patch_size=PATCH), shape)
    for place in [(0, 2), (2, 3), (4, 1)]:
        x, y = where.pixel(*place)
        if not (0 <= x < shape[1] and 0 <= y < shape[0]):
            continue  # padding
        assert where.patch(x, y) == place
        film = np.zeros(shape, np.uint8)
        reach = where.side / 5 / 3  # well inside the patch
        film[int(y - reach) : int(y + reach) + 1, int(x - reach) : int(x + reach) + 1] = 255
        square = preprocess.square(film, stated)
        bright = np.add.reduceat(np.add.reduceat(square, range(0, SIDE, PATCH), 0), range(0, SIDE, PATCH), 1)
        assert np.unravel_index(bright.argmax(), bright.shape) == place


def test_a_point_outside_the_square_is_refused():
    where = maps.Window(30, 0, 100, (5, 5))
    assert where.patch(30, 0) == (0, 0) and where.patch(129, 99) == (4, 4)
    for point in ((29, 50), (130, 50), (80, 100), (80, -1)):
        with pytest.raises(DataError, match="x from 30 to 130, y from 0 to 100"):
            where.patch(*point)


# --- arrays ---------------------------------------------------------------------------------------------------


def test_attention_is_what_the_block_computes(encoder, films):
    """softmax(q k / sqrt d) of the class token, from the stream that enters the block."""
    batch = encoder.preprocess(films)
    stages = encoder.stages(batch)
    for layer, before in [(-1, "blocks_1"), (1, "blocks_0"), (0, "embedded")]:
        block = encoder.params[f"blocks_{layer % 3}"]
        x = np.asarray(stages[before], np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * np.asarray(block["norm1"]["scale"]) + np.asarray(block["norm1"]["bias"])
        qkv = x @ np.asarray(block["attn"]["qkv"]["kernel"]) + np.asarray(block["attn"]["qkv"]["bias"])
        q, k = (qkv[..., i * 32 : (i + 1) * 32].reshape(4, 26, 4, 8) for i in range(2))
        scores = np.einsum("nhd,nkhd->nhk", q[:, 0], k) / np.sqrt(8)
        expected = np.exp(scores - scores.max(-1, keepdims=True))
        expected = (expected / expected.sum(-1, keepdims=True))[..., 1:].reshape(4, 4, 5, 5)
        np.testing.assert_allclose(maps.attention_maps(encoder, films, layer), expected, atol=1e-5)
    with pytest.raises(DataError, match="layer=3: expected a block from 0 to 2"):
        maps.attention_maps(encoder, films, 3)


def test_similarity_is_the_cosine_with_the_patch_under_the_point(encoder, films):
    points = [(10, 80), (95, 0)]
    found = maps.similarity_maps(encoder, films, points)
    patches = np.asarray(encoder(encoder.preprocess(films))["patches"], np.float64)
    for heat, place in zip(found, [(4, 0), (0, 4)], strict=True):
        query = patches[0][place]
        lengths = np.linalg.norm(patches, axis=-1) * np.linalg.norm(query)
        np.testing.assert_allclose(heat, patches @ query / lengths, atol=1e-5)
        assert np.unravel_index(heat[0].argmax(), (5, 5)) == place


def test_components_are_those_of_sklearn(encoder, films):
    scores, share = maps.component_maps(encoder, films)
    flat = maps.unit_patches(encoder, films).reshape(-1, 32)
    theirs = PCA(3).fit(flat)
    expected = theirs.transform(flat).reshape(4, 5, 5, 3)
    signs = np.sign((scores * expected).sum((0, 1, 2)))
    np.testing.assert_allclose(scores, expected * signs, atol=1e-4)
    np.testing.assert_allclose(share[:3], theirs.explained_variance_ratio_, rtol=1e-4)


def test_finer_maps_come_from_a_larger_square(encoder, films):
    finer = heads.sized(encoder, 80)
    assert maps.attention_maps(finer, films[:1]).shape == (1, 4, 10, 10)
    assert encoder.image_size == SIDE and heads.sized(encoder, 0) is encoder
    with pytest.raises(DataError, match="image_size=50: small takes multiples of 8 pixels"):
        heads.sized(encoder, 50)


# --- pictures of films ----------------------------------------------------------------------------------------


def test_pictures_of_films_hold_every_number_they_draw(encoder, films, tmp_path):
    wide = [films[0], np.pad(films[1], ((0, 0), (0, 60)))]
    for one in (maps.attention(encoder, wide, heads=(1, 3)), maps.similarity(encoder, wide, [(20, 30)]),
                maps.components(encoder, wide)):
        one.save(tmp_path)
        assert Image.open(tmp_path / f"{one.name}.png").size[0] > 250
        table = rows_of(tmp_path / f"{one.name}_maps.csv")
        assert len(table) == 2 * 25 and {row["film"] for row in table} == {"1", "2"}
    heat = maps.similarity_maps(encoder, wide, [(20, 30)])[0]
    stated = rows_of(tmp_path / "similarity_maps.csv")
    np.testing.assert_allclose([float(row["point_1"]) for row in stated], heat.ravel(), rtol=1e-6)
    best = rows_of(tmp_path / "similarity.csv")[1]
    place = np.unravel_index(heat[1].argmax(), (5, 5))
    assert (float(best["best_x"]), float(best["best_y"])) == maps.window(encoder, wide[1].shape).pixel(*place)
    attended = rows_of(tmp_path / "attention_maps.csv")
    np.testing.assert_allclose(
        [float(row["head_2"]) for row in attended], maps.attention_maps(encoder, wide)[:, 2].ravel(), rtol=1e-6
    )
    with pytest.raises(DataError, match="heads=.4,.: expected numbers from 0 to 3"):
        maps.attention(encoder, wide, heads=(4,))


def test_a_network_without_such_attention_has_no_picture_of_it(films):
    network = CLIPViT(width=16, depth=1, heads=2, patch_size=8, image_size=16)
    weights = encoders.random_params(network, 16)
    clip = encoders.Encoder("clip", network, weights, Preprocess(16, 16, (0.5,), (0.2,)))
    assert maps.attention(clip, films) is None
    assert len(maps.similarity(clip, films[:2], [(1, 1)]).numbers) == 2


# --- curves ---------------------------------------------------------------------------------------------------


def result(encoder="teacher", name="macro", value=0.5, metric="auprc", **more):
    return dict(encoder=encoder, metric=metric, value=value, std=0.01, n=9, data="synthetic", seed=[0],
                interval=[value - 0.1, value + 0.1]) | {"class": name} | more  # fmt: skip


def workdir(folder, rows, config=None):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def drawn(one) -> dict[str, list]:
    """{label: [(x, y), ...]} of the lines of a picture, as they are drawn."""
    lines, labels = one.figure.axes[0].get_legend_handles_labels()
    return {label: list(zip(*line[0].get_data(), strict=True)) for line, label in zip(lines, labels, strict=True)}


def test_scores_over_a_field_of_the_configs(tmp_path):
    for share, seed, value in [(0.25, 0, 0.3), (0.25, 1, 0.4), (1.0, 0, 0.6)]:
        rows = [result(value=value), result("pixels", value=0.2), result(name="effusion", value=0.9)]
        workdir(tmp_path / f"size_{share}_{seed}", rows, {"data": {"fraction": share}})
    one = curves.over([f"{tmp_path}/size_*"], "data.fraction")
    assert {k: np.round(v, 6).tolist() for k, v in drawn(one).items()} == {
        "teacher": [[0.25, 0.35], [1.0, 0.6]], "pixels": [[0.25, 0.2], [1.0, 0.2]],
    }
    assert one.name == "over_data_fraction" and "SYNTHETIC" in one.title
    assert sorted((r["data.fraction"], r["value"]) for r in one.numbers if r["encoder"] == "teacher") == [
        (0.25, 0.3), (0.25, 0.4), (1.0, 0.6),
    ]
    only = curves.over([f"{tmp_path}/size_*"], "data.fraction", classes=("effusion",), encoders=("teacher",))
    assert list(drawn(only)) == ["teacher, effusion"]


def test_scores_over_a_field_of_the_rows_and_over_words(tmp_path):
    shots = [
        result("vit", value=v, metric="dice", films=n, head="linear", seed=seed)
        for n, v, seed in [(1, 0.4, 0), (1, 0.6, 1), (1, 0.55, [0, 1]), (100, 0.9, 0), (10, 0.7, 0)]
    ] + [result("vit", value=0.0, metric="dice", films=1, head="linear", stratum="sex=F")]
    workdir(tmp_path / "shots", shots)
    one = curves.over([str(tmp_path / "shots")], "films")
    assert drawn(one) == {"linear on vit": [(1, 0.5), (10, 0.7), (100, 0.9)]}
    assert one.figure.axes[0].get_xscale() == "log" and one.figure.axes[0].get_ylabel() == "Dice"
    workdir(tmp_path / "words", [result(size="small", value=0.1), result(size="large", value=0.2)])
    words = curves.over([str(tmp_path / "words")], "size")
    assert [v for _, v in drawn(words)["teacher"]] == [0.1, 0.2]


def test_nothing_to_draw_is_said(tmp_path):
    workdir(tmp_path / "a", [result(), result(metric="rg_er") | {"value": None}])
    with pytest.raises(DataError, match="by='no.such'.*found none"):
        curves.over([str(tmp_path / "a")], "no.such")
    with pytest.raises(DataError, match="rows dice of macro.*found auprc of macro"):
        curves.over([str(tmp_path / "a")], "n", metric="dice")
    with pytest.raises(DataError, match="no workdir with a results.json"):
        curves.over([str(tmp_path / "b")], "n")


def test_bars_are_the_rows_and_their_intervals(tmp_path):
    rows = [result(value=0.5), result(name="edema", value=0.6), result("pixels", value=0.3),
            result("teacher", value=0.1, feature="other"), result("teacher", value=0.2, stratum="sex=F")]
    (one,) = curves.results(workdir(tmp_path / "run", rows))
    heights = [bar.get_height() for bars in one.figure.axes[0].containers for bar in getattr(bars, "patches", ())]
    assert heights == [0.5, 0.6, 0.3] == [row["value"] for row in one.numbers]
    assert "above pixels at 0.300" not in one.sentence and "not told apart from pixels" in one.sentence
    segmented = [result("none", "lungs", 0.9, "dice", head="unet"), result("x", "lungs", 0.8, "dice", head="linear")]
    (dice,) = curves.results(workdir(tmp_path / "seg", segmented))
    assert dice.title.startswith("Dice per class")
    assert dice.figure.axes[0].get_legend_handles_labels()[1] == ["unet", "linear on x"]
    assert curves.results(tmp_path / "none") == []


def test_a_term_that_is_switched_off_has_no_curve_and_a_score_of_nothing_has_one():
    rows = [{"step": s, "loss": 2.0, "dino_global": 0.5, "ibot": 1.5, "koleo": 0.0, "agreement": 0.0} for s in (1, 2)]
    loss, diagnostics = curves.training(rows, {"task": "pretrain", "head": {"prototypes": 8}})[:2]
    assert list(loss.numbers[0]) == ["step", "loss", "dino_global", "ibot"]
    drawn = {line.get_label() for axis in diagnostics.figure.axes for line in axis.get_lines()}
    assert "agreement" in drawn


def test_a_downstream_task_has_its_curves_too():
    rows = [{"step": s, "loss": 1 / s, "val_loss": 2 / s, "dice": s / 10, "lr": 1e-3, "seconds": 3} for s in (1, 2, 3)]
    (one,) = curves.training(rows, {"task": "segment"})
    assert list(one.numbers[0]) == ["step", "loss", "val_loss", "dice"] and len(one.figure.axes) == 2
    assert curves.training([], {"task": "segment"}) == []


# --- masks over films -----------------------------------------------------------------------------------------


def test_outlines_are_the_rims_of_the_masks():
    film = np.full((12, 16), 90, np.uint8)
    predicted, truth = np.zeros((2, 1, 12, 16), bool)
    predicted[0, 3:8, 4:9] = True
    truth[0, 0:8, 0:9] = True  # at the edge of the film
    picture = overlays.outlined(film, predicted, truth)
    red, green = ((picture == colour).all(-1) for colour in (overlays.PREDICTED, overlays.TRUTH))
    rim = np.zeros((12, 16), bool)
    rim[3:8, 4:9], rim[4:7, 5:8] = True, False
    np.testing.assert_array_equal(red, rim)
    assert green[0, :9].all() and green[:8, 0].all() and not green[3, 3] and green[7, 1]
    assert (picture[9:] == 90).all() and (overlays.outlined(film, predicted) == 90).all(-1).sum() == 12 * 16 - rim.sum()


def test_the_segmented_films_of_a_run_with_their_dice(tmp_path):
    film, predicted = np.full((20, 30), 9, np.uint8), np.ones((1, 20, 30), bool)
    for i in range(3):
        overlays.save(tmp_path / "overlays" / f"p{i}" / "film.png", film, predicted)
    lines = ["id,patient,encoder,structure,dice", "p0/film.png,p,teacher,left,0.5", "p0/film.png,p,teacher,right,0.7",
             "p0/film.png,p,mean mask,left,0.1", "p1/film.png,p,teacher,left,"]
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    one = overlays.gallery(tmp_path)
    assert [axis.get_title() for axis in one.figure.axes] == ["film 1   Dice 0.60", "film 2", "film 3"]
    assert one.numbers == [
        dict(film=1, structure="left", dice=0.5), dict(film=1, structure="right", dice=0.7),
        dict(film=2, structure="left", dice=None),
    ]
    assert Image.open(tmp_path / "overlays" / "p0" / "film.png").size == (30, 20)
    assert overlays.gallery(tmp_path / "none") is None


# --- the task -------------------------------------------------------------------------------------------------


def test_any_encoder_on_films_of_a_folder(encoder, films, tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, film in zip(paths, films, strict=False):
        Image.fromarray(film).save(path)
    monkeypatch.setattr(figures.encoders, "load", lambda name, weights: encoder)
    config = config_file.get_config()
    config.update(encoder="small", films=tuple(map(str, paths)), points=((48, 30), (60, 60)), image_size=80)
    figures.run(config, tmp_path / "looks")
    found = sorted(path.name for path in (tmp_path / "looks" / "figures").iterdir())
    names = ["attention", "components", "similarity"]
    assert found == sorted(f"{n}{end}" for n in names for end in (".csv", ".png", "_maps.csv"))
    assert len(rows_of(tmp_path / "looks" / "figures" / "similarity_maps.csv")) == 2 * 100
    page = (tmp_path / "looks" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "Pictures of small" in page
    config.films = (str(tmp_path / "absent.png"),)
    with pytest.raises(DataError, match="absent.png"):
        figures.run(config, tmp_path / "looks")
    config.films = ()
    with pytest.raises(DataError, match="config.films"):
        figures.run(config, tmp_path / "looks")


def test_several_runs_without_an_encoder(tmp_path):
    workdir(tmp_path / "size_1", [result()], {"data": {"fraction": 0.5}})
    config = config_file.get_config()
    config.runs = (f"{tmp_path}/size_*",)
    figures.run(config, tmp_path / "sizes")
    assert [p.name for p in sorted((tmp_path / "sizes" / "figures").iterdir())] == [
        "over_data_fraction.csv", "over_data_fraction.png",
    ]


def test_a_run_of_segment(tmp_path):
    rows = [result("x", "right lung", 0.9, "dice", head="linear")]
    run = workdir(tmp_path / "lungs", rows, {"task": "segment", "dataset": "synthetic", "data": {"films": 3}})
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    overlays.save(run / "overlays" / "a.png", np.zeros((20, 20), np.uint8), np.ones((1, 20, 20), bool))
    figures.run(config_file.get_config(), run)
    assert {p.stem for p in (run / "figures").glob("*.png")} == {"training", "results", "overlays"}
    assert "SYNTHETIC" in (run / "report.html").read_text()


def test_the_config_offers_what_the_task_reads():
    config = config_file.get_config()
    assert isinstance(config, ConfigDict)
    assert {k: v for k, v in config.items() if k not in ("task", "then")} == figures.WANTED.to_dict()


def test_a_picture_shows_itself_in_a_notebook():
    figure, _ = picture.panels(1, 1, 2, 2)
    one = picture.Picture("a", "A & B", "<b>", figure, [{"x": 1}])
    assert "<h2>A &amp; B</h2><p>&lt;b&gt;</p><img" in one._repr_html_() and one.png()[:4] == b"\x89PNG"
