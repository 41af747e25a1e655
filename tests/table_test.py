"""The paper's tables: their numbers, what fills a cell, what keeps it empty; nothing drawn passes for real."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from configs import common, multicxr
from configs import table as table_config
from raddino_jax.data.pipeline import DataError
from raddino_jax.encoders import ENCODERS
from raddino_jax.evals import paper, table


def row(**fields):
    plain = dict(
        task="demographics", dataset="mimic_iv", encoder="rad_dino", metric="accuracy", value=0.7, std=0.012, n=60_100,
        folds=5, seed=0, data="real", config="config.json", interval=[0.6, 0.8],
    )
    return plain | {"class": "sex"} | {{"name": "class"}.get(k, k): v for k, v in fields.items()}


def workdir(path, rows, config=None, command=""):
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(rows))
    if config:
        (path / "config.json").write_text(json.dumps(config))
    if command:
        starts = [json.dumps({"command": words}) for words in ("an older one", command)]
        (path / "starts.jsonl").write_text("\n".join(starts) + "\n")
    return path


def made(tmp_path, name, **fields):
    """(Markdown, csv lines as dicts) of a table from tmp_path/runs."""
    config = table_config.get_config(f"table={name}")
    config.update(runs=str(tmp_path / "runs" / "*"), **fields)
    table.run(config, tmp_path / "out")
    text = (tmp_path / "out" / f"table_{name}.md").read_text()
    head, *lines = [re.split(r",(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", line) for line in
                    (tmp_path / "out" / f"table_{name}.csv").read_text().splitlines()]
    return text, [dict(zip(head, line, strict=True)) for line in lines]


def test_a_pattern_that_matches_nothing_is_told(tmp_path, capsys):
    made(tmp_path, "5")
    assert "matches no folder with a results.json" in capsys.readouterr().err


# --- the numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(paper.TABLES))
def test_every_row_of_a_table_has_a_number_per_column(name):
    found = paper.TABLES[name]
    assert found.rows.keys() == found.numbers.keys()
    for numbers in found.numbers.values():
        assert len(numbers) == len(found.columns) and all(0 < number < 100 for number in numbers)
    for who in found.rows.values():  # a released encoder, a U-Net, or a run that a person has to name
        assert who["encoder"] in ENCODERS or who["encoder"] == "none" or who["encoder"].startswith("RAD-DINO")


@pytest.mark.parametrize("name", ["1", "B1", "C2"])
def test_what_the_paper_prints_as_aggregate_is_the_mean_of_its_classes(name):
    """A digit mistyped here would show: means agree to what rounding allows."""
    found = paper.TABLES[name]
    for *classes, aggregate in found.numbers.values():
        assert abs(np.mean(classes) - aggregate) <= 10.0**-found.decimals + 1e-9, (classes, aggregate)


def test_worst_groups_are_not_above_the_average():
    for numbers in paper.TABLES["C3"].numbers.values():
        assert all(worst <= average for average, worst in zip(numbers[::2], numbers[1::2], strict=True))


def test_what_stands_in_two_tables_is_the_same():
    assert paper.TABLES["B1"].numbers["RAD-DINO"] == paper.TABLES["1"].numbers["RAD-DINO"]
    for encoder in ("BioViL-T", "RAD-DINO"):
        dice = paper.TABLES["3"].numbers[f"{encoder}, linear"]
        assert (dice[0], dice[1]) == (paper.TABLES["C3"].numbers[encoder][0], paper.TABLES["C3"].numbers[encoder][2])


# --- cells ----------------------------------------------------------------------------------------------------

GOLDEN = """\
# Table 5: demographics of MIMIC-CXR patients without finding, logistic regression, accuracy

Values x 100; in brackets the standard deviation.

| row | class | paper | ours | n | command | reason |
| --- | --- | --- | --- | --- | --- | --- |
| BioViL-T | sex | 75.1 |  |  | [1] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BioViL-T | age | 60.8 |  |  | [1] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BioViL-T | weight | 43.8 |  |  | [1] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BioViL-T | bmi | 47.6 |  |  | [1] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BioViL-T | ethnicity | 64.8 |  |  | [1] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BiomedCLIP | sex | 86.0 |  |  | [2] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BiomedCLIP | age | 56.5 |  |  | [2] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BiomedCLIP | weight | 52.8 |  |  | [2] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BiomedCLIP | bmi | 54.2 |  |  | [2] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| BiomedCLIP | ethnicity | 64.6 |  |  | [2] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| RAD-DINO | sex | 99.6 | 70.0 (1.2) | 60100 | [3] |  |
| RAD-DINO | age | 72.3 |  |  | [3] | fewer than two classes |
| RAD-DINO | weight | 62.4 |  |  | [4] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| RAD-DINO | bmi | 71.3 |  |  | [4] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| RAD-DINO | ethnicity | 76.9 |  |  | [4] | no run of it; needs MIMIC-CXR joined with MIMIC-IV |
| pixels | sex |  | 55.5 | 60100 | [3] | not in the paper |

[1] `python -m raddino_jax.main --config=configs/demographics.py:encoder=biovil_t --config.data.data_dir=prepared \
--workdir=runs/demographics_biovil_t`  
[2] `python -m raddino_jax.main --config=configs/demographics.py:encoder=biomedclip --config.data.data_dir=prepared \
--workdir=runs/demographics_biomedclip`  
[3] `python main.py --config=x`  
[4] `python -m raddino_jax.main --config=configs/demographics.py:encoder=rad_dino --config.data.data_dir=prepared \
--workdir=runs/demographics_rad_dino`  

## The same scores on other data

Not to be compared with the paper.

| row | class | ours | n | command |
| --- | --- | --- | --- | --- |
| synthetic / rad_dino | sex accuracy | 99.0 (1.2) synthetic | 60100 | [1] |

[1] `python main.py --config=y`  
"""  # noqa: W291


def test_a_table_from_made_workdirs(tmp_path):
    """Looks different on purpose? Then look at the new one, and put it here."""
    workdir(tmp_path / "runs" / "a", [
        row(), row(name="age", value=None, reason="fewer than two classes"),
        row(encoder="pixels", value=0.555, std=None), row(stratum="race=asian", value=0.2),
    ], command="python main.py --config=x")
    workdir(tmp_path / "runs" / "b", [row(dataset="synthetic", data="synthetic", value=0.99)],
            command="python main.py --config=y")
    assert made(tmp_path, "5")[0] == GOLDEN


@pytest.mark.parametrize("name", list(paper.TABLES))
def test_a_number_of_drawn_films_says_so_wherever_it_stands(name, tmp_path):
    """Rows that would fill every cell, measured on drawn films: none stands there without the word."""
    found = paper.TABLES[name]
    rows = [
        {"std": None, "n": 1} | table._wanted(found, column, "") | who | {"value": 0.999, "data": "synthetic"}
        for column in found.columns for who in (*found.rows.values(), {"encoder": "mine"})
    ]
    workdir(tmp_path / "runs" / "drawn", [{"class": "macro"} | r for r in rows])
    text, lines = made(tmp_path, name)
    ours = [line["ours"] for line in lines]
    assert len(ours) > len(found.rows) * len(found.columns) and all(ours)
    assert all(cell.endswith(" synthetic") for cell in ours)
    assert not re.search(r"99\.9(?! synthetic)", text.replace("99.90", "99.9"))


@pytest.mark.parametrize("name", [*paper.TABLES, *paper.FIGURES])
def test_every_empty_cell_has_a_reason_and_a_command(name, tmp_path):
    _, lines = made(tmp_path, name)
    assert lines and not any(line["ours"] for line in lines)
    for line in lines:
        assert line["reason"].strip('"').startswith("no run of it; needs ")
        assert "python -m raddino_jax.main --config=configs/" in line["command"] and "{" not in line["command"]


def test_of_several_rows_the_one_with_most_films_over_seeds_and_newest_is_shown(tmp_path):
    fields = dict(task="segment", dataset="lungs", metric="dice", head="linear", name="macro")
    workdir(tmp_path / "runs" / "curve", [
        row(**fields, films=10, value=0.1), row(**fields, films=796, value=0.2),
        row(**fields, films=796, value=0.3, seed=[0, 1, 2]), row(**fields, films=796, value=0.4, seed=1),
    ])
    _, lines = made(tmp_path, "3")
    assert [x["ours"] for x in lines if x["row"] == '"RAD-DINO, linear"' and x["class"] == "lungs"] == ["30.0 (1.2)"]


def test_a_run_of_ones_own_takes_the_row_that_it_is_called(tmp_path):
    fields = dict(task="probe", dataset="vindr_cxr", metric="auprc", name="macro", encoder="teacher")
    fresh = workdir(tmp_path / "runs" / "fresh", [row(**fields, value=0.44)])
    workdir(tmp_path / "runs" / "other", [row(**fields, value=0.11)])
    _, lines = made(tmp_path, "B1")
    lacking = [x for x in lines if x["row"] == "RAD-DINO random init"]
    assert lacking and all("encoder=runs/RAD-DINO_random_init --" in x["command"] for x in lacking)
    _, lines = made(tmp_path, "B1", called=(f"{fresh}=RAD-DINO random init",))
    shown = {x["row"]: x["ours"] for x in lines if x["class"] == "Agg."}
    assert shown["RAD-DINO random init"] == "44.0 (1.2)" and shown["teacher"] == "11.0 (1.2)"
    with pytest.raises(DataError, match="'nonsense'"):
        made(tmp_path, "B1", called=("nonsense",))


def test_average_and_worst_group_are_cells_of_their_own(tmp_path):
    fields = dict(task="segment", dataset="lungs", metric="dice", head="linear", name="macro")
    groups = [row(**fields, value=v, stratum=f"race={name}") for name, v in (("white", 0.93), ("asian", 0.91))]
    groups.append(groups[1] | {"stratum": "race: worst"})
    workdir(tmp_path / "runs" / "lungs", [row(**fields, value=0.95), *groups])
    _, lines = made(tmp_path, "C3")
    shown = {x["class"]: x["ours"] for x in lines if x["row"] == "RAD-DINO"}
    assert shown['"lungs, average"'] == "95.0 (1.2)" and shown['"lungs, worst group"'] == "91.0 (1.2)"


@pytest.mark.parametrize(
    "text, words", [("{", "is damaged"), ('[{"task": "probe"}]', "without class"), ("[3]", "is damaged")]
)
def test_a_damaged_results_file_is_named(tmp_path, text, words):
    path = tmp_path / "runs" / "a"
    path.mkdir(parents=True)
    (path / "results.json").write_text(text)
    with pytest.raises(DataError, match=f"a/results.json.*{words}"):
        made(tmp_path, "1")


def test_an_unknown_table_lists_those_that_there_are(tmp_path):
    with pytest.raises(DataError, match="table='9' must be one of 1, .*figB1"):
        made(tmp_path, "9")


# --- figures --------------------------------------------------------------------------------------------------


def test_a_figure_finds_each_runs_resolution_in_the_config_that_trained_it(tmp_path):
    fields = dict(task="probe", dataset="vindr_cxr", metric="auprc", name="macro", encoder="teacher")
    for size, value in ((224, 0.3), (518, 0.5)):
        rows = [row(**fields, value=value), row(**fields | {"encoder": "init"}, value=0.1)]
        workdir(tmp_path / "runs" / f"size_{size}", rows, {"task": "pretrain", "views": {"global_size": size}})
    config = tmp_path / "elsewhere"
    config.mkdir()
    (config / "config.json").write_text(json.dumps({"task": "pretrain", "views": {"global_size": 420}}))
    workdir(tmp_path / "runs" / "probe", [row(**fields | {"encoder": str(config)}, value=0.4)], {"task": "probe"})
    text, lines = made(tmp_path, "figB1")
    assert {x["row"]: x["ours"] for x in lines} == {
        "224 px": "30.0 (1.2)", "322 px": "", "420 px": "40.0 (1.2)", "518 px": "50.0 (1.2)"}
    assert "![Figure B.1" in text and "not in the paper" not in text
    picture = np.asarray(Image.open(tmp_path / "out" / "table_figB1.png").convert("L"))
    assert min(picture.shape) > 200 and len(np.unique(picture)) > 20


def test_a_figure_of_other_data_says_what_it_is(tmp_path):
    fields = dict(task="probe", dataset="synthetic", metric="auprc", name="macro", encoder="teacher", data="synthetic")
    workdir(tmp_path / "runs" / "a", [row(**fields)], {"task": "pretrain", "views": {"global_size": 96}})
    text, lines = made(tmp_path, "figB1", dataset="synthetic")
    assert {x["row"]: x["ours"] for x in lines}["96"] == "70.0 (1.2) synthetic" and "SYNTHETIC films" in text
    assert [x["reason"] for x in lines if x["row"] == "96"] == ["not in the paper"]
    assert not any(x["ours"] for x in made(tmp_path, "figB1")[1])  # VinDr-CXR's curve is not filled by them


def test_each_place_of_a_figure_is_what_its_preset_trains_on():
    for name in ("figB1", "figC1"):
        for size in paper.FIGURES[name].places.values():
            config = multicxr.get_config(f"resolution={size}")
            assert config.views.global_size == config.data.image_size == config.model.image_size == size
    figure = paper.FIGURES["figB2"]
    for preset, sources in zip(figure.presets, figure.places.values(), strict=True):
        assert list(multicxr.get_config(f"data={preset}").data.sources) == sources
    assert common.MULTI_CXR == paper.PUBLIC
