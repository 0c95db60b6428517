// The map of embeddings. Names of files only ever become text: by textContent, or escaped for plotly's labels.
"use strict";

const element = (id) => document.getElementById(id);
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const KINDS = { video: ["picture", "circle", "dot"], audio: ["sound", "triangle-up", "triangle"] };
const MOST_LISTED = 200;

const map = element("map");
let data = null;
let chosen = null;
let hidden = new Set();
let asked = 0;

const aboutPoint = (i) => `${clock(data.start[i])} to ${clock(data.end[i])}`;
const facts = (i) => [KINDS[data.modality[i]][0], data.label[i], aboutPoint(i)].filter((one) => one !== null).join(" · ");
const listed = (i) => `${data.name[i].split("/").pop()} · ${KINDS[data.modality[i]][0]} ${clock(data.start[i])}`;

function say(text) { element("what").textContent = text; }

async function load(layout) {
  const mine = ++asked;
  let answer;
  for (;;) {
    try {
      answer = await (await fetch(`/map/points?layout=${layout}`)).json();
    } catch {
      say("The server does not answer. Is cmacc app still running?");
      return;
    }
    if (mine !== asked) return;
    if (answer.state !== "working") break;
    say(`Arranging the points by nearest neighbours: ${answer.seconds} s so far. You can go on using the map.`);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (mine !== asked) return;
  }
  if (answer.state === "none") { say(answer.reason); return; }
  if (data !== null && data.name.length !== answer.name.length) chosen = null;
  data = answer;
  say(data.what);
  element("all").hidden = false;
  const by = element("by").value;
  const words = { label: "label", group: "similarity (8 groups)", modality: "picture or sound" };
  element("by").replaceChildren(...Object.keys(data.colours).map((key) => new Option(words[key], key)));
  if (by in data.colours) element("by").value = by;
  draw(false);
  list();
}

function traces() {
  const { of, names } = data.colours[element("by").value];
  const shown = [];
  for (const [modality, [, symbol]] of Object.entries(KINDS)) {
    names.forEach((_, number) => {
      if (hidden.has(number)) return;
      const rows = of.flatMap((own, i) => (own === number && data.modality[i] === modality ? [i] : []));
      if (rows.length === 0) return;
      shown.push({
        type: "scatter", mode: "markers", x: rows.map((i) => data.x[i]), y: rows.map((i) => data.y[i]), customdata: rows,
        text: rows.map((i) => `${escaped(data.name[i])}<br>${escaped(facts(i))}`), hovertemplate: "%{text}<extra></extra>",
        marker: { symbol, size: 8, opacity: 0.85, color: colour(number ? `c${number}` : "muted"),
          line: { width: 0.5, color: colour("card") } },
      });
    });
  }
  if (chosen !== null) {
    shown.push({ type: "scatter", mode: "markers", x: [data.x[chosen]], y: [data.y[chosen]], hoverinfo: "skip",
      marker: { symbol: "circle-open", size: 18, line: { width: 3 }, color: colour("ink") } });
  }
  return shown;
}

function draw(keepView) {
  const axis = () => ({ visible: false, zeroline: false, autorange: true });
  const layout = {
    xaxis: axis(), yaxis: axis(), margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: false, dragmode: "pan", hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), align: "left", font: { color: colour("ink") }, namelength: -1 },
  };
  if (keepView && map.layout) for (const name of ["xaxis", "yaxis"]) {
    Object.assign(layout[name], { autorange: false, range: [...map.layout[name].range] });
  }
  Plotly.react(map, traces(), layout, { scrollZoom: true, displayModeBar: false, doubleClick: "reset", responsive: true });
  legend();
}

function legend() {
  const { of, names } = data.colours[element("by").value];
  const mark = (kind, name) => {
    const icon = document.createElement("i");
    icon.className = kind;
    icon.style.background = `var(--${name})`;
    return icon;
  };
  const entries = names.map((name, number) => {
    const count = of.filter((own) => own === number).length;
    if (count === 0) return null;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(!hidden.has(number)));
    button.title = "Show or hide";
    button.dataset.number = number;
    button.append(mark("square", number ? `c${number}` : "muted"), `${name} (${count})`);
    button.onclick = () => {
      if (!hidden.delete(number)) hidden.add(number);
      draw(true);
      element("legend").querySelector(`[data-number="${number}"]`).focus();
    };
    return button;
  }).filter((entry) => entry !== null);
  const shapes = Object.entries(KINDS).map(([modality, [word, , kind]]) => {
    const shape = document.createElement("span");
    shape.append(mark(kind, "ink"), word);
    return shape;
  });
  element("legend").replaceChildren(...shapes, ...entries);
}

function list() {
  const wanted = element("find").value.toLowerCase();
  const fits = (i) => `${data.name[i]} ${data.label[i] ?? ""}`.toLowerCase().includes(wanted);
  const rows = data.name.flatMap((_, i) => (fits(i) ? [i] : []));
  const options = rows.slice(0, MOST_LISTED).map((i) => new Option(listed(i), i));
  if (rows.length === 0) options.push(new Option("nothing found", ""));
  if (rows.length > MOST_LISTED) options.push(new Option(`and ${rows.length - MOST_LISTED} more: type a part of the name`, ""));
  options.forEach((option) => { option.disabled = option.value === ""; });
  element("list").replaceChildren(...options);
  if (chosen !== null) element("list").value = String(chosen);
}

function choose(i) {
  chosen = i;
  draw(true);
  element("hint").hidden = true;
  element("clip").hidden = false;
  element("name").textContent = data.name[i];
  element("facts").textContent = facts(i);
  element("list").value = String(i);
  play(i);
}

function play(i) {
  const video = element("video"), fault = element("fault"), sound = element("sound");
  const id = data.id[i], part = `start=${data.start[i]}&end=${data.end[i]}`;
  sound.hidden = id === null || data.modality[i] !== "audio";
  sound.onerror = () => { sound.hidden = true; };
  if (!sound.hidden) sound.src = `/media/${id}/sound?${part}`;
  video.hidden = id === null;
  fault.hidden = id !== null;
  fault.textContent = "The file of this point is not known.";
  if (id === null) { video.removeAttribute("src"); video.load(); return; }
  // Browsers play some files as they are; of others, the server re-encodes these seconds.
  video.onerror = () => {
    video.onerror = () => { video.hidden = true; fault.hidden = false; fault.textContent = "This file cannot be played."; };
    video.src = `/media/${id}/part?${part}`;
    video.play().catch(() => {});
  };
  video.src = `/media/${id}#t=${data.start[i]},${data.end[i]}`;
  video.play().catch(() => {});
}

function zoom(factor) {
  const around = (range) => {
    const middle = (range[0] + range[1]) / 2, half = (range[1] - range[0]) / 2 * factor;
    return [middle - half, middle + half];
  };
  Plotly.relayout(map, { "xaxis.range": around(map.layout.xaxis.range), "yaxis.range": around(map.layout.yaxis.range) });
}

function move(x, y) {
  const moved = (range, share) => range.map((end) => end + share * (range[1] - range[0]));
  Plotly.relayout(map, { "xaxis.range": moved(map.layout.xaxis.range, x), "yaxis.range": moved(map.layout.yaxis.range, y) });
}

const showAll = () => Plotly.relayout(map, { "xaxis.autorange": true, "yaxis.autorange": true });
const KEYS = {
  "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), 0: showAll,
  ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, 0.1), ArrowDown: () => move(0, -0.1),
};

element("in").onclick = () => zoom(0.7);
element("out").onclick = () => zoom(1 / 0.7);
element("whole").onclick = showAll;
element("layout").onchange = (event) => load(event.target.value);
element("by").onchange = () => { hidden = new Set(); draw(true); };
element("find").oninput = list;
element("list").onchange = (event) => { if (event.target.value !== "") choose(Number(event.target.value)); };
map.onkeydown = (event) => {
  if (event.key in KEYS && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); KEYS[event.key](); }
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (data !== null) draw(true); });

load("pca").then(() => {
  if (data !== null) map.on("plotly_click", (event) => choose(event.points[0].customdata));
});
