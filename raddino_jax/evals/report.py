"""task=report: a language model learns to write the findings of a film, and is scored on films of others (E.3.3).

A frozen encoder's patches, a projector and a Llama; the recipe of arXiv 2401.10815 and LLaVA v1.5. Written to the
workdir: metrics.jsonl and checkpoints/ of the training, writer/ (the tuned model, see `writer_folder`), reports.jsonl
({"id", "reference", "prediction"} and strata), films/ (the first of them), results.json.
Letters: n films, S pixels per side, P patches of a film, C width of the encoder.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from raddino_jax import hosts, logs
from raddino_jax import params as trees
from raddino_jax.conversion import llama as folders
from raddino_jax.data import cases, pairs
from raddino_jax.data.pairs import Pairs
from raddino_jax.data.pipeline import DataError
from raddino_jax.evals import decode, facts, fit, report_scores, tokenizer, tune, writer_folder
from raddino_jax.evals.patches import Eye
from raddino_jax.evals.tokenizer import Tokenizer
from raddino_jax.evals.writer import Writer
from raddino_jax.models import llava
from raddino_jax.models.llama import Llama

ROUND = 16  # batches are padded to a multiple of so many tokens
EXTRA = ("rouge_score", "sacrebleu", "sentencepiece", "tokenizers")  # what comes with the extra `report`


class ReportError(DataError):
    """A config that cannot run, or parts that do not belong together; the message says what to do."""


def run(config, workdir: Path) -> None:
    """Train, write and score; a finished run tells its scores. Raises DataError, encoders.WeightsError."""
    if write(config, workdir):
        score(config, workdir)


def write(config, workdir: Path, beat: Callable[[int, str], None] = lambda step, doing: None) -> bool:
    """Train where there are steps to take, and write the reports of a split; False when asked to stop meanwhile.

    Of several processes all call it. Goes on where an earlier call was killed.
    """
    config, workdir = config.copy_and_resolve_references(), Path(workdir)
    check(config)
    if (workdir / decode.WHOLE).exists():
        return True
    task = Task.open(config, workdir)
    params = task.train(workdir, beat) if task.steps else task.params
    if params is None:
        return False
    if task.steps:
        task.export(params, workdir / "writer")
    return decode.run(task, params, workdir, beat)


def check(config) -> None:
    """Raise ReportError with every field that cannot be, and its mend."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    problems = [
        message for bad, message in (
            (config.dataset not in pairs.DATASETS,
             f"dataset={config.dataset!r} must be one of {', '.join(pairs.DATASETS)}"),
            (not config.encoder, "encoder is empty: name one, or a workdir"),
            (config.init not in ("weights", "random"), f"init={config.init!r} must be weights or random"),
            (config.init == "weights" and not config.llm,
             "llm is empty: the folder of a language model, e.g. --config.llm=vicuna-7b-v1.5, or set init=random"),
            (config.init == "random" and config.llm, "init=random makes no use of llm: set one of them"),
            (config.dataset in pairs.TESTED_ON and not writer_folder.is_tuned(config.llm),
             f"{config.dataset} is an external test: set llm to the writer/ of a finished run of this task"),
            (config.split not in cases.SPLITS, f"split={config.split!r} must be one of {', '.join(cases.SPLITS)}"),
            (config.epochs < 0 or config.steps < 0, "epochs and steps must not be negative"),
            (min(config.batch_size, config.decode_batch, config.new_tokens, config.accumulate) < 1,
             "batch_size, decode_batch, new_tokens and accumulate must be at least 1"),
            (config.batch_size % (config.accumulate * hosts.count()) != 0,
             f"batch_size={config.batch_size} must be a multiple of accumulate={config.accumulate} times the "
             f"{hosts.count()} processes"),
            (config.decode_batch % jax.device_count() != 0 and jax.default_backend() == "tpu",
             f"decode_batch={config.decode_batch} must be a multiple of the {jax.device_count()} chips"),
            (config.lr <= 0, f"lr={config.lr} must be positive"),
            (config.lora < 0, f"lora={config.lora} is a rank, 0 for none"),
            (bool(missing), f"{', '.join(missing)} not installed: pip install -e '.[report]'"),
        ) if bad
    ]  # fmt: skip
    if problems:
        raise ReportError("this config cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def called(config) -> str:
    """The encoder as rows call it, with whatever keeps a run from standing for the paper's."""
    notes = [
        note for used, note in (
            (config.weights == "random", "random weights"), (config.lora, f"LoRA {config.lora}"),
            (config.shuffle_images, "shuffled images"),
        ) if used
    ]  # fmt: skip
    return config.encoder + (f" ({', '.join(notes)})" if notes else "")


# --- what is learned from what ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Films with texts, and the parts that read the one and write the other.

    shown: for each pair the place of the pair whose film it is shown, its own unless images are shuffled. sizes: of the
    language model. params: where training begins.
    """

    config: object
    source: Pairs
    shown: np.ndarray
    tokenizer: Tokenizer
    eye: Eye
    sizes: dict
    params: dict

    @classmethod
    def open(cls, config, workdir: Path) -> "Task":
        """Read texts, tokenizer, encoder and language model; what does not fit is told before any is computed with."""
        source = pairs.open_pairs(config, logs.say)
        _tell_of(config, source)
        words = _tokenizer(config, source, workdir)
        sizes = _sizes(config, words)
        words.check(sizes["vocabulary"])
        eye = Eye.open(config, config.compute_dtype)
        task = cls(config, source, _shown(config, source), words, eye, sizes, {})
        task.check_sizes()
        return dataclasses.replace(task, params=task.initial())

    def check_sizes(self) -> None:
        """Raise ReportError where there is nothing to learn or to write, or no room to write in."""
        config, prompt, positions = self.config, len(self.prompt), self.sizes["positions"]
        if self.steps and not len(self.source.split("train")):
            raise ReportError(
                f"{self.source.name} has no pairs to train on; with steps=0 and epochs=0 it is only tested on"
            )
        needed = [config.split] + (["val"] if self.steps and config.eval_every else [])
        if lacking := [name for name in needed if not len(self.source.split(name))]:
            raise ReportError(f"{self.source.name} has no pairs of split {', '.join(lacking)}")
        if config.length > positions or prompt + config.new_tokens > positions or prompt >= config.length:
            raise ReportError(
                f"a prompt has {prompt} tokens, {self.eye.shape[0]} of them patches, the language model {positions} "
                f"positions: expected length={config.length} above the one and within the other, and room for "
                f"new_tokens={config.new_tokens}"
            )

    @cached_property
    def prompt(self) -> list[int]:
        """The tokens before an answer."""
        return llava.prompt(self.tokenizer.encode, self.eye.shape[0])

    @property
    def made(self) -> dict:
        """What a projector of this task reads."""
        eye = self.eye
        return {
            "encoder": self.config.encoder, "layer": eye.layer, "image_size": eye.encoder.image_size, "join": eye.join
        }  # fmt: skip

    def writer(self, dtype: str, lora: int = 0, remat: bool = False) -> Writer:
        """The model without weights, computing in a type."""
        return Writer.of(self.sizes, dtype=dtype, remat=remat, lora=lora)

    def initial(self) -> dict:
        """Parameters at step 0: those of config.llm, its projector too where it has one, the rest at random."""
        config, writer = self.config, self.writer(self.config.compute_dtype, self.config.lora)
        key, channels = jax.random.key(config.seed), self.eye.shape[1]
        like, given = jax.eval_shape(lambda: writer.init(key, channels)), {}
        if config.init == "weights":
            weights = folders.read(Path(config.llm))[1]
            given["llama"] = trees.merge(like["llama"], trees.unflatten(weights), config.llm)
        if writer_folder.is_tuned(config.llm):
            given["projector"] = writer_folder.read_projector(Path(config.llm), like["projector"], self.made)

        @jax.jit
        def fresh():  # jitted, so that what is given already is not drawn
            return {name: tree for name, tree in writer.init(key, channels).items() if name not in given}

        found = jax.tree.map(lambda x: np.asarray(x, np.float32), fresh() | given)
        return found | ({"llama": _as_wide(found["llama"])} if config.init == "random" else {})

    def merged(self, params: dict) -> dict:
        """Parameters without adapters."""
        if not self.config.lora:
            return params
        return jax.jit(self.writer("float32", self.config.lora).merged)(params)

    # --- training -----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of the whole run; 0 where there is nothing to learn."""
        if self.config.dataset in pairs.TESTED_ON:
            return 0
        films = len(self.source.split("train"))
        return self.config.steps or self.config.epochs * math.ceil(films / self.config.batch_size)

    def train(self, workdir: Path, beat: Callable[[int, str], None] = lambda step, doing: None) -> dict | None:
        """Tuned parameters; None when asked to stop."""
        c, eye = self.config, self.eye_for(self.config.compute_dtype)
        writer = self.writer(c.compute_dtype, c.lora, c.remat)
        constants = tune.Tune(
            writer=writer, encode=eye, lr=c.lr, warmup=c.warmup, betas=tuple(c.betas), weight_decay=c.weight_decay,
            clip=c.clip, steps=self.steps, accumulate=c.accumulate,
        )  # fmt: skip
        frozen = eye.frozen if eye else {}
        return tune.run(c, constants, self.params, frozen, self.batches, workdir, self.val_batches, beat)

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the batches of steps start + 1 on."""
        train, config = self.source.split("train"), self.config
        examples, length = self.examples(train)
        order = fit.places(len(train), config.batch_size, config.seed, start, self.steps)
        for places, shown in self.seen(train[index[self.mine]] for index in order):
            yield llava.batch([examples[place] for place in places], length) | shown

    def val_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the validation part, each pair once: what fills up the last batch does not count."""
        places, size = self.source.split("val"), self.config.batch_size
        examples, length = self.examples(places)
        fillers = -len(places) % size
        index = np.concatenate([places, np.repeat(places[:1], fillers)])
        real = np.arange(len(index)) < len(places)
        batches = [(index[k : k + size][self.mine], real[k : k + size][self.mine]) for k in range(0, len(index), size)]
        for (places, real), (_, shown) in zip(batches, self.seen(places for places, _ in batches), strict=True):
            batch = llava.batch([examples[place] for place in places], length)
            batch["labels"][~real] = llava.IGNORED
            yield batch | shown

    @property
    def mine(self) -> slice:
        """This process's rows of a batch."""
        share = self.config.batch_size // hosts.count()
        return slice(hosts.index() * share, (hosts.index() + 1) * share)

    def examples(self, train: np.ndarray) -> tuple[dict[int, tuple], int]:
        """({place: (tokens, labels)}, the length to which batches are padded)."""
        limit, patches = self.config.length, self.eye.shape[0]
        texts = {place: self.source.pairs[place].text for place in train}
        found = {place: llava.example(self.tokenizer.encode, patches, text, limit) for place, text in texts.items()}
        longest = max(len(tokens) for tokens, _ in found.values())
        cut = sum(tokens[-1] != llava.END for tokens, _ in found.values())
        length = min(limit, -(-longest // ROUND) * ROUND)
        logs.say(
            f"texts: up to {longest} tokens, {len(self.prompt)} of them the prompt with {patches} patches; "
            f"{cut} of {len(found)} are cut; batches of {length} tokens"
        )
        return found, length

    # --- films --------------------------------------------------------------------------------------------------

    @cached_property
    def tested(self) -> np.ndarray:
        """Places of the pairs that are written for."""
        return self.source.split(self.config.split)[: self.config.films or None]

    @cached_property
    def used(self) -> np.ndarray:
        """Places of the pairs whose films are shown, in their order."""
        learned = [self.source.split(name) for name in ("train", "val")] if self.steps else []
        return np.unique(self.shown[np.concatenate([*learned, self.tested])])

    @cached_property
    def features(self) -> np.ndarray | None:
        """Patches [used, P, C], computed once, where they are not too many; else None."""
        gib = len(self.used) * math.prod(self.eye.shape) * 4 / 2**30
        if hosts.count() > 1 or gib > self.config.features_gib:
            return None
        c = self.config
        return self.eye.kept(self.source, self.used, c.features_dir, c.decode_batch, c.threads)

    def eye_for(self, dtype: str) -> Eye | None:
        """The encoder computing in a type; None where its patches are there already."""
        if self.features is not None:
            return None
        return self.eye if dtype == self.eye.encoder.dtype else Eye.open(self.config, dtype)

    def seen(self, batches: Iterator[Sequence[int]]) -> Iterator[tuple[Sequence[int], dict[str, np.ndarray]]]:
        """(places, {"features"} or {"images"} of the films that they are shown)."""
        if self.features is not None:
            for places in batches:
                rows = np.searchsorted(self.used, self.shown[places])
                yield places, {"features": np.asarray(self.features[rows])}
            return
        taken = []

        def shown():
            for places in batches:
                taken.append(places)
                yield self.shown[places]

        for levels in self.eye.read(self.source, shown(), self.config.threads):
            yield taken.pop(0), {"images": levels}

    def export(self, params: dict, folder: Path) -> None:
        """The tuned model as a folder that transformers and config.llm open."""
        if not hosts.first("writer", folder.exists):
            merged = jax.tree.map(_whole, self.merged(params))
            if hosts.index() == 0:
                writer_folder.write(folder, merged, self.sizes, self.tokenizer.path, self.made)
                logs.say(f"the tuned model is in {folder}")


def _tell_of(config, source: Pairs) -> None:
    known = pairs.PAPER.get(source.name, {})
    counts = [
        f"{len(source.split(name))} {name}" + (f" (the paper: {known[name]})" if name in known else "")
        for name in cases.SPLITS
    ]
    logs.say(f"data: {source.kind.upper()} ({source.name}: pairs of a frontal film and findings, {', '.join(counts)})")
    if lacking := [column for column in config.strata if column not in source.pairs[0].facts]:
        there = ", ".join(source.pairs[0].facts)
        raise ReportError(f"strata: {source.name} has no column {', '.join(lacking)}; it has {there}")


def _tokenizer(config, source: Pairs, workdir: Path) -> Tokenizer:
    """The language model's own; one learned from the training texts where both begin from nothing."""
    if config.tokenizer or config.llm:
        return tokenizer.load(config.tokenizer or config.llm)
    path = workdir / "tokenizer.model"

    def learn() -> str:
        if not path.exists():
            texts = [source.pairs[place].text for place in source.split("train")]
            texts += [llava.SYSTEM.strip(), llava.INSTRUCTION.strip()]
            tokenizer.train(texts, config.llm_sizes.vocabulary, path)
        return str(path)

    return tokenizer.load(hosts.first("tokenizer", learn, tokenizer.TokenizerError))


def _sizes(config, words: Tokenizer) -> dict:
    """Fields of the language model. One from scratch has the words that were learned for it."""
    if config.init == "weights":
        return folders.read_sizes(Path(config.llm) / "config.json")
    model = Llama(**config.llm_sizes.to_dict() | ({} if config.tokenizer else {"vocabulary": words.size}))
    return {name: getattr(model, name) for name in (*folders.SIZES.values(), "theta")}


def _as_wide(weights: dict) -> dict:
    """Fresh weights of a language model whose sums are as large as those of Llama's width of 4,096.

    Its deviation of 0.02 lets a narrow model attend to everything alike, and to no patch in particular, for long.
    """
    flat = trees.flatten(weights)
    kernels = {name: value * (4096 / len(value)) ** 0.5 for name, value in flat.items() if name.endswith("kernel")}
    return trees.unflatten(flat | kernels)


def _shown(config, source: Pairs) -> np.ndarray:
    shown = np.arange(len(source))
    if config.shuffle_images:
        logs.say("CONTROL: each text has the film of another patient")
        used = {"train", config.split} | ({"val"} if config.eval_every else set())
        for places in filter(len, map(source.split, sorted(used))):
            patients = [source.pairs[place].patient for place in places]
            shown[places] = places[pairs.exchanged(patients, config.seed)]
    return shown


def _whole(array) -> np.ndarray:
    """An array that may lie on the devices of several processes. All call it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


# --- scores -----------------------------------------------------------------------------------------------------

FACTS = {  # of synthetic films
    "findings_f1": lambda references, texts, _: facts.statistics(references, texts),
    "names_f1": lambda references, texts, _: facts.statistics(references, texts, placed=False),
}


def score(config, workdir: Path) -> None:
    """Score reports.jsonl, write results.json and tell it; of several processes one alone calls it."""
    path = Path(workdir) / "results.json"
    if not path.exists():
        lines, synthetic = decode.read(workdir), config.dataset == "synthetic"
        references, texts = ([line[name] for line in lines] for name in ("reference", "prediction"))
        rows = report_scores.score(
            references, texts, dict(config.graders), {name: [line[name] for line in lines] for name in config.strata},
            seed=config.seed, metrics=report_scores.METRICS | (FACTS if synthetic else {}), dataset=config.dataset,
            encoder=called(config), data="synthetic" if synthetic else "real", config="config.json",
        )  # fmt: skip
        logs.write_whole(path, json.dumps(rows, indent=1) + "\n")
    _tell(json.loads(path.read_text()))


def _tell(rows: Sequence[dict]) -> None:
    for row in rows:
        if row["class"] in ("macro", "micro") and not row["stratum"]:
            interval = "" if row["value"] is None else " (95 % {:.3f} to {:.3f})".format(*row["interval"])
            value = f"null: {row['reason']}" if row["value"] is None else f"{row['value']:.3f}"
            logs.say(
                f"report: {row['encoder']}  {row['metric']} {row['class']}  {value}{interval}  {row['n']} reports  "
                f"[{row['data']}]"
            )
