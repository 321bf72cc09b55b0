// The lab's page: what the reader chooses, and what the worker drew. Nothing of the lab is loaded before a button asks.
(() => {
  const data = JSON.parse(document.getElementById("lab-data").textContent);
  const box = document.getElementById("lab");
  const at = (name) => document.getElementById(`lab-${name}`);
  const made = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const NAMES = ["source", "patched", "target"];
  const ROWS = { target: 0, source: 1, patched: 2 }; // in what the worker draws
  const TOGETHER = 4; // layers that "find the layer" draws in one batch
  const POOLED = "pooled";
  let worker = null;
  let loaded = null; // the model that the worker holds
  let busy = null; // {id, type, resolve, reject} of the message under way
  let stopping = false;
  let count = 0;

  const model = () => data.models[at("model").value];
  const places = () => [...model().layers.keys()].map(String).concat(model().pooled ? [POOLED] : []);
  const placeName = (place) => (place === POOLED ? "the pooled text" : `layer ${place}`);
  function placeNames(chosen) {
    const layers = chosen.filter((place) => place !== POOLED);
    const several = layers.length > 1 ? `layers ${layers.join(", ")}` : layers.map(placeName).join("");
    return [several, chosen.includes(POOLED) ? placeName(POOLED) : ""].filter(Boolean).join(" and ") || "nothing";
  }
  const say = (text) => {
    at("status").textContent = text;
  };

  // --- what is chosen ---------------------------------------------------------------------------------------------

  const OPEN = ""; // a factor that the prompt leaves open
  const factorSelect = (name) => at(`factor-${name}`);

  function showFactors() {
    const { factors, groups } = model().prompts;
    at("factors").replaceChildren(
      ...groups.flat().map((name) => {
        const first = groups.some((group) => group[0] === name);
        const options = factors[name].map((value) => new Option(value, value));
        if (first) options.unshift(new Option("(left open)", OPEN));
        const select = made("select", { id: `lab-factor-${name}` }, ...options);
        select.value = model().prompts.default[name];
        select.addEventListener("change", changed);
        return made("label", {}, `${name[0].toUpperCase()}${name.slice(1)} `, select);
      }),
    );
  }

  function showLayers() {
    at("layers").replaceChildren(
      ...places().map((place) => {
        const name = place === POOLED ? "the pooled text" : model().layers[place];
        const button = made("button", { type: "button", textContent: place, title: name });
        button.dataset.place = place;
        button.setAttribute("aria-label", placeName(place));
        button.addEventListener("click", () => {
          choosePlaces(chosenPlaces().includes(place) ? chosenPlaces().filter((p) => p !== place) : [...chosenPlaces(), place]);
          changed();
        });
        return button;
      }),
    );
    at("known").hidden = model().known.length === 0;
    choosePlaces((model().known.length ? model().known : [model().layers.length >> 1]).map(String));
  }

  const buttons = () => [...at("layers").children];
  const chosenPlaces = () => buttons().filter((b) => b.ariaPressed === "true").map((b) => b.dataset.place);
  function choosePlaces(chosen) {
    for (const button of buttons()) button.ariaPressed = String(chosen.includes(button.dataset.place));
  }

  function chooseModel() {
    showFactors();
    showLayers();
    const seed = at("seed").value;
    at("seed").replaceChildren(...model().seeds.map((number) => new Option(number, number)));
    if (model().seeds.map(String).includes(seed)) at("seed").value = seed;
    at("start").max = model().steps - 1;
    forget();
    changed();
  }

  const word = (name) => at(name).value.trim().toUpperCase();

  // The sentence about a text, or about "..." where there is none yet.
  function prompt(text) {
    const { groups, templates, articles } = model().prompts;
    const named = groups.filter(([first]) => factorSelect(first).value !== OPEN);
    const key = named.map((group) => groups.indexOf(group)).join("");
    const values = Object.fromEntries(named.flat().map((name) => [name, factorSelect(name).value]));
    const all = { ...values, text, a: articles[values.sign] };
    const sentence = templates[key].replace(/\{(\w+)\}/g, (_, name) => all[name]);
    return sentence[0].toUpperCase() + sentence.slice(1);
  }

  // What is wrong with the choice, in one line; empty where nothing is.
  function wrong() {
    const [least, most] = model().prompts.letters;
    for (const name of ["source", "target"]) {
      if (!/^[A-Z]+$/.test(word(name)) || word(name).length < least || word(name).length > most) {
        return `The ${name} needs ${least} to ${most} letters from A to Z, got “${at(name).value}”.`;
      }
    }
    if (word("source") === word("target")) return "Source and target are the same word; choose two.";
    const clash = model().prompts.clashes.find((pair) => pair.every(([name, value]) => factorSelect(name)?.value === value));
    if (clash) {
      const [[one, first], [other, second]] = clash;
      return `This model's world has no ${first} ${one} with ${second} ${other}; choose another colour.`;
    }
    return "";
  }

  function changed() {
    for (const group of model().prompts.groups) {
      for (const name of group.slice(1)) factorSelect(name).disabled = factorSelect(group[0]).value === OPEN;
    }
    at("steps").textContent = `${at("start").value} of ${model().steps}`;
    at("start").setAttribute("aria-valuetext", `step ${at("start").value} of ${model().steps}`);
    at("prompt").textContent = `${prompt(word("source") || "…")} The target says “${word("target") || "…"}”.`;
    const size = (loaded ? 0 : data.runtime) + (loaded === at("model").value ? 0 : model().bytes);
    at("draw").textContent = size ? `Load ${Math.ceil(size / 1e6)} MB and draw` : "Draw";
  }

  // --- the state as a link ----------------------------------------------------------------------------------------

  function link() {
    const state = new URLSearchParams({ model: at("model").value, source: word("source"), target: word("target") });
    state.set("seed", at("seed").value);
    state.set("layers", chosenPlaces().join(","));
    state.set("start", at("start").value);
    for (const name of model().prompts.groups.flat()) state.set(name, factorSelect(name).disabled ? OPEN : factorSelect(name).value);
    return `#${state}`;
  }

  // Sets of places by their names, for the buttons and for links.
  const SETS = {
    all: places,
    none: () => [],
    known: () => model().known.map(String),
    invert: () => places().filter((place) => !chosenPlaces().includes(place)),
  };

  // Take a link's choices; returns what it names that is not here. Its layers may be a set's name, and `open` leaves
  // open all that a prompt need not name.
  function follow(hash) {
    const state = new URLSearchParams(hash.replace(/^#/, ""));
    const unknown = [];
    const choose = (select, name) => {
      if (!state.has(name)) return;
      const value = state.get(name);
      if ([...select.options].some((option) => option.value === value)) select.value = value;
      else if (value !== OPEN) unknown.push(`${name} ${value}`);
    };
    choose(at("model"), "model");
    chooseModel();
    choose(at("seed"), "seed");
    for (const name of ["source", "target"]) if (state.has(name)) at(name).value = state.get(name);
    if (state.has("layers")) {
      const asked = SETS[state.get("layers")]?.() ?? state.get("layers").split(",").filter(Boolean);
      choosePlaces(asked);
      unknown.push(...asked.filter((place) => !places().includes(place)).map(placeName));
    }
    if (state.has("start")) at("start").value = state.get("start");
    const names = model().prompts.groups.flat();
    for (const name of names) choose(factorSelect(name), name);
    if (state.has("open")) for (const [first] of model().prompts.groups) factorSelect(first).value = OPEN;
    const known = ["model", "source", "target", "seed", "layers", "start", "open", ...names];
    unknown.push(...[...state.keys()].filter((name) => !known.includes(name)));
    changed();
    return unknown;
  }

  function followed() {
    if (!location.hash.includes("=")) return;
    const unknown = follow(location.hash);
    say(unknown.length ? `The link names what this lab does not have: ${unknown.join(", ")}.` : "The link's choices are set; draw them.");
  }

  async function copyLink() {
    history.replaceState(null, "", link());
    try {
      await navigator.clipboard.writeText(location.href);
      say("The link is copied; it opens the lab with these choices.");
    } catch {
      say("The link stands in the address bar; it opens the lab with these choices.");
    }
  }

  // --- the worker -------------------------------------------------------------------------------------------------

  function cannot(reason) {
    const note = at("note");
    note.hidden = false;
    at("reason").textContent = reason;
    worker?.terminate();
    worker = loaded = null;
  }

  function started() {
    if (worker) return worker;
    worker = new Worker(new URL(`${data.root}_static/lab/worker.mjs`, location.href), { type: "module" });
    worker.onmessage = ({ data: message }) => {
      if (message.type === "progress") {
        at("progress").value = message.done / message.total;
      } else if (message.type === "step" && message.id === busy?.id) {
        busy.step?.(message);
      } else if (message.type === "failed") {
        busy?.reject(new Error(message.reason));
      } else {
        busy?.resolve(message);
      }
    };
    worker.onerror = (event) => busy?.reject(new Error(event.message || "the worker did not start"));
    return worker;
  }

  // Send a message and wait for its answer; `step` hears of every step on the way.
  function ask(message, step) {
    const id = (count += 1);
    return new Promise((resolve, reject) => {
      busy = { id, type: message.type, resolve, reject, step };
      started().postMessage({ ...message, id });
    }).finally(() => {
      busy = null;
    });
  }

  async function load() {
    const name = at("model").value;
    if (loaded === name) return;
    const total = (loaded ? 0 : data.runtime) + model().bytes;
    say(`Loading ${Math.ceil(total / 1e6)} MB.`);
    const answer = await ask({ type: "load", model: name, total });
    if (answer.type !== "cancelled") loaded = name;
  }

  // Run `work` with the buttons set for it; failures end in one message.
  async function working(work) {
    const problem = wrong();
    if (problem) return say(problem);
    const pressed = document.activeElement;
    stopping = false;
    at("note").hidden = true;
    box.ariaBusy = "true";
    for (const control of box.querySelectorAll("#lab-form :is(button, select, input)")) control.disabled = control.id !== "lab-stop";
    at("progress").hidden = false;
    at("progress").value = 0;
    at("stop").focus();
    try {
      await load();
      say(loaded === at("model").value ? await work() : "Stopped.");
    } catch (error) {
      cannot(error.message);
      say("The lab stopped.");
    }
    for (const control of box.querySelectorAll("#lab-form :is(button, select, input)")) control.disabled = control.id === "lab-stop";
    at("progress").hidden = true;
    box.ariaBusy = "false";
    changed();
    if ([document.body, at("stop")].includes(document.activeElement)) pressed.focus();
  }

  const zeros = () => places().map(() => 0);
  const taking = (chosen) => places().map((place) => Number(chosen.includes(place)));
  const job = (masks) => ({
    prompts: [prompt(word("target")), prompt(word("source"))],
    seed: Number(at("seed").value),
    start: Number(at("start").value),
    masks: [zeros(), ...masks],
  });
  const texts = () => ({ source: word("source"), target: word("target") });

  // --- pictures ---------------------------------------------------------------------------------------------------

  const canvas = (name) => box.querySelector(`.lab-${name} canvas`);

  function paint(pictures) {
    const { width, height } = model();
    for (const name of NAMES) {
      const size = width * height * 3;
      const bytes = pictures.subarray(ROWS[name] * size, (ROWS[name] + 1) * size);
      const image = new ImageData(width, height);
      for (let i = 0; i < width * height; i += 1) {
        image.data.set([bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2], 255], 4 * i);
      }
      const target = canvas(name);
      Object.assign(target, { width, height });
      target.getContext("2d").putImageData(image, 0, 0);
    }
  }

  function told({ text, match, source, target }) {
    const read = text ? `reads ${text}` : "no text found";
    return `${read}${text ? ` (match ${match.toFixed(2)})` : ""}; target score ${target.toFixed(2)}, source score ${source.toFixed(2)}`;
  }

  function caption(name, text) {
    const shown = { source: `Source, ${word("source")}`, target: `Target, ${word("target")}`, patched: "Patched" }[name];
    canvas(name).setAttribute("aria-label", `${shown}: ${text}`);
    box.querySelector(`.lab-${name} .lab-read`).textContent = text;
  }

  // Pictures of another model or size are none of this one.
  function forget() {
    for (const name of NAMES) {
      Object.assign(canvas(name), { width: model().width, height: model().height });
      caption(name, "not drawn yet");
      box.querySelector(`.lab-${name} a`).hidden = true;
    }
    at("found").hidden = true;
  }

  async function offer(name) {
    const blob = await new Promise((done) => canvas(name).toBlob(done));
    const anchor = box.querySelector(`.lab-${name} a`);
    URL.revokeObjectURL(anchor.href);
    Object.assign(anchor, { href: URL.createObjectURL(blob), download: `${at("model").value}-${name}.png`, hidden: false });
  }

  async function draw() {
    const chosen = chosenPlaces();
    const began = performance.now();
    say("Drawing source, target and patched picture from the same noise.");
    const work = { type: "draw", job: job([zeros(), taking(chosen)]), texts: texts(), every: 3 };
    const done = await ask(work, ({ step, pictures }) => {
      at("progress").value = (step + 1) / model().steps;
      if (pictures) paint(pictures);
    });
    if (done.type === "cancelled") return "Stopped.";
    paint(done.pictures);
    for (const name of NAMES) caption(name, told(done.readings[ROWS[name]]));
    await Promise.all(NAMES.map(offer));
    const seconds = (performance.now() - began) / 1000;
    return `With ${placeNames(chosen)} patched, the picture ${told(done.readings[ROWS.patched])}. It took ${seconds.toFixed(1)} seconds.`;
  }

  // --- find the layer ---------------------------------------------------------------------------------------------

  async function find() {
    const all = places();
    const found = [];
    say("Patching each layer in turn.");
    for (let first = 0; first < all.length; first += TOGETHER) {
      const part = all.slice(first, first + TOGETHER);
      const work = { type: "draw", job: job(part.map((place) => taking([place]))), texts: texts(), every: 0 };
      const done = await ask(work, ({ step }) => {
        at("progress").value = (first + (part.length * (step + 1)) / model().steps) / all.length;
      });
      if (done.type === "cancelled" || stopping) break;
      found.push(...done.readings.slice(1).map((reading, i) => ({ place: part[i], ...reading })));
      chart(found, all.length);
    }
    if (found.length < all.length) return `Stopped after ${found.length} of ${all.length} places.`;
    const best = found.reduce((a, b) => (b.target > a.target ? b : a));
    return `Alone, ${placeName(best.place)} brings most of the target's text: it ${told(best)}.`;
  }

  function chart(found, all) {
    at("found").hidden = false;
    at("bars").replaceChildren(
      ...[...Array(all).keys()].map((i) => {
        const bar = made("div", { className: "explorer-bar", title: placeName(places()[i]) });
        for (const name of ["target", "source"]) {
          const part = made("div", { className: name });
          part.style.height = `${100 * (found[i]?.[name] ?? 0)}%`;
          bar.append(part);
        }
        bar.addEventListener("click", () => {
          if (busy) return;
          choosePlaces([places()[i]]);
          changed();
        });
        return bar;
      }),
    );
    at("rows").replaceChildren(
      ...found.map(({ place, text, target, source }) =>
        made(
          "tr",
          {},
          made("th", { scope: "row", textContent: placeName(place) }),
          ...[text || "no text found", target.toFixed(2), source.toFixed(2)].map((textContent) => made("td", { textContent })),
        ),
      ),
    );
  }

  // --- the page ---------------------------------------------------------------------------------------------------

  at("model").replaceChildren(...Object.keys(data.models).map((name) => new Option(name)));
  at("words").replaceChildren(...data.words.map((text) => new Option(text)));
  [at("source").value, at("target").value] = data.pair;
  at("model").addEventListener("change", chooseModel);
  for (const name of ["source", "target", "seed", "start"]) at(name).addEventListener("input", changed);
  for (const [name, pick] of Object.entries(SETS)) {
    at(name).addEventListener("click", () => {
      choosePlaces(pick());
      changed();
    });
  }
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    working(draw);
  });
  at("find").addEventListener("click", () => working(find));
  at("stop").addEventListener("click", () => {
    stopping = true;
    if (busy?.type !== "load") {
      worker?.postMessage({ type: "cancel" });
      return;
    }
    worker.terminate();
    worker = loaded = null;
    busy.resolve({ type: "cancelled" });
  });
  at("copy").addEventListener("click", copyLink);
  addEventListener("hashchange", followed);
  chooseModel();
  followed();
  if (location.protocol === "file:") {
    cannot("A browser does not let a page that was opened as a file load the models. In the folder of the site run: python -m http.server, and open http://localhost:8000/book/lab.html.");
  } else if (typeof WebAssembly !== "object" || typeof Worker !== "function") {
    cannot("This browser has no WebAssembly or no workers.");
  }
  if (!at("note").hidden) for (const name of ["draw", "find"]) at(name).disabled = true;
  else at("stop").disabled = true;
})();
