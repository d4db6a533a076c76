// Runs before MathJax, which is loaded deferred.
(() => {
  const DISPLAY = '.bd-article mjx-container[display="true"]';

  // A space of an em or two stands between two formulas: the best place to break a line.
  const visitor = () =>
    class extends MathJax._.output.common.LinebreakVisitor.LinebreakVisitor {
      constructor(...factory) {
        super(...factory);
        const space = this.FACTORS.space;
        this.FACTORS.space = (penalty, node) => {
          const { w } = node.getBBox();
          return space(penalty, node) - (w >= 1 ? 2000 * w : 0);
        };
      }
    };

  // Rows of one column are broken, and rows that are aligned at a sign are broken after it. A matrix or a definition by
  // cases keeps its entries whole: if it is too wide, the formula scrolls.
  const breakRows = (tables) => {
    const { adjustColumnWidths } = tables;
    tables.adjustColumnWidths = function (width) {
      let alone = true;
      let root = this.node;
      for (; root.parent; root = root.parent) {
        alone &&= root.isKind("mtr") || root.isKind("mtd") || root.parent.childNodes.length === 1;
      }
      const [left, right] = this.getComputedWidths();
      const rest = width - (this.naturalWidth() - right);
      if (alone && this.numCols === 1) adjustColumnWidths.call(this, width);
      else if (alone && this.numCols === 2 && rest > 0.4 * right) this.cWidths = [left, rest];
      else root.attributes.set("overflow", "scroll");
    };
  };

  // A closed fold has no width to measure; it is open for just as long as that takes, which nobody sees.
  const measureInFolds = (page) => {
    const getMetrics = page.getMetrics.bind(page);
    page.getMetrics = () => {
      const folds = document.querySelectorAll(".bd-article details:not([open])");
      for (const fold of folds) fold.open = true;
      getMetrics();
      for (const fold of folds) fold.open = false;
      return page;
    };
  };

  // Lines are broken for one width: at another one, those that are broken or don't fit are set again, with the rest.
  let set = 0;
  const reset = async (width) => {
    if (Math.abs(width - set) < 8) return;
    set = width;
    const misfit = (formula) => formula.scrollWidth > formula.clientWidth || formula.querySelector("mjx-linestack");
    if (![...document.querySelectorAll(DISPLAY)].some(misfit)) return;
    for (const wide of document.querySelectorAll(".bd-article div.math.wide")) wide.classList.remove("wide");
    await MathJax.startup.document.rerenderPromise(MathJax._.core.MathItem.STATE.METRICS);
  };

  if (window.MathJax) {
    MathJax.startup = {
      ready() {
        // Set by assistive-mml for a menu that this book does not load; MathJax would complain about it.
        delete MathJax.config.options?.menuOptions;
        MathJax.config.chtml.linebreaks = { LinebreakVisitor: visitor(), lineleading: 0.35 };
        MathJax.startup.defaultReady();
        breakRows(MathJax.startup.output.factory.getNodeClass("mtable").prototype);
        measureInFolds(MathJax.startup.document);
      },
    };
  }

  // What scrolls sideways must be reachable by keyboard; what does not scroll must not be a stop on the way.
  const boxes = {
    'mjx-container[display="true"]': "Equation",
    "div.highlight > pre": "Code or output",
    ".pst-scrollable-table-container": "Table",
  };
  const update = () => {
    for (const formula of document.querySelectorAll(DISPLAY)) {
      if (formula.scrollWidth > formula.clientWidth) formula.parentElement.classList.add("wide");
    }
    for (const [selector, label] of Object.entries(boxes)) {
      for (const box of document.querySelectorAll(`.bd-article ${selector}`)) {
        if (box.scrollWidth > box.clientWidth) {
          box.tabIndex = 0;
          if (box.localName !== "mjx-container") box.setAttribute("role", "region");
          if (box.localName !== "mjx-container") box.setAttribute("aria-label", label);
        } else if (box.tabIndex === 0) {
          for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
        }
      }
    }
  };
  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    update();
    // A resize event comes before the page has its new columns; the observer comes after.
    const article = document.querySelector(".bd-article");
    set = article?.clientWidth;
    let later;
    const resized = () => {
      requestAnimationFrame(update);
      clearTimeout(later);
      later = setTimeout(() => reset(article.clientWidth).then(update), 250);
    };
    if (article) new ResizeObserver(resized).observe(article);
    document.addEventListener("toggle", update, true); // a fold was opened
  });
})();
