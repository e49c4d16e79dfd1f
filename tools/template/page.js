"use strict";

// Values of a chart's curves at the iteration under the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const { range: [first, last], curves } = JSON.parse(chart.querySelector(".data").textContent);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), tip = chart.querySelector(".tip");
  const dots = curves.map(({ kind }) => {
    const dot = document.createElement("span");
    dot.className = `dot now ${kind}`;
    dot.hidden = true;
    return plot.appendChild(dot);
  });
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const iteration = curves[0].x[nearest(curves[0].x, first + at * (last - first))];
    const left = (iteration - first) / (last - first) * 100;
    const lines = [`iteration ${iteration.toLocaleString("en")}`];
    curves.forEach((curve, number) => {
      const index = nearest(curve.x, iteration);
      dots[number].hidden = curve.x[index] !== iteration;
      dots[number].style.left = `${left}%`;
      dots[number].style.top = `${curve.place[index] / 10}%`;
      if (curve.x[index] === iteration) lines.push(`${curve.label} ${curve.text[index]}`);
    });
    tip.replaceChildren(...lines.flatMap((line, number) => number ? [document.createElement("br"), line] : [line]));
    cursor.hidden = tip.hidden = false;
    cursor.style.left = `${left}%`;
    const width = tip.offsetWidth, x = left / 100 * box.width;
    tip.style.left = `${Math.min(Math.max(x + (x > box.width / 2 ? -width - 12 : 12), 0), box.width - width)}px`;
  };
  const hide = () => [cursor, tip, ...dots].forEach((element) => { element.hidden = true; });
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}

// The heat map at another iteration, or of another measure. The colours of a measure mean the same at every iteration.
const heat = document.querySelector(".heat");
if (heat) {
  const { iterations, values, rows, columns } = JSON.parse(heat.querySelector(".data").textContent);
  const buttons = [...heat.querySelectorAll("[data-measure]")], slider = heat.querySelector("input");
  const cells = [...heat.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
  const paint = () => {
    const measure = buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.measure;
    const time = slider ? Number(slider.value) : iterations.length - 1;
    const top = Math.max(...values[measure].flat(2).filter((value) => value !== null)) || 1;
    cells.forEach((row, i) => row.forEach((cell, j) => {
      const value = values[measure][time][i][j];
      cell.className = value === null ? "none" : "";
      cell.style.setProperty("--v", value === null ? 0 : value / top);
      cell.title = value === null ? "" : `layer ${columns[j]}, ${rows[i]}: ${value}`;
    }));
    heat.querySelector("output").textContent = iterations[time].toLocaleString("en");
    heat.querySelector(".scale .top").textContent = top.toPrecision(3);
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      paint();
    });
  }
  if (slider) slider.addEventListener("input", paint);
  paint();
}
