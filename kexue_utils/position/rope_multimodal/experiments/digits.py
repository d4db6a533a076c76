"""Recorded run: a text after an image of a digit asks for the pixel in row r, column c.

The post expects no gain over flattening from positions with two axes. Here the text has to address a patch across the
border between image and text; images are cut to several sizes, one of them never trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_utils.position.rope_multimodal.experiments.model import Documents, TableAttention
from kexue_utils.position.rope_multimodal.layouts import Image, Text
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.loop import fit
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.transformer import Transformer, autocast, decayed

SIZES, NEW = (4, 5, 7, 8), 6
LEVELS, BINS = 17, 4
ROW, COLUMN, IMG, START, ASK, PAD = LEVELS, LEVELS + 8, LEVELS + 16, LEVELS + 17, LEVELS + 18, LEVELS + 19
TESTS = {
    "trained": [(h, w) for h in SIZES for w in SIZES],
    "new width": [(h, NEW) for h in SIZES],
    "new height": [(NEW, w) for w in SIZES],
    "new size": [(NEW, NEW)],
}
SCHEMES = ("flatten", "page", "naive2d", "tie", "tie_frac", "tv", "mrope")


def images() -> tuple[Tensor, Tensor]:
    """(train, test): the 1,797 digits of 8 × 8 pixels, levels 0 to 16, that come with scikit-learn; every fifth one is
    a test. ModuleNotFoundError without scikit-learn.
    """
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).long()
    test = torch.arange(len(pixels)) % 5 == 0
    return pixels[~test], pixels[test]


def ask(pixels: Tensor, documents: Documents, shapes: Tensor, rows: Tensor, generator: torch.Generator):
    """(ids, answers) for a random pixel of a random cut of random images; rows: documents, shapes: their (h, w).

    ids: [start] [IMG] patches [/IMG] [row r] [column c] [ask]; the answer, the bin of the pixel's level, is wanted at
    the last.
    """
    n, device = len(rows), pixels.device

    def below(limit):
        return (torch.rand(n, generator=generator).to(device) * limit).long()

    h, w = shapes[rows].unbind(1)
    top, first, r, c = below(9 - h), below(9 - w), below(h), below(w)
    which = below(torch.full_like(h, len(pixels)))
    ids = torch.full(documents.mask[rows].shape, PAD, device=device)
    lo, place = documents.start[rows], torch.arange(ids.shape[1], device=device)
    patch = place - lo[:, None]
    inside = (patch >= 0) & (patch < (h * w)[:, None])
    i, j = (patch.clamp(min=0) // w[:, None]).clamp(max=7), patch.clamp(min=0) % w[:, None]
    seen = pixels[which[:, None], (top[:, None] + i).clamp(max=7), (first[:, None] + j).clamp(max=7)]
    ids = torch.where(inside, seen, ids)
    end = lo + h * w
    for offset, token in ((-2, START), (-1, IMG)):
        ids.scatter_(1, (lo + offset)[:, None], token)
    for offset, token in ((0, torch.full_like(r, IMG)), (1, ROW + r), (2, COLUMN + c), (3, torch.full_like(r, ASK))):
        ids.scatter_(1, (end + offset)[:, None], token[:, None])
    level = pixels[which, top + r, first + c]
    answers = torch.full_like(ids, -100).scatter_(1, (end + 3)[:, None], (level * BINS // LEVELS)[:, None])
    return ids, answers


def laid_out(shapes: list, parameters: dict, device: torch.device) -> tuple[Documents, Tensor]:
    """Documents of these shapes, one start token before the image and three words after it."""
    documents = [[Text(1), Image(h, w), Text(3)] for h, w in shapes]
    dim = parameters["d_model"] // parameters["heads"]
    return Documents(documents, parameters, dim, device), torch.tensor(shapes, device=device)


def train(seed: int, parameters: dict, pixels: Tensor, checkpoint=None) -> tuple[Transformer, list]:
    """(model, curve of the loss) on cuts of the trained sizes."""
    p, device = parameters, pixels.device
    documents, shapes = laid_out(TESTS["trained"], p, device)
    torch.manual_seed(seed)
    model = Transformer(PAD + 1, p["d_model"], p["layers"], lambda: TableAttention(p["d_model"], p["heads"]), BINS).to(
        device
    )

    def batch(step):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(shapes), (p["batch"],), generator=generator).to(device)
        return *ask(pixels, documents, shapes, rows, generator), *documents.where(rows)

    def loss(model, ids, answers, *where):
        return F.cross_entropy(model(ids, *where).float().flatten(0, 1), answers.flatten())

    optimizer = torch.optim.AdamW(decayed(model, 0.01), lr=p["rate"], betas=(0.9, 0.98), fused=device.type == "cuda")
    return model, fit(model, loss, batch, p["steps"], optimizer, checkpoint=checkpoint, description=f"seed {seed}")


@torch.no_grad()
def accuracy(model: Transformer, pixels: Tensor, test: list, parameters: dict, seed: int) -> float:
    """Share of right bins over `questions` questions about every shape, on images that were held out."""
    generator, right, asked = torch.Generator().manual_seed(10_000 + seed), 0, 0
    for shape in test:
        documents, shapes = laid_out([shape], parameters, pixels.device)
        rows = torch.zeros(parameters["questions"], dtype=torch.int64, device=pixels.device)
        ids, answers = ask(pixels, documents, shapes, rows, generator)
        with autocast(pixels.device):
            guess = model(ids, *documents.where(rows)).argmax(-1)
        right += (guess == answers).sum().item()
        asked += (answers >= 0).sum().item()
    return right / asked


def _run(parameters, seeds, device, checkpoint):
    runs, (seen, held_out) = [], (part.to(device) for part in images())
    for seed in seeds:
        model, curve = train(seed, parameters, seen, checkpoint)
        tests = {name: accuracy(model, held_out, test, parameters, seed) for name, test in TESTS.items()}
        runs.append({"curve": curve, "tests": tests})
    return runs


def _units(smoke):
    base = {"scheme": "tv", "base": 10000.0, "partition": "interleaved", "d_model": 256, "layers": 4, "heads": 4,
            "batch": 256, "steps": 2000, "rate": 1e-3, "questions": 1024}  # fmt: skip
    if smoke:
        base |= {"d_model": 32, "layers": 2, "heads": 2, "batch": 8, "steps": 20, "questions": 16}
    return {scheme: base | {"scheme": scheme} for scheme in (SCHEMES if not smoke else ("flatten", "tv"))}


def _conclude(units):
    def by_seed(unit, test):
        return [run["tests"][test] for run in units[unit]["runs"]]

    rows = {unit: {test: interval(by_seed(unit, test)) for test in TESTS} for unit in units}
    differences = {
        f"{unit} − flatten": {
            test: paired_difference(by_seed(unit, test), by_seed("flatten", test)) for test in TESTS
        }
        for unit in units
        if unit != "flatten"
    }  # fmt: skip
    return {"rows": rows, "differences": differences}


DIGITS = Experiment(
    title="A pixel asked for by row and column, in text after the image: every layout against flattening",
    units=_units,
    run=_run,
    conclude=_conclude,
    stacked=False,
)
