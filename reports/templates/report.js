// Draws the figures, lets readers choose objectives, sort tables and copy commands. It never makes markup from text:
// names reach the page through textContent only.
"use strict";
(() => {
  const drawings = JSON.parse(document.getElementById("drawings").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll("[data-figure]")];
  // Plotly's button that uploads a figure is on unless it is switched off.
  const config = {
    displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d"],
    plotlyServerURL: "",
    responsive: true,
    showSendToCloud: false,
  };
  document.documentElement.classList.add("scripted");

  // --- figures -------------------------------------------------------------------------------------------------------

  const template = (scheme) => drawings.templates[scheme];
  const paper = 680; // pixels that fit on A4 and on letter
  const scheme = () => (dark.matches ? "dark" : "light");

  function draw(place) {
    const figure = drawings.figures[place.dataset.figure];
    figure.layout.template = template(scheme());
    return Plotly.newPlot(place, figure.data, figure.layout, config).catch((error) => {
      place.classList.add("broken");
      place.textContent = "This figure could not be drawn: " + error.message;
    });
  }

  function dress(name, width = null) {
    const change = { template: template(name), width, autosize: width === null };
    for (const place of plots) if (place.data) Plotly.relayout(place, change);
  }

  // One figure after the other, so that the page can be read and scrolled meanwhile.
  plots.reduce((before, place) => before.then(() => new Promise((next) => setTimeout(next))).then(() => draw(place)), Promise.resolve());
  dark.addEventListener("change", () => dress(scheme()));
  addEventListener("beforeprint", () => dress("light", paper));
  addEventListener("afterprint", () => dress(scheme()));

  // --- any two of several objectives ------------------------------------------------------------------------------------

  const form = document.getElementById("choose");
  if (form && drawings.views) {
    const { objectives, lines } = drawings.views;
    const place = document.querySelector('[data-figure="front"]');
    const selects = [document.getElementById("across"), document.getElementById("up")];
    const chosen = [1, 0];
    selects.forEach((select, side) => {
      objectives.forEach((objective, number) => select.add(new Option(objective.label, number)));
      select.value = chosen[side];
      select.addEventListener("change", () => {
        const picked = Number(select.value);
        if (picked === chosen[1 - side]) chosen[1 - side] = chosen[side];
        chosen[side] = picked;
        selects.forEach((other, i) => (other.value = chosen[i]));
        show(...chosen);
      });
    });
    form.hidden = false;

    function show(across, up) {
      const line = lines[across + "," + up];
      const figure = drawings.figures.front;
      const [area, bound, ...layers] = figure.data;
      Object.assign(area, { x: [...line.x, line.x.at(-1)], y: [...line.y, line.y[0]] });
      Object.assign(bound, { x: line.x, y: line.y });
      layers.forEach((layer, i) => {
        Object.assign(layer, { x: objectives[across].values[i], y: objectives[up].values[i] });
        if (layer.text) Object.assign(layer, { text: line.labels, textposition: line.position });
      });
      figure.layout.xaxis = structuredClone(objectives[across].axis);
      figure.layout.yaxis = structuredClone(objectives[up].axis);
      figure.layout.template = template(scheme());
      Plotly.newPlot(place, figure.data, figure.layout, config);
    }
  }

  // --- commands ---------------------------------------------------------------------------------------------------------

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Pages opened as files may not use the clipboard in some browsers; the old way works there.
      const area = document.createElement("textarea");
      area.value = text;
      area.style.position = "fixed";
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error("not allowed");
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const words = button.textContent;
    const code = button.previousElementSibling;
    const say = (text) => {
      button.textContent = text;
      setTimeout(() => (button.textContent = words), 1500);
    };
    copy(button.dataset.copy ?? code.textContent).then(
      () => say("Copied"),
      () => {
        if (code) getSelection().selectAllChildren(code);
        say("Press Ctrl+C");
      },
    );
  });

  // --- tables -----------------------------------------------------------------------------------------------------------

  const units = { K: 1e3, M: 1e6, B: 1e9, T: 1e12 };

  function value(cell) {
    const text = cell.textContent;
    const found = /^(-?[\d.]+(?:e[+-]?\d+)?)([KMBT]?)$/.exec(text);
    return found ? Number(found[1]) * (units[found[2]] ?? 1) : text;
  }

  function compare(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    if (typeof one === "number" || typeof other === "number") return typeof one === "number" ? -1 : 1;
    return one === "" || other === "" ? (one === "") - (other === "") : one.localeCompare(other);
  }

  function sort(table, column, header) {
    const down = header.getAttribute("aria-sort") === "ascending";
    const rows = [...table.tBodies[0].rows].map((row) => [value(row.cells[column]), row]);
    rows.sort((a, b) => (down ? compare(b[0], a[0]) : compare(a[0], b[0])));
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("#front-table, #trials-table")) {
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      if (!header.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      button.addEventListener("click", () => sort(table, column, header));
    });
  }
})();
