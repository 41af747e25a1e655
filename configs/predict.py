"""The masks of a folder of films, by a finished run of configs/segment.py.

    python -m raddino_jax.main --config=configs/predict.py --workdir=runs/lungs --config.images=films --config.out=masks
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """What to read and where to write; the head is read from the workdir. After the colon: field=value pairs."""
    config = ConfigDict(dict(
        task="predict", then=(),
        images="",  # a folder of films, of any format
        out="",  # "" = predictions/ of the workdir
        part="",  # of a curve, the folder of one of its runs
        separate=False,  # a mask file per structure
    ))  # fmt: skip
    return common.apply(config, arguments, {})
