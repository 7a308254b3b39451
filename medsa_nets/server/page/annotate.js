// The page of a session server: shows an image in three planes, and sends what is said of it (protocol of nnInteractive).
"use strict";

const element = (id) => document.getElementById(id);
const viewer = new niivue.Niivue({ show3Dcrosshair: true, dragAndDropEnabled: false });
const TYPES = {
  Uint8Array: "uint8", Int8Array: "int8", Uint16Array: "uint16", Int16Array: "int16", Uint32Array: "uint32",
  Int32Array: "int32", Float32Array: "float32", Float64Array: "float64",
};
const state = {
  key: "", token: "", volume: null, overlay: null, size: null, affine: null, inverse: null, payload: null,
  tool: "point", include: true, stroke: null, busy: Promise.resolve(), label: 1, object: null, names: {},
  labels: null, step: 1,
};
window.medsa = state;

function say(text) {
  element("status").textContent = text;
}

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}), "X-Array-Codec": "raw" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (state.token) headers["X-Lease-Token"] = state.token;
  const answer = await fetch(path, { method: "POST", ...options, headers });
  if (answer.status === 401 && !state.asked) {
    state.asked = true;
    state.key = window.prompt("The server's API key") || "";
    return call(path, options);
  }
  if (answer.ok) return answer;
  let detail = `${answer.status}`;
  try {
    detail = (await answer.json()).detail;
  } catch (error) { /* no JSON: the status has to do */ }
  throw Object.assign(new Error(detail), { status: answer.status });
}

const post = (path, body) =>
  call(path, { body: JSON.stringify(body || {}), headers: { "Content-Type": "application/json" } });

// An array as the protocol has it: header, shape, and one chunk that is not compressed.
function pack(values, shape) {
  const name = TYPES[values.constructor.name];
  const head = new DataView(new ArrayBuffer(8 + name.length + 8 * shape.length + 4 + 16));
  [0x4e, 0x4e, 0x49, 0x41, 1, 0, shape.length, name.length].forEach((byte, i) => head.setUint8(i, byte));
  let place = 8;
  for (const letter of name) head.setUint8(place++, letter.charCodeAt(0));
  for (const n of shape) { head.setBigInt64(place, BigInt(n), true); place += 8; }
  head.setUint32(place, 1, true);
  head.setBigUint64(place + 4, BigInt(values.byteLength), true);
  head.setBigUint64(place + 12, BigInt(values.byteLength), true);
  return new Blob([head.buffer, values]);
}

function unpack(buffer) {  // uint8, one chunk
  const view = new DataView(buffer);
  const dims = view.getUint8(6), start = 8 + view.getUint8(7);
  const shape = [];
  for (let i = 0; i < dims; i++) shape.push(Number(view.getBigInt64(start + 8 * i, true)));
  return { shape, values: new Uint8Array(buffer, start + 8 * dims + 4 + 16) };
}

// Files have the first axis fastest, the protocol the last one.
function turn(values, size, channels) {
  const [nx, ny, nz] = size, out = new values.constructor(values.length);
  let place = 0;
  for (let c = 0; c < channels; c++)
    for (let x = 0; x < nx; x++)
      for (let y = 0; y < ny; y++)
        for (let z = 0; z < nz; z++) out[place++] = values[((z * ny + y) * nx + x) * channels + c];
  return out;
}

function invert(m) {  // affine, rows
  const [[a, b, c, t], [d, e, f, u], [g, h, i, v]] = m;
  const det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g);
  const r = [[e * i - f * h, c * h - b * i, b * f - c * e], [f * g - d * i, a * i - c * g, c * d - a * f],
             [d * h - e * g, b * g - a * h, a * e - b * d]].map((row) => row.map((n) => n / det));
  return r.map((row) => [...row, -(row[0] * t + row[1] * u + row[2] * v)]);
}

const toVoxel = (mm) => state.inverse.map((row, axis) => Math.min(state.size[axis] - 1,
  Math.max(0, Math.round(row[0] * mm[0] + row[1] * mm[1] + row[2] * mm[2] + row[3]))));

const fileOf = (bytes, name) => new File([bytes], name);

async function readPhotograph(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height), context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const rgb = new Uint8Array((rgba.length / 4) * 3), size = [bitmap.width, bitmap.height, 1];
  for (let i = 0; i < rgba.length / 4; i++) for (let c = 0; c < 3; c++) rgb[3 * i + c] = rgba[4 * i + c];
  // Masks are drawn as textures in three dimensions, which are smaller than photographs may be: draw each step-th pixel.
  const step = Math.ceil(Math.max(...size) / viewer.gl.getParameter(viewer.gl.MAX_3D_TEXTURE_SIZE));
  const drawn = drawnSize(size, step), grey = new Uint8Array(drawn[0] * drawn[1]);
  for (let y = 0, place = 0; y < drawn[1]; y++)
    for (let x = 0; x < drawn[0]; x++, place++) {
      const [r, g, b] = rgba.subarray(4 * step * (y * size[0] + x));
      grey[place] = (r * 299 + g * 587 + b * 114) / 1000;
    }
  const affine = [[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]];
  const bytes = niivue.NVImage.createNiftiArray(drawn, [step, step, 1], enlarged(affine, step).flat(), 2, grey);
  const volume = await niivue.NVImage.loadFromFile({ file: fileOf(bytes, "photograph.nii"), name: "photograph.nii" });
  return { volume, size, affine, step, payload: pack(turn(rgb, size, 3), [3, ...size]), properties: {} };
}

async function readVolume(file) {
  const volume = await niivue.NVImage.loadFromFile({ file, name: file.name });
  const size = volume.hdr.dims.slice(1, 4);
  let values = volume.img;
  const slope = volume.hdr.scl_slope || 1, offset = volume.hdr.scl_inter || 0;
  if (slope !== 1 || offset !== 0) values = Float32Array.from(values, (value) => value * slope + offset);
  const count = size[0] * size[1] * size[2];
  if (!(values.constructor.name in TYPES) || values.length < count) throw new Error("this type of NIfTI is not known");
  const payload = pack(turn(values.subarray(0, count), size, 1), [1, ...size]);
  const affine = volume.hdr.affine.map((row) => Array.from(row));
  return { volume, size: Array.from(size), affine, step: 1, payload, properties: { affine } };
}

async function open(file) {
  say(`Reading ${file.name}`);
  const flat = /\.(png|jpe?g|bmp|webp)$/i.test(file.name);
  const read = await (flat ? readPhotograph(file) : readVolume(file));
  for (const old of [...viewer.volumes]) viewer.removeVolume(old);
  Object.assign(state, read, { label: 1, names: {}, inverse: invert(read.affine) });
  viewer.addVolume(read.volume);
  const drawn = drawnSize(state.size, state.step), affine = enlarged(state.affine, state.step);
  const bytes = niivue.NVImage.createNiftiArray(drawn, pixels(affine), affine.flat(), 2,
    new Uint8Array(drawn[0] * drawn[1] * drawn[2]));
  state.overlay = await niivue.NVImage.loadFromFile({ file: fileOf(bytes, "mask.nii"), name: "mask.nii",
    colormap: "red", opacity: 0.5, cal_min: 0.5, cal_max: 2 });
  viewer.addVolume(state.overlay);
  viewer.setSliceType(flat ? viewer.sliceTypeAxial : viewer.sliceTypeMultiplanar);
  state.object = new Uint8Array(state.size[0] * state.size[1] * state.size[2]);
  state.labels = new Uint8Array(state.object.length);
  await connect();
  say("Click on what you want to segment.");
}

const pixels = (affine) => [0, 1, 2].map((axis) => Math.hypot(...affine.slice(0, 3).map((row) => row[axis])));
// Size and affine of what is drawn, where each step-th row and column is.
const drawnSize = (size, step) => [Math.ceil(size[0] / step), Math.ceil(size[1] / step), size[2]];
const enlarged = (affine, step) => affine.map((row) => [row[0] * step, row[1] * step, row[2], row[3]]);

async function connect() {
  if (!state.token) state.token = (await (await post("claim")).json()).lease_token;
  const properties = { ...state.properties, class: element("class").value };
  await call("set_image", { body: state.payload, headers: { "X-Meta": JSON.stringify({ image_properties: properties }) } });
  await post("set_target_buffer", { shape: state.size, dtype: "uint8" });
}

// Put what changed into the mask; an object keeps its label, the newest one the label that is drawn brightest.
async function show(answer) {
  const meta = JSON.parse(answer.headers.get("X-Meta") || "{}");
  if (meta.bbox) {
    const { values } = unpack(await answer.arrayBuffer());
    const [[x0, x1], [y0, y1], [z0, z1]] = meta.bbox, [nx, ny] = state.size, step = state.step;
    const [mx, my] = drawnSize(state.size, step);
    let place = 0;
    for (let x = x0; x < x1; x++)
      for (let y = y0; y < y1; y++)
        for (let z = z0; z < z1; z++) {
          const voxel = (z * ny + y) * nx + x;
          state.object[voxel] = values[place++];
          if (state.object[voxel]) state.labels[voxel] = state.label;
          else if (state.labels[voxel] === state.label) state.labels[voxel] = 0;
          if (x % step === 0 && y % step === 0)
            state.overlay.img[(z * my + y / step) * mx + x / step] = state.labels[voxel];
        }
    viewer.updateGLVolume();
  }
  if (meta.class) state.names[state.label] = meta.class;
  const count = state.object.reduce((sum, value) => sum + value, 0);
  const rest = meta.complete === false ? " This is a part; 'Whole answer' brings the rest." : "";
  say(`${meta.class || "Object"} ${state.label}: ${count} voxels.${rest}`);
}

// One thing after the other; a session that is over is opened again, and what was done last is done again.
function act(work) {
  state.busy = state.busy.then(async () => {
    if (!state.volume) return;
    try {
      await work();
    } catch (error) {
      if (error.status !== 410) throw error;
      state.token = "";
      await connect();
      await work();
    }
  }).catch((error) => say(error.message));
  return state.busy;
}

function sendPoint(voxel, include) {
  say("Asking …");
  return act(async () => show(await post("add_point_interaction", {
    coordinates: voxel, include_interaction: include, run_prediction: true })));
}

function sendScribble(stroke, include) {
  const low = [0, 1, 2].map((axis) => Math.min(...stroke.map((voxel) => voxel[axis])));
  const shape = low.map((first, axis) => Math.max(...stroke.map((voxel) => voxel[axis])) - first + 1);
  const drawn = new Uint8Array(shape[0] * shape[1] * shape[2]);
  for (let i = 0; i < stroke.length; i++) {
    const from = stroke[Math.max(0, i - 1)], to = stroke[i];
    const steps = Math.max(1, ...to.map((n, axis) => Math.abs(n - from[axis])));
    for (let step = 0; step <= steps; step++) {
      const [x, y, z] = to.map((n, axis) => Math.round(from[axis] + ((n - from[axis]) * step) / steps) - low[axis]);
      drawn[(x * shape[1] + y) * shape[2] + z] = 1;
    }
  }
  const meta = { include_interaction: include, run_prediction: true,
    interaction_bbox: low.map((first, axis) => [first, first + shape[axis]]) };
  say("Asking …");
  return act(async () => show(await call("add_scribble_interaction",
    { body: pack(drawn, shape), headers: { "X-Meta": JSON.stringify(meta) } })));
}

function nextObject() {
  return act(async () => {
    await post("set_target_buffer", { shape: state.size, dtype: "uint8", class: element("class").value });
    if (state.object.some((value) => value)) state.label += 1;
    state.object = new Uint8Array(state.object.length);
    state.overlay.cal_max = state.label + 1;
    say(`Object ${state.label}: click on it.`);
  });
}

function labelMap() {
  return niivue.NVImage.createNiftiArray(state.size, pixels(state.affine), state.affine.flat(), 2, state.labels);
}

function download() {
  if (!state.volume) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([labelMap()], { type: "application/octet-stream" }));
  link.download = "segmentation.nii";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function choose(names, chosen, set) {
  for (const name of names)
    element(name).addEventListener("click", () => {
      for (const other of names) element(other).setAttribute("aria-pressed", String(other === name));
      set(name);
    });
  return chosen;
}

async function start() {
  await viewer.attachToCanvas(element("view"));
  viewer.onLocationChange = (place) => {
    if (state.stroke && state.volume) state.stroke.push(toVoxel(place.mm));
  };
  const canvas = element("view");
  canvas.addEventListener("pointerdown", (event) => { state.stroke = event.button === 0 ? [] : null; });
  canvas.addEventListener("pointerup", () => setTimeout(() => {
    const stroke = state.stroke;
    state.stroke = null;
    if (!stroke || !stroke.length) return;
    if (state.tool === "scribble") sendScribble(stroke, state.include);
    else sendPoint(stroke[stroke.length - 1], state.include);
  }, 0));
  choose(["point", "scribble"], "point", (name) => { state.tool = name; });
  choose(["include", "exclude"], "include", (name) => { state.include = name === "include"; });
  element("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) open(file).catch((error) => say(error.message));
  });
  element("undo").addEventListener("click", () => act(async () => show(await post("undo"))));
  element("whole").addEventListener("click", () => { say("Asking …"); act(async () => show(await post("predict"))); });
  element("next").addEventListener("click", nextObject);
  element("class").addEventListener("change", nextObject);
  element("download").addEventListener("click", download);
  setInterval(() => { if (state.token) post("heartbeat").catch(() => {}); }, 15000);
  window.addEventListener("pagehide", () => {
    if (!state.token) return;
    const headers = { "X-Lease-Token": state.token };
    if (state.key) headers.Authorization = `Bearer ${state.key}`;
    fetch("release", { method: "POST", keepalive: true, headers });
  });
  const known = await (await call("capabilities", { method: "GET" })).json();
  for (const name of known.classes) element("class").append(new Option(name, name));
  state.labelMap = labelMap;
  state.ready = true;
}

start().catch((error) => say(error.message));
