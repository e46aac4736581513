// The memory of all stages side by side, widths by time, with what ran where the pointer is (or the arrow keys).
const timeline = (() => {
  const host = document.getElementById("timeline"), NS = "http://www.w3.org/2000/svg";
  const LEFT = 56, BOTTOM = 62, HEIGHT = 300;
  let data = JSON.parse(document.getElementById("lines").textContent), at = null, lanes = [];

  function part(parent, name, attributes, text) {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  function draw() {
    const old = host.querySelector("svg"), focused = old && old === document.activeElement, shown = at;
    if (old) old.remove();
    const drawn = data.stages.filter(stage => stage.line && stage.line.seconds.length);
    host.hidden = !drawn.length;
    const width = host.clientWidth, plot = HEIGHT - BOTTOM;
    if (!drawn.length || !width) return;
    const budget = data.budget / 1e6;
    const top = 1.06 * Math.max(budget, ...drawn.flatMap(({line}) => [...line.rss, ...line.vram]));
    const last = line => Math.max(line.seconds[line.seconds.length - 1], 0.05);
    const total = drawn.reduce((sum, stage) => sum + last(stage.line), 0);
    const scale = (width - LEFT - 6) / total, y = size => plot - size / top * plot;
    const svg = part(host, "svg", {viewBox: `0 0 ${width} ${HEIGHT}`, tabindex: 0, role: "img",
      "aria-label": "resident memory over time; the arrow keys move from sample to sample"});
    const step = 10 ** Math.floor(Math.log10(top / 4)), tick = [1, 2, 5, 10].map(n => n * step).find(n => top / n <= 6);
    for (let size = 0; size < top; size += tick) {
      part(svg, "line", {x1: LEFT, x2: width, y1: y(size), y2: y(size), stroke: "var(--line)"});
      part(svg, "text", {x: LEFT - 5, y: y(size) + 4, "text-anchor": "end", fill: "var(--dim)"}, `${Math.round(size)} MB`);
    }
    lanes = [];
    let left = LEFT, shownTo = -99;
    drawn.forEach((stage, number) => {
      const {line} = stage, wide = last(line) * scale, x = seconds => left + seconds * scale;
      const points = values => values.map((size, i) => `${x(line.seconds[i]).toFixed(1)},${y(size).toFixed(1)}`).join(" ");
      const lane = part(svg, "g", {opacity: stage.status === "reused" ? 0.65 : 1});
      if (number % 2) part(lane, "rect", {x: left, y: 0, width: wide, height: plot, fill: "var(--lane)"});
      part(lane, "polyline", {points: points(line.anon), fill: "none", stroke: "var(--dim)", "stroke-opacity": 0.6});
      if (line.vram.length) part(lane, "polyline", {points: points(line.vram), fill: "none", stroke: "var(--good)"});
      part(lane, "polyline", {points: points(line.rss), fill: "none", stroke: "var(--accent)", "stroke-width": 1.5});
      for (const [seconds, text] of stage.marks || [])
        part(part(lane, "line", {x1: x(seconds), x2: x(seconds), y1: plot - 5, y2: plot, stroke: "var(--warn)"}), "title", {}, text);
      const middle = left + wide / 2;
      if (middle - shownTo > 13) {
        part(svg, "text", {"text-anchor": "end", fill: "currentColor", transform: `translate(${middle + 4} ${plot + 13}) rotate(-35)`}, stage.name);
        shownTo = middle;
      }
      lanes.push({stage, left, wide, x});
      left += wide;
    });
    part(svg, "line", {x1: LEFT, x2: width, y1: y(budget), y2: y(budget), stroke: "var(--bad)", "stroke-dasharray": "6 4"});
    part(svg, "text", {x: width - 4, y: y(budget) + 14, "text-anchor": "end", fill: "var(--bad)"}, `budget ${Math.round(budget)} MB`);
    const cursor = part(svg, "line", {y1: 0, y2: plot, stroke: "currentColor", "stroke-opacity": 0.5, visibility: "hidden"});
    let tip = host.querySelector(".tip");
    if (!tip) {
      tip = host.appendChild(document.createElement("div"));
      tip.className = "tip";
      tip.setAttribute("role", "status");
      tip.hidden = true;
    }

    function show(lane, index) {
      at = {stage: lane.stage.name, index};
      const {line, marks, name} = lane.stage, seconds = line.seconds[index], x = lane.x(seconds);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
      const happened = (marks || []).filter(([when]) => when <= seconds).pop();
      tip.textContent = `${name} ${seconds.toFixed(1)} s: ${Math.round(line.rss[index])} MB, ${Math.round(line.anon[index])} anonymous`
        + (line.vram.length ? `, ${Math.round(line.vram[index])} on the GPU` : "")
        + (line.modules[line.module[index]] ? `\n${line.modules[line.module[index]]}` : "") + (happened ? `\n${happened[1]}` : "");
      tip.hidden = false;
      tip.style.left = `${Math.max(0, Math.min(x + 12, width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${host.clientHeight - HEIGHT + 8}px`;
    }
    function hide() { at = null; tip.hidden = true; cursor.setAttribute("visibility", "hidden"); }

    if (focused) svg.focus({preventScroll: true});
    const again = shown && lanes.find(lane => lane.stage.name === shown.stage);
    if (again) show(again, Math.min(shown.index, again.stage.line.seconds.length - 1)); else hide();
    svg.addEventListener("pointermove", event => {
      const x = event.clientX - svg.getBoundingClientRect().left;
      const lane = lanes.find(lane => x <= lane.left + lane.wide) || lanes[lanes.length - 1];
      const near = lane.stage.line.seconds.findIndex(seconds => lane.x(seconds) >= x);
      show(lane, near < 0 ? lane.stage.line.seconds.length - 1 : near);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", event => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!by) return;
      event.preventDefault();
      let number = Math.max(0, lanes.findIndex(lane => at && lane.stage.name === at.stage));
      let index = at ? at.index + by : 0;
      if (index < 0 && number > 0) index = lanes[--number].stage.line.seconds.length - 1;
      if (index >= lanes[number].stage.line.seconds.length && number < lanes.length - 1) { number += 1; index = 0; }
      show(lanes[number], Math.max(0, Math.min(index, lanes[number].stage.line.seconds.length - 1)));
    });
  }

  let wide = 0;
  new ResizeObserver(() => { if (wide !== host.parentElement.clientWidth) { wide = host.parentElement.clientWidth; draw(); } }).observe(host.parentElement);
  return {update(fresh) { data = fresh; draw(); }};
})();
