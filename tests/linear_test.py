"""The paper's probe: splits by patient, choices that never see the test part, all runs at once as one by one, rows."""

import json

import fake_trees
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from configs import probe as probe_config
from raddino_jax import prepare
from raddino_jax.data.labels import LabelError, Labels
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import fast, linear, scores, splits, varied
from raddino_jax.evals.splits import PROTOCOLS, Protocol, Split


def crowd(n=90, width=6, seed=0):
    """Features that know the first class well, the second a little, and labels with gaps; three films a patient."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    y = (x[:, :2] + rng.normal(scale=[0.3, 2.0], size=(n, 2)) > 0).astype(np.float32)
    y[::7, 1] = np.nan
    return x, Labels(("easy", "hard"), y, np.array([f"p{i // 3}" for i in range(n)]), np.arange(n))


# --- splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", [*PROTOCOLS.values(), Protocol(), Protocol("seeds"), Protocol(repeats=2)])
def test_no_patient_is_on_two_sides_of_any_split_of_any_protocol(protocol, seed):
    rng = np.random.default_rng(seed)
    patients = np.array([f"p{k}" for k in rng.integers(0, 60, 200)])
    official = np.where([int(p[1:]) < 12 for p in patients], "test", "train")
    found = splits.splits_of(protocol, patients, official, seed)
    assert len(found) == protocol.repeats
    for split in found:
        parts = [split.train, split.val, split.test]
        assert sorted(np.concatenate(parts)) == list(range(200))  # each film once
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not set(patients[parts[a]]) & set(patients[parts[b]])
    if protocol.kind == "folds":
        assert sorted(np.concatenate([split.test for split in found])) == list(range(200))
    if protocol.kind == "official":
        assert all(set(official[split.test]) == {"test"} for split in found)
        assert sorted(np.concatenate([split.val for split in found])) == list(np.flatnonzero(official == "train"))
    if protocol.kind == "seeds":
        shares = [len(set(patients[part])) / len(set(patients)) for part in vars(found[0]).values()]
        np.testing.assert_allclose(shares, protocol.parts, atol=0.02)
        assert list(found[0].test) != list(found[1].test)


@pytest.mark.parametrize(
    "official, words",
    [
        (None, "name it with config.split_column"), (["train"] * 5 + ["hold"], "found 'hold'"),
        (["train", "test"] * 3, "have films in test and elsewhere"), (["train"] * 6, "no patient left for test"),
    ],
)
def test_an_official_split_that_cannot_be_is_refused(official, words):
    patients = ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(LabelError, match=words):
        splits.splits_of(Protocol("official", repeats=2), patients, official, 0)


def test_too_few_patients_are_told():
    with pytest.raises(LabelError, match="repeat 0: no patient left"):
        splits.splits_of(Protocol(), ["a", "b", "c"], None, 0)


def test_balanced_classes_keep_as_many_films_without_as_with():
    y = (np.random.default_rng(0).uniform(size=(300, 3)) < [0.1, 0.3, 0.05]).astype(np.float32)
    found = splits.balanced(y, 1)
    known = ~np.isnan(found)
    np.testing.assert_array_equal(found[known], y[known])
    np.testing.assert_array_equal(known.sum(0), 2 * y.sum(0))
    assert (splits.balanced(y, 2)[known] != found[known]).any()


# --- training -------------------------------------------------------------------------------------------------

RECIPE = fast.Recipe(lrs=(1e-3, 3e-2), epochs=3, batch_size=16, standardize=True)


def three():
    x, labels = crowd()
    return x, labels, splits.splits_of(Protocol(repeats=3), labels.patients, None, 0)


def test_all_at_once_is_one_by_one():
    x, labels, cut = three()
    cut[1] = Split(cut[1].train[:20], cut[1].val, cut[1].test)  # repeats may have different lengths
    together = fast.fit(x, labels.values, cut, RECIPE)
    for k, split in enumerate(cut):
        for j, lr in enumerate(RECIPE.lrs):
            alone = fast.fit(x, labels.values, [split], fast.Recipe(**vars(RECIPE) | {"lrs": (lr,)}), [k])
            for name in ("kernel", "bias"):
                np.testing.assert_allclose(together[name][k, j], alone[name][0, 0], atol=1e-6)


def test_a_run_is_adamw_with_a_cosine_step_by_step():
    x, labels, cut = three()
    plan = fast.plan(x, cut[0].train, RECIPE, 0)
    params = fast.start(plan.key, x.shape[1], 2, RECIPE).params
    total = int(plan.steps)
    adam = optax.adamw(lambda s: 3e-2 * 0.5 * (1 + jnp.cos(jnp.pi * s / total)), weight_decay=0.01)
    state = adam.init(params)

    def mean_entropy(params, z, y):
        known = ~np.isnan(y)
        p = jax.nn.sigmoid(z @ params["kernel"] + params["bias"])
        entropies = -jnp.where(np.nan_to_num(y) == 1, jnp.log(p), jnp.log1p(-p))
        return jnp.where(known, entropies, 0).sum() / known.sum()

    mean, deviation = x[cut[0].train].mean(0), x[cut[0].train].std(0)
    for index in plan.order:
        index = index[index >= 0]
        grads = jax.grad(mean_entropy)(params, (x[index] - mean) / deviation, labels.values[index])
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    found = fast.fit(x, labels.values, cut[:1], RECIPE)
    np.testing.assert_allclose(found["kernel"][0, 1], params["kernel"], atol=2e-5)


def test_every_film_is_seen_once_an_epoch():
    x, _, cut = three()
    order = fast.plan(x, cut[0].train, RECIPE, 0, multiple=5).order
    assert order.shape[1] == 20  # 16 made a multiple of 5
    for epoch in np.split(order, RECIPE.epochs):
        assert sorted(epoch[epoch >= 0]) == sorted(cut[0].train)


def test_features_that_know_are_used():
    x, labels, cut = three()
    recipe = fast.Recipe(lrs=(0.1,), epochs=30, batch_size=16, standardize=True)
    layers = fast.fit(x, labels.values, cut, recipe)
    found = linear._scored(x, labels.values, cut[0], fast.logits(layers, 0, 0, x[cut[0].test]))
    guess = fast.logits(layers, 0, 0, x[cut[0].test])
    truth = labels.values[cut[0].test]
    assert found["auprc"][0] == average_precision_score(truth[:, 0], guess[:, 0]) > 0.9
    known = ~np.isnan(truth[:, 1])
    assert found["auroc"][1] == roc_auc_score(truth[known, 1], guess[known, 1])


def test_votes_stand_beside_their_films():
    x, labels, cut = three()
    shuffled = Split(cut[0].train, cut[0].val, np.random.default_rng(0).permutation(cut[0].test))
    layers = fast.fit(x, labels.values, cut[:1], RECIPE)
    a, b = (linear._scored(x, labels.values, split, fast.logits(layers, 0, 0, x[split.test]))
            for split in (cut[0], shuffled))
    for metric in a:
        np.testing.assert_allclose(a[metric], b[metric])


def test_the_choice_never_sees_the_test_part():
    x, labels, cut = three()
    before = fast.fit(x, labels.values, cut[:1], RECIPE)
    rate = linear.choose(x, labels.values, cut[0], before, 0)
    spoiled, wrong = x.copy(), labels.values.copy()
    spoiled[cut[0].test], wrong[cut[0].test] = 1e3, 1 - wrong[cut[0].test]
    after = fast.fit(spoiled, wrong, cut[:1], RECIPE)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert linear.choose(spoiled, wrong, cut[0], after, 0) == rate
    unknown = labels.values.copy()  # and it does see the validation part
    unknown[cut[0].val] = 1 - unknown[cut[0].val]
    layers = {"kernel": np.stack([[np.eye(6, 2), -np.eye(6, 2)]]), "bias": np.zeros((1, 2, 2)),
              "mean": np.zeros((1, 6)), "scale": np.ones((1, 6))}
    assert linear.choose(x, labels.values, cut[0], layers, 0) == 0 and linear.choose(x, unknown, cut[0], layers, 0) == 1


# --- whole runs -----------------------------------------------------------------------------------------------


def config_of(tmp_path, arguments="fast,dataset=synthetic", **fields):
    config = probe_config.get_config(arguments)
    config.update({"features_dir": str(tmp_path / "features"), "epochs": 3, "repeats": 2, "lrs": (1e-2,)} | fields)
    config.data.update(image_size=56, synthetic_size=60)
    return config


def read(folder):
    rows = json.loads((folder / "results.json").read_text())
    return {(r["encoder"], r["metric"], r["class"]): r for r in rows if "stratum" not in r}


def test_pixels_of_drawn_films(tmp_path, capsys):
    config = config_of(tmp_path, encoder="pixels", lrs=(1e-3, 1e-1))
    linear.run(config, tmp_path)
    rows = read(tmp_path)
    row = rows["pixels", "auprc", "macro"]
    assert (row["task"], row["data"], row["folds"], row["n"], row["protocol"]) == ("probe", "synthetic", 2, 60, "folds")
    classes = [r["value"] for (_, metric, name), r in rows.items() if metric == "auprc" and name != "macro"]
    assert all(r["lr"][0] in config.lrs for r in rows.values()) and len(classes) > 2
    before = (tmp_path / "results.json").stat().st_mtime_ns
    linear.run(config, tmp_path)  # a finished run prints what it found
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert capsys.readouterr().err.count("macro") == 2


def test_an_encoder_on_films_varied_on_the_device(tmp_path):
    config = config_of(tmp_path, encoder="dinov2_vits14", weights="random", image_size=28, augment=True, batch_size=20,
                       epochs=1, feature="cls+grid", films=30)
    config.data.synthetic_size = 30
    linear.run(config, tmp_path)
    (encoder,) = {name for name, _, _ in read(tmp_path)}
    assert encoder == "dinov2_vits14 (random weights)" and read(tmp_path)[encoder, "auprc", "macro"]["augment"]


def test_a_film_without_variation_is_itself_and_with_it_is_not():
    film = jax.random.uniform(jax.random.key(0), (32, 32)) * 255
    still = varied.Variation(0, 0, (1, 1), 0, (1, 1), 0, 0, 0, 0)
    same = varied.vary(jax.random.key(1), jnp.round(film), still)
    assert jnp.abs(same - jnp.round(film)).max() <= 1
    moved = [varied.vary(jax.random.key(k), film, varied.Variation()) for k in (1, 2)]
    assert jnp.abs(moved[0] - moved[1]).mean() > 5 and all(0 <= m.min() and m.max() <= 255 for m in moved)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_class_that_no_test_film_has_is_reported_and_not_averaged(tmp_path, gone):
    x, labels, cut = three()
    y = labels.values.copy()
    y[np.concatenate([split.test for split in cut[: gone + 1]]), 1] = 0
    config = config_of(tmp_path, encoder="e")
    known = Labels(labels.names, y, labels.patients, labels.films)
    task = linear.Task(config, None, known, cut, Protocol(), "real", {})
    layers = fast.fit(x, y, cut, RECIPE)
    found = [linear._scored(x, y, split, fast.logits(layers, k, 0, x[split.test])) for k, split in enumerate(cut)]
    rows = {(r["metric"], r["class"]): r for r in linear._rows(task, "e", found, {})}
    assert rows["auprc", "hard"]["undefined"] == gone + 1 and "one class only" in rows["auprc", "hard"]["reason"]
    assert rows["auprc", "macro"]["value"] == pytest.approx(
        np.mean([np.nanmean(repeat["auprc"]) for repeat in found]))
    assert rows["auprc", "macro"]["left_out"] == {"hard": gone + 1}
    json.dumps(list(rows.values()), allow_nan=False)


def test_a_group_is_scored_on_its_own_films_by_every_repeat(tmp_path):
    x, labels, cut = three()
    group = np.array(["a", "b"])[np.arange(len(x)) // 3 % 2]
    task = linear.Task(config_of(tmp_path), None, labels, cut, Protocol(), "real", {"site": group})
    guesses = [-x[split.test][:, 2:4] for split in cut]
    found = [linear._scored(x, labels.values, *pair) for pair in zip(cut, guesses, strict=True)]
    rows = linear.strata(task, linear._rows(task, "e", found, {}), guesses)
    table = {(r["metric"], r["class"], r["stratum"]): r for r in rows}
    assert len(rows) == 2 * 3 * 4  # metrics x (two classes and macro) x (two groups, all, worst)
    for name in "ab":
        by_hand = []
        for split in cut:
            mine = split.test[group[split.test] == name]
            by_hand.append(average_precision_score(labels.values[mine, 0], -x[mine, 2]))
        row = table["auprc", "easy", f"site={name}"]
        assert row["value"] == pytest.approx(np.mean(by_hand))
        assert row["interval"][0] < row["value"] < row["interval"][1]
        assert row["patients"] == len(set(labels.patients[group == name]))
    scored = next(r for r in linear._rows(task, "e", found, {}) if (r["metric"], r["class"]) == ("auprc", "easy"))
    assert table["auprc", "easy", "site: all"]["value"] == pytest.approx(scored["value"])
    assert table["auprc", "easy", "site: worst"]["gap"] >= 0


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(dataset=""), "dataset is empty: vindr_cxr"), (dict(dataset="folder"), "needs images .* csv .* labels"),
        (dict(feature="all"), "feature='all' must be in cls"), (dict(protocol="loo"), "protocol='loo'"),
        (dict(lrs=()), "lrs must be positive"), (dict(epochs=0), "epochs must be at least 1"),
        (dict(protocol="folds", repeats=1), "repeats must be at least 2"),
    ],
)
def test_what_cannot_be_is_refused_before_a_film_is_read(tmp_path, fields, words):
    with pytest.raises(DataError, match=words):
        linear.check(config_of(tmp_path, **fields))


def folder(tmp_path, n=24):
    films = tmp_path / "films"
    films.mkdir()
    lines = ["file,patient_id,bright,part"]
    for i in range(n):
        bright = i // 2 % 2
        rng = np.random.default_rng(i)
        level = 40 + 120 * bright
        Image.fromarray(rng.integers(level, level + 40, (64, 64), np.uint8)).save(films / f"f{i}.png")
        lines.append(f"f{i}.png,p{i // 2},{bright},{'test' if i >= 16 else 'train'}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return films


def test_any_folder_with_a_table_and_its_own_test_part(tmp_path):
    films = folder(tmp_path)
    config = config_of(tmp_path, "fast,dataset=folder", encoder="pixels", images=str(films), epochs=20,
                       csv=str(tmp_path / "t.csv"), labels=("bright",), split_column="part", lrs=(0.1,),
                       strata=("part",))
    linear.run(config, tmp_path)
    row = read(tmp_path)["pixels", "auprc", "bright"]
    assert row["protocol"] == "official" and row["n"] == 8 and row["value"] == 1 and row["data"] == "real"
    with pytest.raises(LabelError, match="no column 'race'"):
        linear.open_task(config_of(tmp_path, "fast,dataset=folder", **dict(config) | {"strata": ("race",)}))


# --- rows -----------------------------------------------------------------------------------------------------


def test_a_row_has_the_fixed_fields_and_leaves_undefined_repeats_out():
    row = scores.row("t", "d", "e", "m", "c", [0.4, 0.6, np.nan], n=7, folds=3, seed=0, data="real", more=1)
    keys = "task dataset encoder metric class n folds seed data config more undefined"
    assert [row[k] for k in keys.split()] == ["t", "d", "e", "m", "c", 7, 3, 0, "real", "config.json", 1, 1]
    assert row["value"] == pytest.approx(0.5) and row["std"] == pytest.approx(np.std([0.4, 0.6], ddof=1))
    mean, half = scores.interval([0.4, 0.6])
    assert row["interval"] == [mean - half, mean + half]
    lone = scores.row("t", "d", "e", "m", "c", [np.nan], n=7, folds=1, seed=0, data="real")
    assert lone["value"] is None and lone["std"] is None and "1 of 1" in lone["reason"]


def test_rows_replace_their_like_and_keep_the_others(tmp_path):
    def one(encoder, value):
        return scores.row("t", "d", encoder, "m", "c", [value], n=1, folds=1, seed=0, data="real")

    scores.write_rows(tmp_path, [one("a", 1), one("b", 2)])
    scores.write_rows(tmp_path, [one("a", 3)])
    assert {r["encoder"]: r["value"] for r in json.loads((tmp_path / "results.json").read_text())} == {"a": 3, "b": 2}


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_sklearns_degenerate_columns_included(seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (50, 5)).astype(np.float32)
    y[rng.uniform(size=y.shape) < 0.2] = np.nan
    y[:, 3], y[:, 4] = 0, np.nan
    p = np.round(rng.normal(size=y.shape), 1)  # with ties
    for metric, score in (("auprc", average_precision_score), ("auroc", roc_auc_score)):
        found = scores.per_class(metric, y, p)
        for k in range(3):
            known = ~np.isnan(y[:, k])
            assert found[k] == score(y[known, k], p[known, k])
        np.testing.assert_allclose(scores.per_class(metric, y, p, scores.QUICK), found, rtol=1e-12)
        assert np.isnan(found[3:]).all()
        assert scores.mean_of_defined(found) == pytest.approx(found[:3].mean())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_papers_datasets_have_what_their_rows_ask_for(tmp_path, monkeypatch, name):
    tree = fake_trees.TREES[name](tmp_path)
    prepare.prepare(name, str(tree.raw), str(tmp_path / "data"), **{"size": tree.size, "workers": 1} | tree.options)
    config = config_of(tmp_path, f"fast,dataset={name}", encoder="pixels", repeats=0)
    config.data.update(data_dir=str(tmp_path / "data"), image_size=tree.size)
    given = []
    monkeypatch.setattr(splits, "splits_of", lambda *args: given.append(args) or [Split(*[np.arange(3)] * 3)])
    task = linear.open_task(config)
    protocol, patients, official, _ = given[0]
    assert protocol == PROTOCOLS[name] and task.labels.names == protocol.labels and task.kind == "real"
    assert len(patients) == len(task.films) > 0 and np.nanmax(task.labels.values) <= 1
    assert (official is None) == (protocol.kind != "official") and set(official or ()) <= {"train", "test"}
