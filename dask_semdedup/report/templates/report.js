"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("eps");
  const lists = ["before", "dropped", "kept", "after"].map((name) => document.getElementById(name));
  // All pairs, the most similar first, as they stand in the four lists.
  const pairs = lists.flatMap((list) => [...list.querySelectorAll(".pair")]);
  const marks = ["histogram", "duplicates"].map((name) => document.getElementById(`${name}-mark`));
  const noneBelow = document.getElementById("none-below");
  const split = splitBars();
  let chosen = data.start;
  const whole = new Intl.NumberFormat("en-US");
  const percent = (count) => `${((100 * count) / (data.rows || 1)).toFixed(2)}%`;

  // One paint for all bars of the histogram, of two colours that meet at the threshold.
  function splitBars() {
    const make = (name, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      return element;
    };
    const paint = make("linearGradient", { id: "split", gradientUnits: "userSpaceOnUse", x1: 0, x2: data.histogram.width });
    for (const colour of ["blue", "vermilion"]) paint.append(make("stop", { style: `stop-color: var(--${colour})` }));
    document.getElementById("histogram-mark").ownerSVGElement.append(paint);
    for (const bar of document.querySelectorAll('[id^="histogram-bar-"] path')) {
      bar.style.fill = "url(#split)";
      bar.style.stroke = "none";
    }
    return paint;
  }

  function write(values) {
    for (const element of document.querySelectorAll("[data-value]")) element.textContent = values[element.dataset.value];
  }

  function movePairs(threshold) {
    const cut = pairs.filter((pair) => Number(pair.dataset.score) >= threshold).length;
    const cuts = [0, Math.max(0, cut - data.shown), cut, cut + data.shown, pairs.length];
    lists.forEach((list, number) => list.replaceChildren(...pairs.slice(cuts[number], cuts[number + 1])));
    noneBelow.hidden = cut < pairs.length || !pairs.length;
  }

  function moveMarks(number) {
    const share = (at) => data.duplicates[at] / (data.rows || 1);
    const { histogram, curve } = data;
    const right = histogram.x[1] * (data.thresholds[number] - data.thresholds[data.start]);
    marks[0].setAttribute("transform", `translate(${right} 0)`);
    const across = curve.x[1] * (data.eps[number] - data.eps[data.start]);
    const down = curve.y[1] * (share(number) - share(data.start));
    marks[1].setAttribute("transform", `translate(${across} ${down})`);
    const border = (histogram.x[0] + histogram.x[1] * data.thresholds[number]) / histogram.width;
    for (const stop of split.children) stop.setAttribute("offset", border);
  }

  // The counted eps that is nearest to a place of the slider, which is linear as the curve is.
  function nearest(eps) {
    const distance = (number) => Math.abs(data.eps[number] - eps);
    return data.eps.reduce((best, _, number) => (distance(number) < distance(best) ? number : best), 0);
  }

  function choose(number) {
    chosen = number;
    document.body.classList.toggle("moved", number !== data.start);
    const eps = Number(data.eps[number].toPrecision(6));
    const count = data.duplicates[number];
    const kept = data.rows - count;
    write({
      eps,
      similarity: Number((1 - eps).toPrecision(6)),
      duplicates: whole.format(count),
      share: percent(count),
      kept: whole.format(kept),
      "kept-share": percent(kept),
    });
    slider.setAttribute("aria-valuetext", `eps ${eps}: ${count} duplicates, ${percent(count)}`);
    movePairs(data.thresholds[number]);
    moveMarks(number);
  }

  slider.max = data.eps.at(-1);
  slider.value = data.eps[data.start];
  slider.addEventListener("input", () => choose(nearest(Number(slider.value))));
  slider.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.min(Math.max(chosen + step, 0), data.eps.length - 1));
    slider.value = data.eps[chosen];
  });
  document.querySelector(".controls").hidden = false;
  choose(data.start);
})();
