"""The same training step and encoder in PyTorch: what `bench --against=torch` times ours against.

Student and teacher are Hugging Face's Dinov2Model, the rest is DINOv2's step (train/ssl_meta_arch.py) in plain torch:
heads, Sinkhorn-Knopp, cross-entropies on whole logits, KoLeo, clipping per module, AdamW with layer decay, EMA. It
starts from our weights and is fed our crops and masks, so that its losses must equal ours.

    python -m raddino_jax.rival FOLDER      # as bench starts it: a JSON request a line on stdin, an answer on stdout
"""

import contextlib
import json
import re
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Settings:
    """What settings.json of the folder holds; beside it are backbone/, a Hugging Face folder, and arrays.npz."""

    threads: int
    head_layers: int = 3
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int = 8
    clip: float = 3.0
    layer_decay: float = 0.9
    patch_embed_factor: float = 0.2
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8


def network(folder: Path):
    """The Dinov2Model of a folder, attention by scaled_dot_product_attention."""
    # torchvision registers kernels there that a build of torch for CPUs may lack; nothing here needs them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(folder / "backbone", attn_implementation="sdpa")


class Encode:
    """Forward passes of the backbone alone."""

    def __init__(self, folder: Path, settings: Settings, arrays: dict):
        import torch

        self.model = network(folder).eval()
        self.images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()

    def turn(self, _: dict) -> float:
        """One pass; the sum of its class features' magnitudes."""
        import torch

        with torch.inference_mode():
            return float(self.model(self.images).last_hidden_state[:, 0].abs().sum())


class Step:
    """One training step on the same crops again and again."""

    def __init__(self, folder: Path, settings: Settings, arrays: dict):
        import torch

        self.settings = settings
        self.student, self.teacher = ({"backbone": network(folder), "head": _head(arrays)} for _ in range(2))
        self.optimizer = torch.optim.AdamW(self._groups(), betas=settings.betas, eps=settings.eps, fused=True)
        rgb = {name: _crops(arrays[name]) for name in ("global", "local")}
        self.crops, self.masks = rgb, torch.from_numpy(arrays["masks"]).flatten(0, 1)
        self.count = len(arrays["global"])

    def _named(self, side: dict) -> dict:
        named = {f"backbone/{name}": p for name, p in side["backbone"].named_parameters()}
        return named | {f"head/{name}": p for name, p in side["head"].items()}

    def _groups(self) -> list[dict]:
        groups: dict[tuple, list] = {}
        for name, p in self._named(self.student).items():
            groups.setdefault((self._factor(name), self._decays(name), "last_layer" in name), []).append(p)
        keys = ("factor", "decays", "last_layer")
        return [dict(params=list(ps)) | dict(zip(keys, key, strict=True)) for key, ps in groups.items()]

    def _factor(self, name: str) -> float:
        s, depth = self.settings, self.student["backbone"].config.num_hidden_layers
        if hit := re.search(r"layers?\.(\d+)\.", name):
            return s.layer_decay ** (depth - int(hit[1]))
        if "embeddings." in name:
            return s.layer_decay ** (depth + 1) * (s.patch_embed_factor if "patch_embeddings" in name else 1.0)
        return 1.0

    def _decays(self, name: str) -> bool:
        return re.search(r"bias$|norm\d?\.|layernorm\.|lambda1$", name) is None

    def turn(self, schedule: dict) -> float:
        """One step with the values of `optim.Schedules.at`; its loss."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * schedule["last_layer_lr" if group["last_layer"] else "lr"]
            group["weight_decay"] = group["decays"] * schedule["weight_decay"]
        loss = self.loss(schedule["teacher_temp"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameters in (self.student["backbone"].parameters(), self.student["head"].values()):
            torch.nn.utils.clip_grad_norm_(list(parameters), self.settings.clip)
        self.optimizer.step()
        with torch.no_grad():
            teacher, student = (list(self._named(side).values()) for side in (self.teacher, self.student))
            torch._foreach_lerp_(teacher, student, 1 - schedule["momentum"])
        return float(loss)

    def loss(self, temperature: float):
        """The four terms of the objective, as `objective.Objective` weighs them."""
        import torch

        s, n, masks = self.settings, self.count, self.masks
        dino, ibot = self._targets(temperature)
        out = self.student["backbone"](self.crops["global"], bool_masked_pos=masks).last_hidden_state
        local = self.student["backbone"](self.crops["local"]).last_hidden_state[:, 0]
        rows = torch.cat([out[:, 0], local, out[:, 1:][masks]])
        logs = torch.log_softmax(self._logits(self.student["head"], rows) / s.student_temperature, dim=-1)
        both, small, patches = logs.split([2 * n, len(local), len(rows) - 2 * n - len(local)])
        pairs = n * (2 + 2 * len(local) // n)
        swapped = dino.view(n, 2, -1).flip(1).flatten(0, 1)
        loss = -s.dino_weight * (swapped * both).sum() / pairs
        both_teachers = dino.view(n, 2, -1).sum(1)[:, None]
        loss = loss - s.dino_weight * (both_teachers * small.view(n, len(local) // n, -1)).sum() / pairs
        weight = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        loss = loss - s.ibot_weight * ((ibot * patches).sum(-1) * weight).sum() / (2 * n)
        return loss + s.koleo_weight * self._koleo(out[:, 0])

    def _targets(self, temperature: float):
        import torch

        with torch.no_grad():
            out = self.teacher["backbone"](self.crops["global"]).last_hidden_state
            cls, patches = out[:, 0], out[:, 1:][self.masks]
            return [self._sinkhorn(self._logits(self.teacher["head"], x) / temperature) for x in (cls, patches)]

    def _sinkhorn(self, logits):
        q = (logits - logits.max()).exp().T
        q /= q.sum()
        for _ in range(self.settings.sinkhorn_iterations):
            q /= q.sum(1, keepdim=True) * q.shape[0]
            q /= q.sum(0, keepdim=True) * q.shape[1]
        return (q * q.shape[1]).T

    def _logits(self, head: dict, x):
        from torch.nn import functional as F

        for i in range(self.settings.head_layers):
            x = F.linear(x, head[f"mlp.{2 * i}.weight"], head[f"mlp.{2 * i}.bias"])
            x = F.gelu(x) if i < self.settings.head_layers - 1 else x
        prototypes = head["last_layer.weight_g"] * F.normalize(head["last_layer.weight_v"], eps=1e-12)
        return F.linear(F.normalize(x, eps=1e-12), prototypes)

    def _koleo(self, cls):
        """Of both global crops, in groups of consecutive images."""
        import torch
        from torch.nn import functional as F

        terms = []
        for crop in cls.view(self.count, 2, -1).unbind(1):
            for x in F.normalize(crop, eps=1e-8).split(self.settings.koleo_group):
                nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
                terms.append(-torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean())
        return 2 * torch.stack(terms).mean()


def _crops(views: np.ndarray):
    """[B, V, H, W, 1] -> [B V, 3, H, W]."""
    import torch

    flat = torch.from_numpy(views).flatten(0, 1).permute(0, 3, 1, 2)
    return flat.expand(-1, 3, -1, -1).contiguous()


def _head(arrays: dict) -> dict:
    """{name: parameter} of the shared head."""
    import torch

    names = [name for name in arrays if name.startswith("head/")]
    return {name.removeprefix("head/"): torch.nn.Parameter(torch.from_numpy(arrays[name].copy())) for name in names}


def peak_memory() -> float:
    """The most memory, in GiB, that this process has held since `forget_peak`; Linux only, else nan."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def forget_peak() -> None:
    """Begin to measure anew, so that what compilation needed does not count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(folder: Path) -> None:
    """Answer requests until stdin ends: {"value", "seconds", "peak_memory_gib"}."""
    import torch

    settings = Settings(**json.loads((folder / "settings.json").read_text()))
    torch.set_num_threads(settings.threads)
    arrays = dict(np.load(folder / "arrays.npz"))
    work = (Encode if "images" in arrays else Step)(folder, settings, arrays)
    print(json.dumps({"ready": torch.__version__}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        value = work.turn(json.loads(line))
        seconds = time.perf_counter() - began
        print(json.dumps({"value": value, "seconds": seconds, "peak_memory_gib": peak_memory()}), flush=True)
        forget_peak()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
