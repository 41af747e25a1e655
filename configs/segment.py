"""Segmentation: a decoder on a frozen encoder, or a U-Net from pixels, by the recipe of the paper (E.3.2).

    python -m raddino_jax.main --config=configs/segment.py:head=upernet,dataset=lungs --config.data.data_dir=prepared
    python -m raddino_jax.main --config=configs/segment.py:small,head=unet,dataset=synthetic
    python -m raddino_jax.main --config=configs/segment.py:head=linear,dataset=folder --config.encoder=runs/mine \\
      --config.data.csv=films.csv --config.structures="('right lung=127','left lung=255')"

Arguments after the colon: fields, and the presets `small` (minutes on a CPU core) and `fewshot` (a curve).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """The paper's recipe, changed by `arguments`."""
    config = ConfigDict(dict(
        task="segment",
        then=(),
        head="linear",  # linear, vitdet or upernet on a frozen encoder; unet or effunet from pixels
        dataset="",  # lungs, zones, pneumothorax, tubes, ribs; synthetic; folder; any prepared dataset with masks
        structures=(),  # () = all; of a folder "right lung=127", "lungs>0", "heart=3|4"
        encoder="rad_dino",  # a name or a path, as encoders.load takes it
        weights="",  # "random" for the same network without training
        image_size=0,  # pixels per side of the square; 0 = the encoder's own, unet_size for U-Nets
        unet_size=518,
        fit="crop",  # how a film becomes a square: crop (the encoder's own way), pad, stretch
        compute_dtype="float32",
        mean=common.RAD_DINO_MEAN,  # of U-Nets, before each film is standardised
        std=common.RAD_DINO_STD,
        # The recipe. Loss: 1 - Dice and binary cross-entropy, equally, which the paper leaves open.
        lr=5e-4,
        batch_size=80,
        epochs=100,
        min_steps=0,  # however few films there are
        eval_every=0,  # steps between validations; 0 = an epoch, at most 100 in a run
        log_every=50,
        checkpoint_every=200,
        seed=0,  # of weights, order, deformations, and of the split where the data has none
        # Curves: training films, 0 = all of them; seeds from `seed` on.
        shots=(),
        seeds=1,
        strata=(),  # columns of the table by whose values Dice is told apart
        overlays=8,  # test films drawn into overlays/
        # Augmentation, on the device. Without it a frozen encoder sees each film once.
        augment=True,
        deformation=dict(
            affine=0.5, rotation=30.0, shear=15.0,  # hi-ml's linear head on films
            elastic=0.4, elastic_alpha=34.0, elastic_sigma=4.0,  # hi-ml; in pixels of the square
            flip=0.5,  # left out where structures have sides, as lungs, zones and ribs do
            intensity=1.0, gamma=(0.5, 1.5), brightness=0.2, contrast=0.2,
        ),
        features_gib=16.0,  # host memory for features that are computed once
        head_width=512,  # channels of vitdet and upernet
        unet=dict(filters=(64, 96, 128, 192, 256, 384, 512)),
        effunet=dict(scale=(1.8, 2.6), decoder=(256, 128, 64, 32, 16), drop=0.2),
        data=dict(
            data_dir="",  # of prepared datasets
            image_size=518, films=400,  # of synthetic films
            # Of a folder: two folders with the same names in them, or a table.
            images="", masks="", csv="",
            file_column="file", mask_column="mask_file", ignore_column="", patient_column="patient_id",
            split_column="split", where="",  # "" in split_column: drawn, 70/15/15 by patient
            other="refuse",  # values without a name: refuse, background, ignore
        ),
    ))  # fmt: skip
    return common.apply(config, arguments, PRESETS)


def small(config: ConfigDict) -> None:
    """Small networks, small batches, a higher learning rate: minutes on one CPU core."""
    config.update(batch_size=8, epochs=30, lr=2e-3, head_width=64, log_every=20, checkpoint_every=50)
    config.unet.filters, config.unet_size = (8, 16, 32, 64, 64), 128
    config.data.update(image_size=96)
    config.deformation.update(elastic=0.0, rotation=15.0, shear=5.0, gamma=(0.7, 1.4))


def fewshot(config: ConfigDict) -> None:
    """Dice over the number of training films, three seeds, every point with as many steps as the paper's 796 films."""
    config.update(shots=(1, 2, 5, 10, 20, 50, 100, 200, 400, 0), seeds=3, min_steps=1000)


PRESETS = {"small": small, "fewshot": fewshot}
