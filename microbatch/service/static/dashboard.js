// The dashboard: asks for the feed again and again, and puts the answers of several worker processes together.
// Whatever comes from the service is shown as text, never as markup.
"use strict";

(() => {
  // Of several processes any one may answer. A connection that is kept open always leads to the same one, so they are
  // asked less often than servers keep connections, and with several questions at once.
  const ONE = { poll: 1000, questions: 1, overlap: 20, behind: 1 };
  const SEVERAL = { poll: 2500, questions: 4, overlap: 60, behind: 5 };
  const WINDOW = 120;         // seconds that a chart shows
  const QUIET = 60;           // seconds after which a process that does not answer any more is forgotten
  const CARRY = 5;            // seconds for which the last depth of a queue stands
  const RECENT = 5;           // seconds that the tiles speak of
  const FOLLOW = 400;         // milliseconds between two questions for one job
  const FOLLOWED = 300;       // of them at most

  const processes = new Map();
  let how = null;             // how latencies are counted
  let pace = ONE;             // milliseconds between questions, how many, seconds asked for again, seconds not shown yet
  let now = 0;                // the service's clock
  let since = 0;

  const element = (id) => document.getElementById(id);

  function make(tag, text = "", kind = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  async function ask(path, options = {}, reviver = undefined) {
    const response = await fetch(path, { cache: "no-store", ...options });
    const text = await response.text();
    const body = (response.headers.get("Content-Type") || "").includes("json") ? JSON.parse(text, reviver) : {};
    if (!response.ok) throw new Error(body.detail || `The service answered ${response.status}.`);
    return body;
  }

  // A number with the digits that the database has, where the browser tells them: 12.50 and not 12.5.
  function asWritten(name, value, context) {
    return typeof value === "number" && context && context.source ? context.source : value;
  }

  // The feed.

  function hear(told) {
    now = told.now;
    since = Math.max(0, Math.floor(now) - pace.overlap);
    const known = processes.get(told.process) || { seconds: new Map() };
    processes.set(told.process, known);
    for (const second of told.seconds) known.seconds.set(second.at, second);
    for (const at of known.seconds.keys()) if (at < now - how.history) known.seconds.delete(at);
    Object.assign(known, { stats: told.stats, batches: told.batches, failures: told.failures, heard: now });
    for (const [id, each] of processes) {
      // Where there is one process at a time, another one means that the service was started anew.
      if (id !== told.process && (pace === ONE || now - each.heard > QUIET)) processes.delete(id);
    }
  }

  function sum(name) {
    let total = 0;
    for (const each of processes.values()) total += each.stats[name];
    return total;
  }

  function latest(name) {
    const all = [];
    for (const each of processes.values()) all.push(...each[name]);
    return all.sort((one, other) => other.at - one.at).slice(0, 20);
  }

  const EMPTY = ["completed", "failed", "unknown", "cancelled", "batches", "jobs", "largest"];

  function secondOf(at) {
    const total = { queued: 0, outstanding: 0, latencies: new Map() };
    for (const name of EMPTY) total[name] = 0;
    for (const each of processes.values()) {
      const second = each.seconds.get(at);
      if (second) {
        for (const name of EMPTY) {
          total[name] = name === "largest" ? Math.max(total[name], second[name]) : total[name] + second[name];
        }
        count(total.latencies, second.latencies);
      }
      const depth = depthOf(each.seconds, at);
      total.queued += depth.queued;
      total.outstanding += depth.outstanding;
    }
    return total;
  }

  function depthOf(seconds, at) {
    for (let back = 0; back <= CARRY; back += 1) {
      const second = seconds.get(at - back);
      if (second) return second;
    }
    return { queued: 0, outstanding: 0 };
  }

  function count(into, latencies) {
    const pairs = latencies instanceof Map ? latencies : Object.entries(latencies);
    for (const [number, jobs] of pairs) into.set(Number(number), (into.get(Number(number)) || 0) + jobs);
  }

  function quantile(latencies, share) {
    let total = 0;
    for (const jobs of latencies.values()) total += jobs;
    if (!total) return null;
    let seen = 0;
    for (const number of [...latencies.keys()].sort((one, other) => one - other)) {
      seen += latencies.get(number);
      // The middle of the class.
      if (seen >= share * total) return how.floor * how.growth ** (number - 0.5);
    }
    return null;
  }

  // Words.

  function duration(seconds) {
    if (seconds === null) return "–";
    if (seconds === 0) return "0";
    const milliseconds = seconds * 1000;
    if (milliseconds < 9.95) return `${milliseconds.toFixed(1)} ms`;
    if (milliseconds < 999.5) return `${milliseconds.toFixed(0)} ms`;
    return `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
  }

  function number(value) {
    if (value === null) return "–";
    return value < 9.95 && value % 1 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
  }

  function time(at) {
    return new Date(at * 1000).toLocaleTimeString("en-GB");
  }

  // Charts.

  const WHOLE = [1, 2, 5].flatMap((step) => [1, 10, 100, 1000, 10000, 100000].map((ten) => step * ten)).sort((a, b) => a - b);
  const CHARTS = [
    {
      name: "rate", show: number, lines: ["completed", "failed"], fills: true, least: 5, steps: WHOLE,
      values: (second) => [second.completed, second.failed + second.unknown],
    },
    {
      name: "latency", show: duration, lines: ["p50", "p99"], fills: false, least: 0.005,
      values: (second) => [quantile(second.latencies, 0.5), quantile(second.latencies, 0.99)],
    },
    {
      name: "size", show: number, lines: ["mean", "largest"], fills: false, least: 5, steps: WHOLE,
      values: (second) => (second.batches ? [second.jobs / second.batches, second.largest] : [null, null]),
    },
    {
      name: "queue", show: number, lines: ["outstanding", "queued"], fills: true, least: 5, steps: WHOLE,
      values: (second) => [second.outstanding, second.queued],
    },
  ];

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function axis(more) {
    const grid = { stroke: color("--grid"), width: 1 };
    return { stroke: color("--soft"), font: "11px system-ui, sans-serif", grid, ticks: { show: false }, ...more };
  }

  function draw(chart) {
    const place = element(`chart-${chart.name}`);
    if (chart.plot) chart.plot.destroy();
    const line = (letter, size) => ({
      stroke: color(`--${letter}`), width: 1.6, fill: chart.fills ? color(`--${letter}-fill`) : undefined,
      points: {
        show: (plot, series, first, last) => lonely(plot.data[series], first, last),
        size, width: 0, fill: color(`--${letter}`),
      },
    });
    chart.plot = new uPlot({
      width: place.clientWidth, height: place.clientHeight, padding: [8, 24, 0, 0], legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: "all" }, points: { size: 7 } },
      scales: { x: { time: true }, y: { range: (plot, least, most) => [0, Math.max((most || 0) * 1.1, chart.least)] } },
      axes: [
        axis({ size: 24, gap: 6, space: 90, values: (plot, splits) => splits.map(time) }),
        axis({ size: 58, space: 34, incrs: chart.steps, values: (plot, splits) => splits.map(chart.show) }),
      ],
      // The first line of the legend lies on top, with smaller points: where both have one value, both are seen.
      series: [{}, line("b", 9), line("a", 5)],
      hooks: { setCursor: [() => label(chart)] },
    }, chart.data || [[], [], []], place);
  }

  // A value without neighbours has no line: a quiet service would show nothing.
  function lonely(values, first, last) {
    for (let at = first; at <= last; at += 1) {
      if (values[at] !== null && (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null) return true;
    }
    return false;
  }

  function label(chart) {
    const under = chart.plot.cursor.idx;
    chart.keys.forEach((key, line) => {
      const values = chart.plot.data[2 - line];
      const value = under === null || under === undefined ? lastOf(values) : values[under];
      key.textContent = chart.show(value ?? null);
    });
  }

  function lastOf(values) {
    return values.length ? values[values.length - 1] : null;
  }

  function prepare(chart) {
    const legend = element(`legend-${chart.name}`);
    chart.keys = chart.lines.map((name, line) => {
      const key = make("span", `${name} `, `key ${"ab"[line]}`);
      const value = make("b", "–");
      key.append(value);
      legend.append(key);
      return value;
    });
    draw(chart);
    const place = element(`chart-${chart.name}`);
    new ResizeObserver(() => {
      chart.plot.setSize({ width: place.clientWidth, height: place.clientHeight });
    }).observe(place);
  }

  function show() {
    // The second that is under way would look like a fall.
    const end = Math.floor(now) - pace.behind;
    const seconds = [];
    for (let at = end - WINDOW + 1; at <= end; at += 1) seconds.push([at, secondOf(at)]);
    for (const chart of CHARTS) {
      const columns = [seconds.map(([at]) => at), [], []];
      for (const [, second] of seconds) {
        const [one, other] = chart.values(second);
        columns[2].push(one);
        columns[1].push(other);
      }
      chart.data = columns;
      chart.plot.setData(columns);
      label(chart);
    }
    showTiles(seconds.slice(-RECENT).map(([, second]) => second));
    showBars("outcomes", ["completed", "failed", "unknown", "cancelled"].map((name) => [name, sum(name)]), "completed");
    showBars("triggers", triggers(), null);
    showBatches();
    showFailures();
    showState();
  }

  function showTiles(seconds) {
    const latencies = new Map();
    let [ended, batches, jobs] = [0, 0, 0];
    for (const second of seconds) {
      ended += second.completed + second.failed + second.unknown;
      batches += second.batches;
      jobs += second.jobs;
      count(latencies, second.latencies);
    }
    element("tile-rate").textContent = number(ended / RECENT);
    element("tile-p50").textContent = duration(quantile(latencies, 0.5));
    element("tile-p99").textContent = duration(quantile(latencies, 0.99));
    element("tile-size").textContent = number(batches ? jobs / batches : null);
    element("tile-queued").textContent = number(sum("queued"));
    element("tile-outstanding").textContent = number(sum("outstanding"));
  }

  function showState() {
    let failing = 0;
    for (const each of processes.values()) failing = Math.max(failing, each.stats.consecutive_failures);
    if (failing) state(`${failing} failed ${failing === 1 ? "batch" : "batches in a row"}`, "bad");
    else state("live", "good");
    element("processes").textContent = processes.size > 1 ? `${processes.size} worker processes` : "";
  }

  function state(text, kind) {
    const pill = element("state");
    if (pill.textContent !== text) pill.textContent = text;
    pill.className = `pill ${kind}`;
  }

  // Bars and tables.

  function triggers() {
    const total = {};
    for (const each of processes.values()) {
      for (const [name, batches] of Object.entries(each.stats.triggers)) total[name] = (total[name] || 0) + batches;
    }
    return Object.entries(total);
  }

  function showBars(id, entries, good) {
    const list = element(id);
    const most = Math.max(1, ...entries.map(([, value]) => value));
    entries.forEach(([name, value], place) => {
      const item = list.children[place] || list.appendChild(bar(name, good === null || name === good));
      item.querySelector(".fill").style.width = `${(100 * value) / most}%`;
      item.querySelector(".count").textContent = number(value);
    });
  }

  function bar(name, good) {
    const item = make("li");
    const track = make("div", "", "track");
    track.append(make("div", "", good ? "fill" : "fill b"));
    item.append(make("span", name), track, make("span", "", "count"));
    return item;
  }

  function fill(id, rows, columns, nothing) {
    const body = element(id);
    if (!rows.length) {
      const cell = make("td", nothing, "none");
      cell.colSpan = columns;
      rows = [make("tr")];
      rows[0].append(cell);
    }
    body.replaceChildren(...rows);
  }

  function row(...cells) {
    const made = make("tr");
    made.append(...cells);
    return made;
  }

  function showBatches() {
    fill("batches", latest("batches").map((batch) => {
      const outcome = make("td");
      const again = batch.attempt > 1 ? `, attempt ${batch.attempt}` : "";
      if (batch.outcome === "failed") outcome.append(make("span", `failed${again}`, "pill bad"));
      else if (batch.failed) outcome.append(make("span", `${number(batch.failed)} failed${again}`, "pill busy"));
      else outcome.append(make("span", `completed${again}`, "pill good"));
      return row(
        make("td", time(batch.at)), make("td", number(batch.size), "number"), make("td", batch.trigger),
        make("td", duration(batch.seconds), "number"), outcome,
      );
    }), 5, "No batch yet.");
  }

  function showFailures() {
    fill("failures", latest("failures").map((failure) => {
      const job = make("td");
      const id = make("code", `${failure.job.slice(0, 10)}…`);
      id.title = failure.job;
      job.append(id);
      const error = make("td", failure.message, "wide");
      const facts = [failure.sqlstate, failure.constraint].filter(Boolean).join(" · ");
      if (facts) error.append(make("span", facts, "soft"));
      return row(make("td", time(failure.at)), job, error);
    }), 3, "No failure yet.");
  }

  // The form.

  const EXAMPLES = { integer: "1", number: "12.50", text: "pending" };

  function kindOf(schema) {
    const types = [schema.type].flat();
    return ["boolean", "integer", "number"].find((type) => types.includes(type)) || (schema.type ? "text" : "json");
  }

  function addField(column) {
    const label = make("label");
    const input = make("input");
    const kind = kindOf(column.schema);
    input.name = column.name;
    input.dataset.kind = kind;
    input.dataset.required = column.required ? "1" : "";
    input.dataset.text = [column.schema.type].flat().includes("string") ? "1" : "";
    input.placeholder = column.type;
    if (kind === "boolean") input.type = "checkbox";
    else if (["character varying", "text"].includes(column.type)) input.value = EXAMPLES.text.slice(0, column.schema.maxLength);
    else input.value = EXAMPLES[kind] || "";
    if (kind === "integer" || kind === "number") input.inputMode = "decimal";
    label.append(make("span", column.name), input);
    element("fields").append(label);
  }

  function valueOf(input) {
    const { kind, required, text } = input.dataset;
    if (kind === "boolean") return input.checked;
    if (input.value === "" && !required) return null;
    // Digits stay as they are typed where the service takes a string.
    if (kind === "text" || (kind === "number" && text)) return input.value;
    try {
      return JSON.parse(input.value);
    } catch {
      return input.value; // the service says what is wrong with it
    }
  }

  async function submit(event) {
    event.preventDefault();
    say("");
    const job = {};
    for (const input of element("fields").querySelectorAll("input")) job[input.name] = valueOf(input);
    const copies = Number(element("copies").value);
    const body = JSON.stringify(copies > 1 ? Array(copies).fill(job) : job);
    element("submit").disabled = true;
    try {
      const headers = { "Content-Type": "application/json" };
      const accepted = [await ask("submit-job", { method: "POST", headers, body })].flat();
      follow(accepted[accepted.length - 1].jobId, accepted.length);
    } catch (error) {
      say(error.message);
    } finally {
      element("submit").disabled = false;
    }
  }

  function say(text) {
    element("message").textContent = text;
    element("message").hidden = !text;
  }

  let following = 0;

  async function follow(id, copies) {
    following += 1;
    const mine = following;
    element("followed").hidden = false;
    element("followed-id").textContent = id;
    element("followed-id").title = id;
    element("followed-note").textContent = `The last one of ${number(copies)}.`;
    element("followed-note").hidden = copies < 2;
    tell("pending", null);
    for (let questions = 0; questions < FOLLOWED && mine === following; questions += 1) {
      try {
        const answer = await ask(`job-status/${encodeURIComponent(id)}`, {}, asWritten);
        if (mine !== following) return;
        tell(answer.status, answer.result);
        if (!["pending", "processing"].includes(answer.status)) return;
      } catch (error) {
        say(error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, FOLLOW));
    }
  }

  function tell(status, result) {
    const pill = element("followed-status");
    pill.textContent = status;
    pill.className = `pill ${status === "completed" ? "good" : ["pending", "processing"].includes(status) ? "busy" : "bad"}`;
    const list = element("followed-result");
    list.replaceChildren();
    for (const [name, value] of Object.entries(result || {})) {
      if (value === null && status !== "completed") continue;
      const text = typeof value === "object" ? JSON.stringify(value) : String(value);
      const kind = text.length > 22 ? "long" : "";
      list.append(make("dt", name, kind), make("dd", text, kind));
    }
  }

  // The way it goes.

  async function poll() {
    if (!document.hidden) {
      try {
        if (!how) await begin();
        const questions = Array.from({ length: pace.questions }, () => ask(`dashboard/feed?since=${since}`));
        (await Promise.all(questions)).forEach(hear);
        show();
      } catch (error) {
        state("not reached", "bad");
      }
    }
    setTimeout(poll, pace.poll);
  }

  async function begin() {
    const told = await ask("dashboard/form");
    told.columns.forEach(addField);
    how = told;
    pace = told.several ? SEVERAL : ONE;
    element("submit").disabled = false;
  }

  CHARTS.forEach(prepare);
  element("form").addEventListener("submit", submit);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => CHARTS.forEach(draw));
  poll();
})();
