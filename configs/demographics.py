"""Sex, age, weight, BMI and ethnicity from frozen features: logistic regression, five folds by subject (paper, 3.5 and E.3.4).

    python -m raddino_jax.main --config=configs/demographics.py --config.data.data_dir=prepared          # as in the paper
    python -m raddino_jax.main --config=configs/demographics.py:encoder=runs/mine,synthetic
    python -m raddino_jax.main --config=configs/demographics.py:encoder=rad_dino --config.targets="('sex','age')" \\
      --config.data.sources="('folder:films',)" --config.csv=films.csv

    [P] arXiv 2401.10815        [open] not stated there: our reading, change it freely
"""  # noqa: E501

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """The paper's protocol, changed by `arguments`."""
    config = ConfigDict(dict(
        task="demographics",
        then=(),
        encoder="rad_dino",  # a name or a path, as encoders.load takes it; "pixels": a grey raster
        weights="",  # "random" for the same network without training
        beside=(),  # further encoders on the same folds, e.g. ("pixels", "runs/mine/checkpoints/0")
        feature="cls",  # [P]; "cls+patches": with the patches' mean
        # What is predicted, and the columns that hold it; a target without a column here is a column by itself.
        targets=("sex", "age", "weight", "bmi", "ethnicity"),
        columns=dict(sex="sex", age="age", weight="weight", bmi="bmi", ethnicity="race"),
        # [P] edges between the classes of a number; a class holds its lower edge [open]. () = classes are words
        bins=dict(age=(20.0, 40.0, 60.0, 80.0), weight=(50.0, 65.0, 80.0, 95.0), bmi=(18.5, 25.0, 30.0, 35.0)),
        folds=5,  # [P]
        by_patient=True,  # [P] 3.5: splits are by subject across all applications
        split_column="",  # instead of folds: train on its "train" and "val", judge on its "test"
        # scikit-learn's LogisticRegression with its defaults [P] [open]
        c=1.0, max_iter=100, tol=1e-4,
        standardize=False,  # [open] features to mean 0 and deviation 1
        solver="auto",  # sklearn, jax (large sets), or auto: by size
        strata=(),  # columns by whose groups accuracy is told apart
        smallest=2,  # patients that a group needs to count as the worst
        films=0,  # at most so many, 0 = all
        seed=0,
        encode_batch=32,
        threads=2,  # that decode films
        features_dir="~/.cache/raddino_jax/features",  # where features are kept
        # Of a folder: its table.
        csv="", file_column="file", patient_column="patient_id", where="",
        data=dict(sources=("mimic_iv",), data_dir="", image_size=518, synthetic_size=400),
    ))  # fmt: skip
    return common.apply(config, arguments, PRESETS)


def synthetic(config: ConfigDict) -> None:
    """The drawn films: all targets but ethnicity, which they have not."""
    config.targets = ("sex", "age", "weight", "bmi")
    config.data.update(sources=("synthetic",), image_size=96)


PRESETS = {"synthetic": synthetic}
