"""Linear probe: one layer of sigmoids on a frozen encoder, by the recipe and the splits of the paper (E.3.1).

    python -m raddino_jax.main --config=configs/probe.py:encoder=rad_dino,dataset=vindr_cxr --config.data.data_dir=prepared
    python -m raddino_jax.main --config=configs/probe.py:fast,encoder=runs/mine,dataset=folder --config.images=films \\
      --config.csv=films.csv --config.labels="('effusion','nodule')" --config.beside="('pixels',)"

Arguments after the colon: fields, and the preset `fast` (each film is encoded once, learning rates are tried).

    [P] arXiv 2401.10815        [open] not stated there: our reading, change it freely
"""  # noqa: E501

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """The paper's recipe, changed by `arguments`."""
    config = ConfigDict(dict(
        task="probe",
        then=(),
        encoder="rad_dino",  # a name or a path, as encoders.load takes it; "pixels": a grey raster
        weights="",  # "random" for the same network without training
        beside=(),  # further encoders on the same splits, e.g. ("pixels", "runs/mine/checkpoints/0")
        image_size=0,  # pixels per side of the square; 0 = the encoder's own
        compute_dtype="float32",
        feature="cls",  # [P]; cls+patches, cls+grid: with the patches' means, over the film or 3 x 3 regions
        dataset="",  # vindr_cxr, candid_ptx, rsna_pneumonia, padchest; any prepared one with labels; folder; synthetic
        # "" and () and 0: what the dataset's row in evals/splits.py says, for others five folds over all labels.
        protocol="",  # folds, official (the dataset's own test part), seeds
        repeats=0,  # folds, or seeds
        labels=(),
        where="",  # "column=value" keeps films
        # The recipe.
        lrs=(5e-5,),  # [P]; of several, each repeat takes the one with the best macro AUPRC of its validation part
        weight_decay=0.01,  # [open] PyTorch's default
        batch_size=96,  # [P]
        epochs=100,  # [P]
        standardize=False,  # [open] features to mean 0 and deviation 1 of the train part; pixels always
        seed=0,
        # Augmentation, on the device; without it films are encoded once, and all repeats and rates train together.
        augment=True,  # [P]; ranges are those of hi-ml's linear head on films
        variation=dict(
            rotation=30.0, shear=15.0, scale=(0.8, 1.0), flip=0.5, gamma=(0.5, 1.5), brightness=0.2, contrast=0.2,
            noise=0.05, noisy=0.5,
        ),
        strata=(),  # columns by whose groups scores are told apart
        films=0,  # at most so many, 0 = all
        encode_batch=32,
        threads=2,  # that decode films
        features_dir="~/.cache/raddino_jax/features",  # where features are kept
        # Of a folder: where its films are, and its table.
        images="", csv="", file_column="file", patient_column="patient_id", split_column="",
        data=dict(data_dir="", image_size=518, synthetic_size=400),
    ))  # fmt: skip
    return common.apply(config, arguments, PRESETS)


def fast(config: ConfigDict) -> None:
    """No augmentation, standardised features, four learning rates to choose from: seconds to minutes."""
    config.update(augment=False, standardize=True, lrs=(1e-4, 1e-3, 1e-2, 1e-1))


PRESETS = {"fast": fast}
