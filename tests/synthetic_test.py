"""Synthetic radiographs: one film per (seed, index), honest labels, no clue but the finding."""

import concurrent.futures
import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics

from raddino_jax.data import anatomy, synthetic

HERE = pathlib.Path(__file__).parent
SIZE = 112


@pytest.fixture(scope="module")
def table():
    """Cases and labels of 2,000 films: cheap, nothing is drawn."""
    indices = range(2000)
    return [synthetic.case(i) for i in indices], [synthetic.labels(i) for i in indices]


@pytest.fixture(scope="module")
def drawn():
    """Sixty films with masks."""
    return [(synthetic.case(i), synthetic.film(i, SIZE, masks=True)) for i in range(60)]


def column(labels, name):
    return np.array([row[name] for row in labels])


def digest(index, size=64, seed=3):
    return hashlib.sha256(synthetic.film(index, size, seed).image.tobytes()).hexdigest()


def test_a_film_is_the_same_in_another_thread_and_another_process():
    here = [digest(i) for i in range(6)]
    assert len(set(here)) == 6
    synthetic.case.cache_clear()
    synthetic.patient.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, range(6))) == here
    code = "import synthetic_test as t; print(*(t.digest(i) for i in reversed(range(6))))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert there.stdout.split()[::-1] == here


def test_the_seed_makes_another_world():
    assert digest(0, seed=3) != digest(0, seed=4)
    same = [synthetic.labels(i, 3)["age"] == synthetic.labels(i, 4)["age"] for i in range(50)]
    assert sum(same) < 5


@pytest.mark.parametrize("index", [0, 3, 17])
def test_every_size_shows_the_same_film(index):
    large = synthetic.film(index, 448).image.reshape(112, 4, 112, 4).mean((1, 3))
    small = synthetic.film(index, 112).image.astype(float)
    assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.985
    other = synthetic.film(index + 40, 112).image.astype(float)
    assert np.corrcoef(large.ravel(), other.ravel())[0, 1] < 0.97


@pytest.mark.parametrize("size", [112, 201, 224, 518])
def test_any_size(size):
    film = synthetic.film(5, size, masks=True)
    assert film.image.shape == (size, size) and film.image.dtype == np.uint8
    for mask in film.masks.values():
        assert mask.shape[-2:] == (size, size) and mask.dtype == bool


def test_films_use_the_greys_that_real_films_use(drawn):
    # Means over 305 frontal NIH films of the percentiles 1, 25, 50, 75, 99 of the film.
    real = 7, 84, 136, 178, 223
    grey = [np.percentile(film.image, (1, 25, 50, 75, 99)) for _, film in drawn]
    assert np.all(np.abs(np.mean(grey, 0) - real) < (15, 30, 30, 30, 20))
    assert np.std(grey, 0)[2] > 10  # exposure varies from film to film


def test_a_source_is_a_random_access_collection():
    films = synthetic.Synthetic(25, image_size=64, seed=3)
    assert len(films) == 25
    np.testing.assert_array_equal(films[-1], films[24])
    np.testing.assert_array_equal(films[np.int64(7)], synthetic.film(7, 64, 3).image)
    assert films.labels(7) == films.film(7).labels
    assert films.film(7).masks is None
    with pytest.raises(IndexError, match="25"):
        films[25]


def test_labels_do_not_draw(monkeypatch):
    monkeypatch.setattr(anatomy.Projection, "__init__", None)
    assert set(synthetic.FINDINGS) < set(synthetic.labels(12345))


def test_prevalence(table):
    _, labels = table
    for name, wanted in zip(synthetic.FINDINGS, synthetic.PREVALENCE, strict=True):
        assert abs(column(labels, name).mean() - wanted) < 0.04, name
    shares = [np.mean(column(labels, "view") == view) for view in synthetic.VIEWS]
    np.testing.assert_allclose(shares, synthetic.VIEW_SHARES, atol=0.04)
    assert 0.4 < np.mean(column(labels, "sex") == "F") < 0.54


def test_patients_have_one_to_four_films_and_stay_themselves(table):
    _, labels = table
    people = {}
    for row in labels:
        people.setdefault(row["patient_id"], []).append(row)
    assert {len(rows) for rows in people.values()} == {1, 2, 3, 4}
    for rows in people.values():
        assert len({(row["sex"], row["bmi"], row["weight"]) for row in rows}) == 1
        ages = [row["age"] for row in rows]
        assert ages == sorted(ages)


def test_findings_last_but_not_always(table):
    _, labels = table
    pairs = zip(labels[:-1], labels[1:], strict=True)
    pairs = [(a, b) for a, b in pairs if a["patient_id"] == b["patient_id"]]
    for name in synthetic.FINDINGS:
        before, after = (np.array([pair[k][name] for pair in pairs]) for k in (0, 1))
        assert 0.25 < np.corrcoef(before, after)[0, 1] < 0.75, name


def circumstances(case):
    """Numbers that say how a film was taken, and of whom."""
    t, p, person = case.technique, case.pose, case.patient
    return [
        *(t.level, t.contrast, t.gamma, t.black, t.white, t.noise, t.blur, t.equalise, sum(t.cut)),
        *(t.letter == "R", t.outside, p.view == "LATERAL", p.field, p.rotation, *p.shift, p.yaw),
        *(p.inspiration, p.stomach, p.nipples, person.sex == "F", person.age, person.bmi),
        *(d in case.devices for d in synthetic.DEVICES),
        p.view == "AP",
    ]


def test_findings_depend_neither_on_each_other_nor_on_how_the_film_was_taken(table):
    cases, labels = table
    # Films of one patient are not independent draws: one film each.
    first = np.unique(column(labels, "patient_id"), return_index=True)[1]
    found = np.stack([column(labels, name) for name in synthetic.FINDINGS], 1)[first]
    taken = np.array([circumstances(cases[i]) for i in first], float)
    both = np.corrcoef(np.concatenate([found, taken], 1).T)
    n, bound = found.shape[1], 4.5 / np.sqrt(len(first))
    assert np.abs(both[:n, n:]).max() < bound
    assert np.abs(both[:n, :n] - np.eye(n)).max() < bound
    # The bound is one that dependence breaks: tubes belong to the AP film.
    tube = n + taken.shape[1] - 1 - len(synthetic.DEVICES)
    assert both[tube, -1] > bound


def test_masks_of_the_anatomy(drawn):
    for case, film in drawn:
        lungs, zones, ribs = (film.masks[name] for name in ("lungs", "zones", "ribs"))
        if case.pose.view == "LATERAL":
            assert lungs.any((1, 2)).all() and not ribs.any() and not zones.any()
            continue
        right, left = lungs
        assert np.nonzero(right)[1].mean() + 20 < np.nonzero(left)[1].mean()
        assert 0.05 < right.mean() < 0.35 and 0.03 < left.mean() < 0.35
        assert not (right & left).any()
        np.testing.assert_array_equal(zones.reshape(2, 3, SIZE, SIZE).sum(1), lungs)
        rows = np.reshape([np.nonzero(zone)[0].mean() for zone in zones], (2, 3))
        assert np.all(np.diff(rows) > 0)
        assert len(ribs) == len(anatomy.RIBS) == 20
        areas = ribs.mean((1, 2))
        assert areas.min() > 0.001 and areas.max() < 0.08
        tops = np.reshape([np.nonzero(rib)[0].min() for rib in ribs], (2, 10))
        assert np.all(np.diff(tops) >= 0)
        # Bone is brighter than what lies between the ribs of the same lung.
        bone = ribs.any(0)
        assert film.image[right & bone].mean() > film.image[right & ~bone].mean()


def test_findings_have_a_mask_where_and_only_where_they_are(drawn):
    seen = dict.fromkeys(synthetic.FINDINGS, 0)
    for index, (_, film) in enumerate(drawn):
        for name in synthetic.FINDINGS:
            assert film.masks[name].any() == bool(film.labels[name]), (index, name)
            seen[name] += film.labels[name]
    assert min(seen.values()) >= 4


@pytest.mark.parametrize("lateral", [False, True])
@pytest.mark.parametrize("name", synthetic.FINDINGS)
def test_a_finding_changes_the_film_inside_its_mask_most(name, lateral):
    view = anatomy.Lateral if lateral else anatomy.Frontal
    cases = (synthetic.case(i, seed=1) for i in range(1000))
    case = next(c for c in cases if name in c.findings and (c.pose.view == "LATERAL") == lateral)
    scene = view(case.patient.body, case.pose, case.findings, {}, SIZE)
    others = {k: site for k, site in case.findings.items() if k != name}
    plain = view(case.patient.body, case.pose, others, {}, SIZE)
    change = np.abs(scene.render() - plain.render())
    mask = getattr(scene, f"{name}_mask")()
    assert change[mask].mean() > 0.01
    assert change[mask].mean() > 4 * change[~mask].mean()


def test_the_sentence_names_the_findings_and_devices_and_no_others(table):
    cases, labels = table
    for case, row in zip(cases[:400], labels[:400], strict=True):
        said = synthetic.sentence(case).lower()
        for name in (*synthetic.FINDINGS, *synthetic.DEVICES):
            assert (name in said) == bool(row[name]), (name, said)
        assert ("clear lungs" in said) == (not case.findings)
        for name in {"pneumothorax", "fracture", "opacity"} & set(case.findings):
            part = next(part for part in said.split(".") if name in part)
            assert anatomy.SIDES[case.findings[name]["side"]] in part


def test_the_sentence_says_the_zone_where_the_mask_lies(drawn):
    checked = 0
    for case, film in drawn:
        if "opacity" in case.findings and case.pose.view != "LATERAL":
            largest = (film.masks["zones"] & film.masks["opacity"]).sum((1, 2)).argmax()
            said = anatomy.ZONES.index(synthetic.zone(case.findings["opacity"]))
            assert abs(largest - said) <= 1 and largest // 3 == said // 3
            checked += 1
    assert checked > 5


def pixels(n, size):
    """32 x 32 grey pixels, each film standardised; findings; half of the patients."""
    rows = np.kron(np.eye(32), np.full(size // 32, 32 / size))
    films = [rows @ synthetic.film(i, size, seed=5).image @ rows.T for i in range(n)]
    x = np.reshape(films, (n, -1))
    labels = [synthetic.labels(i, seed=5) for i in range(n)]
    y = np.stack([column(labels, name) for name in synthetic.FINDINGS], 1)
    patients = np.unique(column(labels, "patient_id"), return_inverse=True)[1]
    return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), y, patients % 2 == 0


def probe(x, y, train):
    """Macro AUPRC of ridge regression on the other patients, at the penalty best for them."""
    x = (x - x[train].mean(0)) / x[train].std(0)
    kernel, macro = x @ x[train].T, []
    for penalty in (100, 1e3, 1e4, 1e5):
        inverse = np.linalg.inv(kernel[train] + penalty * np.eye(train.sum()))
        scores = (kernel @ inverse @ (y[train] - y[train].mean(0)))[~train]
        macro.append(metrics.average_precision_score(y[~train], scores, average="macro"))
    return max(macro)


def test_small_pixels_do_not_solve_the_task():
    x, y, train = pixels(400, size=64)
    assert probe(x, y, train) < 0.9
    # The probe works: with the answer among the pixels it finds it.
    assert probe(np.concatenate([x, np.repeat(y, 100, 1)], 1), y, train) > 0.95


@pytest.mark.slow
def test_small_pixels_do_not_solve_the_task_with_4000_films():
    x, y, train = pixels(4000, size=128)
    # Real films are hard for pixels too; better than chance, as heart size and fluid are.
    assert y[~train].mean() + 0.05 < probe(x, y, train) < 0.75
