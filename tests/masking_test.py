"""Block masks: the budget holds, the strata are met, the draw follows its key and nothing else."""

import math
import random

import numpy as np
import pytest

from raddino_jax import masking

RATIO = (0.1, 0.5)
LAYOUTS = [  # crops, image size, patch size, probability, ratio
    (20, 518, 14, 0.5, RATIO),
    (8, 112, 14, 0.5, RATIO),
    (4, 96, 16, 1.0, (0.3, 0.3)),
    (7, 70, 14, 0.5, (0.0, 0.9)),
    (2, 42, 14, 0.5, RATIO),
]


def _group(step=0, group=0, seed=0, layout=LAYOUTS[1]):
    crops, image_size, patch_size, probability, ratio = layout
    return masking.group_masks(
        seed,
        step,
        group,
        crops=crops,
        image_size=image_size,
        patch_size=patch_size,
        probability=probability,
        ratio=ratio,
    )


def _mask_of_cells(rng: random.Random, grid: int, target: int, max_patches: float):
    """The sampler again, over a set of cells: (cells, area added by each rectangle)."""
    cells, added = set(), []
    while len(cells) < target:
        cap = min(target - len(cells), max_patches)
        for _ in range(10):
            area = 4 + (cap - 4) * rng.random()
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * rng.random())
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if max(h, w) < grid:
                top, left = rng.randint(0, grid - h), rng.randint(0, grid - w)
                new = {(top + i, left + j) for i in range(h) for j in range(w)} - cells
                if 1 <= len(new) <= cap:
                    cells |= new
                    added.append(len(new))
                    break
        else:
            return cells, added
    return cells, added


@pytest.mark.parametrize("size, patches", [(518, 666), (224, 128), (70, 10)])
def test_max_block_patches_keeps_the_floors_of_the_reference(size, patches):
    assert masking.max_block_patches(size, 14) == patches


@pytest.mark.parametrize(
    "crops, patches, budget", [(80, 1369, 16682), (64, 256, 2496), (8, 25, 34)]
)
def test_token_budget_of_the_reference(crops, patches, budget):
    assert masking.token_budget(crops, patches, 0.5, RATIO) == budget


@pytest.mark.parametrize("ratio", [RATIO, (0.0, 0.75), (0.2, 0.6), (0.3, 0.3)])
def test_strata_and_budget_equal_torch_to_the_last_bit(ratio):
    torch = pytest.importorskip("torch")
    for count in [1, 2, 3, 4, 5, 10, 16, 20, 31, 40, 64, 100]:
        edges = torch.linspace(*ratio, count + 1)
        np.testing.assert_array_equal(masking.strata(count, ratio), edges.numpy())
        for patches in [9, 25, 36, 100, 196, 1369]:
            expected = sum(int(patches * edge) for edge in edges[1:])
            assert masking.token_budget(2 * count, patches, 0.5, ratio) == expected


@pytest.mark.parametrize("grid, max_patches", [(37, 666), (16, 128), (6, 18), (5, 10), (16, 7)])
def test_block_mask_equals_the_sampler_over_sets_of_cells(grid, max_patches):
    for seed in range(30):
        target = int(grid * grid * (0.05 + 0.02 * seed))
        mask = masking.block_mask(random.Random(seed), grid, target, max_patches)
        cells, added = _mask_of_cells(random.Random(seed), grid, target, max_patches)
        assert set(zip(*np.nonzero(mask), strict=True)) == cells
        assert len(cells) <= target and all(area <= max_patches for area in added)


@pytest.mark.parametrize("grid, target", [(5, 0), (1, 1), (2, 4), (3, 9), (5, 25)])
def test_block_mask_ends_where_its_target_is_out_of_reach(grid, target):
    for seed in range(20):
        mask = masking.block_mask(random.Random(seed), grid, target, max(1, grid * grid // 2))
        assert mask.shape == (grid, grid) and mask.sum() <= target


def test_block_masks_come_near_their_target_and_favour_the_centre():
    target = 410  # 30 % of 37 x 37
    masks = np.stack([masking.block_mask(random.Random(s), 37, target, 666) for s in range(400)])
    counts = masks.sum((1, 2))
    assert counts.mean() > target - 0.3 and 0.82 < (counts == target).mean() < 0.95
    often = masks.mean(0)
    assert often[16:21, 16:21].mean() > 0.5  # rectangles lie inside: a corner needs the one place
    assert often[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_masks_fill_their_strata_and_never_exceed_the_budget(layout):
    crops, image_size, patch_size, probability, ratio = layout
    patches = (image_size // patch_size) ** 2
    masked = int(crops * probability)
    budget = masking.token_budget(crops, patches, probability, ratio)
    ceilings = np.floor(patches * masking.strata(masked, ratio)[1:].astype(np.float64) + 1e-4)
    for step in range(25):
        masks = _group(step=step, layout=layout)
        assert masks.shape == (crops, patches) and masks.dtype == bool
        counts = np.sort(masks.sum(1))
        assert counts.sum() <= budget
        assert (counts[: crops - masked] == 0).all()
        assert (counts[crops - masked :] <= ceilings).all()


def test_group_masks_use_most_of_the_budget():
    total = np.mean([_group(step=step, layout=LAYOUTS[0]).sum() for step in range(20)])
    # A ratio lies on average half a stratum below its edge, 0.02 of 1,369 patches, ten times over.
    budget = masking.token_budget(20, 1369, 0.5, RATIO)
    assert abs(budget - 10 * 0.02 * 1369 - total) < 0.01 * budget


def test_group_masks_depend_on_seed_step_and_group_alone():
    np.testing.assert_array_equal(_group(3, 5, seed=7), _group(3, 5, seed=7))
    draws = {
        _group(step, group, seed).tobytes()
        for seed in (0, 1, 11)
        for step in (0, 1, 11)
        for group in (0, 1, 11)
    }
    assert len(draws) == 27


def test_group_masks_leave_the_global_generator_alone():
    before = random.getstate()
    _group()
    assert before == random.getstate()


def test_a_group_too_small_to_mask_stays_empty():
    assert masking.token_budget(1, 64, 0.5, RATIO) == 0
    assert not _group(layout=(1, 112, 14, 0.5, RATIO)).any()


def test_every_crop_of_a_group_is_masked_equally_often():
    groups = 600
    masked = sum(_group(group=g).any(1).astype(int) for g in range(groups))
    assert np.abs(masked / groups - 0.5).max() < 4.5 * math.sqrt(0.25 / groups)
