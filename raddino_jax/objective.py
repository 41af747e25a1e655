"""The paper's objective: student and teacher on (views, masks) -> losses and metrics.

total = DINO(global crops) + DINO(local crops) + iBOT(masked patches) + KoLeo(class tokens), each term in
the amount in which it is optimised (the reference logs KoLeo and iBOT at half of that).
Reference: DINOv2 `train/ssl_meta_arch.py`; arXiv 2401.10815, section 3.1.

Letters: B images, V local crops, N patches of a global crop, D width, b bottleneck, K prototypes,
G groups of `group_size` consecutive images, U masked tokens a group may have (static), R shards.
Arrays keep the images outermost: [B, 2, ...] for global crops, [B, V, ...] for local ones.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from raddino_jax import diagnostics, losses
from raddino_jax import params as trees
from raddino_jax.models.heads import DINOHead, prototypes
from raddino_jax.models.ops import STD
from raddino_jax.models.vit import ViT, draw_subsets, sincos

Array = jax.Array


@dataclass(frozen=True)
class Objective:
    """Networks and constants of the objective; every field is static.

    ibot_head: None when DINO and iBOT share one head. koleo_group: images among which KoLeo searches neighbours.
    masked_budget: U. shards: devices the batch is split over. logits_budget: prototype logits alive at once per shard.
    init_std: of the linear layers' fresh kernels. init_position: amplitude of the sines and cosines that position
    embeddings start from; 0 draws them as DINOv2 does.
    """

    backbone: ViT
    dino_head: DINOHead
    ibot_head: DINOHead | None
    group_size: int
    koleo_group: int
    masked_budget: int
    drop_rates: tuple[float, ...]
    centring: str = "sinkhorn"
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9
    student_temperature: float = 0.1
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    init_std: float = STD
    init_position: float = 0.0
    shards: int = 1
    logits_budget: int = 2**26

    def init(self, key: Array) -> dict:
        """Fresh parameters {"backbone", "dino_head"[, "ibot_head"]}."""
        keys = jax.random.split(key, 3)
        size = self.backbone.image_size
        features = jnp.zeros((1, self.backbone.width))
        params = {
            "backbone": self.backbone.init(keys[0], jnp.zeros((1, size, size, 1)))["params"],
            "dino_head": self.dino_head.init(keys[1], features)["params"],
        }
        if self.ibot_head is not None:
            params["ibot_head"] = self.ibot_head.init(keys[2], features)["params"]
        return self._started(params)

    def _started(self, params: dict) -> dict:
        """Fresh parameters at the scales asked for."""
        flat = trees.flatten(params)
        if self.init_std != STD:
            factor = self.init_std / STD
            linear = [name for name in flat if name.endswith("/kernel") and "/patch_embed/" not in name]
            flat |= {name: factor * flat[name] for name in linear}
        if self.init_position:
            side = self.backbone.image_size // self.backbone.patch_size
            flat["backbone/pos_embed"] = jnp.asarray(self.init_position * sincos(side, self.backbone.width))
        return trees.unflatten(flat)

    def init_centres(self) -> dict:
        """Zero centres; Sinkhorn has none."""
        if self.centring == "sinkhorn":
            return {}
        ibot = self.ibot_head or self.dino_head
        return {"dino": jnp.zeros(self.dino_head.prototypes), "ibot": jnp.zeros(ibot.prototypes)}

    @property
    def mim(self) -> bool:
        """Whether there is a masked-image term."""
        return self.ibot_weight > 0 and self.masked_budget > 0

    def patch_head(self, params: dict) -> tuple[DINOHead, dict]:
        """The head of the patches and its parameters."""
        if self.ibot_head is None:
            return self.dino_head, params["dino_head"]
        return self.ibot_head, params["ibot_head"]

    def __call__(
        self, student: dict, teacher: dict, centres: dict, views: dict, masks: Array, key: Array, temperature: Array
    ) -> tuple[Array, tuple[dict, dict]]:
        """(total loss, (metrics, centres for the next step)).

        student, teacher: parameters as `init` makes them; no gradient flows to the teacher.
        views: {"global" [B, 2, H, W, C], "local" [B, V, h, w, C]}, normalised. masks: bool [B, 2, N].
        key: of the step, for stochastic depth. temperature: the teacher's.
        """
        given, weight = self._given(views, masks)
        seen = self.look(jax.lax.stop_gradient(teacher), given)
        taught, centres = self.centre(seen, weight, jax.lax.stop_gradient(teacher), centres, temperature)
        total, metrics = self.learn(student, taught, given, key)
        return total, (metrics | {"masked_tokens": (weight > 0).sum()}, centres)

    def in_parts(
        self, parts: int, student: dict, teacher: dict, centres: dict, views: dict, masks: Array, key: Array,
        temperature: Array,
    ) -> tuple[tuple[Array, tuple[dict, dict]], dict]:
        """What jax.value_and_grad of `__call__` returns, with the memory of a batch `parts` times smaller.

        The teacher looks at one part after the other, targets are centred over the whole batch, then the student
        learns from one part after the other. Every shard contributes to every part, and groups stay whole.
        """
        given, weight = self._given(views, masks)
        given = jax.tree.map(lambda x: self._split(x, parts), given)
        seen = jax.tree.map(self._merge, jax.lax.map(lambda part: self.look(teacher, part), given))
        taught, centres = self.centre(seen, weight, teacher, centres, temperature)
        constants, rows = self._rows(taught)
        rows = jax.tree.map(lambda x: self._split(x, parts), rows)

        def learn(student, part):
            part_given, part_rows = part
            total, metrics = self.learn(student, _joined(constants, part_rows), part_given, key)
            return total, metrics

        def add(total, part):
            found = jax.value_and_grad(learn, has_aux=True)(student, part)
            return jax.tree.map(lambda a, b: a + b / parts, total, found), None

        first = jax.tree.map(lambda x: x[0], (given, rows))
        shapes = jax.eval_shape(jax.value_and_grad(learn, has_aux=True), student, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        ((loss, metrics), grads), _ = jax.lax.scan(add, zeros, (given, rows))
        return (loss, (metrics | {"masked_tokens": (weight > 0).sum()}, centres)), grads

    def _given(self, views: dict, masks: Array) -> tuple[dict, Array]:
        """What student and teacher look at, first axes by image or group; and the weight [G, U] of masked tokens."""
        index, weight = masked_tokens(masks, self.group_size, self.masked_budget)
        return {"views": views, "masks": masks, "index": index, "groups": jnp.arange(len(index))}, weight

    def look(self, teacher: dict, given: dict) -> dict:
        """The teacher on unmasked global crops: unit vectors of class tokens and masked patches, some features."""
        crops, index = given["views"]["global"], given["index"]
        images, patches = len(crops), crops.shape[2] * crops.shape[3] // self.backbone.patch_size**2
        few = jnp.arange(0, patches, max(patches // 4, 1))  # of each film's first crop, for `diagnose`
        few = (2 * patches * jnp.arange(self.group_size)[:, None] + few).reshape(-1)
        few = jnp.broadcast_to(few, (len(index), few.size))
        cls, found = self._run(teacher, crops, jnp.concatenate([index, few] if self.mim else [few], axis=1))
        masked, few = jnp.split(found, [found.shape[1] - few.shape[1]], axis=1)
        features = {"cls": cls[::2], "patches": few.reshape(images, -1, few.shape[-1])}
        rows = self.dino_head.apply({"params": teacher["dino_head"]}, cls)
        seen = {"dino": rows.reshape(images, 2, -1), "features": features}
        if self.mim:
            head, head_params = self.patch_head(teacher)
            seen["ibot"] = head.apply({"params": head_params}, masked)
        return seen

    def centre(self, seen, weight, teacher, centres, temperature) -> tuple[dict, dict]:
        """Targets, as unit vectors and a bias per prototype, from all that the teacher has seen of a batch."""
        cls = seen["dino"].reshape(len(weight), -1, seen["dino"].shape[-1])
        head, ones = teacher["dino_head"], jnp.ones(cls.shape[:2])
        dino, centres = self._centre("dino", cls, ones, head, centres, temperature)
        taught = {"dino": dino | {"rows": seen["dino"]}, "weight": weight, "features": seen["features"]}
        if self.mim:
            head_params = self.patch_head(teacher)[1]
            valid = (weight > 0).astype(jnp.float32)
            taught["ibot"], centres = self._centre("ibot", seen["ibot"], valid, head_params, centres, temperature)
        return taught, centres

    def learn(self, student, taught, given, key) -> tuple[Array, dict]:
        """(loss, metrics) of the student on what is given."""
        crops = self.study(student, given, key)
        total, terms = self.compare(student, taught, crops)
        return total, terms | self.diagnose(student, taught, crops)

    def _rows(self, taught: dict) -> tuple[dict, dict]:
        """Targets apart: what all parts of a batch share, and what goes by image or group."""
        rows = {"weight": taught["weight"], "features": taught["features"]}
        rows |= {name: taught[name]["rows"] for name in ("dino", "ibot") if name in taught}
        shared = {
            name: {k: v for k, v in taught[name].items() if k != "rows"} for name in ("dino", "ibot") if name in taught
        }
        return shared, rows

    def _split(self, x: Array, parts: int) -> Array:
        """[B, ...] -> [parts, B / parts, ...], an equal share of every shard in each part."""
        each = len(x) // parts
        x = x.reshape(self.shards, parts, each // self.shards, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(parts, each, *x.shape[3:])

    def _merge(self, x: Array) -> Array:
        """The inverse of `_split`."""
        parts, each = x.shape[:2]
        x = x.reshape(parts, self.shards, each // self.shards, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(parts * each, *x.shape[3:])

    def _centre(self, name, rows, valid, head_params, centres, temperature):
        """Targets of one kind from unit vectors [G, n, b] and what the centring makes of them."""
        weights = prototypes(head_params)
        bias, centres = self._bias(name, rows, valid, weights, centres, temperature)
        return {"rows": rows, "prototypes": weights, "bias": bias, "temperature": temperature}, centres

    def _bias(self, name, rows, valid, weights, centres, temperature):
        if self.centring == "sinkhorn":
            rows, valid = self._shard(rows.reshape(-1, rows.shape[-1])), self._shard(valid.reshape(-1))
            iterations, budget = self.sinkhorn_iterations, self.logits_budget
            return losses.sinkhorn_bias(rows, valid, weights, temperature, iterations, budget), centres
        bias = losses.centre_bias(centres[name], temperature)
        moved = losses.update_centre(centres[name], rows, valid, weights, self.centre_momentum)
        return bias, centres | {name: moved}

    def study(self, student, given, key) -> dict:
        """The student on masked global crops and on local crops."""
        views, index, groups = given["views"], given["index"], given["groups"]
        global_key, local_key = jax.random.split(key)
        subsets = draw_subsets(global_key, groups, 2 * self.group_size, self.drop_rates)
        cls, patches = self._run(student, views["global"], index, given["masks"], subsets)
        crops = {"features": cls.reshape(len(views["global"]), 2, -1), "patches": patches}
        local = views["local"]
        if local.shape[1]:
            subsets = draw_subsets(local_key, groups, local.shape[1] * self.group_size, self.drop_rates)
            cls, _ = self._run(student, local, index[:, :0], subsets=subsets)
            crops["local"] = cls.reshape(*local.shape[:2], -1)
        return crops

    def compare(self, student, taught, crops) -> tuple[Array, dict[str, Array]]:
        """(their sum, the four terms of the loss), weighted as optimised."""
        images, local = len(crops["features"]), crops.get("local")
        pairs = 2 + (2 * local.shape[1] if local is not None else 1)  # as the reference counts, V = 0 too
        per_pair = jnp.full(images, self.dino_weight / (images * pairs))
        project = lambda x: self.dino_head.apply({"params": student["dino_head"]}, x)  # noqa: E731
        dino = taught["dino"]
        swapped = _items(dino["rows"][:, ::-1])  # each crop learns from the other
        both = dino | {"rows": swapped, "weight": jnp.repeat(per_pair, 2)}
        questions = {"dino_global": (_items(project(crops["features"])), both)}
        if local is not None:
            questions["dino_local"] = (project(local), dino | {"weight": per_pair})
        patches = {"ibot": self._ibot(student, taught, crops["patches"], images)} if self.mim else {}
        if self.ibot_head is None:  # one head: all its terms add to one gradient
            questions, patches = questions | patches, {}
        total, terms = self._cross_entropies(questions, student["dino_head"])
        if patches:
            of_patches, term = self._cross_entropies(patches, student["ibot_head"])
            total, terms = total + of_patches, terms | term
        koleo = self._koleo(crops["features"])
        return total + koleo, {"dino_local": 0.0, "ibot": 0.0} | terms | {"koleo": koleo}

    def _ibot(self, student, taught, masked, images) -> tuple[Array, dict]:
        """What is asked of the masked patches, and the answers; masked: the student's tokens [G, U, D]."""
        head, head_params = self.patch_head(student)
        patches = head.apply({"params": head_params}, masked)
        # Divided by all 2 B global crops although only some are masked: the reference's scale.
        weight = taught["weight"].reshape(-1) * (self.ibot_weight / (2 * images))
        return _items(patches), taught["ibot"] | {"rows": _items(taught["ibot"]["rows"]), "weight": weight}

    def diagnose(self, student, taught, crops) -> dict[str, Array]:
        """Signs of collapse, on one global crop per film and a few patches of each; no gradient."""
        head, out, dino = student["dino_head"], taught["features"], taught["dino"]
        patches = out["patches"].reshape(-1, out["patches"].shape[-1])
        student_rows = self.dino_head.apply({"params": head}, crops["features"][:, 0])
        teacher = dino | {"rows": dino["rows"][:, 1]}  # what the student's first crop is to answer
        found = diagnostics.matching(student_rows, prototypes(head), teacher)
        found |= diagnostics.spread(out["cls"], "cls") | diagnostics.spread(patches, "patch")
        return jax.tree.map(jax.lax.stop_gradient, found)

    def _cross_entropies(self, questions: dict[str, tuple[Array, dict]], head_params) -> tuple[Array, dict]:
        """(sum, each by name) of the cross-entropies of {name: (student, teacher)} that share a head."""
        students = tuple(self._shard(z) for z, _ in questions.values())
        teachers = tuple(
            teacher | {k: self._shard(teacher[k]) for k in ("rows", "weight")} for _, teacher in questions.values()
        )
        total, values = losses.cross_entropies(
            students, prototypes(head_params), teachers, self.student_temperature, self.logits_budget
        )
        return total, dict(zip(questions, values, strict=True))

    def _koleo(self, features):
        if not self.koleo_weight:
            return jnp.zeros(())
        groups = features.reshape(-1, self.koleo_group, 2, features.shape[-1])
        groups = jnp.moveaxis(groups, 2, 1).reshape(-1, self.koleo_group, features.shape[-1])
        return 2 * self.koleo_weight * losses.koleo(groups)  # one term per global crop

    def _run(self, params, crops, patches, masks=None, subsets=None):
        """(class tokens [B c, D], patches [G, m, D]) of crops [B, c, H, W, C]; patches: int [G, m] into a group's."""
        flat = crops.reshape(-1, *crops.shape[2:])
        masks = None if masks is None else masks.reshape(len(flat), -1)
        out = self.backbone.apply({"params": params["backbone"]}, flat, masks, subsets, patches)
        return out["cls"], out["patches"]

    def _shard(self, x):
        """[rows, ...] -> [R, rows / R, ...]: the chunks of one shard stay on its device."""
        return x.reshape(self.shards, -1, *x.shape[1:])


def masked_tokens(masks: Array, group_size: int, budget: int) -> tuple[Array, Array]:
    """Where the masked patches of each group are, and what each weighs.

    masks: bool [B, 2, N]. Returns (index int [G, budget] into the group's 2 group_size N patches, ascending,
    0 where padded; weight float32 [G, budget], 1 / (masked patches of the token's crop), 0 where padded).
    """
    crops = masks.reshape(-1, 2 * group_size, masks.shape[-1])
    flat = crops.reshape(len(crops), -1)
    index = jax.vmap(lambda mask: jnp.nonzero(mask, size=budget, fill_value=0)[0])(flat)
    weights = 1.0 / jnp.maximum(crops.sum(axis=2), 1).astype(jnp.float32)
    weight = jnp.take_along_axis(weights, index // masks.shape[-1], axis=1)
    valid = jnp.arange(budget) < flat.sum(axis=1, keepdims=True)
    return index, jnp.where(valid, weight, 0.0)


def _joined(shared: dict, rows: dict) -> dict:
    """The inverse of `Objective._rows`."""
    rows = dict(rows)
    return {name: part | {"rows": rows.pop(name)} for name, part in shared.items()} | rows


def _items(x: Array) -> Array:
    """[a, c, b] -> [a c, 1, b]: every row an item of its own."""
    return x.reshape(-1, 1, x.shape[-1])
