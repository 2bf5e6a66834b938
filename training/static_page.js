// What the static page does: `settings` stands in front of this, and `window.held` has the files as base64.
"use strict";

const element = (name) => document.getElementById(name);
const bytes = async (name) =>
  new Uint8Array(await (await fetch(`data:application/octet-stream;base64,${window.held[name]}`)).arrayBuffer());
const text = async (name) => new TextDecoder().decode(await bytes(name));
const module = async (name) =>
  import(URL.createObjectURL(new Blob([await bytes(name)], { type: "text/javascript" })));
const say = (words, wrong = false) => {
  element("said").textContent = words;
  element("said").className = wrong ? "wrong" : "";
};

class Refused extends Error {}

async function load() {
  const [ort, { Tokenizer }] = await Promise.all([module("runtime"), module("tokenizers")]);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await bytes("wasm");
  // Rust writes a character by its number otherwise than JavaScript.
  const description = JSON.parse((await text("tokenizer")).replaceAll("\\\\x{17f}", "\\u017f"));
  const tokenizer = new Tokenizer(description, {});
  const vision = await ort.InferenceSession.create(await bytes("vision"));
  const words = await ort.InferenceSession.create(await bytes("text"));
  window.held = {};
  return { ort, tokenizer, vision, words };
}

// As the model's tokenizer cleans texts, but for what only ftfy knows (texts in a wrong encoding).
function cleaned(label) {
  const box = document.createElement("textarea");
  let words = label;
  for (let time = 0; time < 2; time++) {
    box.innerHTML = words.replaceAll("<", "&lt;");
    words = box.value;
  }
  words = words.replace(/[\u2018-\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"');
  words = words.replace(/[\ufb00-\ufb06\u0132\u0133]/g, (one) => one.normalize("NFKD"));
  return words.normalize("NFC").split(/\s+/).filter(Boolean).join(" ").toLowerCase();
}

function encoded(tokenizer, label) {
  const ids = tokenizer.encode(cleaned(label)).ids;
  return ids.length <= settings.context ? ids : [...ids.slice(0, settings.context - 1), settings.end];
}

const unit = (values) => {
  const length = Math.hypot(...values);
  return values.map((value) => value / length);
};

async function embeddedTexts(model, texts) {
  const found = [];
  for (let start = 0; start < texts.length; start += 16) {
    const rows = texts.slice(start, start + 16).map((one) => encoded(model.tokenizer, one));
    const width = Math.max(...rows.map((row) => row.length));
    const ids = new BigInt64Array(rows.length * width);
    const mask = new BigInt64Array(rows.length * width);
    rows.forEach((row, number) =>
      row.forEach((id, place) => {
        ids[number * width + place] = BigInt(id);
        mask[number * width + place] = 1n;
      }),
    );
    const given = { input_ids: ids, attention_mask: mask };
    const inputs = {};
    for (const name of model.words.inputNames)
      inputs[name] = new model.ort.Tensor("int64", given[name], [rows.length, width]);
    const result = (await model.words.run(inputs))[model.words.outputNames[0]];
    const size = result.dims[1];
    for (let row = 0; row < rows.length; row++)
      found.push(unit(Array.from(result.data.slice(row * size, (row + 1) * size))));
    if (texts.length > 64) say(`Reading the labels: ${Math.round((100 * (start + rows.length)) / texts.length)} %`);
    await new Promise((done) => setTimeout(done));
  }
  return found;
}

// Pillow's bicubic weights (a = -0.5), widened when a picture becomes smaller: for each new pixel the first old one, and
// as many weights as it reads.
function weights(old, made) {
  const scale = Math.max(old / made, 1);
  const cubic = (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
  };
  return Array.from({ length: made }, (_, place) => {
    const centre = ((place + 0.5) * old) / made;
    const first = Math.max(0, Math.trunc(centre - 2 * scale + 0.5));
    const last = Math.min(old, Math.trunc(centre + 2 * scale + 0.5));
    const raw = [];
    for (let at = first; at < last; at++) raw.push(cubic((at - centre + 0.5) / scale));
    const sum = raw.reduce((a, b) => a + b, 0);
    return [first, raw.map((one) => one / sum)];
  });
}

const pixel = (value) => Math.min(255, Math.max(0, Math.round(value)));

// RGB planes resized, rows first and rounded in between, as Pillow does it.
function resized(planes, width, height, newWidth, newHeight) {
  const across = weights(width, newWidth);
  const down = weights(height, newHeight);
  return planes.map((plane) => {
    const rows = new Uint8ClampedArray(newWidth * height);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < newWidth; x++) {
        const [first, shares] = across[x];
        let sum = 0;
        for (let n = 0; n < shares.length; n++) sum += shares[n] * plane[y * width + first + n];
        rows[y * newWidth + x] = pixel(sum);
      }
    const result = new Uint8ClampedArray(newWidth * newHeight);
    for (let y = 0; y < newHeight; y++) {
      const [first, shares] = down[y];
      for (let x = 0; x < newWidth; x++) {
        let sum = 0;
        for (let n = 0; n < shares.length; n++) sum += shares[n] * rows[(first + n) * newWidth + x];
        result[y * newWidth + x] = pixel(sum);
      }
    }
    return result;
  });
}

const halfToEven = (value) => {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
};

async function pixelValues(file) {
  let picture;
  try {
    picture = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Refused("This is no picture, or of a kind that this browser does not read.");
  }
  const { width, height } = picture;
  if (width * height > 50e6) throw new Refused("This picture is too large: at most 50 million pixels are taken here.");
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const data = context.getImageData(0, 0, width, height).data;
  let planes = [0, 1, 2].map((channel) => {
    const plane = new Uint8ClampedArray(width * height);
    for (let n = 0; n < plane.length; n++) plane[n] = data[4 * n + channel];
    return plane;
  });
  const long = Math.trunc((settings.size * Math.max(width, height)) / Math.min(width, height));
  const [newHeight, newWidth] = height <= width ? [settings.size, long] : [long, settings.size];
  planes = resized(planes, width, height, newWidth, newHeight);
  const [tall, wide] = settings.crop;
  const [top, left] = [halfToEven((newHeight - tall) / 2), halfToEven((newWidth - wide) / 2)];
  const values = new Float32Array(3 * tall * wide);
  planes.forEach((plane, channel) => {
    for (let y = 0; y < tall; y++)
      for (let x = 0; x < wide; x++)
        values[(channel * tall + y) * wide + x] =
          (plane[(top + y) * newWidth + left + x] / 255 - settings.mean[channel]) / settings.std[channel];
  });
  return values;
}

function labelsOf(words) {
  const labels = words.trim().split("\n").map((line) => line.split(/\s+/).filter(Boolean).join(" "));
  if (!labels[0]) throw new Refused("There are no labels yet: write at least one, each on a line of its own.");
  if (labels.length > 1000) throw new Refused(`These are ${labels.length} labels, and the page takes 1000.`);
  labels.forEach((label, number) => {
    if (!label) throw new Refused(`Line ${number + 1} of the labels is empty.`);
    if (label.length > 500) throw new Refused(`The label on line ${number + 1} has more than 500 characters.`);
    if (labels.indexOf(label) !== number) throw new Refused(`The label “${label}” stands there twice.`);
  });
  return labels;
}

async function classified(model, file, labels, templates) {
  const pixels = await pixelValues(file);
  const [tall, wide] = settings.crop;
  const given = { [model.vision.inputNames[0]]: new model.ort.Tensor("float32", pixels, [1, 3, tall, wide]) };
  const picture = unit(Array.from((await model.vision.run(given))[model.vision.outputNames[0]].data));
  const texts = labels.flatMap((label) => templates.map((one) => one.replace("{}", () => label)));
  const embedded = await embeddedTexts(model, texts);
  const logits = labels.map((_, number) => {
    const own = embedded.slice(number * templates.length, (number + 1) * templates.length);
    const mean = unit(own[0].map((_, place) => own.reduce((sum, one) => sum + one[place], 0)));
    return settings.scale * mean.reduce((sum, value, place) => sum + value * picture[place], 0);
  });
  const most = Math.max(...logits);
  const shares = logits.map((logit) => Math.exp(logit - most));
  const sum = shares.reduce((a, b) => a + b, 0);
  return labels.map((label, number) => [label, shares[number] / sum]).sort((a, b) => b[1] - a[1]);
}

function show(rows) {
  element("bars").replaceChildren(
    ...rows.slice(0, 12).map(([label, share]) => {
      const row = document.createElement("li");
      const [name, percent, bar] = ["span", "span", "i"].map((kind) => document.createElement(kind));
      name.textContent = label;
      percent.textContent = `${(100 * share).toFixed(1)} %`;
      percent.dataset.share = share;
      bar.style.width = `${100 * share}%`;
      row.append(name, percent, bar);
      return row;
    }),
  );
}

async function start() {
  const model = await load().catch((error) => {
    console.error(error);
    say("The model could not be read in this browser.", true);
    return null;
  });
  if (!model) return;
  element("classify").disabled = false;
  say("");
  element("file").addEventListener("change", () => {
    const [file] = element("file").files;
    element("shown").hidden = !file;
    if (file) element("shown").src = URL.createObjectURL(file);
    element("bars").replaceChildren();
  });
  element("classify").addEventListener("click", async () => {
    element("classify").disabled = true;
    element("bars").replaceChildren();
    say("Working …");
    try {
      const [file] = element("file").files;
      if (!file) throw new Refused("There is no picture yet: choose one.");
      const templates = element("templates").checked ? settings.templates : ["{}"];
      show(await classified(model, file, labelsOf(element("labels").value), templates));
      say("");
    } catch (error) {
      if (!(error instanceof Refused)) console.error(error);
      say(error instanceof Refused ? error.message : "Something went wrong; the browser's console has it.", true);
    }
    element("classify").disabled = false;
  });
}

start();
