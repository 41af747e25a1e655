"""The paper's run, shrunk: synthetic radiographs, minutes on two CPU cores.

    python -m raddino_jax.main --config=configs/quickstart.py
    python -m raddino_jax.main --config=configs/quickstart.py --config.data.sources="('folder:PATH',)"

It is `configs/multicxr.py` with smaller numbers (configs/common.py: shrink), so what it shows of the system
holds for the full run. Arguments after a colon are those of multicxr.py.
"""

from ml_collections import ConfigDict

from configs import common, multicxr


def get_config(arguments: str = "") -> ConfigDict:
    """The shrunk run, changed by `arguments`."""
    config = common.shrink(multicxr.get_config())
    config.update(steps=700, epoch_steps=100, log_every=10, checkpoint_every=175, eval_every=175)
    config.eval.update(films=3200, feature="cls+patches")
    config.then = ("probe", "figures")
    return common.apply(config, arguments, multicxr.PRESETS)
