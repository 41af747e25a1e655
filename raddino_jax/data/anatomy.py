"""Procedural chest anatomy: what an X-ray beam meets on its way through a drawn patient.

A projection adds the paths (cm) through soft tissue, air and bone along the beam, as a real film
does, so that ribs show through the heart and a thick patient is pale. Lengths are centimetres: u
runs to the right of the picture (the patient's left), v downwards from the apex of the lungs.
Outlines are functions of one coordinate, tabulated once per film and looked up per pixel: that is
what makes a film cost milliseconds.

Letters: S pixels per side, N dots, C table cells.
"""

import dataclasses
import functools
import math

import numpy as np

SIDES = ("right", "left")  # the patient's; the right is at the left of the picture
LEVELS = ("upper", "mid", "lower")
ZONES = tuple(f"{side} {level}" for side in SIDES for level in LEVELS)
RIBS = tuple(f"{side} rib {k}" for side in SIDES for k in range(1, 11))

SOFT = 0.16  # attenuation of water per cm at chest energies
LUNG = 0.25  # density of aerated lung, water = 1
RIB_SPACING = 2.3  # cm between neighbours; the true distance grows a little downwards

CELLS, SPAN, ORIGIN = 2048, 64.0, 24.0  # tables cover -24..40 cm, two cells per pixel at 518 px
AXIS = (np.arange(CELLS) * (SPAN / CELLS) - ORIGIN).astype(np.float32)
VERTEBRAE = np.arange(-9, 20)  # 1 is T1: the neck and the lumbar spine continue the count
EVERYWHERE = np.s_[:, :]

# glibc gives freed arrays back to the kernel, so that a film, made of 200 kB arrays, spends a fifth
# of its time on page faults until one larger block has been taken and freed. This is that block.
np.empty(1 << 24, np.uint8)


@dataclasses.dataclass(frozen=True)
class Body:
    """What stays the same in all films of one patient (cm unless said otherwise)."""

    half_width: float  # of the rib cage, inside
    height: float  # lung apex to costophrenic angle
    depth: float  # front to back
    fat: float
    breast: float  # thickness, 0 for none
    bone: float  # mineral density, 1 = young adult
    rib_half_width: float
    rib_drop: float  # steepness of the ribs, 1 = average
    cardiothoracic: float  # ratio, without a finding
    knob: float  # how far the aortic arch stands out
    calcified: bool  # aortic arch
    scoliosis: float
    kyphosis: float
    dome: float  # height of the diaphragm above the costophrenic angle
    elevation: float  # right dome above the left
    vascularity: float  # 1 = average
    seed: tuple  # key of the vessel tree


@dataclasses.dataclass(frozen=True)
class Pose:
    """How one film was taken (cm unless said otherwise)."""

    view: str
    field: float  # side of the film
    rotation: float  # radians
    shift: tuple
    yaw: float  # by how much the front of the chest is turned to the picture's right
    inspiration: float  # by how much the diaphragm stands lower than usual
    arms: float  # 0 by the side, 1 hands on the hips
    supine: bool
    facing: int  # of a lateral, 1 = towards the left of the picture
    stomach: float  # radius of the gas bubble, 0 for none
    electrodes: bool
    nipples: bool  # shown as two faint discs
    fold: bool  # of skin, a line that is no pleura
    seed: tuple  # key of the textures


def smooth(x):
    """0 below 0, 1 above 1, no kink between."""
    x = np.clip(x, 0, 1)
    y = 3 - 2 * x
    y *= x
    y *= x
    return y


@functools.lru_cache(maxsize=64)
def through(*points):
    """Outline table [C] through (x, y) points: a cubic with the slopes of the chords."""
    px, py = np.array(points, float).T
    chords = np.diff(py) / np.diff(px)
    slope = np.concatenate([[0], (chords[1:] + chords[:-1]) / 2, [0]])
    x = AXIS[::16]
    k = np.clip(np.searchsorted(px, x) - 1, 0, len(px) - 2)
    h = px[k + 1] - px[k]
    s = np.clip((x - px[k]) / h, 0, 1)
    rest = 1 - s
    y = py[k] * rest * rest * (1 + 2 * s) + py[k + 1] * s * s * (3 - 2 * s)
    return np.interp(AXIS, x, y + h * s * rest * (slope[k] * rest - slope[k + 1] * s))


def chord(x):
    """Path through a round rod at distance x from its axis, radius 1, over its diameter."""
    return np.sqrt(np.maximum(1 - x * x, 0))


def hollow(x, wall):
    """Path through a hollow bone, 1 at its brightest: the cortex shows as two lines."""
    return (chord(x) - 0.75 * (1 - wall) * chord(x / (1 - wall))) / chord(1 - wall)


@functools.lru_cache(maxsize=64)
def _upsampling(size, cells):
    """Cubic B-spline weights [S, cells + 3] from a grid of numbers to a smooth field."""
    x = (np.arange(size) + 0.5) / size * cells
    distance = np.abs(x[:, None] + 1 - np.arange(cells + 3))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def upsample(grid, size):
    """A grid of numbers [cells + 3, cells + 3] as a smooth field [S, S]."""
    rows = _upsampling(size, len(grid) - 3)
    # In slices: for one large product BLAS would start threads, which only get in Grain's way.
    tall = np.concatenate([rows, rows[: -size % 4]]).reshape(-1, 4, len(grid))
    return np.matmul(np.matmul(tall, grid), rows.T).reshape(-1, size)[:size]


def noise(rng, size, cells):
    """Smooth noise [S, S] of unit variance, one bump per cell, the same at every size."""
    return upsample(2.1 * rng.standard_normal((cells + 3, cells + 3), np.float32), size)


def splat(size, x, y, sigma, amount):
    """Sum [S, S] of Gaussian dots (pixels) of integral `amount`: thin things fade, none aliases."""
    reach = np.maximum(np.rint(np.where(sigma < 2.5, 1.6, 2.8) * sigma), 1).astype(int)
    reach = np.where(reach > 4, (reach + 3) // 4 * 4, reach)
    pad = 2 * reach.max(initial=1)
    width = size + 2 * pad
    out = np.zeros(width * width, np.float32)
    x, y, spread, amount = (np.float32(a) for a in (x + pad, y + pad, -0.5 / sigma**2, amount))
    col, row = np.floor(x), np.floor(y)
    near, far = np.minimum(col, row), np.maximum(col, row)
    dx, dy = col + np.float32(0.5) - x, row + np.float32(0.5) - y
    centre = (row * width + col).astype(np.intp)
    for k in np.flatnonzero(np.bincount(reach)):  # dots of one size together
        pick = np.flatnonzero((reach == k) & (near >= pad - k) & (far < pad + size + k))
        offset = np.arange(-k, k + 1)
        gx = np.exp(spread[pick, None] * (dx[pick, None] + np.float32(offset)) ** 2)
        gy = np.exp(spread[pick, None] * (dy[pick, None] + np.float32(offset)) ** 2)
        gy *= (amount[pick] / (gx.sum(1) * gy.sum(1)))[:, None]
        cell = centre[pick, None] + (offset[:, None] * width + offset).ravel()
        np.add.at(out, cell.ravel(), np.einsum("ni,nj->nij", gy, gx).ravel())
    return out.reshape(width, width)[pad : pad + size, pad : pad + size]


def line(points, spacing):
    """Points (x [N], y [N]) at equal steps along a polyline with rounded corners."""
    points = np.asarray(points, float)
    for _ in range(3 if len(points) < 20 else 0):
        cut = [0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]]
        points = np.concatenate([points[:1], np.stack(cut, 1).reshape(-1, 2), points[-1:]])
    length = np.append(0, np.cumsum(np.sqrt((np.diff(points, axis=0) ** 2).sum(1))))
    s = np.arange(0, length[-1], spacing)
    return np.interp(s, length, points[:, 0]), np.interp(s, length, points[:, 1])


@functools.lru_cache(maxsize=32)
def vessel_tree(seed, first, last, trunks):
    """Vessels from two hila at the origin: side, x, y, width, amount of their dots (reach 1)."""
    rng = np.random.default_rng(seed)
    side = np.repeat([0, 1], trunks)
    heading = np.tile(np.linspace(first, last, trunks), 2) + rng.normal(0, 0.2, side.size)
    x, y = rng.normal(0, 0.03, side.size), np.tile(np.linspace(-0.14, 0.2, trunks), 2)
    radius = np.tile(np.linspace(0.02, 0.034, trunks), 2) * rng.uniform(0.7, 1.1, side.size)
    length = rng.uniform(0.2, 0.4, side.size)
    parts = []
    for count in (13, 9, 7, 5, 4):
        s = np.arange(1, count + 1) / count
        bend = heading[:, None] + rng.normal(0, 0.35, heading.size)[:, None] * s
        step = length[:, None] / count
        px = x[:, None] + np.cumsum(step * np.cos(bend), 1)
        py = y[:, None] + np.cumsum(step * np.sin(bend), 1)
        taper = radius[:, None] * (1 - 0.3 * s)
        parts.append(np.broadcast_arrays(side[:, None], px, py, taper, step))
        # One child leaves at the tip, one on the way: a tree, not a fan.
        every, way = np.arange(heading.size), rng.integers(count // 3, count, heading.size)
        x, y = np.append(px[:, -1], px[every, way]), np.append(py[:, -1], py[every, way])
        turn = rng.uniform(0.2, 0.75, heading.size) * rng.choice([-1, 1], heading.size)
        heading = np.append(bend[:, -1], bend[every, way]) + np.append(0.35 * turn, -turn)
        length = np.tile(length, 2) * rng.uniform(0.6, 0.95, heading.size)
        radius, side = np.append(radius * 0.72, radius * 0.55), np.tile(side, 2)
    side, x, y, radius, step = np.concatenate([np.reshape(part, (5, -1)) for part in parts], 1)
    return side, x, y, 0.6 * np.maximum(radius, step), radius**1.55 * step


class Projection:
    """Pixels in body coordinates, the brushes both views draw with, and what they draw alike.

    A view adds the outlines, and the organs that `render` calls in turn.
    """

    def __init__(self, body, pose, findings, devices, size):
        self.body, self.pose, self.size = body, pose, size
        self.findings, self.devices = findings, devices
        self.px = pose.field / size
        self.strokes = []
        self.cos, self.sin = math.cos(pose.rotation), math.sin(pose.rotation)
        axis = ((np.arange(size) + 0.5) / size - 0.5) * pose.field
        x, y = np.float32(axis - pose.shift[0]), np.float32(axis[:, None] - pose.shift[1])
        self.u = pose.facing * (self.cos * x + self.sin * y)
        self.v = self.cos * y - self.sin * x
        self.iv = self.index(self.v)
        self.base = body.height + pose.inspiration  # depth of the costophrenic angles
        k = VERTEBRAE - 1
        uneven = np.random.default_rng((*body.seed, 1)).normal(0, 0.12, k.size)
        self.vertebra_v = (0.3 + 1.95 * k + 0.045 * k * np.abs(k)) * body.height / 26 + uneven
        self.vertebra_of = np.interp(AXIS, self.vertebra_v, VERTEBRAE).astype(np.float32)

    def index(self, x):
        """Table cell of a coordinate."""
        cell = x + np.float32(ORIGIN)
        cell *= np.float32(CELLS / SPAN)
        return cell.astype(np.intp)

    def at(self, table, index):
        """A table's values at the pixels."""
        return np.take(table.astype(np.float32, copy=False), index, mode="clip")

    def value(self, table, x):
        """A table's value at one coordinate."""
        return float(np.interp(x, AXIS, table))

    def pixels(self, u, v):
        """Column and row of a point of the body."""
        x = self.cos * self.pose.facing * u - self.sin * v + self.pose.shift[0]
        y = self.sin * self.pose.facing * u + self.cos * v + self.pose.shift[1]
        return x / self.px + self.size / 2, y / self.px + self.size / 2

    def window(self, u0, u1, v0, v1):
        """The part of the picture that can show a rectangle of the body: skip the rest."""
        bow = abs(self.body.scoliosis)
        u, v = np.array([u0 - bow, u0 - bow, u1 + bow, u1 + bow]), np.array([v0, v1, v0, v1])
        cols, rows = (np.clip((p.min(), p.max() + 1), 0, self.size) for p in self.pixels(u, v))
        return np.s_[int(rows[0]) : int(rows[1]), int(cols[0]) : int(cols[1])]

    def dots(self, u, v, sigma, amount):
        """Queue Gaussian dots: sigma in cm, amount = attenuation integrated over the dot."""
        self.strokes.append([np.ravel(a) for a in np.broadcast_arrays(u, v, sigma, amount)])

    def stroke(self, points, radius, strength):
        """Queue a wire, a wall or an edge: strength is the attenuation along its middle."""
        step = max(0.7 * radius, 0.5 * self.px)
        u, v = line(points, step)
        self.dots(u, v, 0.6 * radius, strength * 1.5 * radius * step)

    def painted(self):
        """The queued dots [S, S]."""
        if not self.strokes:
            return np.zeros((self.size, self.size), np.float32)
        u, v, sigma, amount = (np.concatenate(a) for a in zip(*self.strokes, strict=True))
        self.strokes = []
        x, y = self.pixels(u, v)
        return splat(self.size, x, y, np.maximum(sigma / self.px, 0.45), amount / self.px**2)

    def ellipse(self, u, v, radius_u, radius_v):
        """A window, and in it 1 at (u, v), 0 on an ellipse around it, negative outside."""
        w = self.window(u - radius_u, u + radius_u, v - radius_v, v + radius_v)
        x, y = self.u[w] - np.float32(u), self.v[w] - np.float32(v)
        x *= np.float32(1 / radius_u)
        y *= np.float32(1 / radius_v)
        return w, 1 - x * x - y * y

    def ball(self, film, amount, *ellipse):
        """Add an ellipsoid: `amount` through its middle."""
        w, inside = self.ellipse(*ellipse)
        film[w] += np.float32(amount) * np.sqrt(np.maximum(inside, 0))

    def discs(self, ellipses):
        """Mask of the pixels inside any of the ellipses."""
        mask = np.zeros((self.size, self.size), bool)
        for ellipse in ellipses:
            w, inside = self.ellipse(*ellipse)
            mask[w] |= inside > 0
        return mask

    def render(self):
        """Attenuation [S, S]."""
        w = self.thorax
        air = self.lungs()
        # The mottle of small vessels and airways seen end on.
        mottle = noise(np.random.default_rng(self.pose.seed), self.size, 64)[w]
        air *= 1 + np.float32(0.05) * mottle
        lung = np.minimum(air * np.float32(1 / 6), 1)
        self.vessels()
        inside = self.painted()[w] * lung
        inside -= np.float32(SOFT * (1 - LUNG)) * air
        if "pneumothorax" in self.findings:
            # No vessels there, and nothing but air.
            free = self.free_air()
            inside *= 1 - free
            inside -= np.float32(SOFT) * air * free
        inside += self.lesions(lung)
        film = self.flesh()
        film *= np.float32(SOFT)
        film[w] += inside
        self.airways(film)
        self.ribs(film)
        self.bones(film)
        self.wires()
        film += self.painted()
        return film

    def whole(self, part):
        """A mask of the thorax as a mask of the film [S, S]."""
        mask = np.zeros((self.size, self.size), bool)
        mask[self.thorax] = part
        return mask

    def lesions(self, lung):
        """Attenuation of nodules and opacities, in the thorax."""
        out = np.float32(0)
        if "nodule" in self.findings:
            film = np.zeros((self.size, self.size), np.float32)
            for site in self.findings["nodule"]["sites"]:
                amount = SOFT * 2 * site["radius"] * site["density"]
                self.ball(film, amount, *self.nodule(site))
            out = film[self.thorax]
        if "opacity" in self.findings:
            water, _ = self.opacity()
            out = out + SOFT * water * lung * self.beside(self.findings["opacity"]["side"])
        return out

    def nodule(self, site):
        """A nodule's ellipse."""
        return *self.locate(site), site["radius"], site["radius"] * site["aspect"]

    def opacity(self):
        """Airspace or reticular shadow in the thorax, over both lungs: (water in cm, mask)."""
        site, w = self.findings["opacity"], self.thorax
        u, v = self.locate(site)
        rng = np.random.default_rng(site["seed"])
        coarse, fine = noise(rng, self.size, 18)[w], noise(rng, self.size, 54)[w]
        x, y = (self.u[w] - u) / (site["radius"] * site["aspect"]), (self.v[w] - v) / site["radius"]
        bump = np.exp(-x * x - y * y) * (1 + 0.5 * np.clip(coarse, -1, 2))
        shape = smooth((bump - 0.2) / 0.45)
        if site["kind"] == "airspace":
            return site["density"] * shape * (1 + 0.2 * fine), shape > 0.3
        # Septa seen edge on: the lines where one of two random surfaces crosses zero.
        other = noise(rng, self.size, 54)[w]
        net = np.clip(1 - 2 * np.minimum(np.abs(fine), np.abs(other)), 0, 1)
        return site["density"] * shape * (0.75 * net - 0.15), shape > 0.3

    def ribs(self, film):
        """Add the ribs: tubes with a bright cortex."""
        w = self.rib_cage
        soft = max(0.22, 0.8 * self.px / self.body.rib_half_width)
        d = np.arange(256, dtype=np.float32) / 128
        profile = smooth((1 - d) / soft + 0.5) * (0.62 + 0.55 * np.minimum(d, 1) ** 3)
        for _, distance, strength in self.rib_arcs(w):
            distance = np.abs(distance)
            distance *= 128
            strength *= self.at(profile, distance.astype(np.intp))
            film[w] += strength

    def break_ribs(self, nearest, distance, strength, beyond):
        """Displace broken ribs beyond the break and open a gap (in place).

        `beyond(u)` is the distance of the pixels past a break at u.
        """
        site = self.findings["fracture"]
        gap = max(0.3, 0.5 * self.px)
        for rib in site["ribs"]:
            broken = nearest == rib
            s = beyond(self.break_point(rib)[0])[broken]
            distance[broken] += np.where(s > 0, site["step"] / self.body.rib_half_width, 0)
            strength[broken] *= 1 - 0.95 * np.exp(-((s / gap) ** 2))

    def nodule_mask(self):
        """Pixels of all nodules."""
        return self.discs(self.nodule(site) for site in self.findings["nodule"]["sites"])

    def fracture_mask(self):
        """Discs around the broken places."""
        ribs = self.findings["fracture"]["ribs"]
        return self.discs((*self.break_point(rib), 1.6, 1.6) for rib in ribs)

    def opacity_mask(self):
        """Where the shadow lies over its lung."""
        shape = self.opacity()[1] & self.beside(self.findings["opacity"]["side"])
        return self.chest & self.whole(shape)

    def pneumothorax_mask(self):
        """Where there is air outside the lung."""
        free = self.free_air()
        return self.chest & self.whole(free > 0.5 * free.max())


class Frontal(Projection):
    """A PA or AP film. `a` is the distance from the midline; side 0 is the patient's right."""

    def __init__(self, body, pose, findings, devices, size):
        super().__init__(body, pose, findings, devices, size)
        self.u -= self.at(body.scoliosis * np.sin(np.pi * AXIS / 26), self.iv)
        self.a = np.abs(self.u)
        self.side = self.u > 0
        other = self.side * CELLS
        self.ia, self.ivs = self.index(self.a) + other, self.iv + other
        wide = body.half_width + 1.2
        self.thorax = self.window(-wide, wide, -0.5, self.base + 9)
        self.rib_cage = self.window(-wide, wide, 0, self.base + 5)
        self.carina = 7.2 + 0.3 * pose.inspiration
        rise = np.clip(AXIS / (0.82 * body.height), 0, 1)
        self.wall = body.half_width * np.sqrt(1 - (1 - rise) ** 2.3)
        fall = through((-20, 1), (-1, 2.2), (3, 5), (9, 8.6), (16, 9.8), (40, 10))
        self.drop = body.rib_drop * fall
        self.edges = self._mediastinum()
        self.domes = [self._dome(side) for side in (0, 1)]
        self.fluid = [self._fluid_level(side) for side in (0, 1)]
        self.wall_px = self.at(self.wall, self.iv) + np.float32(1e-3)
        self.edge_px = self.sided(self.edges, self.ivs)
        self.dome_px = self.sided(self.domes, self.ia)

    def sided(self, pair, index):
        """The right or the left table's values, by side of the pixel."""
        return self.at(np.concatenate(pair), index)

    def beside(self, side):
        """Which pixels of the thorax are in one half of the body."""
        return self.side[self.thorax] == side

    def _mediastinum(self):
        """Right and left border of the heart and the great vessels, from the midline."""
        body, pose = self.body, self.pose
        ratio = self.findings.get("cardiomegaly", {"ratio": body.cardiothoracic})["ratio"]
        # The heart is further from the film in AP, and flatter on a raised diaphragm.
        magnified = (1.08 if pose.view == "AP" else 1) * (1 - 0.02 * pose.inspiration)
        width = 2 * body.half_width * ratio * magnified
        r, h, k, f = 0.33 * width, 0.67 * width, body.knob, self.base - body.dome + 1
        right = through(
            (-6, 5), (-1, 4.2), (1, 3.0), (0.18 * f, 2.6), (0.52 * f, 2.7),
            (0.67 * f, 0.72 * r + 0.6), (0.85 * f, r), (f, 0.9 * r), (f + 3, 0.5 * r), (f + 6, 2),
        )  # fmt: skip
        left = through(
            (-6, 5), (-1, 4.2), (1, 2.8), (0.18 * f, 2.3), (0.25 * f, 2.2 + 0.5 * k),
            (0.32 * f, 2.5 + k), (0.385 * f, 2.5 + 0.5 * k), (0.45 * f, 2.9), (0.58 * f, 3.6),
            (0.76 * f, 0.72 * h), (0.935 * f, h), (f + 1.2, 0.93 * h), (f + 3.2, 0.6 * h),
            (f + 5, 2),
        )  # fmt: skip
        shift = 0.5 * pose.yaw
        return right - shift, np.minimum(left + shift, np.maximum(0.9 * self.wall, 5))

    def _dome(self, side):
        """Height of a hemidiaphragm over the distance from the midline."""
        body = self.body
        top = self.base - body.dome + (0.5 - (side == 0)) * body.elevation
        x = (np.abs(AXIS) - 0.4 * body.half_width) / (0.6 * body.half_width)
        return top + np.where(x > 0, (self.base - top) * np.abs(x) ** 2.2, 2 * x * x)

    def _fluid_level(self, side):
        """Upper surface of pleural fluid: level, with a meniscus that climbs the chest wall."""
        site = self.findings.get("effusion")
        if not site or side not in site["sides"]:
            return np.full(CELLS, 39, np.float32)
        x = np.clip(np.abs(AXIS) / self.body.half_width, 0, 1)
        climb = np.exp((x - 1) / 0.12) + 0.25 * np.exp(-x / 0.15)
        # Lying down, most of the fluid spreads behind the lung (see lungs), little is below it.
        return self.base - site["height"] * (0.3 if self.pose.supine else 1) * (0.6 + 0.4 * climb)

    @functools.cached_property
    def pleura(self):
        """Outline of the lung inside a pneumothorax (table over v)."""
        site = self.findings["pneumothorax"]
        gap = site["gap"] * through((-20, 1), (4, 1), (14, 0.7), (self.base, 0.25), (40, 0.2))
        fallen = np.interp(AXIS - site["gap"] * site["apical"], AXIS, self.wall)
        return np.maximum(fallen - gap, -1)

    def locate(self, site):
        """A place in the lung, across from hilum to wall and down from apex to base, in cm."""
        side, v = site["side"], site["down"] * self.base
        inner, outer = self.value(self.edges[side], v), self.value(self.wall, v)
        u = inner + site["across"] * (outer - inner)
        return (-1, 1)[side] * u, min(v, self.value(self.domes[side], u) - 1)

    def lungs(self):
        """Path through aerated lung, in the thorax."""
        w, iv = self.thorax, self.iv[self.thorax]
        height = np.clip(AXIS / 15, 0, 1)
        depth = 0.71 * self.body.depth * np.sqrt(1 - (1 - height) ** 2.4)
        t = np.minimum(self.a[w] / self.wall_px[w], 1)
        out = self.at(depth, iv) * np.sqrt(1 - t * t * np.sqrt(t))
        floor = np.minimum(self.dome_px[w], self.sided(self.fluid, self.ia[w]))
        floor -= self.v[w]
        # Behind the dome the lung reaches deeper; fluid fills that recess first.
        recess = 0.16 * np.exp(np.minimum(AXIS, 0) / 2.2)
        shown = np.maximum(smooth(AXIS / max(0.4, self.px) + 0.5), recess)
        out *= self.at(shown, self.index(floor))
        deep = np.clip((self.edge_px[w] - self.a[w]) * np.float32(1 / 2.4), 0, 1)
        out *= 1 - np.float32(0.93) * deep * (2 - deep)
        site = self.findings.get("effusion")
        if site and self.pose.supine:
            layer = 0.4 * site["height"] * smooth((AXIS + 2) / (0.8 * self.base))
            pair = [layer * (side in site["sides"]) for side in (0, 1)]
            out = np.maximum(out - self.sided(pair, self.ivs[w]), 0.2 * out)
        return out

    def free_air(self):
        """Where in the thorax a pneumothorax is; queues the fine line of the visceral pleura."""
        w, side = self.thorax, self.findings["pneumothorax"]["side"]
        v = AXIS[(AXIS > 0) & (AXIS < self.base - 1)][::4]
        u = np.interp(v, AXIS, self.pleura)
        beside_heart = u > np.interp(v, AXIS, self.edges[side])
        shown = beside_heart & (v < np.interp(u, AXIS, self.domes[side]))
        if shown.sum() > 4:
            self.stroke(np.stack([(-1, 1)[side] * u, v], 1)[shown], 0.12, 0.12)
        outside = (self.a[w] - self.at(self.pleura, self.iv[w])) * (1 / 0.3) + 0.5
        return smooth(outside) * self.beside(side)

    def flesh(self):
        """Path through soft tissue, as if there were no air in the body."""
        body, pose, w = self.body, self.pose, self.body.half_width
        total = body.depth + 2 * body.fat
        s = 19 + 0.5 * body.fat
        shoulders = through(
            (-20, 8), (-9, 6.3), (-5, 6), (-3, 7.2), (-1, 10.5), (0.6, 15), (2.5, s - 1), (5, s),
            (8, s - 1), (11, 15), (15, 0), (40, 0),
        )  # fmt: skip
        skin = self.wall + 2 + body.fat
        outline = np.maximum(shoulders, skin * smooth((AXIS - 4) / 6))
        depth = through(
            (-20, 13), (-4, 12), (1, 0.7 * total), (9, 0.98 * total), (14, total), (24, total),
            (30, 1.04 * total), (40, total),
        )  # fmt: skip
        x = np.minimum(self.a * self.at(1 / outline, self.iv), 1)
        out = self.at(depth, self.iv) * np.sqrt(1 - x * x)
        thick = 4.2 + 0.5 * body.fat
        for z, across, along in self.arms():
            arm = self.at(2.5 * thick * chord(AXIS / thick), across)
            out[z] = np.maximum(out[z], arm * self.at(smooth((AXIS + 3) / 4), along))
        if body.breast:
            r, u, v = 0.45 * w, 0.64 * w, 0.68 * self.base
            z = self.window(-3 * w, 3 * w, v - 1.2 * r, v + 1.2 * r)
            x, y = (self.a[z] - u) * (1 / r), (self.v[z] - v) * (1 / (1.15 * r))
            out[z] += body.breast * np.sqrt(np.maximum(1 - x * x - y * y, 0)) * smooth(y + 0.6)
        if pose.stomach:
            g, top = pose.stomach, self.value(self.domes[1], 5.5)
            self.ball(out, -3.5, 5.5, top + 1.2 + 0.8 * g, 1.3 * g, 0.8 * g)
        return out

    def arms(self):
        """Each upper arm's window, and the table cells across and along it."""
        angle, inner = 0.04 + 0.3 * self.pose.arms, 0.8 * self.body.half_width
        cos, sin = math.cos(angle), math.sin(angle)
        for w in (self.window(-40, -inner, 1, 40), self.window(inner, 40, 1, 40)):
            s, v = self.a[w] - (1.3 * self.body.half_width + 0.3), self.v[w] - 4.5
            yield w, self.index(s * cos - v * sin), self.index(s * sin + v * cos)

    def airways(self, film):
        """Remove the air of trachea and main bronchi."""
        w = self.window(-6, 6, -12, self.carina + 4)
        iv, below = self.iv[w], np.clip(AXIS - self.carina, 0, None)
        trachea = 0.45 * self.pose.yaw - 0.25 * smooth((AXIS - 3) / 4)
        x = self.u[w] - self.at(trachea, iv)
        bronchi = self.sided([0.75 * below, 1.15 * below], self.ivs[w])
        x = np.where(self.v[w] > self.carina, np.abs(x) - bronchi, x)
        width = np.where(AXIS < self.carina, 0.9, 0.75)
        air = (1.3 + 0.6 * smooth(AXIS / 4)) * smooth((AXIS + 9) / 3)
        air *= smooth((self.carina + 3.2 - AXIS) / 2.5)
        film[w] -= self.at(SOFT * air, iv) * chord(x / self.at(width, iv))

    def vessels(self):
        """Queue arteries and veins, and the hila they leave from."""
        body = self.body
        side, x, y, width, amount = vessel_tree(body.seed, -2.0, 1.85, 9)
        across, down = 0.95 * body.half_width, 0.5 * body.height
        u = (2 * side - 1) * (2.8 + across * x) + 0.3 * self.pose.yaw
        v = 11.2 - 0.9 * side + down * y
        self.dots(u, v, across * width, 1.25 * body.vascularity * across**2.55 * amount)
        self.dots([-3.4, 3.4], [10.6, 9.7], 1.1, 0.8)
        self.dots([-3.4, 3.4], [12.6, 11.7], 1.3, 1.2)

    def rib_arcs(self, w=EVERYWHERE):
        """Per arc (posterior, anterior): which rib, signed distance in half widths, strength.

        A rib is a hoop seen aslant: it falls by drop * fall(t) on its way out to the wall (t = 1)
        and back in.
        """
        body, v, iv = self.body, self.v[w], self.iv[w]
        k = (self.a[w] * self.at(1000 / np.maximum(self.wall + 0.5, 1), iv)).astype(np.intp)
        t = np.arange(1200, dtype=np.float32) / 1000
        root = np.sqrt(np.maximum(1 - t * t, 0.003))
        # Near the wall a rib runs steeply, so that it is thinner across than it is high.
        steep = np.minimum(0.29 * t / root, 2)
        thin = self.at(RIB_SPACING / body.rib_half_width / np.sqrt(1 + steep * steep), k)
        drop = self.at(self.drop, iv)
        shown = smooth((self.base + 5 - AXIS) / 7) * smooth((AXIS - 0.3) / 1.5)
        shown = self.at(body.bone * shown, iv)
        ends = smooth((1.03 - t) / 0.03)
        arcs = (
            (12.5, 0.42 - 0.42 * root, 0.23 * smooth((t - 0.07) / 0.14)),
            (10.5, 0.42 + 0.55 * root, 0.15 * smooth((t - 0.42) / 0.15)),
        )
        for anterior, (last, fall, strength) in enumerate(arcs):
            rib = self.at(self.vertebra_of, self.index(v - drop * self.at(fall, k)))
            nearest = np.rint(rib)
            rib -= nearest
            rib *= thin
            if anterior:
                rib *= np.float32(0.9)
            strength = self.at(strength * ends, k) * shown
            strength *= nearest < last
            if "fracture" in self.findings and not anterior:
                own = np.where(self.side[w] == self.findings["fracture"]["side"], nearest, 0)
                self.break_ribs(own, rib, strength, lambda u: self.a[w] - abs(u))
            yield nearest, rib, strength

    def break_point(self, rib):
        """Where a broken rib is broken: a few steps of v = spine + drop(v) * fall."""
        site = self.findings["fracture"]
        fall = 0.42 - 0.42 * math.sqrt(1 - site["across"] ** 2)
        v = start = float(np.interp(rib, VERTEBRAE, self.vertebra_v))
        for _ in range(6):
            v = start + fall * self.value(self.drop, v)
        return (-1, 1)[site["side"]] * site["across"] * (self.value(self.wall, v) + 0.5), v

    def bones(self, film):
        """Add collar bones, shoulder blades, arms and spine."""
        self.clavicles(film)
        self.scapulae(film)
        self.humeri(film)
        self.spine(film)

    def clavicles(self, film):
        """Rods bent like an S; turning the patient takes their inner ends off the midline."""
        body, pose, w = self.body, self.pose, self.body.half_width
        lift = (1.2 if pose.view == "AP" else 0) - 0.3 * pose.inspiration
        curve = through(
            (-20, 5), (1.6, 5.2), (4.6, 4.3), (0.5 * w, 2.9), (0.8 * w, 2.2), (1.2 * w, 1), (40, 0)
        )
        shaft = through((-20, 1), (1.6, 1.1), (4.1, 0.75), (0.6 * w, 0.6), (40, 0.7))
        ends = np.clip((AXIS - 1.6) / 1.2, 0, 1) * np.clip((1.25 * w - AXIS) / 1.5, 0, 1)
        slope = np.gradient(curve, SPAN / CELLS)
        width = shaft * np.sqrt(ends * (1 + slope * slope)) + 1e-3
        z = self.window(-26, 26, -1.5 - lift, 7 - lift)
        along = self.index(self.a[z] + np.where(self.side[z], -0.6 * pose.yaw, 0.6 * pose.yaw))
        d = np.abs(self.v[z] - self.at(curve - lift, along)) / self.at(width, along)
        bone = smooth((1 - d) / max(0.25, 1.2 * self.px) + 0.5) * (0.8 + 0.2 * np.minimum(d, 1))
        film[z] += 0.34 * body.bone * bone

    def scapulae(self, film):
        """The blade lies over the outer lung unless the shoulders are rolled forward."""
        w = self.body.half_width
        inner = w * (0.66 + 0.25 * self.pose.arms)
        corners = np.array([(inner, 1.0), (1.22 * w, 3.6), (inner + 0.14 * w, 14)], np.float32)
        z = self.window(-26, 26, 0, 15)
        near = np.float32(9)
        for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, 0), strict=True):
            n = np.array([v0 - v1, u1 - u0]) / np.hypot(v0 - v1, u1 - u0)
            near = np.minimum(near, self.a[z] * n[0] + (self.v[z] * n[1] - (u0 * n[0] + v0 * n[1])))
        border = 0.09 * smooth(AXIS / 0.5 + 0.5) + 0.09 * np.exp(-((AXIS - 0.4) ** 2) / 0.1)
        film[z] += self.at(self.body.bone * border, self.index(near))

    def humeri(self, film):
        """Heads and shafts of the upper arms."""
        bone, u = self.body.bone, 1.28 * self.body.half_width - 0.2
        for w, across, along in self.arms():
            shaft = self.at(0.6 * bone * hollow(AXIS / 1.2, 0.35), across)
            film[w] += shaft * self.at(smooth((AXIS - 0.5) / 3), along)
        for centre in (-u, u):
            w, inside = self.ellipse(centre, 3.8, 2.4, 2.4)
            head = np.maximum(inside, 0)
            film[w] += 0.2 * bone * smooth(head * 3) * np.sqrt(head + 0.4)

    def spine(self, film):
        """Vertebral bodies, discs, pedicles, and the descending aorta beside them."""
        w = self.window(-3, 3, -20, 40)
        iv, ia = self.iv[w], self.ia[w]
        part = (self.vertebra_of + 0.5) % 1 - 0.5
        bodies = (0.05 + 0.06 * smooth((AXIS + 1) / 4)) * smooth((0.45 - np.abs(part)) / 0.14)
        half = self.at(through((-20, 1.1), (-3, 1.3), (10, 1.7), (30, 2.1), (40, 2.1)), iv)
        out = self.at(bodies + 0.12, iv) * smooth((half - self.a[w]) * (1 / 0.6) + 0.5)
        pedicles = np.exp(-(((part + 0.05) / 0.16) ** 2)) * smooth((AXIS + 1) / 3)
        beside = np.exp(-(((np.abs(AXIS) - 1.15) / 0.3) ** 2)) + np.exp(-((AXIS / 0.35) ** 2))
        out += self.at(0.07 * pedicles, iv) * self.sided([beside, beside], ia)
        out *= self.body.bone
        aorta = 0.14 * chord((AXIS - 1.2) / 1.5)
        out += self.sided([0 * aorta, aorta], ia) * self.at(smooth((AXIS - 6) / 3), iv)
        film[w] += out

    def wires(self):
        """Queue what is thin and outside the lungs: devices, calcium, electrodes, gas, skin."""
        body, pose, w = self.body, self.pose, self.body.half_width
        rng = np.random.default_rng((*pose.seed, 1))
        for name, site in self.devices.items():
            getattr(self, f"_{name}")(site)
        if body.calcified:
            v = np.linspace(0.25, 0.38, 12) * (self.base - body.dome)
            u = np.interp(v, AXIS, self.edges[1]) - 0.15
            self.stroke(np.stack([u, v], 1), 0.12, 0.35)
        if pose.nipples:
            self.dots([-0.62 * w, 0.62 * w], 0.74 * self.base + rng.normal(0, 0.3, 2), 0.4, 0.16)
        if pose.fold:
            x, sign = rng.uniform(0.55, 0.85), rng.choice([-w, w])
            way = [(sign * x, 2), (sign * (x + 0.05), 12), (sign * (x - 0.1), 24)]
            self.stroke(way, 0.25, 0.07)
        if pose.electrodes:
            out = rng.uniform(-1, 1) * w
            for u, v in rng.uniform((-0.8 * w, 3), (0.8 * w, 24), (3, 2)):
                self.dots(u, v, 0.35, 0.3)
                self.stroke([(u, v), (u + rng.normal(0, 4), v + 6), (out, 32)], 0.08, 0.3)
        gas = rng.integers(0, 4)
        size = rng.uniform(0.7, 1.6, gas)
        u, v = rng.uniform(-0.8, 0.95, gas) * w, self.base + rng.uniform(2, 9, gas)
        self.dots(u, v, size, -2.5 * size**2)

    def _tube(self, site):
        sign, x, w = (-1, 1)[site["side"]], 0.45 * self.pose.yaw, self.body.half_width
        if site["kind"] == "endotracheal tube":
            for wall in (-0.35, 0.35):
                tip = (x + wall, self.carina - site["tip"])
                self.stroke([(x + 2 * wall, -14), (x + wall, -5), tip], 0.1, 0.35)
        elif site["kind"] == "nasogastric tube":
            stomach = [(1.2, self.base - 4), (4, self.base + 1), (7, self.base)]
            self.stroke([(x + 0.6, -14), (0.5, 0), (0.9, 12), *stomach], 0.17, 0.45)
        else:
            chest = [(w + 6, 20), (w, 15), (0.8 * w, 9), (0.55 * w, 3.5)]
            self.stroke([(sign * u, v) for u, v in chest], 0.28, 0.4)

    def _line(self, site):
        sign = (-1, 1)[site["side"]]
        entry = [(sign * 4.5, -9), (sign * 3.2, -1)]
        if site["kind"] == "subclavian":
            entry = [(sign * 13, 6), (sign * 9, 2.6), (sign * 4.5, 2.2)]
            self.dots(sign * 13, 6, 0.7, 1.6)
        self.stroke([*entry, (-1.2, 4), (-2.2, 7), (-2.3, 9 + site["tip"])], 0.12, 0.55)

    def _pacemaker(self, site):
        sign, floor = (-1, 1)[site["side"]], self.base - self.body.dome
        u, v = sign * 10.5, 5.0
        gu, gv = np.meshgrid(np.arange(-1.9, 2, 0.35), np.arange(-1.5, 1.6, 0.35))
        case = (np.abs(gu) / 2.2) ** 3 + (np.abs(gv) / 1.8) ** 3 < 1
        self.dots(u + gu[case], v + gv[case], 0.22, 1.5 * 0.35**2)
        entry = [(u, v - 1.5), (sign * 8, 1.5), (sign * 4, 2.4), (-1.4, 4.5), (-2.4, 8)]
        self.stroke([*entry, (-3, floor - 4), (-1, floor - 1), (4.5, floor - 1.2)], 0.11, 0.6)
        self.stroke([*entry, (-3.4, floor - 6), (-2.4, floor - 7.5)], 0.11, 0.6)

    @functools.cached_property
    def chest(self):
        """Both lungs as they lie, whatever hides them [S, S]."""
        above = (self.v < self.dome_px) & (self.v > 0)
        return (self.a < self.wall_px) & (self.a > self.edge_px) & above

    def masks(self):
        """Boolean masks of the anatomy: lungs [2], zones [6], ribs [20]."""
        level = np.clip(self.v * (3 / self.base), 0, 2.999).astype(int)
        lungs = np.stack([self.chest & (self.side == side) for side in (0, 1)])
        zones = np.stack([lung & (level == k) for lung in lungs for k in range(3)])
        ribs = np.zeros((len(RIBS), self.size, self.size), bool)
        for nearest, distance, strength in self.rib_arcs():
            bone = (np.abs(distance) < 1) & (strength > 0.03)
            for k, rib in enumerate(ribs):
                rib |= bone & (nearest == k % 10 + 1) & (self.side == k // 10)
        return {"lungs": lungs, "zones": zones, "ribs": ribs}

    def effusion_mask(self):
        """Where fluid hides the lung; lying down it spreads behind the lower two thirds."""
        top = 0.35 * self.base if self.pose.supine else self.sided(self.fluid, self.ia)
        sides = np.isin(self.side, self.findings["effusion"]["sides"])
        return self.chest & (self.v > top) & sides

    def cardiomegaly_mask(self):
        """The heart's silhouette."""
        f = self.base - self.body.dome + 1
        floor = np.minimum(self.dome_px + 0.5, f + 3)
        return (self.a < self.edge_px) & (self.v > 0.56 * f) & (self.v < floor)


class Lateral(Projection):
    """A lateral film: u runs from the breastbone to the back, both lungs lie over each other."""

    def __init__(self, body, pose, findings, devices, size):
        super().__init__(body, pose, findings, devices, size)
        k, hunch = body.depth / 22, body.kyphosis * np.exp(-(((AXIS - 8) / 8) ** 2))
        self.front = through(
            (-20, -2), (-4, -2.5), (0, -3.6 * k), (3, -6 * k), (8, -8.6 * k), (15, -10.4 * k),
            (20, -10.8 * k), (25, -10 * k), (40, -10 * k),
        )  # fmt: skip
        self.back = hunch + through(
            (-20, 1), (-4, 2.5), (0, 5.2), (4, 8 * k), (10, 9.8 * k), (16, 10.2 * k),
            (22, 9.6 * k), (28, 8.5 * k), (40, 8 * k),
        )  # fmt: skip
        self.front_px, self.back_px = self.at(self.front, self.iv), self.at(self.back, self.iv)
        self.x = (self.u - self.front_px) / (self.back_px - self.front_px)  # 0 in front, 1 behind
        self.iu = self.index(self.u)
        self.thorax = self.window(-14, 16, -2, self.base + 5)
        self.rib_cage = self.window(-14, 16, 0, self.base + 5)
        self.domes = [self._dome(side) for side in (0, 1)]
        self.fluid = [self._fluid_level(side) for side in (0, 1)]

    def beside(self, side):
        """Both sides lie over each other."""
        return np.bool_(True)

    def _dome(self, side):
        """Height of a hemidiaphragm over u: high in front, deep behind."""
        top = self.base - self.body.dome + (0.5 - (side == 0)) * self.body.elevation
        return top + through(
            (-24, 2.5), (-11, 2.2), (-8, 0.8), (-3, 0), (2, 0.9), (6, 3), (10, 6.5), (40, 8)
        )

    def _fluid_level(self, side):
        """Upper surface of pleural fluid, deepest behind the lung."""
        site = self.findings.get("effusion")
        if not site or side not in site["sides"]:
            return np.full(CELLS, 39, np.float32)
        climb = np.exp(-np.abs(AXIS - 10.5) / 1.8) + 0.4 * np.exp(-np.abs(AXIS + 10.5) / 1.8)
        return self.base + 0.5 - site["height"] * (0.6 + 0.4 * climb)

    @functools.cached_property
    def heart(self):
        """An egg that leans backwards: 1 in its middle, 0 at its outline, negative outside."""
        body = self.body
        ratio = self.findings.get("cardiomegaly", {"ratio": body.cardiothoracic})["ratio"]
        r = 13 * ratio * body.half_width / 14
        v = self.v - (self.base - body.dome - 0.3 * r)
        u = self.u - (0.92 * r - 9.8 * body.depth / 22)
        x, y = (u + 0.35 * v) * (1 / (0.95 * r)), v * (1 / (1.15 * r))
        return 1 - x * x - y * y

    def locate(self, site):
        """A place in the lung, down from apex to base and behind the breastbone, in cm."""
        v = site["down"] * self.base
        front, back = self.value(self.front, v), self.value(self.back, v)
        u = front + site["behind"] * (back - front)
        return u, min(v, self.value(self.domes[site["side"]], u) - 1)

    def lungs(self):
        """Path through aerated lung of both sides, in the thorax."""
        w, iv, iu = self.thorax, self.iv[self.thorax], self.iu[self.thorax]
        x = np.minimum(np.abs(2 * self.x[w] - 1), 1)
        width = 0.75 * self.body.half_width * smooth((AXIS + 1.5) / 10)
        out = self.at(width, iv) * np.sqrt(1 - x**5)
        shown = smooth(AXIS / max(0.4, self.px) + 0.5)
        floors = np.minimum(self.domes, self.fluid)
        out *= sum(self.at(shown, self.index(self.at(f, iu) - self.v[w])) for f in floors)
        # Great vessels and muscle between the lungs, above the heart.
        column = self.at(smooth((5.5 - np.abs(AXIS + 0.5)) / 5), iu)
        column *= self.at(0.5 * smooth((18 - AXIS) / 12), iv)
        out *= 1 - np.maximum(0.55 * smooth(1.3 * self.heart[w]), column)
        return out

    def free_air(self):
        """Where in the thorax air lies before and above one lung; queues the line of its pleura."""
        w, gap = self.thorax, self.findings["pneumothorax"]["gap"]
        edge = np.interp(AXIS - gap, AXIS, self.front) + gap
        v = AXIS[(AXIS > 1.2 * gap) & (AXIS < self.base - 6)][::4]
        self.stroke(np.stack([np.interp(v, AXIS, edge), v], 1), 0.12, 0.12)
        ahead = smooth((self.at(edge, self.iv[w]) - self.u[w]) * (1 / 0.3))
        above = self.at(smooth((1.2 * gap - AXIS) / 0.3), self.iv[w])
        # The other lung is in front of it: half the beam meets free air.
        return 0.5 * np.maximum(ahead, above)

    def flesh(self):
        """Path through soft tissue, as if there were no air in the body."""
        body = self.body
        belly = 0.8 * body.fat * smooth((AXIS - 16) / 10) - 2.5 * smooth((2 - AXIS) / 4)
        bust = 1.3 * body.breast * np.exp(-np.abs((AXIS - 0.68 * self.base) / 5) ** 2.5)
        ahead = self.front - 1.6 - 0.7 * body.fat - belly - bust
        behind = self.back + 2.2 + body.fat + 1.5 * smooth((6 - AXIS) / 8)
        middle, scale = 0.5 * (ahead + behind), 2 / (behind - ahead)
        x = np.abs((self.u - self.at(middle, self.iv)) * self.at(scale, self.iv))
        full = 2 * (body.half_width + 2 + body.fat)
        width = through((-20, 14), (-6, 18), (-1, 0.8 * full), (4, full), (14, full), (40, full))
        out = self.at(width, self.iv) * np.sqrt(1 - np.minimum(x, 1) ** 3)
        # The arms are raised out of the way, forwards.
        w = self.window(-30, 10, -24, 6)
        across, along = 0.8 * self.u[w] - 0.6 * self.v[w] - 1.5, 0.6 * self.u[w] + 0.8 * self.v[w]
        arm = self.at(11 * chord(AXIS / 5), self.index(across))
        out[w] = np.maximum(out[w], arm * self.at(smooth((2 - AXIS) / 6), self.index(along)))
        if self.pose.stomach:
            g, top = self.pose.stomach, self.value(self.domes[1], -2)
            self.ball(out, -4, -2, top + 1 + 0.8 * g, 1.3 * g, 0.8 * g)
        return out

    def airways(self, film):
        """Remove the air of the trachea, which runs backwards as it goes down."""
        w = self.window(-4, 6, -12, 12)
        axis = through((-20, -1.5), (-5, -0.8), (0, 0.2), (9, 2.4), (40, 3))
        air = SOFT * 1.9 * smooth((AXIS + 9) / 3) * smooth((11 - AXIS) / 2.5)
        x = (self.u[w] - self.at(axis, self.iv[w])) * (1 / 0.9)
        film[w] -= self.at(air, self.iv[w]) * chord(x)

    def vessels(self):
        """Queue both trees, which leave from hila that nearly coincide."""
        body = self.body
        side, x, y, width, amount = vessel_tree(body.seed, -2.9, 2.9, 11)
        scale = 0.42 * body.depth
        u, v = 1.0 + 1.6 * side + scale * x, 11.2 - 1.4 * side + 1.15 * scale * y
        self.dots(u, v, scale * width, 1.45 * body.vascularity * scale**2.55 * amount)
        self.dots([1.5, 2.4], [10.5, 9.6], 1.3, 1.8)

    def rib_arcs(self, w=EVERYWHERE):
        """Per side: which rib, signed distance in half widths, strength."""
        u, x = self.u[w], self.x[w]
        shown = smooth((x - 0.12) * (1 / 0.15)) * smooth((1.08 - x) * (1 / 0.04))
        shown *= 0.14 * self.body.bone
        for side in (0, 1):
            y = self.v[w] - 0.55 * (self.back_px[w] - u) - 0.9 * side
            rib = self.at(self.vertebra_of, self.index(y))
            nearest = np.rint(rib)
            rib -= nearest
            rib *= 0.87 * RIB_SPACING / self.body.rib_half_width
            strength = shown * ((nearest > 0.5) & (nearest < 11.5))
            if self.findings.get("fracture", {"side": -1})["side"] == side:
                self.break_ribs(nearest, rib, strength, lambda at: at - u)
            yield nearest, rib, strength

    def break_point(self, rib):
        """Where a broken rib is broken."""
        site = self.findings["fracture"]
        ahead = 0.6 * site["across"]
        start = float(np.interp(rib, VERTEBRAE, self.vertebra_v)) + 0.9 * site["side"]
        v = start
        for _ in range(6):
            front, back = self.value(self.front, v), self.value(self.back, v)
            v = start + 0.55 * ahead * (back - front)
        return back - ahead * (back - front), v

    def bones(self, film):
        """Add spine and breastbone."""
        part = (self.vertebra_of + 0.5) % 1 - 0.5
        plates = 0.16 * np.exp(-(((np.abs(part) - 0.4) / 0.06) ** 2))
        bodies = 0.2 * smooth((0.45 - np.abs(part)) / 0.1) + plates + 0.05
        column = smooth((1.7 - np.abs(AXIS + 3.2)) / 0.4 + 0.5)
        behind = self.index(self.u - self.back_px)
        out = self.at(bodies, self.iv) * self.at(column, behind)
        arches, beam = 0.6 + 0.4 * np.cos(2 * np.pi * part), np.exp(-(((AXIS + 0.6) / 0.9) ** 2))
        out += self.at(0.16 * arches, self.iv) * self.at(beam, behind)
        sternum, plate = smooth((AXIS - 2) / 2) * smooth((20 - AXIS) / 2), np.abs(AXIS + 0.5)
        ahead = self.index(self.u - self.front_px)
        out += self.at(0.3 * sternum, self.iv) * self.at(smooth((0.9 - plate) / 0.4), ahead)
        out *= self.body.bone
        film += out

    def wires(self):
        """Queue devices, the shoulder blades' borders, the aortic arch."""
        for shift in (0, 1.6):
            self.stroke([(4 + shift, -2), (6.5 + shift, 5), (8.6 + shift, 13)], 0.3, 0.13)
        turn, radius = np.linspace(-0.4, np.pi, 14), 3 + 0.6 * self.body.knob
        arch = np.stack([1.2 - radius * np.cos(turn), 9.5 - radius * np.sin(turn)], 1)
        self.stroke([*arch, (4.6, 13), (4.4, 19)], 1.3, 0.16)
        if self.body.calcified:
            self.stroke(arch[5:12] + 0.4, 0.12, 0.3)
        for name, site in self.devices.items():
            getattr(self, f"_{name}")(site)

    def _tube(self, site):
        if site["kind"] == "endotracheal tube":
            self.stroke([(-1.4, -14), (-0.8, -5), (1.7, 7.5 - site["tip"])], 0.3, 0.4)
        elif site["kind"] == "nasogastric tube":
            stomach = [(1, self.base), (-3, self.base + 1)]
            self.stroke([(0.5, -14), (1, -4), (3.4, 8), (3.5, 18), *stomach], 0.17, 0.5)
        else:
            self.stroke([(0, 22), (2, 15), (3, 9), (1, 3.5)], 0.28, 0.4)

    def _line(self, site):
        entry = [(0, -9), (-1, -1)]
        if site["kind"] == "subclavian":
            entry = [(-9, 6), (-6, 2)]
            self.dots(-9, 6, 0.6, 1.6)
        self.stroke([*entry, (-2, 4), (-1.5, 7), (-1.2, 9 + site["tip"])], 0.12, 0.55)

    def _pacemaker(self, site):
        u, floor = self.value(self.front, 5) - 0.8, self.base - self.body.dome
        gu, gv = np.meshgrid(np.arange(-0.5, 0.6, 0.3), np.arange(-1.6, 1.7, 0.3))
        self.dots(u + gu + 0.3 * gv, 5.5 + gv, 0.22, 1.5 * 0.3**2)
        lead = [(-4, 2), (-2, 5), (-1, 10), (-2, floor - 3), (-6, floor - 2)]
        self.stroke([(u, 4), *lead], 0.11, 0.6)

    @functools.cached_property
    def lung_outlines(self):
        """Each lung as it lies, whatever hides it [2, S, S]."""
        inside = (self.x > 0) & (self.x < 1) & (self.v > 0)
        return np.stack([inside & (self.v < self.at(dome, self.iu)) for dome in self.domes])

    @property
    def chest(self):
        """Both lungs [S, S]."""
        return self.lung_outlines.any(0)

    def masks(self):
        """Boolean masks: from the side, zones and ribs cannot be told apart."""
        none = np.zeros((len(RIBS), self.size, self.size), bool)
        return {"lungs": self.lung_outlines, "zones": none[: len(ZONES)], "ribs": none}

    def effusion_mask(self):
        """Where fluid hides a lung."""
        fluid = np.stack([self.v > self.at(level, self.iu) for level in self.fluid])
        return (fluid & self.lung_outlines).any(0)

    def cardiomegaly_mask(self):
        """The heart's silhouette."""
        return (self.heart > 0) & self.chest
