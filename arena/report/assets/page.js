"use strict";
// Words come from results and submissions: they enter the page as text nodes, never as markup.

const make = (tag, options = {}, ...inside) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...inside);
  return node;
};
const percent = value => value === null || value === undefined ? "–" : (100 * value).toFixed(1);
const plain = (value, digits) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

// ------------------------------------------------------------------- the address keeps the state

const state = new URLSearchParams(
  location.hash.includes("=") ? location.hash.slice(1) : "");
const keep = (name, value) => {
  if (value === "" || value === null || value === undefined) state.delete(name);
  else state.set(name, value);
  history.replaceState(null, "", state.size ? "#" + state : location.pathname + location.search);
};

// ---------------------------------------------------------------------------------------- theme

const themes = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");
let theme = "auto";
try { theme = localStorage.getItem("theme") ?? "auto"; } catch { /* no storage: the system's */ }
const showTheme = () => {
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = "Theme: " + theme;
};
if (!themes.includes(theme)) theme = "auto";
showTheme();
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  try { localStorage.setItem("theme", theme); } catch { /* kept for this page only */ }
  showTheme();
});

// ------------------------------------------------------------------------- tables of a few lines

document.querySelectorAll("table.sortable").forEach((table, number) => {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const sort = (column, up) => {
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.v ?? "";
    const numeric = heads[column].classList.contains("n");
    const rows = [...table.tBodies[0].rows].sort((one, two) => {
      const a = value(one), b = value(two);
      if (a === "" || b === "") return (a === "") - (b === "");
      return (numeric ? a - b : a.localeCompare(b)) * (up ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  };
  heads.forEach((head, column) => {
    const press = () => {
      const up = head.getAttribute("aria-sort") === "none"
        ? !head.classList.contains("n") : head.getAttribute("aria-sort") === "descending";
      sort(column, up);
      keep("t" + number, (up ? "" : "-") + column);
    };
    head.tabIndex = 0;
    head.setAttribute("aria-sort", "none");
    head.addEventListener("click", press);
    head.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); press(); }
    });
  });
  const kept = /^(-?)(\d+)$/.exec(state.get("t" + number) ?? "");
  if (kept && heads[kept[2]]) sort(Number(kept[2]), kept[1] === "");
});

// ----------------------------------------------------------------------------- the explorer's data

const source = document.getElementById("data");
if (source) explore(JSON.parse(source.textContent));

function explore(data) {
  const isWord = new Set(data.words_in);
  const runs = data.runs.map((line, number) => {
    const run = { id: "r" + number };
    data.columns.forEach((name, k) => {
      run[name] = isWord.has(name) ? data.words[line[k]] : line[k];
    });
    run.n = 1;
    return run;
  });
  const pairs = data.pairs.map(([places, means, n, status], number) => {
    const first = runs[places[0]];
    const pair = { ...first, id: "p" + number, n, status, seed: null, runs: places };
    data.figures.forEach(name => {
      [pair[name], pair[name + "_sd"]] = means[name] ?? [null, null];
    });
    const reasons = new Set(places.map(k => runs[k].reason));
    pair.reason = [...reasons].filter(Boolean).join("; ");
    places.forEach(k => { runs[k].pair = pair; });
    return pair;
  });
  const byKey = new Map(runs.map(run => [run.key, run]));
  const various = name => new Set(runs.map(run => run[name])).size > 1;

  // ------------------------------------------------------------------------------------ columns

  const kindOf = row => row.status.split(/ \d/)[0].split(",")[0];
  const opener = cell => {
    const row = cell.getData();
    const run = row.runs ? runs[row.runs[0]] : row;
    return make("a", {
      href: row.home ? row.home + "#cell=" + encodeURIComponent(run.key) : "#",
      title: row.attack_spec,
      onclick: event => { if (!row.home) { event.preventDefault(); open(row); } },
    }, row.attack);
  };
  const text = cell => {
    const value = cell.getValue() ?? "";
    return make("span", { title: value }, String(value));
  };
  const spread = (name, show) => cell => {
    const row = cell.getData(), node = make("span", {}, show(row[name]));
    const sd = row[name + "_sd"];
    if (sd !== null && sd !== undefined) node.append(make("span", { class: "sd" }, " ± " + show(sd)));
    return node;
  };
  const head = (title, hint) => () => make("button", { type: "button", title: hint ?? title }, title);
  // widths come from the words, not from measuring cells: nothing shifts, and it is quick
  const room = (field, least) => {
    const longest = runs.reduce((most, run) => Math.max(most, run[field].length), 0);
    return Math.min(Math.max(least, 40 + 7.3 * longest), innerWidth > 700 ? 280 : 128);
  };
  const word = (field, title, width, more = {}) => ({
    field, title, titleFormatter: head(title), formatter: text, width: room(field, width),
    sorter: "string", ...more,
  });
  const figure = (field, title, show, width = 104) => ({
    field, title, titleFormatter: head(title), formatter: spread(field, show), width,
    hozAlign: "right", headerHozAlign: "right", cssClass: "n", headerSortStartingDir: "desc",
    sorter: (a, b, one, two, column, dir) => {
      const none = dir === "asc" ? Infinity : -Infinity;
      return (a ?? none) - (b ?? none) || 0;
    },
  });
  const columns = [
    word("attack", "attack", 150, { formatter: opener, frozen: innerWidth > 700 }),
    word("defense", "defense", 150, { formatter: cell => {
      const row = cell.getData();
      return make("span", { title: row.defense_spec, class: row.null ? "null" : "" },
        row.defense + (row.null ? " (null)" : ""));
    } }),
    figure("acc", "ACC %", percent), figure("asr", "ASR %", percent),
    figure("ra", "RA %", percent), figure("der", "DER %", percent),
    figure("acc_drop", "ACC drop", percent, 112), figure("twin_acc_drop", "twin drop", percent, 112),
    figure("distance", "distance", value => plain(value, 2)),
    figure("distance_gain", "gain %", percent), figure("robust_acc", "robust ACC %", percent, 140),
    figure("seconds", "seconds", value => plain(value, 1), 120),
    { ...figure("n", "seeds", value => String(value), 88), field: "n" },
    { ...figure("seed", "seed", value => value === null ? "–" : String(value), 88) },
    word("status", "status", 130),
    word("board", "board", 130), word("dataset", "data set", 110), word("model", "model", 100),
    word("recipe", "recipe", 80), word("threat", "threat model", 130),
    word("labels", "labels", 90), figure("clean_images", "clean images",
      value => plain(value, 0), 140),
  ].filter(column => ["attack", "defense", "n", "seed", "status"].includes(column.field)
    || (isWord.has(column.field) ? various(column.field) : data.columns.includes(column.field)));

  // ------------------------------------------------------------------------------------ filters

  const form = document.getElementById("filters");
  const fields = [];
  const add = (name, label, control) => {
    control.name = name;
    control.id = "filter-" + name;
    form.append(make("label", { for: control.id }, make("span", {}, label), control));
    fields.push(control);
  };
  add("q", "search", make("input", { type: "search", placeholder: "any words" }));
  for (const [name, label] of [["board", "board"], ["dataset", "data set"], ["model", "model"],
    ["attack", "attack"], ["defense", "defense"], ["threat", "threat model"],
    ["labels", "labels"], ["status", "status"]]) {
    const found = name === "status" ? [...new Set(runs.map(kindOf))] : [...new Set(runs.map(r => r[name]))];
    if (found.length < 2) continue;
    const select = make("select", {}, make("option", { value: "" }, "all"));
    found.sort().forEach(value => select.append(
      make("option", { value: value || "?" }, value || "not recorded")));
    add(name, label, select);
  }
  for (const [name, label] of [["seeds", "seeds, at least"], ["seconds", "seconds, at most"],
    ["images", "clean images, at most"]]) {
    add(name, label, make("input", { type: "number", min: 0, step: "any", inputmode: "decimal" }));
  }
  const view = make("select", {}, make("option", { value: "" }, "means over seeds"),
    make("option", { value: "runs" }, "every run"));
  add("view", "rows", view);
  form.append(make("button", { type: "reset" }, "Clear"));
  const values = () => Object.fromEntries(fields.map(field => [field.name, field.value.trim()]));
  const limit = (value, row, name) => value === "" || Number.isNaN(Number(value))
    || (row[name] !== null && row[name] !== undefined && row[name] <= Number(value));
  const kept = row => {
    const want = kept.want;
    for (const name of ["board", "dataset", "model", "attack", "defense", "threat", "labels"]) {
      if (want[name] && (row[name] || "?") !== want[name]) return false;
    }
    if (want.status && !row.status.includes(want.status)
      && !(want.status === "ok" && row.n > 0 && !row.status.includes("not established"))) return false;
    if (want.seeds && (row.pair ?? row).n < Number(want.seeds)) return false;
    if (!limit(want.seconds, row, "seconds") || !limit(want.images, row, "clean_images")) return false;
    if (!want.q) return true;
    row.words ??= [row.attack, row.attack_spec, row.defense, row.defense_spec, row.board, row.dataset,
      row.model, row.status, row.reason, row.flags, row.threat, row.key].join(" ").toLowerCase();
    return want.q.toLowerCase().split(/\s+/).every(each => row.words.includes(each));
  };
  fields.forEach(field => { if (state.has(field.name)) field.value = state.get(field.name); });
  kept.want = values();

  // -------------------------------------------------------------------------------------- table

  const count = document.getElementById("count");
  const asked = /^(-?)(\w+)$/.exec(state.get("sort") ?? "");
  const sortable = asked && columns.some(column => column.field === asked[2]);
  const shown = () => kept.want.view === "runs" ? runs : pairs;
  const table = new Tabulator("#explorer", {
    data: shown().filter(kept),
    columns, index: "id", height: "min(36rem, 75vh)", renderVertical: "virtual",
    layout: "fitData", placeholder: "Nothing matches; clear a filter.",
    initialSort: sortable ? [{ column: asked[2], dir: asked[1] ? "desc" : "asc" }] : [],
    columnDefaults: { headerSortTristate: true, resizable: false, headerTooltip: false },
    rowFormatter: row => {
      const line = row.getData(), node = row.getElement();
      node.classList.toggle("single", (line.pair ?? line).n === 1 && !line.pair?.runs?.[1]);
      node.classList.toggle("odd", kindOf(line) !== "ok");
    },
  });
  const tell = () => {
    const all = shown().length, now = table.getDataCount();
    count.textContent = `${now} of ${all} ${kept.want.view === "runs" ? "runs" : "pairs"}`;
  };
  const columnsOf = () => {
    const each = kept.want.view === "runs";
    table[each ? "hideColumn" : "showColumn"]("n");
    table[each ? "showColumn" : "hideColumn"]("seed");
  };
  const apply = async () => {
    kept.want = values();
    fields.forEach(field => keep(field.name, field.value.trim()));
    await table.replaceData(shown().filter(kept));
    columnsOf();
    tell();
  };
  table.on("tableBuilt", () => { columnsOf(); tell(); document.body.dataset.ready = "yes"; });
  table.on("dataSorted", sorters => {
    const [first] = sorters;
    keep("sort", first ? (first.dir === "desc" ? "-" : "") + first.field : "");
  });
  let waiting;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", event => event.preventDefault());

  // ------------------------------------------------------------------------------------- records

  const dialog = document.getElementById("record");
  const facts = entries => {
    const list = make("dl", { class: "facts" });
    for (const [name, value] of entries) {
      if (value === "" || value === null || value === undefined || value === "–") continue;
      list.append(make("dt", {}, name), make("dd", {}, String(value)));
    }
    return list;
  };
  const range = (low, high) => low === null || low === undefined ? "" : `, 95 %: ${percent(low)} to ${percent(high)}`;
  const about = run => facts([
    ["status", run.status], ["reason", run.reason], ["flags", run.flags],
    ["ACC %", percent(run.acc) + range(run.acc_low, run.acc_high)],
    ["ASR %", percent(run.asr) + range(run.asr_low, run.asr_high)],
    ["RA %", percent(run.ra)], ["DER %", percent(run.der)], ["ACC drop", percent(run.acc_drop)],
    ["before", run.asr_before === null || run.asr_before === undefined ? `ACC ${percent(run.acc_before)}`
      : `ACC ${percent(run.acc_before)}, ASR ${percent(run.asr_before)}`],
    ["clean twin", run.clean_twin_acc === null ? "" : `ACC ${percent(run.clean_twin_acc)}`],
    ["seconds", plain(run.seconds, 1)], ["peak MB", plain(run.peak_memory_mb, 0)],
    ["clean images", run.clean_images],
    ["passes", run.forward_images === null || run.forward_images === undefined ? ""
      : `${run.forward_images} images forward, ${run.backward_images} backward`],
    ["finished", run.finished], ["commit", run.commit], ["data", run.fingerprint],
    ...(data.more[run.key] ?? []).map(([label, value]) => [data.words[label], data.words[value]]),
    ["key", run.key],
  ]);
  function open(row) {
    const pair = row.pair ?? row;
    const body = document.getElementById("record-body");
    body.replaceChildren(
      make("h2", { id: "record-title" }, `${pair.attack} × ${pair.defense}`),
      facts([["board", pair.board], ["data set", pair.dataset], ["model", pair.model],
        ["recipe", pair.recipe], ["threat", pair.threat], ["labels", pair.labels],
        ["attack", pair.attack_spec], ["defense", pair.defense_spec]]));
    pair.runs.forEach(k => {
      const run = runs[k], part = make("details", {}, make("summary", {},
        `seed ${run.seed}: ${run.status}, ACC ${percent(run.acc)}, ASR ${percent(run.asr)}`), about(run));
      part.open = row === run || pair.runs.length === 1;
      body.append(part);
    });
    const figures = [...document.querySelectorAll("#triggers figure")]
      .filter(node => node.dataset.attack === pair.attack);
    figures.forEach(node => body.append(make("h3", {}, "Trigger"), node.cloneNode(true)));
    const first = row.pair ? row : runs[pair.runs[0]];
    keep("cell", first.key.slice(0, 20));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }
  dialog.addEventListener("close", () => keep("cell", ""));
  document.getElementById("record-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  const find = key => byKey.get(key) ?? runs.find(run => key && run.key.startsWith(key));
  document.querySelectorAll("a[data-cell]").forEach(link => link.addEventListener("click", event => {
    const run = find(link.dataset.cell);
    if (run) { event.preventDefault(); open(run.pair); }
  }));
  const start = find(state.get("cell") ?? "");
  if (start) open(start);
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;
    const now = new URLSearchParams(location.hash.slice(1));
    const run = find(now.get("cell") ?? "");
    [...state.keys()].forEach(name => state.delete(name));
    now.forEach((value, name) => state.set(name, value));
    fields.forEach(field => { field.value = now.get(field.name) ?? ""; });
    apply();
    if (run) open(run); else if (dialog.open) dialog.close();
  });
}
