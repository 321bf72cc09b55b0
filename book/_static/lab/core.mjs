// The lab's arithmetic: tokens, the loop over the steps, and the reader. It knows nothing of pages; the worker hands it
// ONNX Runtime and the files that textloc_utils/book/lab.py exported.

// --- tokens -------------------------------------------------------------------------------------------------------

// A prompt's tokens, padded as the pipeline pads them: {ids, mask}, each as long as the tokenizer's text.
export function tokensOf(tokenizer, { length, pad }, prompt) {
  const { ids } = tokenizer.encode(prompt);
  if (!ids.every(Number.isInteger)) throw new Error(`this model's tokenizer does not know a word of: ${prompt}`);
  if (ids.length > length) throw new Error(`a prompt of ${ids.length} tokens is too long; this model takes ${length}`);
  const rest = length - ids.length;
  return {
    ids: [...ids, ...Array(rest).fill(pad)],
    mask: [...Array(ids.length).fill(1), ...Array(rest).fill(0)],
  };
}

// --- drawing ------------------------------------------------------------------------------------------------------

const product = (shape) => shape.reduce((a, b) => a * b, 1);

export class Miniature {
  // `about` is model.json, `files` its files as Uint8Arrays by name.
  static async load(ort, Tokenizer, about, files) {
    const made = new Miniature();
    const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all", logSeverityLevel: 3 };
    made.ort = ort;
    made.about = about;
    made.noise = new Float32Array(files["noise.bin"].slice().buffer);
    made.tokenizers = Object.entries(about.tokenizers).map(([name, known]) => [
      name,
      known,
      new Tokenizer(known.tokenizer, {}),
    ]);
    for (const part of ["text", "denoiser", "decoder"]) {
      made[part] = await ort.InferenceSession.create(files[`${part}.onnx`], options);
    }
    return made;
  }

  async release() {
    for (const part of ["text", "denoiser", "decoder"]) await this[part].release();
  }

  // What the denoiser is called with for the target's and the source's prompt.
  async conditions(prompts) {
    const feed = {};
    for (const [name, known, tokenizer] of this.tokenizers) {
      const rows = prompts.map((prompt) => tokensOf(tokenizer, known, prompt));
      for (const part of ["ids", "mask"]) {
        if (!this.text.inputNames.includes(`${name}.${part}`)) continue;
        const numbers = rows.flatMap((row) => row[part]).map(BigInt);
        feed[`${name}.${part}`] = new this.ort.Tensor("int64", BigInt64Array.from(numbers), [2, known.length]);
      }
    }
    return this.text.run(feed);
  }

  // Latents (rows, ...) to the bytes of pictures, rows x height x width x 3.
  async decode(latents, rows) {
    const tensor = new this.ort.Tensor("float32", latents, [rows, ...this.about.noise]);
    return (await this.decoder.run({ latents: tensor })).picture.data;
  }

  // Draw one picture per row from the same noise. `prompts` are [target, source]; row 0 has the target's prompt, all
  // others the source's. `masks` say for each row and place how much of row 0's text keys and values it takes, from
  // step `start` on. After every step `onStep(step, look)` is awaited; `look()` gives the pictures expected by then.
  // What it returns ends the run if it is false.
  async draw({ prompts, seed, masks, start = 0 }, onStep = async () => true) {
    const { about, ort } = this;
    const places = about.layers.length + Number(about.pooled);
    const rows = masks.length;
    const size = product(about.noise);
    const at = about.seeds.indexOf(seed);
    if (at < 0) throw new Error(`there is no noise of seed ${seed}; allowed: ${about.seeds.join(", ")}`);
    if (masks.some((mask) => mask.length !== places) || masks[0].some((share) => share !== 0)) {
      throw new Error(`every row needs ${places} shares, and row 0, the target's, takes nothing`);
    }
    const noise = this.noise.subarray(at * size, (at + 1) * size);
    const known = await this.conditions(prompts);
    const texts = new ort.Tensor("int64", BigInt64Array.from([...masks.keys()].map((row) => BigInt(row > 0))), [rows]);
    const shares = (on) =>
      new ort.Tensor("float32", Float32Array.from(masks.flat(), (share) => (on ? share : 0)), [rows, places]);
    let picture = new Float32Array(rows * size);
    for (let row = 0; row < rows; row += 1) picture.set(noise, row * size);
    const answers = [];
    for (let step = 0; step < about.steps; step += 1) {
      const feed = {
        picture: new ort.Tensor("float32", picture, [rows, ...about.noise]),
        timestep: new ort.Tensor("float32", [about.timesteps[step]], []),
        texts,
        mask: shares(step >= start),
        ...known,
      };
      const asked = Object.entries(feed).filter(([name]) => this.denoiser.inputNames.includes(name));
      const answer = (await this.denoiser.run(Object.fromEntries(asked))).answer.data;
      answers.push(answer);
      const before = picture;
      const [first, ...amounts] = about.update[step];
      picture = new Float32Array(rows * size);
      for (let i = 0; i < picture.length; i += 1) {
        let sum = first * noise[i % size];
        for (let s = 0; s <= step; s += 1) sum += amounts[s] * answers[s][i];
        picture[i] = sum;
      }
      const last = step === about.steps - 1;
      const [own, of] = about.clean[step];
      const look = () =>
        this.decode(last ? picture : Float32Array.from(answer, (value, i) => own * before[i] + of * value), rows);
      if ((await onStep(step, look)) === false) return null;
    }
    return this.decode(picture, rows);
  }
}

// --- reading ------------------------------------------------------------------------------------------------------

// The direction of largest colour variance in the band where a sign hangs, as the package's reader takes it.
function principal(pixels, { height, width, cell }) {
  const top = height / 2 - cell[0] / 2;
  const band = [[], [], []];
  for (let y = top; y < top + cell[0]; y += 1) {
    for (let x = 8; x < width - 8; x += 1) {
      for (let c = 0; c < 3; c += 1) band[c].push(pixels[(y * width + x) * 3 + c]);
    }
  }
  const middle = band.map((values) => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)]);
  let matrix = [0, 1, 2].map((i) =>
    [0, 1, 2].map((j) => band[i].reduce((sum, value, k) => sum + (value - middle[i]) * (band[j][k] - middle[j]), 0)),
  );
  // Squared again and again, a matrix becomes its first eigenvector times itself.
  for (let turn = 0; turn < 30; turn += 1) {
    const scale = Math.max(...matrix.flat().map(Math.abs), 1e-30);
    const now = matrix.map((row) => row.map((value) => value / scale));
    matrix = now.map((row) => [0, 1, 2].map((j) => row.reduce((sum, value, k) => sum + value * now[k][j], 0)));
  }
  const column = [0, 1, 2].reduce((best, i) => (matrix[i][i] > matrix[best][best] ? i : best), 0);
  const direction = matrix.map((row) => row[column]);
  const length = Math.hypot(...direction) || 1;
  return direction.map((value) => value / length);
}

// Read one picture (bytes, height x width x 3) by template matching, with the letters of all typefaces. Returns {text,
// typeface, match}: `match` is the mean correlation of the letters, 0 to 1; without text all three are empty.
export function read(pixels, known, letters) {
  const { height, width, left, columns, slack, heights } = known;
  const [h, w] = known.cell;
  const direction = principal(pixels, known);
  const top = height / 2 - h / 2 + heights[0] - slack;
  const rows = heights[1] - heights[0] + 2 * slack + 1;
  const grey = new Float32Array((rows + h - 1) * width);
  for (let i = 0; i < grey.length; i += 1) {
    const at = (top * width + i) * 3;
    grey[i] = direction[0] * pixels[at] + direction[1] * pixels[at + 1] + direction[2] * pixels[at + 2];
  }
  const area = h * w;
  const faces = known.faces.length;
  const count = known.letters.length;
  // For both signs, every face, row and column: the best letter's match, and which letter it is.
  const found = new Map();
  for (let column = 0; column < columns; column += 1) {
    for (let dx = -slack; dx <= slack; dx += 1) {
      const x = left + w * column + dx;
      for (let row = 0; row < rows; row += 1) {
        let sum = 0;
        let squares = 0;
        for (let y = 0; y < h; y += 1) {
          for (let i = 0; i < w; i += 1) {
            const value = grey[(row + y) * width + x + i];
            sum += value;
            squares += value * value;
          }
        }
        const scale = Math.sqrt(Math.max(squares / area - (sum / area) ** 2, 1) * area);
        for (let face = 0; face < faces; face += 1) {
          const best = { 1: [-Infinity, 0], "-1": [-Infinity, 0] };
          for (let letter = 0; letter < count; letter += 1) {
            let dot = 0;
            const from = (face * count + letter) * area;
            for (let y = 0; y < h; y += 1) {
              for (let i = 0; i < w; i += 1) dot += letters[from + y * w + i] * grey[(row + y) * width + x + i];
            }
            for (const sign of [1, -1]) {
              const match = (sign * dot) / scale;
              if (match > best[sign][0]) best[sign] = [match, letter];
            }
          }
          found.set(`${face} ${row} ${x}`, best);
        }
      }
    }
  }
  let result = { text: "", typeface: "", match: 0 };
  let score = known.least;
  for (const sign of [1, -1]) {
    for (const n of known.lengths) {
      for (let column = 0; column <= columns - n; column += 1) {
        for (let dx = -slack; dx <= slack; dx += 1) {
          for (let face = 0; face < faces; face += 1) {
            for (let row = 0; row < rows; row += 1) {
              const cells = [];
              for (let i = 0; i < n; i += 1) cells.push(found.get(`${face} ${row} ${left + dx + w * (column + i)}`)[sign]);
              const match = cells.reduce((sum, [value]) => sum + value, 0) / n;
              if (match + known.longer * n > score) {
                score = match + known.longer * n;
                const text = cells.map(([, letter]) => known.letters[letter]).join("");
                result = { text, typeface: known.faces[face], match };
              }
            }
          }
        }
      }
    }
  }
  return result;
}

// The book's text score: 1 less the edit distance as a share of the longer text.
export function textScore(found, wanted) {
  let row = [...Array(wanted.length + 1).keys()];
  for (let i = 0; i < found.length; i += 1) {
    const next = [i + 1];
    for (let j = 0; j < wanted.length; j += 1) {
      next.push(Math.min(row[j] + (found[i] === wanted[j] ? 0 : 1), row[j + 1] + 1, next[j] + 1));
    }
    row = next;
  }
  return 1 - row[wanted.length] / Math.max(found.length, wanted.length, 1);
}
