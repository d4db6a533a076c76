// Runs before MathJax, which is loaded deferred.
(() => {
  if (window.MathJax) {
    MathJax.startup = {
      ready() {
        // Set by assistive-mml for a menu that this book does not load; MathJax would complain about it.
        delete MathJax.config.options?.menuOptions;
        MathJax.startup.defaultReady();
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
    for (const formula of document.querySelectorAll('.bd-article mjx-container[display="true"]')) {
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
    if (article) new ResizeObserver(() => requestAnimationFrame(update)).observe(article);
    document.addEventListener("toggle", update, true); // a fold was opened
  });
})();
