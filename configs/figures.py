"""Pictures and report.html: of a finished run, of any encoder on films of yours, of several runs side by side.

    python -m raddino_jax.main --config=configs/figures.py --workdir=runs/quickstart
    python -m raddino_jax.main --config=configs/figures.py --workdir=runs/looks --config.encoder=rad_dino \
        --config.films="('a.dcm','b.png')" --config.points="((410,520),(300,700))"
    python -m raddino_jax.main --config=configs/figures.py --workdir=runs/sizes \
        --config.runs="('runs/size_*',)" --config.by=data.fraction

Reads config.json, metrics.jsonl, results.json and the newest checkpoint of workdirs; changes none of them. Each picture
is a PNG in WORKDIR/figures beside the numbers behind it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arguments: str = "") -> ConfigDict:
    """Everything else is read from the workdir. After the colon: field=value pairs."""
    config = ConfigDict(dict(task="figures", then=()))

    # What an encoder sees in films (Figures 2, C.3 to C.5).
    config.encoder = ""  # "" = the teacher of the workdir; else any name or path of `encoders.load`
    config.weights = ""
    config.image_size = 0  # pixels of the square it sees, a multiple of the patch size; 0 = its own; more = finer maps
    config.films = ()  # files; () = six of the run's sources
    config.points = ()  # pixels (x, y) of the first film, to be found again in all; () = three
    config.layer = -1  # block whose attention is shown
    config.heads = ()  # () = all

    # Scores of several runs over what they differ in (Figures C.1, C.2, Table B.3).
    config.runs = ()  # workdirs or patterns of them
    config.by = "data.fraction"  # a field of their config.json, or of the rows of results.json
    config.metric = ""  # "" = the first of auprc, dice, accuracy, rouge_l, auroc that they have
    config.classes = ("macro",)
    config.encoders = ()  # () = all
    return common.apply(config, arguments, {})
