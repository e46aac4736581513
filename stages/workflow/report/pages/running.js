// Loads the run's state again and again; it works for a page that was opened as a file too, where nothing can be fetched.
const OLD = 12; // seconds without news after which the command is no more
let busy = false;
const by = id => document.getElementById(id);

function inWords(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} min`;
}

function live(said) { // called by report/live.js
  if (said.state !== "running") return location.reload();
  const age = Date.now() / 1000 - said.updated, stale = age > OLD, {now} = said;
  by("state").textContent = stale ? "no news" : "running";
  by("state").className = `badge ${stale ? "stale" : "running"}`;
  by("stale").hidden = !stale;
  const since = new Date(said.updated * 1000).toLocaleString();
  if (stale) by("stale").textContent = `Not updated since ${since} (${inWords(age)} ago): the command was killed, or the machine stopped. Everything finished is kept. Go on with:\n${document.body.dataset.command}`;
  const took = inWords(said.updated - said.began);
  if (now && now.stage) {
    const count = now.total ? ` ${now.done} of ${now.total} ${now.unit}` : "";
    const left = now.left === null ? "" : `, about ${inWords(now.left)} left` + (now.all_left > now.left + 1 ? ` (all: ${inWords(now.all_left)})` : "");
    by("what").textContent = `${now.stage}:${count || " starts"}${left}; ${took} so far`;
    document.title = `${now.total ? Math.floor(100 * now.done / now.total) + "% " : ""}${now.stage} · ${document.querySelector("h1").textContent}`;
    if (now.total) { by("done").max = now.total; by("done").value = now.done; } else by("done").removeAttribute("value");
  } else { by("what").textContent = `prepares; ${took} so far`; by("done").removeAttribute("value"); }
  by("memory").textContent = `${Math.round(now.rss / 1e6)} MB of ${Math.round(said.budget / 1e6)} MB${now.module ? `: ${now.module}` : ""}`;
  by("level").value = now.rss;
  by("note").textContent = now.note;
  const figure = by("preview"), image = figure.querySelector("img");
  figure.hidden = !said.preview;
  if (said.preview && image.getAttribute("src") !== said.preview.src) {
    image.src = said.preview.src;
    figure.querySelector("figcaption").textContent = `preview: ${said.preview.stage}`;
  }
  const megabytes = size => size ? String(Math.round(size / 1e6)) : "-";
  for (const stage of said.stages) {
    const row = document.querySelector(`tr[data-stage="${CSS.escape(stage.name)}"]`);
    for (const cell of row ? row.querySelectorAll("[data-is]") : []) {
      const is = cell.dataset.is, value = stage[is];
      cell.textContent = is === "status" ? value : is.endsWith("seconds") ? (value ? inWords(value) : "-") : megabytes(value);
    }
  }
  timeline.update(said);
}

function ask() {
  if (busy) return;
  busy = true;
  const script = document.createElement("script");
  script.src = `report/live.js?${Date.now()}`;
  script.onload = script.onerror = () => { busy = false; script.remove(); };
  document.head.append(script);
}
ask();
setInterval(ask, 1000);
