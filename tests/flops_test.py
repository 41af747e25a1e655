"""FLOPs of a step against the calculator beside the reference arrays, and by hand."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import multicxr
from raddino_jax import flops, train

CALCULATOR = Path(os.environ["RADDINO_GOLDENS"]).parent / "tools" / "flops.py"


def _per_image(arguments: str = "") -> float:
    config = multicxr.get_config(arguments)
    views = config.views
    objective = train.objective_of(config)
    return flops.step(objective, views.global_size, views.local_size, views.local_crops)


@pytest.fixture(scope="module")
def calculator():
    if not CALCULATOR.is_file():
        pytest.skip(f"no FLOP calculator at {CALCULATOR} (set RADDINO_GOLDENS)")
    spec = importlib.util.spec_from_file_location("calculator", CALCULATOR)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {  # fields of ours -> arguments of the calculator
    "group_size=40,model.drop_path=0.0": dict(),
    "model.drop_path=0.3": dict(batch=10, drop_path=0.3),
    "model.drop_path=0.0,model.registers=4,head.separate=True": dict(batch=10, regs=4),
    "model.drop_path=0.0,head.prototypes=4096,views.global_size=224,views.local_size=98": dict(
        batch=10, k=4096, gsize=224, lsize=98
    ),
    "model.drop_path=0.0,model.patch_size=16,views.global_size=512,views.local_size=192": dict(
        batch=10, patch=16, gsize=512, lsize=192
    ),
}


@pytest.mark.parametrize("size", ["S", "B", "L"])
@pytest.mark.parametrize("ours", CASES)
def test_flops_per_image_equal_the_calculators(calculator, size, ours):
    """0.5 % would do for MFU, but the patch embedding's whole share is less."""
    expected = calculator.step(size, **CASES[ours])["flops_per_image"]
    assert _per_image(f"model.variant={size},{ours}") == pytest.approx(expected, rel=2e-5)


def test_an_image_of_the_papers_run_costs_3_341_tflop():
    """ViT-B/14, 518 and 196 px, 8 local crops, masks of 40 images together, no drop path."""
    found = _per_image("group_size=40,model.drop_path=0.0")
    assert found == pytest.approx(3.341e12, rel=0.005)


def test_a_crop_is_counted_by_hand():
    """Two blocks of width 4 on 1 + 2 + 4 tokens: qkv 3, proj 1, MLP 8 squares of the width each."""
    backbone = train.backbone_of(multicxr.get_config(
        "model.width=4,model.depth=2,model.heads=2,model.patch_size=2,model.registers=2"
    ))  # fmt: skip
    crop = flops.vit(backbone, 4)
    assert crop.blocks == 2 * (7 * 2 * 12 * 16 + 2 * 2 * 7 * 7 * 4)
    assert crop.embedding == 4 * 2 * (3 * 2 * 2) * 4


def test_swiglu_costs_what_its_three_products_cost():
    backbone = train.backbone_of(multicxr.get_config("model.variant=g"))
    tokens, width, hidden = 17, 1536, 4096
    linear = tokens * 2 * (4 * width**2 + width * 2 * hidden + hidden * width)
    assert flops.vit(backbone, 56).blocks == 40 * (linear + 4 * tokens**2 * width)


@pytest.mark.parametrize("rank", [0, 3])
def test_tuning_is_counted_by_hand(rank):
    """A language model of one layer, width 4, SwiGLU 6 and 10 words, on 5 tokens, 2 of them patches of width 7."""
    model = SimpleNamespace(width=4, depth=1, hidden=6, vocabulary=10)
    linear, attention, logits = 5 * 2 * (4 * 16 + 3 * 24), 2 * 2 * (1 + 2 + 3 + 4 + 5) * 4, 5 * 2 * 40
    projector = 2 * 2 * (7 * 4 + 16)
    found = flops.tuning(SimpleNamespace(llama=model, lora=rank), tokens=5, patches=2, channels=7)
    if not rank:
        assert found == 3 * (linear + attention + logits + projector)
    else:
        adapters = 5 * 2 * 3 * (4 * 8 + 3 * 10)
        assert found == 2 * (linear + logits) + 3 * (attention + adapters + projector)


def test_what_the_compiler_counts_of_a_vit_is_what_is_counted_here():
    """Norms, softmax and GELU come on top of it, 4 % of so narrow a network."""
    backbone = train.backbone_of(multicxr.get_config(
        "compute_dtype=float32,model.width=64,model.depth=2,model.heads=2,model.patch_size=8,model.image_size=64"
    )).clone(attention="xla")  # fmt: skip
    films = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    params = jax.eval_shape(backbone.init, jax.random.key(0), films)
    crop = flops.vit(backbone, 64)
    found = flops.traced(lambda p, x: backbone.apply(p, x)["patches"], params, films)
    assert found == pytest.approx(crop.blocks + crop.embedding, rel=0.1)


class _Device:
    def __init__(self, kind, limit=None):
        self.device_kind, self.limit = kind, limit

    def memory_stats(self):
        return self.limit and {"bytes_limit": self.limit}


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5", 459.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
    ],
)
def test_a_device_is_known_by_the_start_of_its_name(kind, peak):
    assert flops.chip(_Device(kind)).peak == peak


def test_an_unknown_device_has_no_peak():
    assert flops.chip(_Device("cpu")) is None


def test_the_memory_of_a_device_at_hand_is_what_its_allocator_gives_out():
    assert flops.chip(_Device("NVIDIA A100-SXM4-40GB")).memory == 40
    assert flops.chip(_Device("NVIDIA H200", 105 * 2**30)).memory == 105


# --- memory -------------------------------------------------------------------------------------


def _mesh(kind: str, devices: int):
    return SimpleNamespace(size=devices, devices=np.array([SimpleNamespace(device_kind=kind)] * devices))


@pytest.mark.parametrize(
    ("arguments", "kind", "devices", "policy"),
    [
        ("", "TPU v5 lite", 32, "full"),  # 20 films on 16 GiB
        ("", "NVIDIA H200", 16, "none"),  # 40 films on 141 GiB
        ("", "cpu", 1, "none"),
        ("model.remat=dots", "TPU v5 lite", 32, "dots"),
        ("batch_size=64,group_size=4,koleo_group=8", "TPU v5 lite", 16, "none"),  # 4 films
    ],
)
def test_recomputing_is_chosen_by_the_memory_of_the_chips(arguments, kind, devices, policy):
    assert train.remat_of(multicxr.get_config(arguments), _mesh(kind, devices)) == policy


def test_memory_grows_with_what_is_kept_and_shrinks_with_devices_that_share_parameters():
    objective = train.objective_of(multicxr.get_config("model.variant=L"))
    need = [flops.memory(objective, 518, 196, 8, 20, remat) for remat in ("full", "dots", "none")]
    assert need == sorted(need) and need[0] < need[2] / 3
    parameters = 5 * 4 * (304e6 + 27e6) / 2**30  # of ViT-L and its head, five copies of four bytes
    saved = need[0] - flops.memory(objective, 518, 196, 8, 20, "full", fsdp=8)
    assert saved == pytest.approx(parameters * 7 / 8, rel=0.02)
