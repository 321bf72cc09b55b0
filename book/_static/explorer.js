// The layer explorer: shows one pair of one model with one place patched. All it needs is in the page.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const box = document.getElementById("layer-explorer");
  const find = (selector) => box.querySelector(selector);
  const [model, pair, slider] = ["model", "pair", "site"].map((name) => document.getElementById(`explorer-${name}`));
  // Rows 0 and 1 of every pair are the source and the target as they are.
  const FIRST = 2;
  const KIND = 5;
  const chosen = () => data.models[model.value].pairs[pair.selectedIndex];
  const reading = (row) => row[1] || "no text found";

  function picture(name, index, read, spoken) {
    const { height, width } = data.models[model.value];
    const { file, rows } = chosen();
    const shown = find(`.explorer-${name} .explorer-picture`);
    shown.style.aspectRatio = `${width} / ${height}`;
    shown.style.backgroundImage = `url("${data.root}${file}")`;
    shown.style.backgroundSize = `100% ${100 * rows.length}%`;
    shown.style.backgroundPosition = `0 ${(100 * index) / (rows.length - 1)}%`;
    shown.setAttribute("aria-label", `${spoken}; OCR reads ${read}`);
    find(`.explorer-${name} .explorer-read`).textContent = `reads ${read}`;
  }

  function show() {
    const { source, target, rows } = chosen();
    const index = FIRST + Number(slider.value);
    const row = rows[index];
    picture("source", 0, reading(rows[0]), `Picture for the source prompt, ${source}`);
    picture("target", 1, reading(rows[1]), `Picture for the target prompt, ${target}`);
    picture("patched", index, reading(row), `Source picture with ${row[0]} patched`);
    slider.setAttribute("aria-valuetext", row[0]);
    find(".explorer-status").textContent =
      `With ${row[0]} patched OCR reads ${reading(row)}: target score ${row[2]}, source score ${row[3]}.`;
    [rows[0], row, rows[1]].forEach((values, i) => {
      const cells = box.querySelectorAll(`tbody tr:nth-child(${i + 1}) td`);
      [reading(values), ...values.slice(2, KIND)].forEach((text, j) => {
        cells[j].textContent = text;
      });
    });
    box.querySelectorAll(".explorer-bar").forEach((bar, i) => bar.classList.toggle("chosen", FIRST + i === index));
  }

  function choosePair() {
    const { source, target, prompt, rows } = chosen();
    find(".explorer-prompt").textContent = `${prompt} The target says “${target}” in place of “${source}”.`;
    slider.max = rows.length - 1 - FIRST;
    find(".explorer-bars").replaceChildren(
      ...rows.slice(FIRST).map(([site, , target_score, source_score], i) => {
        const bar = document.createElement("div");
        bar.className = "explorer-bar";
        bar.title = site;
        for (const [name, score] of [["target", target_score], ["source", source_score]]) {
          const part = document.createElement("div");
          part.className = name;
          part.style.height = `${100 * score}%`;
          bar.append(part);
        }
        bar.addEventListener("click", () => {
          slider.value = i;
          show();
        });
        return bar;
      }),
    );
    show();
  }

  function chooseModel() {
    const kept = Math.max(0, pair.selectedIndex);
    const options = data.models[model.value].pairs.map(({ source, target }) => new Option(`${source} → ${target}`));
    pair.replaceChildren(...options);
    pair.selectedIndex = Math.min(kept, options.length - 1);
    choosePair();
    // The patch that brings most of the target's text comes first, then the reader chooses.
    const scores = chosen().rows.slice(FIRST).filter((row) => row[KIND] === "layer").map((row) => Number(row[2]));
    slider.value = scores.indexOf(Math.max(...scores));
    show();
  }

  model.addEventListener("change", chooseModel);
  pair.addEventListener("change", choosePair);
  slider.addEventListener("input", show);
  chooseModel();
})();
