"""RadGraph's annotations of texts: python radgraph_tagger.py TEXTS.json ANNOTATIONS.json [FOLDER_OF_WEIGHTS].

Runs by its path in any environment that has the package `radgraph`, and needs nothing of raddino_jax there. Where it
fails, the last line it prints says why.
"""

import json
import sys
from pathlib import Path

MODEL = "radgraph"  # version 1, that of published RG_ER; the package's own default is another one


def main(texts: str, annotations: str, weights: str = "") -> int:
    """Reads a list of texts, writes the list of their annotations; exit code 1 where the tagger is not to be had."""
    try:
        from radgraph import RadGraph
    except ImportError as error:
        print(f"not installed ({error}): pip install 'raddino_jax[graders]', or name an environment that has it")
        return 1
    if weights and not (Path(weights) / MODEL / "weights.th").is_file():
        print(f"no weights: {weights} holds no {MODEL}/weights.th (StanfordAIMI/RRG_scorers, radgraph.tar.gz unpacked)")
        return 1
    given = json.loads(Path(texts).read_text())
    try:
        found = RadGraph(model_type=MODEL, **({"model_cache_dir": weights} if weights else {}))(given)
        ordered = [found[str(i)] for i in range(len(given))]
    except Exception as error:  # a missing download, a version it cannot live with: the person hears which
        print(f"its tagger does not run here ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
        return 1
    Path(annotations).write_text(json.dumps(ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
