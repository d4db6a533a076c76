"""How long Chromium takes from opening a page of 40 display equations until all are typeset: `python -m` this file.

Prints the median, fastest and slowest of the runs, and exits 1 if the median is over the budget of 1.5 s.
"""

import functools
import http.server
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import yaml
from playwright.sync_api import sync_playwright

from benchmarks.timing import header

ROOT = Path(__file__).resolve().parents[2]
EQUATIONS, RUNS, BUDGET = 40, 7, 1.5
FORMS = (
    r"\log p(x_t\mid x_{<t}) = \sum_{j=1}^{t-%d}\log p(x_t\mid x_j)-(t-%d)\log p(x_t)",
    r"\begin{aligned} a_{t,j} &= \frac{e^{q(x_{t-%d})\cdot k(x_j)}}{Z_t} \\ Z_t &= \sum_{j=1}^{t-%d}e^{q\cdot k(x_j)}"
    r"\end{aligned}",
    r"\mathrm{softmax}\Big(\sum_j a_{t,j}\,v_{%d}(x_j)\cdot w(x_t)\Big) = \underbrace{\int p(x_t\mid z)\,dz}_{%d}",
    r"\begin{pmatrix} \cos %d\theta & -\sin\theta \\ \sin\theta & \cos %d\theta \end{pmatrix}^{\top}\mathbf{q}"
    r" \doteq \tfrac{\sigma^2}{4}\sum_y\lvert\Delta_h p_y\rvert",
)
TYPESET = """async () => {
  const late = new Promise((_, fail) => setTimeout(() => fail(new Error('not typeset after 20 s')), 20000));
  await Promise.race([MathJax.startup.promise.then(() => document.fonts.ready), late]);
  return [performance.now() / 1000, document.querySelectorAll('mjx-container[display="true"]').length,
          document.querySelectorAll('mjx-merror').length];
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def write_page(folder: Path) -> None:
    """index.html with the equations, and the book's MathJax beside it."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]
    shutil.copytree(ROOT / "book" / "_static" / "mathjax", folder / "mathjax")
    shutil.copyfile(ROOT / "book" / "_static" / "book.js", folder / "book.js")
    body = "".join(rf"<div class='math'>\[{FORMS[i % len(FORMS)] % (i, i)}\]</div>" for i in range(EQUATIONS))
    body = body.replace("<t", "&lt;t")
    (folder / "index.html").write_text(
        f"<!doctype html><meta charset='utf-8'><link rel='icon' href='data:,'>"
        f"<script>window.MathJax = {json.dumps(config['mathjax3_config'])}</script><script src='book.js'></script>"
        f"<script defer src='{config['mathjax_path']}'></script><article class='bd-article'>{body}</article>",
        encoding="utf-8",
    )


def measure(folder: Path) -> list[float]:
    """Seconds from navigation to the last typeset equation, for every run in a fresh browser context."""
    handler = functools.partial(Quiet, directory=str(folder))
    seconds = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as play:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for _ in range(RUNS):
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
            time, typeset, errors = page.evaluate(TYPESET)
            if (typeset, errors) != (EQUATIONS, 0):
                raise RuntimeError(f"{typeset} of {EQUATIONS} equations typeset, {errors} errors")
            seconds.append(time)
            context.close()
        browser.close()
        server.shutdown()
    return seconds


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_page(Path(folder))
        seconds = measure(Path(folder))
    header("cpu", ("playwright",), threads=os.cpu_count())
    median = statistics.median(seconds)
    print(f"{EQUATIONS} equations, {RUNS} runs: median {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
          f"budget {BUDGET} s")  # fmt: skip
    return 0 if median <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
