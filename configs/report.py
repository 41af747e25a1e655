"""Report generation: a language model learns to write the Findings of a film that a frozen encoder sees (E.3.3).

    python -m raddino_jax.main --config=configs/report.py:encoder=rad_dino,dataset=mimic_cxr \\
      --config.data.data_dir=prepared --config.data.reports=mimic-cxr-reports --config.llm=vicuna-7b-v1.5
    python -m raddino_jax.main --config=configs/report.py:encoder=rad_dino,dataset=iu_xray \\
      --config.data.data_dir=prepared --config.llm=runs/report/writer          # external test of a tuned model
    python -m raddino_jax.main --config=configs/report.py:tiny,encoder=runs/quickstart

Arguments after the colon: fields, and the presets `tiny` (synthetic films, minutes on two CPU cores) and `lora`.
Training on MIMIC-CXR is 3,444 steps of a model of 6.8 billion parameters; `plan` says on which devices that fits.

    [P] arXiv 2401.10815        [LLaVA] its script for v1.5        [open] in neither: our reading
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """The paper's recipe, changed by `arguments`."""
    config = ConfigDict(dict(
        task="report",
        then=(),
        encoder="rad_dino",  # a name or a path, as encoders.load takes it; it is never trained [P]
        weights="",  # "random" for the same network without training
        feature_layer=0,  # block whose patches are read: -1 the last, -2 that before; 0 = the encoder's own [LLaVA]
        image_size=0,  # pixels per side of the square; 0 = the encoder's own
        join=1,  # n x n neighbouring patches as one token; 1 is [P]
        dataset="mimic_cxr",  # mimic_cxr; iu_xray (test alone); folder; synthetic
        # The language model: a Hugging Face folder of Vicuna-7B v1.5 [P], or the writer/ of a run of this task.
        llm="",
        llm_sizes=dict(vocabulary=32_000, width=4096, depth=32, heads=32, hidden=11_008, positions=4096),
        init="weights",  # "random": of llm_sizes, without a folder
        tokenizer="",  # tokenizer.model, tokenizer.json or a folder with one; "" = in the llm folder
        lora=0,  # rank; 0 trains the whole language model [P], anything else is a deviation
        # The recipe.
        batch_size=128,  # [P]
        accumulate=1,  # parts of a batch, one after the other, on the same trajectory
        epochs=3,  # [P]
        steps=0,  # 0 = by epochs
        lr=2e-5,  # [P]
        warmup=0.03,  # share of the steps [P]; cosine to 0 after it
        clip=1.0,  # [LLaVA] the Trainer's own
        weight_decay=0.0,  # [P]
        betas=(0.9, 0.999),  # [P]
        length=2048,  # tokens of prompt, film and answer [LLaVA]
        compute_dtype="bfloat16",  # [P]
        remat=True,  # [P]
        mesh=dict(fsdp=0),  # devices that share parameters and moments; 0 = all
        seed=0,  # of weights and order
        features_gib=4.0,  # up to which features are computed once and kept, else in every step
        features_dir="~/.cache/raddino_jax/features",
        threads=2,  # that read films
        log_every=10,
        checkpoint_every=200,
        eval_every=0,  # steps between losses of the validation part; 0 = never
        # Decoding: greedy, until </s>.
        new_tokens=150,  # [P]
        decode_batch=16,  # the texts are those of batch 1
        decode_dtype="float32",  # [P]
        split="test",  # that is written for and scored
        films=0,  # of it, at most; 0 = all
        graders=dict(radgraph="", radgraph_python="", chexbert="", vocab=""),  # as in evals/report_scores.py
        strata=(),  # columns by whose groups scores are told apart
        shuffle_images=False,  # the control: each text gets the film of another patient
        data=dict(
            data_dir="",  # of prepared datasets
            reports="",  # of mimic_cxr: the folder of mimic-cxr-reports.zip, unpacked, or mimic_cxr_sectioned.csv
            val=0.033,  # share of the patients of train that validate beside the official ones, 7,250 pairs [open]
            image_size=96, films=4000,  # of synthetic films
            # Of a folder: its table. Splits "" are drawn by patient, 70/15/15.
            images="", csv="", file_column="file", text_column="findings", patient_column="patient_id",
            split_column="split", where="",
        ),
    ))  # fmt: skip
    return common.apply(config, arguments, PRESETS)


def tiny(config: ConfigDict) -> None:
    """A language model of 0.2 million parameters from scratch, on synthetic films: a quarter of an hour of a core."""
    config.update(dataset="synthetic", encoder="runs/quickstart", init="random", compute_dtype="float32", remat=False)
    config.llm_sizes.update(vocabulary=1024, width=64, depth=2, heads=4, hidden=172, positions=512)
    config.update(join=3, batch_size=64, steps=2000, lr=3e-3, length=384, new_tokens=48, decode_batch=64)
    config.update(log_every=50, checkpoint_every=500, eval_every=500, then=("figures",))
    config.data.films = 16_000


def lora(config: ConfigDict) -> None:
    """Adapters of rank 64 instead of the whole language model: a deviation from the paper, for fewer devices."""
    config.update(lora=64, lr=2e-4)


PRESETS = {"tiny": tiny, "lora": lora}
