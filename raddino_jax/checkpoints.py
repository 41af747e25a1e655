"""Checkpoints of a run: the Orbax manager behind save, restore and latest.

A checkpoint `checkpoints/<step>/` holds student, teacher, opt and rest (step, centres) as separate items, so that an
evaluation reads the teacher alone. Step 0 holds the teacher only: the initialisation, which evaluations compare with.
Saving is asynchronous; a step is listed once it is complete. `digests.json` in it has a digest of each file, for Orbax
restores a flipped bit without a word.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from raddino_jax import hosts, logs

ITEMS = ("student", "teacher", "opt", "rest")
DIGESTS = "digests.json"
NOT_DIGESTED = (DIGESTS, DIGESTS + ".tmp", "_CHECKPOINT_METADATA")  # Orbax writes times into the last after the rename
UNFINISHED = "*.orbax-checkpoint-tmp"
THREADS = 8  # files digested side by side: hashlib lets go of the interpreter


FOREVER = 10**15


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that can be read; the message says what is left."""


class Checkpoints:
    """The checkpoints of one workdir. Of several processes all call every method.

    keep: newest ones kept. keep_every: steps between checkpoints kept for good, 0 for none; step 0 always is.
    best: metric (larger is better) whose best checkpoint is kept, "" for none.
    """

    def __init__(self, workdir: Path, keep: int = 3, keep_every: int = 0, best: str = ""):
        rules = [LatestN(keep), EveryNSteps(keep_every or FOREVER)]
        # A start that was judged by something else may have left other scores.
        judge = (lambda metrics: metrics.get(best, -np.inf)) if best else None
        if judge:
            rules.append(BestN(get_metric_fn=judge, n=1, keep_checkpoints_without_metrics=False))
        self.folder = Path(workdir).resolve() / "checkpoints"
        self.options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(rules), cleanup_tmp_directories=True,
            best_fn=judge,  # the policy alone decides what is kept, but without this no metrics are written for it
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )

    @cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Opened at the first use, which is after damaged steps are out of the way: it fails at unreadable metrics."""
        return ocp.CheckpointManager(self.folder, options=self.options, item_names=ITEMS)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        return self.manager.latest_step()

    def save(self, step: int, items: dict, metrics: dict | None = None) -> None:
        """Start to save {item name: tree}; returns once the arrays may be changed.

        Raises CheckpointError where this or the save before it fails.
        """
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self.manager.save(step, args=ocp.args.Composite(**saved), metrics=metrics)
        except Exception as error:
            raise self._unwritten(error) from error

    def check(self) -> None:
        """Raise CheckpointError if a save in the background has failed."""
        try:
            self.manager.check_for_errors()
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, step: int, like: dict) -> dict:
        """{item name: tree} of a step, each with the shapes, dtypes and places of `like`'s leaves."""
        wanted = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for name, tree in like.items()}
        restored = self.manager.restore(step, args=ocp.args.Composite(**wanted))
        return {name: restored[name] for name in like}

    def newest_sound(self) -> int | None:
        """Step of the newest checkpoint whose files are what was written; None where there is none at all.

        Damaged newer ones are told and moved to `damaged/` beside `checkpoints/`, for their steps will be saved again.
        Raises CheckpointError, and moves none, where all are damaged or only the initialisation is not.
        """
        step = hosts.first("sound", self._set_damaged_aside, CheckpointError)
        self.manager.reload()
        return step

    def _set_damaged_aside(self) -> int | None:
        steps, damaged = sorted(_steps(self.folder), reverse=True), {}
        for step in steps:
            if not (faults := damage(self.folder / str(step))):
                break
            damaged[step] = "; ".join(faults[:3])
        sound = next((step for step in steps if step not in damaged), None)
        if damaged and not sound:  # to begin anew must be somebody's decision, at the next start too: all stay in place
            raise CheckpointError(
                f"every checkpoint of {self.folder}{'' if sound is None else ' but the initialisation'} is damaged ("
                + ", ".join(f"step {step}: {faults}" for step, faults in damaged.items())
                + "): restore one from a backup, or train anew in another --workdir"
            )
        for step, faults in damaged.items():
            aside = _aside(self.folder, step)
            logs.say(f"checkpoint {step} is damaged: {faults}. It is now {aside}; trying the one before")
        return sound

    def _seal(self) -> None:
        """Write the digests of the step that is complete but not yet renamed."""
        if hosts.index() == 0:
            for step in self.folder.glob(UNFINISHED):
                logs.write_whole(step / DIGESTS, json.dumps(digests(step), indent=1))

    def _unwritten(self, error: Exception) -> CheckpointError:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            reason = f"no space left on the disk of {self.folder}"
        elif "Read-only file system" in str(error):
            reason = f"{self.folder} is on a read-only file system"
        kept = max(_steps(self.folder), default=None)
        return CheckpointError(
            f"a checkpoint could not be written: {reason}. The newest complete one is "
            f"{'none' if kept is None else f'step {kept}'}; once that is mended the same command goes on from it"
        )

    def close(self) -> None:
        """Wait until everything is on disk. Raises CheckpointError where a save fails."""
        if "manager" not in vars(self):
            return  # never opened
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        finally:
            self.manager.close()


def _abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _steps(folder: Path) -> list[int]:
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []


def _aside(folder: Path, step: int) -> Path:
    """Move a step out of `checkpoints/`, under a name that is free."""
    damaged = folder.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    number = 1
    while (target := damaged / f"{step}-{number}").exists():
        number += 1
    return (folder / str(step)).rename(target)


def digests(step: Path) -> dict[str, str]:
    """{path below `step`: BLAKE2b of the file} of every file whose bytes are final."""
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.name not in NOT_DIGESTED)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((str(p.relative_to(step)) for p in files), pool.map(_digest, files), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def damage(step: Path) -> list[str]:
    """What differs between the files of a step and their digests, a sentence each.

    A step without digests, from before there were any, counts as sound.
    """
    try:
        expected = json.loads((step / DIGESTS).read_text())
        found = digests(step)
    except FileNotFoundError:
        return [] if os.listdir(step) else [f"{step} is empty"]
    except (OSError, ValueError) as error:
        return [f"{step / DIGESTS} cannot be read ({error})"]
    missing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    return sorted(missing) + [f"{name} has other bytes than were written" for name, digest in sorted(found.items())
                              if name in expected and digest != expected[name]]


def load_arrays(workdir: Path, item: str, step: int | None = None) -> dict:
    """One item of a checkpoint (the newest by default) as nested dicts of numpy arrays, on any devices.

    Of several processes each may call it alone. Raises FileNotFoundError where the workdir has no complete checkpoint.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    steps = sorted(_steps(folder))
    if not steps:
        raise FileNotFoundError(f"{workdir} holds no complete checkpoint (expected {folder}/<step>/)")
    path = folder / str(steps[-1] if step is None else step) / item
    alone = ocp.options.MultiprocessingOptions(primary_host=hosts.index(), active_processes={hosts.index()})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
    tree = reader.metadata(path).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
