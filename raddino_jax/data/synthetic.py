"""Synthetic chest radiographs: drawn patients with known findings, to try the system without data.

A film is a function of (seed, index) alone and looks the same at every size. What is wrong with a
patient is drawn independently of how the film was taken (exposure, pose, collimation, noise) and of
the patient's build, and findings are independent of each other, so that nothing but a finding
itself gives it away. Patients have one to four films.

    films = Synthetic(10_000, image_size=224)
    films[3]                     uint8 [224, 224]
    films.labels(3)              {"effusion": 0.0, ..., "sex": "F", "age": 61.0, "view": "PA", ...}
    films.film(3, masks=True)    image, labels, sentence, masks of lungs, zones, ribs and findings
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from raddino_jax.data import anatomy

FINDINGS = ("effusion", "pneumothorax", "nodule", "opacity", "cardiomegaly", "fracture")
PREVALENCE = (0.25, 0.20, 0.22, 0.25, 0.25, 0.15)
DEVICES = ("tube", "line", "pacemaker")
VIEWS = ("PA", "AP", "LATERAL")
VIEW_SHARES = (0.55, 0.32, 0.13)

ROOMS = ("block", "patient", "film", "sites", "vessels", "texture", "grain")  # of random numbers
BLOCK = 10  # consecutive films that are shared out among patients of 1-4 films
LASTING = 0.7  # chance that a finding (or its absence) is the same on another film of the patient
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


@dataclasses.dataclass(frozen=True)
class Patient:
    """A person, and the findings that last."""

    number: int
    sex: str
    age: float  # at the first film
    bmi: float
    weight: float  # kg
    body: anatomy.Body
    present: tuple
    sites: dict
    pacemaker: dict | None


@dataclasses.dataclass(frozen=True)
class Technique:
    """What detector, radiographer and software do to a film."""

    level: float  # window position, fraction of the window
    contrast: float
    gamma: float
    black: float  # grey of air
    white: float  # grey of metal
    equalise: float  # how much of the slow variation the software removes
    blur: float  # cm
    noise: float  # grey levels
    tilt: tuple  # heel effect across the film
    cut: tuple  # collimated away at left, top, right, bottom (cm)
    skew: float  # of the collimator, radians
    outside: float  # grey of what is collimated away
    letter: str  # "L", "R" or none
    place: tuple  # of the letter: cm from the side and from the top, height, angle
    seed: tuple  # key of the noise


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything about one film but its pixels."""

    patient: Patient
    age: float
    pose: anatomy.Pose
    technique: Technique
    findings: dict
    devices: dict


@dataclasses.dataclass(frozen=True)
class Film:
    """One film: image uint8 [S, S], what is on it, and on request boolean masks.

    masks: "lungs" [2, S, S], "zones" [6, S, S], "ribs" [20, S, S] in the order of anatomy.SIDES,
    ZONES and RIBS, and one [S, S] per finding. In a lateral film zones and ribs are empty.
    """

    image: np.ndarray
    labels: dict
    sentence: str
    masks: dict | None


def _rng(seed, room, *key):
    """A generator for one purpose; keys never meet across purposes."""
    return np.random.default_rng([seed, ROOMS.index(room), *key])


def _within(x, low, high):
    # min and max keep Python floats, which leave float32 arrays float32; np.clip does not.
    return min(max(x, low), high)


def patient_and_visit(index, seed=0):
    """Number of the patient of a film (the index of the first), and how many films came before."""
    block, position = divmod(index, BLOCK)
    starts = np.append(0, np.cumsum(_rng(seed, "block", block).integers(1, 5, BLOCK)))
    start = int(starts[starts <= position][-1])
    return block * BLOCK + start, position - start


@functools.lru_cache(maxsize=256)
def patient(number, seed=0):
    """Draw a person: sex, age and habitus shape the body as they do in the population."""
    rng = _rng(seed, "patient", number)
    male = rng.random() < 0.53
    age = _within(rng.normal(57, 18), 18, 92)
    bmi = _within(26.5 + 5 * rng.normal() + 1.5 * abs(rng.normal()), 16, 46)
    weight = bmi * ((1.77 if male else 1.64) + (taller := rng.normal(0, 0.07))) ** 2
    bust = 0.12 * (bmi - 33) if male else 2.2 + 0.15 * (bmi - 22) + 0.7 * rng.normal()
    old, n = max(age - 45, 0), rng.normal(size=15).tolist()
    body = anatomy.Body(
        half_width=(14.1 if male else 12.7) + 0.5 * n[0] + 0.04 * (bmi - 26),
        height=(26.3 if male else 24.0) + 6 * taller + n[1] - 0.02 * old,
        depth=(20.5 if male else 18.5) + 0.9 * n[2] + 0.12 * (bmi - 26) + 0.03 * old,
        fat=_within(0.6 + 0.17 * (bmi - 19) + 0.25 * n[3], 0.3, 5.5),
        breast=_within(bust, 0 if male else 0.8, 6.5),
        bone=_within((1.1 if male else 1.0) - 0.008 * old + 0.1 * n[4], 0.5, 1.4),
        rib_half_width=(0.62 if male else 0.56) + 0.04 * n[5],
        rib_drop=1 + 0.1 * n[6] + 0.004 * (age - 50),
        cardiothoracic=_within(0.442 + 0.027 * n[7] + 0.0004 * (age - 50), 0.36, 0.49),
        knob=_within(0.3 + 0.02 * (age - 40) + 0.3 * n[8], 0, 2),
        calcified=rng.random() < _within((age - 55) / 50, 0, 0.6),
        scoliosis=0.5 * n[9] * (1 + old / 60),
        kyphosis=max(0.05 * (age - 60) + 0.6 * n[10], 0),
        dome=_within(4.0 + 0.6 * n[11], 2.6, 5.6),
        # One patient in twelve has one side of the diaphragm raised, which is no effusion.
        elevation=1.2 + 0.7 * n[12] + 3 * math.copysign(rng.random() < 0.08, n[13]),
        vascularity=_within(1 + 0.15 * n[14], 0.6, 1.5),
        seed=(seed, ROOMS.index("vessels"), number),
    )
    present = tuple((rng.random(len(FINDINGS)) < PREVALENCE).tolist())
    pacemaker = {"side": int(rng.random() < 0.8)} if rng.random() < 0.09 else None
    sex = "M" if male else "F"
    return Patient(number, sex, age, bmi, weight, body, present, _sites(rng), pacemaker)


def _place(rng):
    """Somewhere in a lung: fractions of its width, height and depth."""
    across, down, behind = rng.uniform((0.15, 0.12, 0.2), (0.85, 0.78, 0.85)).tolist()
    return {"side": int(rng.integers(2)), "across": across, "down": down, "behind": behind}


def _sites(rng):
    """Where and how large each finding would be if it were there (cm)."""
    u = rng.random(17).tolist()
    side = [int(x < 0.5) for x in u[:3]]
    fluid = {"sides": (0, 1) if u[3] < 0.15 else (side[0],), "height": 2.5 + 10 * u[4] ** 1.6}
    air = {"side": side[1], "gap": 1.0 + 4.5 * u[5] ** 1.8, "apical": 0.6 + 0.9 * u[6]}
    count = 1 + int(np.searchsorted((0.7, 0.9), u[7]))
    sizes = rng.uniform((0.7, 1.0, 0.85), (1.7, 1.5, 1.2), (count, 3)).tolist()
    nodules = [
        _place(rng) | {"radius": radius, "density": density, "aspect": aspect}
        for radius, density, aspect in sizes
    ]
    seed = tuple(rng.integers(2**31, size=2).tolist())
    shadow = _place(rng) | {"aspect": 0.7 + 0.6 * u[8], "seed": seed}
    if u[9] < 0.4:
        shadow |= {"kind": "reticular", "radius": 4 + 3 * u[10], "density": 2.2 + 1.4 * u[11]}
    else:
        shadow |= {"kind": "airspace", "radius": 2.6 + 3 * u[10], "density": 3.5 + 3 * u[11]}
    first, last = int(rng.integers(3, 8)), 1 + int(np.searchsorted((0.5, 0.8), u[12]))
    broken = {"side": side[2], "ribs": tuple(range(first, first + last))}
    broken |= {"across": 0.4 + 0.48 * u[13], "step": math.copysign(0.8 + 0.6 * u[14], u[15] - 0.5)}
    heart = {"ratio": 0.54 + 0.12 * u[16] ** 1.2}
    return dict(zip(FINDINGS, (fluid, air, {"sites": nodules}, shadow, heart, broken), strict=True))


@functools.lru_cache(maxsize=256)
def case(index, seed=0):
    """Draw all there is to know about a film."""
    number, visit = patient_and_visit(index, seed)
    person = patient(number, seed)
    rng = _rng(seed, "film", index)
    view = VIEWS[int(np.searchsorted(np.cumsum(VIEW_SHARES)[:-1], rng.random()))]
    age = person.age + 1.2 * max(visit - rng.uniform(0, 0.9), 0)  # about a year between films
    pose = _pose(rng, view, person.body, (seed, ROOMS.index("texture"), index))
    technique = _technique(rng, pose, person.body, (seed, ROOMS.index("grain"), index))
    findings = _findings(_rng(seed, "sites", index), person)
    return Case(person, age, pose, technique, findings, _devices(rng, view, person))


def _findings(rng, person):
    """Most findings last from film to film; each film keeps the prevalence of the population."""
    lasting = (rng.random(len(FINDINGS)) < LASTING).tolist()
    fresh = (rng.random(len(FINDINGS)) < PREVALENCE).tolist()
    sites, found = _sites(rng), {}
    for k, name in enumerate(FINDINGS):
        if person.present[k] if lasting[k] else fresh[k]:
            found[name] = person.sites[name] if lasting[k] else sites[name]
    return found


def _devices(rng, view, person):
    """Lines and tubes belong to the bedside film, whatever the findings."""
    u, found = rng.random(8).tolist(), {}
    chance = 0.35 if view == "AP" else 0.06
    if u[0] < chance:
        kind = ("endotracheal tube", "nasogastric tube", "chest tube")[int(3 * u[1])]
        found["tube"] = {"kind": kind, "side": int(u[2] < 0.5), "tip": 2 + 2.5 * u[3]}
    if u[4] < chance:
        kind = "jugular" if u[5] < 0.55 else "subclavian"
        found["line"] = {"kind": kind, "side": int(u[6] < 0.35), "tip": 3 * u[7]}
    if person.pacemaker:
        found["pacemaker"] = person.pacemaker
    return found


def _pose(rng, view, body, seed):
    """Lungs always lie on the film, though not in its middle."""
    bedside = view == "AP"
    inspiration = _within(rng.normal(*((-1.1, 1.1) if bedside else (0.3, 0.8))), -3.5, 2.2)
    base = body.height + inspiration
    half = (0.62 * body.depth if view == "LATERAL" else body.half_width) + 1.5
    field = max(rng.normal(36.5, 2.8), 2 * half + 0.5, base + 4.5)
    room = field / 2 - half, (field - base - 4) / 2
    off = [_within(rng.normal(0, 1.8 if bedside else 1.3), -most, most) for most in room]
    return anatomy.Pose(
        view=view,
        field=field,
        rotation=math.radians(_within(rng.normal(0, 3.5 if bedside else 1.8), -8, 8)),
        shift=(off[0], off[1] - (base + 0.6) / 2),
        yaw=_within(rng.normal(0, 1.1 if bedside else 0.5), -2.2, 2.2),
        inspiration=inspiration,
        arms=rng.uniform(0, 0.4) if bedside else rng.uniform(0.3, 1),
        supine=bedside and rng.random() < 0.5,
        facing=(-1) ** int(rng.integers(2)) if view == "LATERAL" else 1,
        stomach=rng.uniform(1, 2.4) if rng.random() < 0.6 else 0.0,
        electrodes=bedside and rng.random() < 0.4,
        nipples=rng.random() < 0.12,
        fold=bedside and rng.random() < 0.2,
        seed=seed,
    )


def _technique(rng, pose, body, seed):
    """Draw exposure, processing, collimation and marker; the shutters never hide a lung."""
    bedside = pose.view == "AP"
    side, top = pose.field / 2 - body.half_width - 2, pose.field / 2 + pose.shift[1] - 2
    room = side + pose.shift[0], top, side - pose.shift[0], 2.0
    wanted = rng.uniform(0, 4, 4) * (rng.random(4) < 0.45) * (rng.random() < 0.6)
    return Technique(
        level=rng.normal(0, 0.05),
        contrast=_within(rng.normal(0.8 if bedside else 0.95, 0.13), 0.5, 1.3),
        gamma=math.exp(rng.normal(0, 0.16)),
        black=rng.uniform(-0.03, 0.09),
        white=_within(rng.normal(0.93, 0.06), 0.75, 1),
        equalise=rng.uniform(0, 0.45),
        blur=rng.uniform(0, 0.14 if bedside else 0.09),
        noise=math.exp(rng.uniform(math.log(0.7), math.log(4.0))),
        tilt=(rng.normal(0, 0.04), rng.normal(0, 0.04)),
        cut=tuple(_within(most, 0, want) for want, most in zip(wanted.tolist(), room, strict=True)),
        skew=rng.normal(0, 0.012),
        outside=0.93 if rng.random() < 0.08 else rng.uniform(0, 0.06),
        letter="LR"[int(rng.random() < 0.3)] if rng.random() < 0.75 else "",
        place=(rng.uniform(1.5, 3.5), rng.uniform(1.5, 5), rng.uniform(1, 1.9), rng.normal(0, 0.2)),
        seed=seed,
    )


LETTERS = {
    "L": [[(0, 0), (0, 1), (0.55, 1)]],
    "R": [[(0, 1), (0, 0), (0.4, 0.02), (0.5, 0.25), (0.4, 0.5), (0, 0.5)], [(0.2, 0.5), (0.5, 1)]],
}


def _letter(technique, pose, size):
    """The lead letter in the upper corner of its side, grey [S, S] to add."""
    px = pose.field / size
    inset, down, height, angle = technique.place
    at_left = (technique.letter == "R") == (pose.facing == 1)
    x0 = technique.cut[0] + inset if at_left else pose.field - technique.cut[2] - inset - height
    strokes = [anatomy.line(np.repeat(s, 2, 0), 0.04) for s in LETTERS[technique.letter]]
    x, y = height * np.concatenate(strokes, 1)
    x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    x, y = (x0 + x) / px, (technique.cut[1] + down + y) / px
    sigma = np.full(x.shape, max(0.1 * height / px, 0.5))
    return anatomy.splat(size, x, y, sigma, 0.12 * height / px * sigma)


def develop(attenuation, technique, pose):
    """Attenuation to film, uint8 [S, S]: exposure, S curve, noise, collimation, marker."""
    size = len(attenuation)
    px = pose.field / size
    sample = ((np.arange(THUMBNAIL) + 0.5) / THUMBNAIL * size).astype(int)
    thumbnail = attenuation[np.ix_(sample, sample)]
    levels = np.sort(thumbnail[thumbnail > 0.4])
    low, high = levels[int(0.08 * levels.size)], levels[int(0.96 * levels.size)]
    scale = (1 + 0.6 * technique.equalise) / float(high - low)
    # All that varies slowly is worked out on a coarse grid: what software flattens, and the tilt.
    axis = np.linspace(-1.25, 1.25, 11)
    slow = technique.tilt[0] * axis + technique.tilt[1] * axis[:, None] + technique.level
    slow -= technique.equalise * scale * (_blocks(thumbnail) - 0.5 * (low + high))
    exposure = anatomy.upsample((slow - low * scale + 1).astype(np.float32), size)
    exposure += scale * attenuation
    grey = np.take(_curve(technique), (exposure * CURVE).astype(np.intp), mode="clip")
    if technique.blur > 0.45 * px:
        grey = ndimage.gaussian_filter(grey, technique.blur / px, truncate=2)
    # Few photons come through where a film is bright: there the noise is strongest.
    rng = np.random.default_rng(technique.seed)
    grain = rng.random(grey.shape, np.float32) - np.float32(0.5)
    grain *= grey + np.float32(0.3)
    grain *= technique.noise / 255 * math.sqrt(12)
    grey += grain
    if technique.letter:
        grey += _letter(technique, pose, size)
    if any(technique.cut):
        shutter = _collimator(technique, pose, size)
        grey = grey * shutter + technique.outside * (1 - shutter)
    np.clip(grey, 0, 1, out=grey)
    return (255 * grey + 0.5).astype(np.uint8)


CURVE = 1024  # table cells per unit of exposure
THUMBNAIL = 35  # pixels per side of the film that the exposure is set by


def _curve(technique):
    """Grey over exposure, from one window below black to one above white."""
    x = np.arange(3 * CURVE, dtype=np.float32) / CURVE - 1
    grey = (0.5001 + 0.5 * np.tanh(2.2 * technique.contrast * (x - 0.39))) ** technique.gamma
    return technique.black + (technique.white - technique.black) * grey


def _blocks(thumbnail):
    """Means [11, 11] of a thumbnail around the knots of a smooth field of 8 cells."""
    knots = (np.arange(11) - 1) / 8 * THUMBNAIL
    weights = np.exp(-0.5 * ((np.arange(THUMBNAIL) + 0.5 - knots[:, None]) / 4) ** 2)
    weights /= weights.sum(1, keepdims=True)
    return weights @ thumbnail @ weights.T


def _collimator(technique, pose, size):
    """1 where the shutters are open."""
    half, width = pose.field / 2, max(0.2, pose.field / size)
    axis = np.float32((np.arange(size) + 0.5) / size * pose.field - half)
    x, y = axis + technique.skew * axis[:, None], axis[:, None] - technique.skew * axis
    left, top, right, bottom = technique.cut
    near = np.minimum(np.minimum(x + (half - left), (half - right) - x), y + (half - top))
    near = np.minimum(near, (half - bottom) - y)
    return np.clip(near * (1 / width) + 0.5, 0, 1)


def film(index, size, seed=0, masks=False):
    """Film number `index` of the world `seed`, at any size."""
    one = case(index, seed)
    view = anatomy.Lateral if one.pose.view == "LATERAL" else anatomy.Frontal
    scene = view(one.patient.body, one.pose, one.findings, one.devices, size)
    image = develop(scene.render(), one.technique, one.pose)
    return Film(image, labels(index, seed), sentence(one), _masks(scene) if masks else None)


def _masks(scene):
    found = scene.masks()
    for name in FINDINGS:
        none = np.zeros((scene.size, scene.size), bool)
        found[name] = getattr(scene, f"{name}_mask")() if name in scene.findings else none
    return found


def labels(index, seed=0):
    """What is known about a film, without drawing it."""
    one = case(index, seed)
    known = {name: float(name in one.findings) for name in FINDINGS}
    known |= {name: float(name in one.devices) for name in DEVICES}
    person = one.patient
    known |= {"sex": person.sex, "age": round(one.age, 1), "bmi": round(person.bmi, 1)}
    known |= {"weight": round(person.weight, 1), "view": one.pose.view}
    return known | {"patient_id": f"p{person.number:07d}"}


def zone(site):
    """Name of the lung zone of a nodule or an opacity, one of anatomy.ZONES."""
    return f"{anatomy.SIDES[site['side']]} {anatomy.LEVELS[int(3 * site['down'])]}"


def sentence(one):
    """The findings of a report: every finding and device with its side or zone, and no other."""
    found, devices = one.findings, one.devices
    said = []
    if site := found.get("effusion"):
        size = "Small" if site["height"] < 4 else "Moderate" if site["height"] < 8 else "Large"
        if len(site["sides"]) == 2:
            said.append(f"{size} bilateral pleural effusions.")
        else:
            said.append(f"{size} {anatomy.SIDES[site['sides'][0]]} pleural effusion.")
    if site := found.get("pneumothorax"):
        size = "Small" if site["gap"] < 2 else "Large"
        said.append(f"{size} {anatomy.SIDES[site['side']]} pneumothorax.")
    if site := found.get("nodule"):
        places = [f"{zone(nodule)} zone" for nodule in site["sites"]]
        word = "Nodules" if len(places) > 1 else "Nodule"
        said.append(f"{word} in the {' and the '.join(places)}.")
    if site := found.get("opacity"):
        said.append(f"{site['kind'].capitalize()} opacity in the {zone(site)} zone.")
    if "cardiomegaly" in found:
        said.append("Cardiomegaly.")
    if site := found.get("fracture"):
        side, ribs = anatomy.SIDES[site["side"]], [ORDINALS[k - 1] for k in site["ribs"]]
        many = "s" if len(ribs) > 1 else ""
        said.append(f"Fracture{many} of the {side} {' and '.join(ribs)} rib{many}.")
    if not said:
        said.append("Clear lungs, normal heart size, no acute abnormality.")
    if site := devices.get("tube"):
        side = f"{anatomy.SIDES[site['side']]} " if site["kind"] == "chest tube" else ""
        said.append(f"{side}{site['kind']} in place.".capitalize())
    if site := devices.get("line"):
        side = anatomy.SIDES[site["side"]].capitalize()
        said.append(f"{side} {site['kind']} central venous line.")
    if site := devices.get("pacemaker"):
        said.append(f"{anatomy.SIDES[site['side']].capitalize()} chest pacemaker.")
    return " ".join(said)


class Synthetic:
    """A random-access source of n films, for the data pipeline."""

    def __init__(self, n: int, image_size: int, seed: int = 0):
        self.n, self.image_size, self.seed = n, image_size, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> np.ndarray:
        return self.film(i).image

    def labels(self, i: int) -> dict:
        """Findings and devices as 0.0 or 1.0, then sex, age, bmi, weight, view, patient_id."""
        return labels(self._index(i), self.seed)

    def film(self, i: int, masks: bool = False) -> Film:
        """Image, labels, sentence and, on request, masks."""
        return film(self._index(i), self.image_size, self.seed, masks)

    def _index(self, i):
        if not -self.n <= i < self.n:
            raise IndexError(f"film {i} of {self.n}")
        return int(i) % self.n
