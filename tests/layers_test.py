"""Who may import whom: the plan of the house. A new arrow is a decision, and is made here first."""

import ast
import configparser
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PLUMBING = {"params", "sharding", "checkpoints", "optim", "logs", "flops", "loop", "hosts"}
EVALS = {"encoders", "models", "augment", "losses", "data", *PLUMBING}

# A room is a module or a folder; the longest name that fits a module is its room. Every room may
# also import itself, so modules of one folder may import each other.
MAY_IMPORT = {
    "train": {"objective", "augment", "masking", "models", "encoders", "conversion", "data", "watch", *PLUMBING},
    "watch": {"diagnostics", "augment", "models", "data", *PLUMBING},
    "bench": {"train", "starts", "augment", "masking", "rival", "conversion", "encoders", "data", *PLUMBING},
    "rival": set(),
    "plan": {
        "train", "starts", "encoders", "conversion", "data", "evals.tune", "evals.patches", "evals.writer", *PLUMBING,
    },
    "embed": {"encoders", "evals.features", "data"},
    "prepare": {"data"},
    "convert": {"conversion", "encoders", "checkpoints"},
    "evals": EVALS,
    # These lie below the tasks of evals/.
    "evals.features": EVALS,
    "evals.scores": EVALS,
    "evals.report_scores": {"evals.scores", "evals.chexbert", *EVALS},
    "evals.chexbert": {"conversion", *EVALS},
    # The folders of language models are Hugging Face's.
    "evals.report": {"evals", "conversion", *EVALS},
    "evals.writer_folder": {"conversion", *EVALS},
    "encoders": {"preprocess", "workdirs", "conversion", "models", "params", "sharding"},
    "preprocess": {"conversion", "models", "data.images"},
    "workdirs": {"conversion", "models", "checkpoints", "params"},
    "objective": {"losses", "models", "diagnostics", "params"},
    "diagnostics": {"losses"},
    "conversion": {"params"},
    "data": {"masking"},
    "augment": set(),
    "losses": set(),
    "models": set(),
    "masking": set(),
    "params": set(),
    **{room: {"params"} for room in PLUMBING - {"params"}},
    "hosts": {"logs"},
    "heartbeat": {"hosts", "logs"},
    "starts": {"hosts", "logs"},
    "checkpoints": {"params", "hosts", "logs"},
    "configs": set(),
}
MAY_IMPORT["main"] = {*MAY_IMPORT}  # it joins the rooms

# Packages of others: what a room may not name, or all that it may name beside the standard library.
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "clu"}
NEVER = {"data": JAX, "masking": JAX}
ONLY = {
    "augment": {"jax", "flax", "numpy", "einops"},
    "losses": {"jax", "flax", "numpy", "einops"},
    "models": {"jax", "flax", "numpy", "einops"},
    "configs": {"ml_collections", "yaml"},
}
# Packages that have a home: package -> the rooms that may import it.
TORCH = {"conversion", "rival", "evals.report_scores"}
HOMES = {
    "torch": TORCH,
    "torchvision": TORCH,
    "transformers": TORCH,
    "safetensors.torch": TORCH,
    "pydicom": {"data.dicom"},
    "sklearn": {"evals"},
    "tensorflow": set(),
}
# What they are called where they are installed from, if otherwise: known here, so that nothing has to be installed.
CALLED = {
    "PIL": "pillow", "absl": "absl-py", "gdcm": "python-gdcm", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}  # fmt: skip
INSIDE_FUNCTIONS = {"torch", "torchvision", "transformers", "safetensors.torch"}


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def room_of(module: str) -> str:
    return max((room for room in MAY_IMPORT if within(module, {room})), key=len, default="")


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(name as the table has it, file) of every module; a room not built yet is no fault."""
    for folder in ("raddino_jax", "configs"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[1:] if folder == "raddino_jax" else parts), path


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int, bool]]:
    """(full dotted name, line, inside a function) of every import, however it is written."""

    def walk(node, inside):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield alias.name, node.lineno, inside
            case ast.ImportFrom():
                base = package[: len(package) - node.level + 1] if node.level else ()
                base = (*base, node.module) if node.module else base
                for alias in node.names:
                    yield ".".join((*base, alias.name)), node.lineno, inside
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]) if (
                name in ("import_module", "__import__")
            ):
                literal = first.value if isinstance(first, ast.Constant) else "<computed name>"
                yield literal, node.lineno, inside
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or function)

    yield from walk(tree, False)


def objection(module: str, target: str, inside: bool) -> str | None:
    """What is wrong with this import, or None."""
    room, top = room_of(module), target.partition(".")[0]
    if target == "raddino_jax" or top in sys.stdlib_module_names:
        return None
    if top in ("raddino_jax", "configs"):
        own = target.removeprefix("raddino_jax.")
        allowed = within(own, MAY_IMPORT[room] | {room})
        return None if allowed else f"{room} imports {own}: an arrow that MAY_IMPORT lacks"
    if target == "<computed name>":
        return "imports a module by a computed name; a dict of modules does the same in the open"
    if top in NEVER.get(room, ()):
        return f"{room} imports {top}, which it must not know"
    if top not in ONLY.get(room, {top}):
        return f"{room} imports {top}, may import {sorted(ONLY[room])}"
    for home, rooms in HOMES.items():
        if within(target, {home}):
            if not within(module, rooms):
                return f"{module} imports {home}, whose place is {sorted(rooms) or 'nowhere'}"
            if home in INSIDE_FUNCTIONS and not inside:
                return f"{module} imports {home} at the top, must do so inside a function"
    return None


def complaints(root: Path) -> list[str]:
    found = []
    for module, path in sources(root):
        where, tree = path.relative_to(root), ast.parse(path.read_text())
        if path.parent != root / "configs" and not (path.parent / "__init__.py").exists():
            found.append(f"{where.parent}: no __init__.py, an installed copy would lack it")
        if path.name == "__init__.py":
            names = [name for name, *_ in imports(tree, ())]
            if any(name.partition(".")[0] not in sys.stdlib_module_names for name in names):
                found.append(f"{where}: re-exports; what a module holds is imported from it")
        elif not room_of(module):
            found.append(f"{where}: has no row in MAY_IMPORT")
        else:
            for target, line, inside in imports(tree, where.parts[:-1]):
                if said := objection(module, target, inside):
                    found.append(f"{where}:{line}: {said}")
    return found


def test_no_new_arrow():
    assert list(sources(ROOT))
    found = complaints(ROOT)
    assert not found, "\n".join(found)


def declared(section: str, option: str) -> set[str]:
    """Distribution names asked for in setup.cfg, as the package index compares them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = re.findall(r"^[\w.-]+", setup[section][option], re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_what_is_imported_at_the_top_is_a_core_dependency():
    """`pip install -e .` is enough: no room lives off what another package happens to bring."""
    core = declared("options", "install_requires")
    distributions = importlib.metadata.packages_distributions()
    missing = []
    for module, path in sources(ROOT):
        package = path.relative_to(ROOT).parts[:-1]
        for target, line, inside in imports(ast.parse(path.read_text()), package):
            top = target.partition(".")[0]
            if inside or top in ("raddino_jax", "configs") or top in sys.stdlib_module_names:
                continue
            names = {re.sub(r"[-_.]+", "-", n).lower() for n in distributions.get(top, [CALLED.get(top, top)])}
            if not names & core:
                missing.append(f"{module}:{line}: {top} ({sorted(names)})")
    assert not missing, "\n".join(missing)


def house(root: Path, files: dict[str, str]) -> Path:
    """A small tree that keeps every rule, and `files` beside it."""
    clean = {
        "raddino_jax/__init__.py": '"""A docstring is allowed."""\n',
        "raddino_jax/losses.py": "import jax\nimport math\n",
        "raddino_jax/params.py": "import numpy as np\n",
        "raddino_jax/models/__init__.py": "",
        "raddino_jax/models/vit.py": "from raddino_jax.models.attention import attention\n",
        "raddino_jax/evals/__init__.py": "",
        "raddino_jax/evals/features.py": "from raddino_jax import encoders, params\n",
        "raddino_jax/conversion/__init__.py": "",
        "raddino_jax/data/__init__.py": "",
        "configs/common.py": "from ml_collections import ConfigDict\n",
    }
    for name, text in (clean | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


ALLOWED = [
    ("main.py", "import jax\nfrom raddino_jax import train\nfrom raddino_jax.evals import probe"),
    ("train.py", "from raddino_jax import loop, objective\nimport raddino_jax.data.pipeline"),
    ("encoders.py", "from raddino_jax import preprocess, workdirs"),
    ("preprocess.py", "from raddino_jax.data import images\nimport raddino_jax.data.images"),
    ("embed.py", "from raddino_jax.evals import features"),
    ("evals/probe.py", "import sklearn\nfrom raddino_jax.evals import features, scores"),
    ("conversion/rules.py", "def read():\n    import torch"),
    ("data/dicom.py", "import numpy\nimport pydicom\nfrom raddino_jax import masking"),
    ("models/attention.py", "import einops\nfrom . import vit"),
]

FORBIDDEN = [
    ("train.py", "from raddino_jax.evals import probe", "train imports evals.probe"),
    ("train.py", "import raddino_jax.evals.probe", "train imports evals.probe"),
    ("train.py", "def f():\n    from raddino_jax.evals import probe", "train imports evals.probe"),
    ("train.py", "f = import_module('raddino_jax.evals')", "train imports evals"),
    ("train.py", "import importlib\nf = importlib.import_module(name)", "computed name"),
    ("loop.py", "from raddino_jax import params, models", "loop imports models"),
    ("loop.py", "from .models import vit", "loop imports models.vit"),
    ("losses.py", "from raddino_jax.params import flatten", "losses imports params.flatten"),
    ("losses.py", "import optax", "losses imports optax"),
    ("encoders.py", "from raddino_jax.data import pipeline", "encoders imports data.pipeline"),
    ("preprocess.py", "from raddino_jax.data import pipeline", "preprocess imports data.pipeline"),
    ("workdirs.py", "from raddino_jax import encoders", "workdirs imports encoders"),
    ("embed.py", "from raddino_jax.evals import probe", "embed imports evals.probe"),
    ("evals/features.py", "from raddino_jax.evals import probe", "features imports evals.probe"),
    ("evals/probe.py", "from raddino_jax import train", "evals imports train"),
    ("evals/features.py", "from .. import train", "evals.features imports train"),
    ("data/pipeline.py", "def f():\n    import jax.numpy as jnp", "data imports jax"),
    ("masking.py", "from jax import random", "masking imports jax"),
    ("conversion/rules.py", "import torch.nn as nn", "inside a function"),
    ("conversion/rules.py", "from safetensors import torch", "inside a function"),
    ("encoders.py", "def f():\n    import transformers", "encoders imports transformers"),
    ("data/datasets/brax.py", "import pydicom", "brax imports pydicom"),
    ("train.py", "from sklearn import metrics", "train imports sklearn"),
    ("logs.py", "def f():\n    import tensorflow", "logs imports tensorflow"),
    ("utils.py", "", "utils.py: has no row"),
    ("evals/__init__.py", "from raddino_jax import params", "re-exports"),
    ("../configs/probe.py", "from raddino_jax import params", "configs imports params"),
    ("../configs/probe.py", "import numpy as np", "configs imports numpy"),
]


def test_the_checker_accepts_what_the_table_allows(tmp_path):
    root = house(tmp_path, {f"raddino_jax/{name}": text for name, text in ALLOWED})
    assert complaints(root) == []


@pytest.mark.parametrize("name, text, expected", FORBIDDEN)
def test_the_checker_sees(tmp_path, name, text, expected):
    root = house(tmp_path, {"raddino_jax/data/datasets/__init__.py": ""})
    (root / "raddino_jax" / name).write_text(text)
    found = complaints(root)
    assert len(found) == 1 and expected in found[0], found


def test_the_checker_sees_a_folder_that_an_installed_copy_would_lack(tmp_path):
    root = house(tmp_path, {"raddino_jax/data/datasets/brax.py": ""})
    assert complaints(root) == [
        "raddino_jax/data/datasets: no __init__.py, an installed copy would lack it"
    ]
