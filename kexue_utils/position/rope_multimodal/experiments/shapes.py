"""Recorded run: which colour is above, which is to the left of a patch, on images of sizes that were never trained.

If the step to a neighbour depends on the size of the image, then the relation has to be learned for every size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_utils.position.rope_multimodal.experiments.model import Documents, TableAttention
from kexue_utils.position.rope_multimodal.layouts import PATCH, TEXT, Image, Text
from kexue_utils.training.intervals import interval, paired_difference
from kexue_utils.training.loop import fit
from kexue_utils.training.recorder import Experiment
from kexue_utils.training.transformer import Transformer, autocast, decayed

COLOURS = WORDS = 16
IMG, PAD = COLOURS + WORDS, COLOURS + WORDS + 1
SIZES = (3, 4, 5, 7, 8, 10)
NEW_SIZES = (6, 9)
HELD_OUT = [(h, w) for i, h in enumerate(SIZES) for j, w in enumerate(SIZES) if (i + 2 * j) % 4 == 1]
TRAINED = [(h, w) for h in SIZES for w in SIZES if (h, w) not in HELD_OUT]
TESTS = {
    "trained": TRAINED,
    "new combination": HELD_OUT,
    "new width": [(h, w) for h in SIZES for w in NEW_SIZES],
    "new height": [(h, w) for h in NEW_SIZES for w in SIZES],
    "12 × 12": [(12, 12)],
    "16 × 16": [(16, 16)],
    "4 × 24": [(4, 24)],
    "24 × 4": [(24, 4)],
}
SCHEMES = ("flatten", "page", "naive2d", "tie", "tie_min", "tie_frac", "tv", "mrope")
QUESTIONS = ("above", "left")


def colour(documents: Documents, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, above, left) of the documents `rows`: random colours and words, and the two answers, −100 where none is."""
    kind = documents.kind[rows]
    ids = torch.randint(COLOURS, kind.shape, generator=generator).to(kind.device)
    ids = torch.where(kind == PATCH, ids, torch.where(kind == TEXT, COLOURS + ids, IMG))
    ids = ids.masked_fill(~documents.mask[rows], PAD)
    answers = (
        ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, -100)
        for place in (documents.above[rows], documents.left[rows])
    )
    return ids, *answers


def answer(model: Transformer, ids: Tensor, *where: Tensor) -> Tensor:
    """Logits of both answers, (2, B, T, colours)."""
    return model(ids, *where).unflatten(-1, (2, COLOURS)).movedim(-2, 0)


def train(seed: int, parameters: dict, device: torch.device, checkpoint=None) -> tuple[Transformer, list]:
    """(model, curve of the loss) on the trained shapes, with one to four words before and after every image."""
    p = parameters
    words = range(1, 1 + p["words"])
    shapes = [[Text(a), Image(h, w), Text(b)] for h, w in TRAINED[: p["shapes"]] for a in words for b in words]
    documents = Documents(shapes, p, p["d_model"] // p["heads"], device)
    torch.manual_seed(seed)
    model = Transformer(
        PAD + 1, p["d_model"], p["layers"], lambda: TableAttention(p["d_model"], p["heads"]), 2 * COLOURS
    ).to(device)

    def batch(step):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(shapes), (p["batch"],), generator=generator).to(device)
        return *colour(documents, rows, generator), *documents.where(rows)

    def loss(model, ids, above, left, *where):
        logits = answer(model, ids, *where).float()
        return F.cross_entropy(logits.flatten(0, 2), torch.stack((above, left)).flatten())

    optimizer = torch.optim.AdamW(decayed(model, 0.01), lr=p["rate"], betas=(0.9, 0.98), fused=device.type == "cuda")
    curve = fit(model, loss, batch, p["steps"], optimizer, checkpoint=checkpoint, description=f"seed {seed}")
    return model, curve


@torch.no_grad()
def accuracy(model: Transformer, shapes: list, parameters: dict, seed: int, device: torch.device) -> dict:
    """Share of right colours {above, left} over the patches of `images` images of every shape."""
    p, right, asked = parameters, dict.fromkeys(QUESTIONS, 0), dict.fromkeys(QUESTIONS, 0)
    generator = torch.Generator().manual_seed(10_000 + seed)
    for h, w in shapes:
        documents = Documents([[Text(2), Image(h, w), Text(2)]], p, p["d_model"] // p["heads"], device)
        rows = torch.zeros(p["images"], dtype=torch.int64, device=device)
        ids, *answers = colour(documents, rows, generator)
        with autocast(device):
            guesses = answer(model, ids, *documents.where(rows)).argmax(-1)
        for question, guess, target in zip(QUESTIONS, guesses, answers, strict=True):
            right[question] += (guess == target).sum().item()
            asked[question] += (target >= 0).sum().item()
    return {question: right[question] / asked[question] for question in QUESTIONS}


def _run(parameters, seeds, device, checkpoint):
    runs = []
    for seed in seeds:
        model, curve = train(seed, parameters, device, checkpoint)
        tests = {name: accuracy(model, shapes, parameters, seed, device) for name, shapes in TESTS.items()}
        runs.append({"curve": curve, "tests": tests})
    return runs


def _units(smoke):
    base = {"scheme": "tv", "base": 10000.0, "partition": "interleaved", "d_model": 256, "layers": 4, "heads": 4,
            "batch": 256, "steps": 1500, "rate": 1e-3, "words": 4, "shapes": len(TRAINED), "images": 64}  # fmt: skip
    if smoke:
        base |= {"d_model": 32, "layers": 2, "heads": 2, "batch": 4, "steps": 20, "words": 1, "shapes": 4, "images": 1}
    units = {scheme: base | {"scheme": scheme} for scheme in (SCHEMES if not smoke else ("flatten", "tie"))}
    if not smoke:
        units |= {f"{scheme}, base 100": base | {"scheme": scheme, "base": 100.0} for scheme in ("tie", "tv")}
        units |= {f"{scheme}, chunked": base | {"scheme": scheme, "partition": "chunked"} for scheme in ("tie", "tv")}
    return units


def _conclude(units):
    rows = {
        unit: {test: {q: interval([run["tests"][test][q] for run in result["runs"]]) for q in QUESTIONS}
               for test in TESTS}
        for unit, result in units.items()
    }  # fmt: skip
    pairs = [
        (a, b) for a in ("tv", "mrope", "naive2d") for b in ("tie", "tie_frac", "flatten") if {a, b} <= units.keys()
    ]
    differences = {
        f"{a} − {b}": {
            test: {
                q: paired_difference(*([run["tests"][test][q] for run in units[u]["runs"]] for u in (a, b)))
                for q in QUESTIONS
            }
            for test in TESTS
        }
        for a, b in pairs
    }
    return {"rows": rows, "differences": differences}


SHAPES = Experiment(
    title="The colour above and to the left of a patch, on images of shapes that were never trained: every layout",
    units=_units,
    run=_run,
    conclude=_conclude,
    stacked=False,
)
