"""What a reader sees of a check: two short lines where it holds, two sides where it does not."""

import sys
from fractions import Fraction

import numpy as np

from . import kinds
from .register import BUNDLE, score

records = []  # bundles of this process, for tests and scripts


def display_bundle(bundle):
    """Show the lines in a notebook, with the bundle beside them; elsewhere, print the lines."""
    records.append(bundle)
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from IPython.display import display

        display({"text/plain": summary(bundle), BUNDLE: bundle}, raw=True)
    else:
        print(summary(bundle))


def summary(bundle):
    """The two short lines under a check."""
    if bundle["state"] == "cited":
        return f"○ {bundle['label']} · cited: {bundle['evidence']}"
    unexplained = [n for n, v in bundle["mutants"].items() if v == "survived" and n not in bundle["same"]]
    first = [
        f"{'▲' if unexplained else '✓'} {bundle['label']}",
        f"{bundle['kind']}, {bundle['evidence']}",
        "{}/{} mutants".format(*score(bundle["mutants"].values())),
    ]
    second = ["{} {}/{}".format(name.rsplit(".", 1)[-1], *score(verdicts.values()))
              for name, verdicts in bundle["functions"].items()]  # fmt: skip
    if bundle["subset"]:
        second.append("{tried} of {of} tried".format(**bundle["subset"]))
    lines = filled(first) + ["  " + line for line in filled(second)]
    return "\n".join(lines + [f"  survives without a reason: {name}" for name in unexplained])


def filled(pieces, width=58):
    """Pieces joined by a dot, in lines that a page's column does not cut off."""
    lines = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) < width:
            lines[-1] += " · " + piece
        else:
            lines.append(("  " if lines else "") + piece)
    return lines


def difference(left, right):
    """Two sides where they differ most, in two lines."""
    if any(map(kinds.is_sympy, kinds.parts(left))):
        return f"left   {str(left)[:60]}", f"right  {str(right)[:60]}"
    if isinstance(left, kinds.Slope):
        return f"left   slope {left.fitted:.3f}, last pair {left.last:.3f}", f"right  {right}"
    for a, b in kinds.pairs(left, right):
        a, b = kinds.aligned(a, b)
        with np.errstate(invalid="ignore"):
            gap = np.nan_to_num(np.abs(a * 1.0 - b).astype(float), nan=np.inf).reshape(-1)
        if a.dtype.kind in "fc":
            gap[np.broadcast_to(kinds.close(a, b), a.shape).reshape(-1)] = 0  # rounding is not what went wrong
        if gap.max(initial=0) > 0:
            worst = int(gap.argmax())
            at = f" at {tuple(map(int, np.unravel_index(worst, a.shape)))}" if a.ndim else ""
            x, y = (value.astype(object).reshape(-1)[worst] for value in (a, b))
            for digits in (6, 12, 17):  # as many as it takes to see the difference
                show = [str(v) if isinstance(v, (Fraction, int)) else f"{v:.{digits}g}" for v in (x, y)]
                if show[0] != show[1]:
                    break
            return f"left   {show[0]}{at}", f"right  {show[1]}"
    return ("left and right differ by less than a float can tell",)
