"""Block-wise masks for masked image modelling, as DINOv2 draws them (iBOT, arXiv 2111.07832).

A mask is a union of random rectangles on the patch grid. It is found by rejection sampling, which
suits a host and not an accelerator, so the data pipeline draws it and it travels beside the images.
How many tokens are masked varies from batch to batch; `token_budget` bounds the number, so that the
compiled step has one static shape.
"""

import itertools
import math
import random

import numpy as np

MIN_PATCHES = 4
MIN_ASPECT = 0.3  # height / width is log-uniform in [0.3, 1 / 0.3]
TRIES = 10


def max_block_patches(image_size: int, patch_size: int) -> int:
    """Largest area of one rectangle, in patches: 666 for 518 px, 128 for 224 px.

    Meant as half of the grid. The reference computes it from left to right with floor divisions, so
    that 518 px yields 666 and not 684; the released weights were trained with that number.
    """
    return int(0.5 * image_size // patch_size * image_size // patch_size)


def block_mask(rng: random.Random, grid: int, target: int, max_patches: float) -> np.ndarray:
    """Bool [grid, grid] with at most `target` cells set, exactly `target` in about 9 of 10 draws.

    `random.Random` and not a numpy generator: its scalar draws are several times cheaper, and in
    the reference's order they give the reference's masks cell for cell.
    """
    log_aspect = math.log(MIN_ASPECT), math.log(1 / MIN_ASPECT)
    mask, count = np.zeros((grid, grid), bool), 0
    while count < target:
        cap = min(target - count, max_patches)
        for _ in range(TRIES):
            area = rng.uniform(MIN_PATCHES, cap)  # below the minimum the cap is the lower end
            aspect = math.exp(rng.uniform(*log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= grid or width >= grid:
                continue
            top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
            block = mask[top : top + height, left : left + width]
            new = height * width - int(np.count_nonzero(block))
            if 0 < new <= cap:
                block[:] = True
                count += new
                break
        else:  # ten rectangles in a row did not fit: the mask stays short of its target
            break
    return mask


def strata(count: int, ratio: tuple[float, float]) -> np.ndarray:
    """Edges [count + 1], float32, of `count` equal strata of the mask ratio.

    Every last bit of torch.linspace, which walks from both ends to the middle and rounds once per
    value: patches times an edge is truncated to whole patches, and may lie on a whole number.
    """
    low, high = np.float32(ratio[0]), np.float32(ratio[1])
    step = float((high - low) / np.float32(max(count, 1)))
    index = np.arange(count + 1)
    rising, falling = float(low) + step * index, float(high) - step * (count - index)
    return np.where(index < (count + 1) // 2, rising, falling).astype(np.float32)


def token_budget(crops: int, patches: int, probability: float, ratio: tuple[float, float]) -> int:
    """The most tokens that a group of `crops` crops can have masked.

    16,682 for the reference's 80 crops of 1,369 patches with probability 0.5 and ratio (0.1, 0.5).
    """
    edges = strata(int(crops * probability), ratio)[1:]
    return int((np.float32(patches) * edges).astype(np.int64).sum())


def group_masks(
    seed: int,
    step: int,
    group: int,
    *,
    crops: int,
    image_size: int,
    patch_size: int,
    probability: float,
    ratio: tuple[float, float],
) -> np.ndarray:
    """Masks, bool [crops, patches], of the global crops of one group of images at one step.

    `probability` of the crops are masked, one for each stratum of the mask ratio, in random order;
    the others stay empty. Which host or device holds the group does not enter. The sum never
    exceeds `token_budget`: no ratio lies above its stratum's upper edge, and where that edge's
    patches reach a whole number, rounding them to float32 does not fall below it.
    """
    rng = random.Random(f"block masks of seed {seed}, step {step}, group {group}")
    grid = image_size // patch_size
    max_patches = max_block_patches(image_size, patch_size)
    masked = int(crops * probability)
    edges = strata(masked, ratio).tolist()
    masks = [
        block_mask(rng, grid, int(grid * grid * rng.uniform(low, high)), max_patches).reshape(-1)
        for low, high in itertools.pairwise(edges)
    ]
    masks += [np.zeros(grid * grid, bool)] * (crops - masked)
    rng.shuffle(masks)
    return np.stack(masks)
