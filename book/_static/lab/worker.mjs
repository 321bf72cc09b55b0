// Runs the lab beside the page, so that the page stays usable. Messages in: load, draw, cancel. Messages out: progress,
// loaded, step, drawn, cancelled, failed.
import { Miniature, read, textScore } from "./core.mjs";

const here = new URL("./", import.meta.url).href;
let runtime = null;
let reader = null;
let miniature = null;
let current = 0;

// A file as a Uint8Array; `tell` hears how many bytes came with every part.
async function fetched(path, tell = () => {}) {
  const answer = await fetch(here + path);
  if (!answer.ok) throw new Error(`${path} cannot be loaded: ${answer.status} ${answer.statusText}`);
  const parts = [];
  let size = 0;
  const stream = answer.body.getReader();
  for (;;) {
    const { done, value } = await stream.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    tell(value.length);
  }
  const whole = new Uint8Array(size);
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

async function load({ model, total }) {
  let done = 0;
  const tell = (bytes) => postMessage({ type: "progress", done: (done += bytes), total });
  if (!runtime) {
    const ort = await import("./ort.wasm.min.mjs");
    const { Tokenizer } = await import("./tokenizers.min.mjs");
    ort.env.wasm.numThreads = 1; // threads need headers that plain servers do not send
    ort.env.wasm.wasmPaths = { mjs: `${here}ort-wasm-simd-threaded.mjs` };
    const wasm = await fetched("ort-wasm-simd-threaded.wasm", tell);
    ort.env.wasm.wasmBinary = wasm.buffer;
    reader = [json(await fetched("reader.json")), new Float32Array((await fetched("reader.bin")).buffer)];
    runtime = { ort, Tokenizer };
  }
  if (miniature?.about.name !== model) {
    const about = json(await fetched(`${model}/model.json`));
    const files = {};
    for (const name of Object.keys(about.bytes)) files[name] = await fetched(`${model}/${name}`, tell);
    await miniature?.release();
    miniature = null;
    miniature = await Miniature.load(runtime.ort, runtime.Tokenizer, about, files);
  }
  postMessage({ type: "loaded", model });
}

const readings = (pictures, rows, texts) => {
  const size = pictures.length / rows;
  return [...Array(rows).keys()].map((row) => {
    const found = read(pictures.subarray(row * size, (row + 1) * size), ...reader);
    return { ...found, source: textScore(found.text, texts.source), target: textScore(found.text, texts.target) };
  });
};

async function draw({ id, job, texts, every }) {
  current = id;
  const rows = job.masks.length;
  const pictures = await miniature.draw(job, async (step, look) => {
    const last = step === miniature.about.steps - 1;
    const shown = !last && every && step % every === every - 1 ? await look() : null;
    postMessage({ type: "step", id, step, pictures: shown });
    await new Promise((done) => setTimeout(done)); // lets a cancel through
    return current === id;
  });
  if (pictures === null) postMessage({ type: "cancelled", id });
  else postMessage({ type: "drawn", id, pictures, readings: readings(pictures, rows, texts) });
}

onmessage = async ({ data }) => {
  try {
    if (data.type === "load") await load(data);
    else if (data.type === "draw") await draw(data);
    else if (data.type === "cancel") current = 0;
  } catch (error) {
    postMessage({ type: "failed", id: data.id, reason: String(error?.message ?? error) });
  }
};
