// LoRA and (IA)^3 for linear layers in Node, with nothing but Node, as a program that the suite can check:
//
//     python -m conformance --impl "cmd:node conformance/examples/node_adapters.mjs" --methods lora,ia3
//
// From top to bottom: safetensors, matrices, the two methods, a model with one adapter, and the loop of JSON lines.
// A port to another language has to write the same five parts.

import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import readline from "node:readline";

class Unsupported extends Error {} // the port does not claim it
class Rejected extends Error {} // refused on purpose: the input is wrong

// ---- safetensors: the header's length in 8 bytes, the header in JSON, the numbers in row-major order

const NUMBERS = { F64: Float64Array, F32: Float32Array, I64: BigInt64Array };

function readTensors(file) {
  let raw;
  try {
    raw = fs.readFileSync(file);
  } catch (error) {
    throw new Rejected(`${file} cannot be read: ${error.message}`);
  }
  const length = raw.length < 8 ? NaN : Number(raw.readBigUInt64LE(0));
  if (!(8 + length <= raw.length)) throw new Rejected(`${file} is no safetensors file: its header is cut off`);
  let header;
  try {
    header = JSON.parse(raw.toString("utf8", 8, 8 + length));
  } catch {
    throw new Rejected(`${file} is no safetensors file: its header is no JSON`);
  }
  const found = {};
  for (const [name, { dtype, shape, data_offsets: places }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const Numbers = NUMBERS[dtype];
    if (!Numbers) throw new Unsupported(`tensors of ${dtype}`);
    const [start, end] = places.map((place) => 8 + length + place);
    if (end > raw.length || end - start !== size(shape) * Numbers.BYTES_PER_ELEMENT)
      throw new Rejected(`${file}: the numbers of ${name} are cut off`);
    const copied = raw.buffer.slice(raw.byteOffset + start, raw.byteOffset + end); // at an aligned place
    found[name] = { shape, data: Float64Array.from(new Numbers(copied), Number) };
  }
  return found;
}

function writeTensors(file, tensors, dtype) {
  const header = {};
  let end = 0;
  for (const [name, { shape }] of Object.entries(tensors)) {
    const start = end;
    end += size(shape) * NUMBERS[dtype].BYTES_PER_ELEMENT;
    header[name] = { dtype, shape, data_offsets: [start, end] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (Buffer.byteLength(text) % 8)) % 8); // so that the numbers begin at a multiple of 8
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(Buffer.byteLength(text)));
  const numbers = Object.values(tensors).map(({ data }) => Buffer.from(NUMBERS[dtype].from(data).buffer));
  fs.writeFileSync(file, Buffer.concat([length, Buffer.from(text), ...numbers]));
}

// ---- matrices: {shape, data}, the last axis being the columns and all others together the rows

let rounded = (data) => data; // what the model's dtype leaves of float64 numbers; `build` sets it

const size = (shape) => shape.reduce((a, b) => a * b, 1);
const columns = (a) => a.shape.at(-1);
const rows = (a) => a.data.length / columns(a);
const matrix = (shape, at) => ({ shape, data: rounded(Float64Array.from({ length: size(shape) }, (_, i) => at(i))) });
const map = (a, f) => matrix(a.shape, (i) => f(a.data[i], i));
const plus = (a, b, factor = 1) => map(a, (v, i) => v + factor * b.data[i]);
const alongColumns = (a, v) => map(a, (x, i) => x * v.data[i % columns(a)]);
const transposed = (a) => matrix([columns(a), rows(a)], (i) => a.data[(i % rows(a)) * columns(a) + Math.floor(i / rows(a))]);

function times(a, b) { // a's leading axes stay
  const [inner, across] = [columns(a), columns(b)];
  return matrix([...a.shape.slice(0, -1), across], (i) => {
    const [row, column] = [Math.floor(i / across), i % across];
    let sum = 0;
    for (let k = 0; k < inner; k++) sum += a.data[row * inner + k] * b.data[k * across + column];
    return sum;
  });
}

const overRows = (a) => matrix([columns(a)], (j) => {
  let sum = 0;
  for (let i = j; i < a.data.length; i += columns(a)) sum += a.data[i];
  return sum;
});

function linear(x, W, b) {
  const y = times(x, transposed(W));
  return b ? map(y, (v, i) => v + b.data[i % columns(y)]) : y;
}

// ---- the methods. `t`: one layer's tensors by slot; `back` takes the output's gradient to the input's and the tensors'.

const METHODS = {
  LORA: {
    fields: ["r", "lora_alpha", "use_rslora"],
    live: { "lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight" },
    check({ r }) {
      if (!Number.isInteger(r) || r < 1) throw new Rejected(`r must be a positive integer, not ${JSON.stringify(r)}`);
    },
    scale: ({ r, lora_alpha = 8, use_rslora }) => lora_alpha / (use_rslora ? Math.sqrt(r) : r),
    fresh: ([out, into], { r }, layer, draw) => ({
      "lora_A.weight": matrix([r, into], () => (2 * draw() - 1) / Math.sqrt(into)),
      "lora_B.weight": matrix([out, r], () => 0),
    }),
    run(x, W, b, t, s) {
      return plus(linear(x, W, b), linear(linear(x, t["lora_A.weight"]), t["lora_B.weight"]), s);
    },
    back(x, g, W, b, t, s) {
      const [A, B] = [t["lora_A.weight"], t["lora_B.weight"]];
      const inside = times(g, B); // the gradient of A x, but for s
      const [flatX, flatG, flatInside] = [x, g, inside].map((a) => ({ ...a, shape: [rows(a), columns(a)] }));
      return { input: plus(times(g, W), times(inside, A), s), tensors: {
        "lora_A.weight": map(times(transposed(flatInside), flatX), (v) => s * v),
        "lora_B.weight": map(times(transposed(flatG), linear(flatX, A)), (v) => s * v),
      } };
    },
    merge: (W, b, t, s) => ({ W: plus(W, times(t["lora_B.weight"], t["lora_A.weight"]), s), b }),
  },
  IA3: {
    fields: ["feedforward_modules"],
    live: { ia3_l: "ia3_l.default" },
    check() {},
    scale: () => 1,
    // l has the shape (1, in) where it acts on the input, as in feed-forward layers, and (out, 1) on the output
    fresh: ([out, into], { feedforward_modules: inner = [] }, layer) => ({
      ia3_l: matrix(targets(inner, layer) ? [1, into] : [out, 1], () => 1),
    }),
    run(x, W, b, { ia3_l: l }) {
      return l.shape[0] === 1 ? linear(alongColumns(x, l), W, b) : alongColumns(linear(x, W, b), l);
    },
    back(x, g, W, b, { ia3_l: l }) {
      const onInput = l.shape[0] === 1;
      const inner = times(onInput ? g : alongColumns(g, l), W);
      const felt = onInput ? map(x, (v, i) => v * inner.data[i]) : map(linear(x, W, b), (v, i) => v * g.data[i]);
      return { input: onInput ? alongColumns(inner, l) : inner, tensors: { ia3_l: { ...overRows(felt), shape: l.shape } } };
    },
    merge: (W, b, { ia3_l: l }) => l.shape[0] === 1 ? { W: alongColumns(W, l), b } :
      { W: map(W, (v, i) => v * l.data[Math.floor(i / columns(W))]), b: b && alongColumns(b, l) },
  },
};

const targets = (wanted, layer) => wanted.some((name) => layer === name || layer.endsWith(`.${name}`));

function drawer(seed) { // numbers in [0, 1), the same for the same seed
  let state = seed >>> 0;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
}

// ---- the model: its public methods are the protocol's operations, its arguments come by name

const PREFIX = "base_model.model.";

class Model {
  info() {
    return { name: "node-adapters", version: "1", dtypes: ["float64", "float32"] };
  }

  build({ base, weights, config, dtype, seed = 0 }) {
    if (!base.layers) throw new Unsupported("layers only, no language models");
    for (const [name, kind] of base.layers) if (!["Linear", "Tanh"].includes(kind)) throw new Unsupported(`${name}: ${kind}`);
    if (!["float64", "float32"].includes(dtype)) throw new Unsupported(dtype);
    const method = config && METHODS[config.peft_type];
    if (config) {
      if (!method) throw new Unsupported(`no ${config.peft_type}`);
      const known = ["peft_type", "task_type", "inference_mode", "target_modules", ...method.fields];
      const set = ([field, v]) => field.startsWith("init_") ? v !== true : // on by default; all others are off
        v && v !== "none" && (typeof v !== "object" || Object.keys(v).length > 0);
      const extra = Object.entries(config).filter(set).map(([field]) => field).filter((field) => !known.includes(field));
      if (extra.length) throw new Unsupported(`no ${extra}`);
      if (!Array.isArray(config.target_modules)) throw new Unsupported("target_modules other than a list");
      method.check(config);
    }
    rounded = dtype === "float32" ? (data) => Float64Array.from(Float32Array.from(data)) : (data) => data;
    const [W, draw, adapter] = [{}, drawer(seed), {}];
    for (const [name, { shape, data }] of Object.entries(weights)) W[name] = matrix(shape, (i) => data[i]);
    for (const [name, kind] of config ? base.layers : [])
      if (kind === "Linear" && targets(config.target_modules, name))
        adapter[name] = method.fresh(W[`${name}.weight`].shape, config, name, draw);
    if (config && !Object.keys(adapter).length)
      throw new Rejected(`target_modules ${config.target_modules} match no layer of ${base.layers.map(([name]) => name)}`);
    Object.assign(this, { base, W, config, dtype, adapter, factor: 1, off: 0, before: null });
  }

  get method() {
    return METHODS[this.config.peft_type];
  }

  get strength() {
    return this.factor * this.method.scale(this.config);
  }

  saved() { // saved key -> [layer, slot]
    return Object.fromEntries(Object.entries(this.adapter).flatMap(([layer, t]) =>
      Object.keys(t).map((slot) => [`${PREFIX}${layer}.${slot}`, [layer, slot]])));
  }

  load({ tensors, name = "default" }) {
    if (name !== "default") throw new Unsupported("more than one adapter");
    const places = this.saved();
    const wrong = [...Object.keys(places).filter((key) => !(key in tensors)),
      ...Object.keys(tensors).filter((key) => !(key in places))];
    if (wrong.length) throw new Rejected(`missing or unexpected tensors: ${wrong}`);
    for (const [key, [layer, slot]] of Object.entries(places)) {
      const { shape } = this.adapter[layer][slot];
      if (`${tensors[key].shape}` !== `${shape}`) throw new Rejected(`${key}: shape ${tensors[key].shape}, not ${shape}`);
      if (!tensors[key].data.every(Number.isFinite)) throw new Rejected(`${key} holds numbers that are not finite`);
    }
    for (const [key, [layer, slot]] of Object.entries(places)) this.adapter[layer][slot] = map(tensors[key], (v) => v);
  }

  state_dict() {
    return Object.fromEntries(Object.entries(this.saved()).map(([key, [layer, slot]]) => [key, this.adapter[layer][slot]]));
  }

  acts(layer) {
    return layer in this.adapter && !this.off && !this.before;
  }

  forward({ inputs, adapter_names }, seen = []) { // `seen` gathers what each layer was given
    if (adapter_names) throw new Unsupported("mixed batches");
    if (this.off && this.before) throw new Unsupported("disabling what is merged");
    let x = map(inputs.x, (v) => v);
    for (const [name, kind] of this.base.layers) {
      seen.push(x);
      const [W, b] = [this.W[`${name}.weight`], this.W[`${name}.bias`]];
      if (kind === "Tanh") x = map(x, Math.tanh);
      else x = this.acts(name) ? this.method.run(x, W, b, this.adapter[name], this.strength) : linear(x, W, b);
    }
    return x;
  }

  gradients({ inputs, cotangent }) {
    const [seen, found] = [[], {}];
    this.forward({ inputs }, seen);
    let g = map(cotangent, (v) => v);
    for (const [name, kind] of [...this.base.layers].reverse()) {
      const [x, W, b] = [seen.pop(), this.W[`${name}.weight`], this.W[`${name}.bias`]];
      if (kind === "Tanh") g = map(g, (v, i) => v * (1 - Math.tanh(x.data[i]) ** 2));
      else if (!this.acts(name)) g = times(g, W);
      else {
        const { input, tensors } = this.method.back(x, g, W, b, this.adapter[name], this.strength);
        for (const [slot, t] of Object.entries(tensors)) found[`${PREFIX}${name}.${slot}`] = t;
        g = input;
      }
    }
    return { ...found, input: g };
  }

  train() {} // there is no dropout

  step({ inputs, cotangent, rate }) {
    const found = this.gradients({ inputs, cotangent });
    for (const [key, [layer, slot]] of Object.entries(this.saved()))
      this.adapter[layer][slot] = plus(this.adapter[layer][slot], found[key], -rate);
  }

  names() {
    const found = {};
    for (const key of Object.keys(this.W)) {
      const [, layer, last] = key.match(/(.*)\.([^.]*)/);
      found[this.config ? `${PREFIX}${layer}${layer in this.adapter ? ".base_layer" : ""}.${last}` : key] = false;
    }
    for (const [layer, t] of Object.entries(this.adapter))
      for (const slot of Object.keys(t)) found[`${PREFIX}${layer}.${this.method.live[slot]}`] = !this.config.inference_mode;
    return found;
  }

  count() {
    const total = (tensors) => Object.values(tensors).reduce((sum, { shape }) => sum + size(shape), 0);
    const own = total(this.state_dict());
    return [this.config?.inference_mode ? 0 : own, own + total(this.W)];
  }

  active() {
    return this.config ? ["default"] : [];
  }

  weights() {
    return this.W;
  }

  merge() {
    if (this.before) return;
    this.before = { ...this.W };
    for (const [layer, t] of Object.entries(this.adapter)) {
      const { W, b } = this.method.merge(this.W[`${layer}.weight`], this.W[`${layer}.bias`], t, this.strength);
      this.W[`${layer}.weight`] = W;
      if (b) this.W[`${layer}.bias`] = b;
    }
  }

  unmerge() {
    if (this.before) this.W = this.before;
    this.before = null;
  }

  unload({ merge }) {
    if (merge) this.merge();
    else this.unmerge();
    Object.assign(this, { adapter: {}, config: null, before: null, off: 0 });
  }

  disable({ off }) {
    this.off = Math.max(this.off + (off ? 1 : -1), 0);
  }

  scale({ factor }) {
    if (this.config.peft_type !== "LORA") throw new Unsupported("(IA)^3 has no scale");
    this.factor *= factor;
  }

  copy() {
    Object.assign(this, structuredClone({ ...this }));
  }

  save({ path: folder }) { // who loads a file does not train it, unless asked to
    fs.mkdirSync(folder, { recursive: true });
    const config = JSON.stringify({ ...this.config, inference_mode: true }, null, 2);
    fs.writeFileSync(path.join(folder, "adapter_config.json"), config);
    const dtype = this.dtype === "float64" ? "F64" : "F32";
    writeTensors(path.join(folder, "adapter_model.safetensors"), this.state_dict(), dtype);
  }

  restore({ path: folder, base, weights, dtype }) {
    let config;
    try {
      config = JSON.parse(fs.readFileSync(path.join(folder, "adapter_config.json"), "utf8"));
    } catch (error) {
      throw new Rejected(`adapter_config.json: ${error.message}`);
    }
    if (!METHODS[config?.peft_type]) throw new Rejected(`adapter_config.json: unknown peft_type ${config?.peft_type}`);
    const tensors = readTensors(path.join(folder, "adapter_model.safetensors"));
    this.build({ base, weights, config, dtype });
    this.load({ tensors });
  }
}

// ---- JSON lines: one request and one reply a line, tensors as paths of safetensors files

const isTensor = (value) => value?.data instanceof Float64Array;
const folder = fs.mkdtempSync(path.join(os.tmpdir(), "answers-")); // TMPDIR is the folder that the suite reads

function read(value) {
  const file = value?.tensors ?? value?.array;
  if (typeof file !== "string" || Object.keys(value).length !== 1) return value;
  const tensors = readTensors(file);
  fs.rmSync(file);
  return "array" in value ? tensors.array : tensors;
}

function write(value, file, dtype) {
  if (isTensor(value)) {
    writeTensors(file, { array: value }, dtype);
    return { array: file };
  }
  if (value && typeof value === "object" && Object.values(value).length && Object.values(value).every(isTensor)) {
    writeTensors(file, value, dtype);
    return { tensors: file };
  }
  return value ?? null;
}

const OPERATIONS = Object.getOwnPropertyNames(Model.prototype).filter((name) =>
  !["constructor", "method", "strength", "saved", "acts"].includes(name));
const model = new Model();
let number = 0;
for await (const line of readline.createInterface({ input: process.stdin })) {
  let reply;
  try {
    const { op, args = {} } = JSON.parse(line);
    if (!OPERATIONS.includes(op)) throw new Unsupported(op);
    const given = Object.fromEntries(Object.entries(args).map(([name, value]) => [name, read(value)]));
    const file = path.join(folder, `${number++}.safetensors`);
    reply = { ok: write(model[op](given), file, model.dtype === "float64" ? "F64" : "F32") };
  } catch (error) {
    if (error instanceof Unsupported) reply = { unsupported: error.message };
    else if (error instanceof Rejected) reply = { rejected: error.message };
    else reply = { error: error.stack };
  }
  process.stdout.write(JSON.stringify(reply) + "\n");
}
