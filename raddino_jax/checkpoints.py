"""Checkpoints of a run: the Orbax manager behind save, restore and latest.

A checkpoint `checkpoints/<step>/` holds student, teacher, opt and rest (step, centres) as separate items, so that an
evaluation reads the teacher alone. Step 0 holds the teacher only: the initialisation, which evaluations compare with.
Saving is asynchronous; a step is listed once it is complete.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

ITEMS = ("student", "teacher", "opt", "rest")


FOREVER = 10**15


class Checkpoints:
    """The checkpoints of one workdir.

    keep: newest ones kept. keep_every: steps between checkpoints kept for good, 0 for none; step 0 always is.
    best: metric (larger is better) whose best checkpoint is kept, "" for none.
    """

    def __init__(self, workdir: Path, keep: int = 3, keep_every: int = 0, best: str = ""):
        rules = [LatestN(keep), EveryNSteps(keep_every or FOREVER)]
        if best:
            rules.append(BestN(get_metric_fn=lambda m: m[best], n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(rules), cleanup_tmp_directories=True
        )
        folder = Path(workdir).resolve() / "checkpoints"
        self.manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        return self.manager.latest_step()

    def save(self, step: int, items: dict, metrics: dict | None = None) -> None:
        """Start to save {item name: tree}; returns once the arrays may be changed."""
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self.manager.save(step, args=ocp.args.Composite(**saved), metrics=metrics)

    def restore(self, step: int, like: dict) -> dict:
        """{item name: tree} of a step, each with the shapes, dtypes and places of `like`'s leaves."""
        wanted = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for name, tree in like.items()}
        restored = self.manager.restore(step, args=ocp.args.Composite(**wanted))
        return {name: restored[name] for name in like}

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def _abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def load_arrays(workdir: Path, item: str, step: int | None = None) -> dict:
    """One item of a checkpoint (the newest by default) as nested dicts of numpy arrays, on any devices.

    Raises FileNotFoundError where the workdir has no complete checkpoint.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"{workdir} holds no complete checkpoint (expected {folder}/<step>/)")
    path = folder / str(steps[-1] if step is None else step) / item
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, restore_args=args)
