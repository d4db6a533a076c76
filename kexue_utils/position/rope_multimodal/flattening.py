"""Images as one row of patches: how far apart neighbours come, at least."""

from itertools import pairwise


def grid_bandwidth(h: int, w: int) -> int:
    """Least, over all orders of the h × w patches, of the largest distance of two neighbours   (mm-bandwidth)

    min(h, w), but 0 for 1 × 1. By branch and bound, exponential: for some 20 patches. Raises ValueError unless
    h, w ≥ 1. Source of the formula: J. Chvátalová, Discrete Mathematics 11, 249 (1975).
    """
    if h < 1 or w < 1:
        raise ValueError(f"grid needs h>=1 and w>=1, got h={h}, w={w}")
    rows = [[(i, j) for j in range(w)] for i in range(h)]
    near = {cell: set() for row in rows for cell in row}
    for line in (*rows, *zip(*rows, strict=True)):
        for a, b in pairwise(line):
            near[a].add(b)
            near[b].add(a)
    k = 0
    while not _completes([], near, k):
        k += 1
    return k


def _completes(order, near, k):
    """Whether all cells can follow `order` so that neighbours are at most k apart."""
    rank, seen, waiting = len(order), set(order), set()
    # The neighbours of the first cells up to rank m, that are still to come, share the ranks up to m + k.
    for m, cell in enumerate(order):
        waiting |= near[cell] - seen
        if len(waiting) > max(0, m + k + 1 - rank):
            return False
    rest = near.keys() - seen
    return not rest or any(_completes([*order, cell], near, k) for cell in sorted(rest))
