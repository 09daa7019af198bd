"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;  // there a drag scrolls the page
  const plots = [...document.querySelectorAll(".plot")];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Black, which one variant is drawn in, would not be seen on a dark page.
  const BLACK = "#000000";

  function themed(figure) {
    const axis = {gridcolor: colour("--line"), linecolor: colour("--line"), tickcolor: colour("--line")};
    const layout = {
      ...figure.layout, dragmode: touch ? false : "zoom", font: {family: "system-ui, sans-serif", size: 12, color: colour("--text")},
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), align: "left", font: {color: colour("--text")}},
      xaxis: {...figure.layout.xaxis, ...axis}, yaxis: {...figure.layout.yaxis, ...axis},
    };
    const seen = (one) => one === BLACK ? colour("--text") : one;
    const data = figure.data.map((trace) => ({...trace, line: {...trace.line, color: seen(trace.line.color)}}));
    return [data, layout, {responsive: true, displayModeBar: false}];
  }
  function draw() {
    for (const plot of plots) {
      plot.figure ??= JSON.parse(plot.nextElementSibling.textContent);
      Plotly.react(plot, ...themed(plot.figure));
    }
  }
  draw();
  dark.addEventListener("change", draw);

  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.querySelectorAll("th")];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const key = (row) => row.cells[column].dataset.key;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)], [m, n] = [Number(x === "inf" ? Infinity : x), Number(y === "inf" ? Infinity : y)];
        if (m === Infinity || n === Infinity) return (m === Infinity) - (n === Infinity);
        return (down ? -1 : 1) * (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n);
      };
      const rows = [...table.tBodies[0].rows].sort(order);
      table.tBodies[0].append(...rows);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    }));
  }
})();
