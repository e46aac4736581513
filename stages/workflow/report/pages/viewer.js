// A picture of any size: tiles of the level that fits the screen, over those of coarser levels that are there already.
const viewer = (() => {
  const data = JSON.parse(document.getElementById("picture").textContent), host = document.getElementById("viewer");
  const [pane, second] = host.querySelectorAll(".pane"), canvas = pane.querySelector("canvas"), output = host.querySelector("output");
  const {width, height} = data, MOST = 160, COLORS = {denoise: "#ff3b30", decode: "#34c759", regions: "#ffcc00"};
  const levels = data.zoom ? data.zoom.levels : 1, side = data.zoom ? data.zoom.tile : Math.max(width, height);
  const images = new Map(), shown = {}, pointers = new Map();
  let view = null, whole = true, waits = false, lowres = null, pinch = 0;

  const density = () => window.devicePixelRatio || 1;
  const fitted = () => Math.min(canvas.clientWidth / width, canvas.clientHeight / height);
  const fit = () => ({x: width / 2, y: height / 2, scale: fitted()});
  const name = (level, col, row) => data.zoom ? `${data.zoom.folder}/${level}/${col}_${row}.${data.zoom.format}` : data.image;

  function later() {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; draw(); });
  }

  function tile(level, col, row, wanted) {
    const src = name(level, col, row);
    let image = images.get(src);
    if (!image) {
      if (!wanted) return null;
      image = new Image();
      image.onload = later;
      image.src = src;
    } else images.delete(src); // the one that was used last comes last
    images.set(src, image);
    for (const old of images.keys()) { if (images.size <= MOST) break; if (!old.includes(`/${levels - 1}/`)) images.delete(old); else break; }
    return image.complete && image.naturalWidth ? image : null;
  }

  function draw() {
    if (!canvas.clientWidth) return;
    if (whole) view = fit();
    view.scale = Math.max(fitted() * 0.8, Math.min(view.scale, 16));
    view.x = Math.max(0, Math.min(view.x, width));
    view.y = Math.max(0, Math.min(view.y, height));
    const context = prepare(canvas), level = Math.max(0, Math.min(levels - 1, Math.floor(Math.log2(1 / (view.scale * density())) + 0.2)));
    const box = [view.x - canvas.clientWidth / 2 / view.scale, view.y - canvas.clientHeight / 2 / view.scale,
      view.x + canvas.clientWidth / 2 / view.scale, view.y + canvas.clientHeight / 2 / view.scale];
    for (let one = levels - 1; one >= level; one--) {
      const span = side * 2 ** one, wanted = one === level || one === levels - 1;
      const cols = Math.ceil(Math.ceil(width / 2 ** one) / side), rows = Math.ceil(Math.ceil(height / 2 ** one) / side);
      for (let row = Math.max(0, Math.floor(box[1] / span)); row < rows && row * span < box[3]; row++)
        for (let col = Math.max(0, Math.floor(box[0] / span)); col < cols && col * span < box[2]; col++) {
          const image = tile(one, col, row, wanted);
          if (image) context.drawImage(image, col * span, row * span, image.naturalWidth * 2 ** one, image.naturalHeight * 2 ** one);
        }
    }
    overlay(context);
    if (!second.hidden) {
      const beside = prepare(second.querySelector("canvas"));
      if (lowres.complete) beside.drawImage(lowres, 0, 0, width, height);
    }
    output.textContent = `${Math.round(view.scale * 100)}%, level ${level}`;
  }

  function prepare(on) {
    const ratio = density(), wide = Math.round(on.clientWidth * ratio), high = Math.round(on.clientHeight * ratio);
    if (on.width !== wide || on.height !== high) { on.width = wide; on.height = high; }
    const context = on.getContext("2d"), scale = view.scale * ratio;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, wide, high);
    context.setTransform(scale, 0, 0, scale, wide / 2 - view.x * scale, high / 2 - view.y * scale);
    context.imageSmoothingEnabled = view.scale < 4;
    return context;
  }

  function overlay(context) {
    context.lineWidth = 1.5 / view.scale;
    for (const [kind, grid] of Object.entries(data.grids)) {
      if (!shown[kind]) continue;
      context.strokeStyle = COLORS[kind];
      for (const [top, bottom] of grid.rows) for (const [left, right] of grid.cols) context.strokeRect(left, top, right - left, bottom - top);
    }
    if (!shown.regions) return;
    context.strokeStyle = context.fillStyle = COLORS.regions;
    context.lineWidth = 3 / view.scale;
    context.font = `${14 / view.scale}px system-ui, sans-serif`;
    context.textBaseline = "top";
    context.shadowColor = "#000";
    context.shadowBlur = 4;
    for (const {box: [left, top, right, bottom], prompt} of data.regions) {
      context.strokeRect(left, top, right - left, bottom - top);
      context.fillText(prompt.slice(0, 60), left + 6 / view.scale, top + 6 / view.scale, right - left);
    }
    context.shadowBlur = 0;
  }

  function zoom(by, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    whole = false;
    const before = view.scale, dx = x - canvas.clientWidth / 2, dy = y - canvas.clientHeight / 2;
    view.scale = Math.max(fitted() * 0.8, Math.min(before * by, 16));
    view.x += dx / before - dx / view.scale;
    view.y += dy / before - dy / view.scale;
    later();
  }

  function move(dx, dy) { whole = false; view.x -= dx / view.scale; view.y -= dy / view.scale; later(); }

  function all() { whole = true; later(); }

  for (const on of host.querySelectorAll("canvas")) {
    on.addEventListener("wheel", event => {
      event.preventDefault();
      const lines = event.deltaMode ? 16 : 1, place = on.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY * lines * 0.0016), event.clientX - place.left, event.clientY - place.top);
    }, {passive: false});
    on.addEventListener("pointerdown", event => { on.setPointerCapture(event.pointerId); pointers.set(event.pointerId, event); pinch = 0; });
    on.addEventListener("pointermove", event => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      pointers.set(event.pointerId, event);
      move((event.clientX - before.clientX) / pointers.size, (event.clientY - before.clientY) / pointers.size);
      if (pointers.size < 2) return;
      const [a, b] = [...pointers.values()], apart = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY), place = on.getBoundingClientRect();
      if (pinch) zoom(apart / pinch, (a.clientX + b.clientX) / 2 - place.left, (a.clientY + b.clientY) / 2 - place.top);
      pinch = apart;
    });
    for (const ends of ["pointerup", "pointercancel"]) on.addEventListener(ends, event => { pointers.delete(event.pointerId); pinch = 0; });
    on.addEventListener("dblclick", event => zoom(2, event.offsetX, event.offsetY));
  }
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = 80, keys = {"+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": all,
      "1": () => zoom(1 / density() / view.scale), ArrowLeft: () => move(far, 0), ArrowRight: () => move(-far, 0),
      ArrowUp: () => move(0, far), ArrowDown: () => move(0, -far)};
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  const buttons = {in: () => zoom(1.5), out: () => zoom(1 / 1.5), fit: all, full: () => zoom(1 / density() / view.scale)};
  host.querySelectorAll("[data-do]").forEach(button => button.addEventListener("click", () => buttons[button.dataset.do]()));
  host.querySelectorAll("[data-show]").forEach(box => box.addEventListener("change", () => {
    shown[box.dataset.show] = box.checked;
    if (box.dataset.show === "lowres") {
      second.hidden = !box.checked;
      if (!lowres) { lowres = new Image(); lowres.onload = later; lowres.src = data.lowres; }
    }
    later();
  }));
  new ResizeObserver(later).observe(pane);
  return {get view() { return view; }};
})();
