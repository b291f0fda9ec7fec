// The page: an upload, and then what is shown of the answer. Threshold, classes and layers are
// applied here, so that none of them asks the server again.

import { colour, paint } from "./draw.js";

const byId = (id) => document.getElementById(id);
const layers = ["boxes", "masks", "labels"];

let model = null;    // what /model says
let picture = null;  // ImageBitmap, upright
let name = "";       // of the file
let answer = null;   // what /predict says
let marked = null;   // detection under the pointer in the table
let request = null;  // AbortController of the upload under way

// --- state -------------------------------------------------------------------------------------

function setState(state, status, error = "") {
  document.body.dataset.state = state;
  byId("status").textContent = status;
  byId("error").textContent = error;
  byId("error").hidden = !error;
  for (const part of byId("panel").querySelectorAll("button, input")) part.disabled = state !== "done";
}

function least() {
  return Number(byId("threshold").value) / 100;
}

function wanted() {
  const boxes = [...byId("classes").querySelectorAll("input")];
  return new Set(boxes.filter((box) => box.checked).map((box) => box.value));
}

function shown() {
  const classes = wanted();
  return answer.detections.filter((each) => each.score >= least() && classes.has(each.class));
}

// --- showing -----------------------------------------------------------------------------------

function what() {
  return Object.fromEntries(layers.map((id) => [id, byId(id).checked]));
}

function draw() {
  if (!answer) return;
  const canvas = byId("canvas");
  const room = canvas.parentElement.clientWidth;
  const height = Math.max(320, window.innerHeight - 120);
  const fit = Math.min(room / picture.width, height / picture.height, 8);
  const dense = window.devicePixelRatio || 1;
  paint(canvas, picture, shown(), what(), fit * dense, marked);
  canvas.style.width = `${canvas.width / dense}px`;
}

function refresh() {
  byId("least").textContent = `${byId("threshold").value} %`;
  if (!answer) return;
  const list = shown();
  draw();
  const counts = new Map();
  for (const each of list) counts.set(each.class, (counts.get(each.class) || 0) + 1);
  const words = [...counts].map(([label, count]) => `${count} ${label}`).join(", ");
  const text = `${list.length} of ${answer.detections.length} detections shown`;
  byId("status").textContent = text + (words ? `: ${words}.` : ".");
  byId("canvas").setAttribute("aria-label", `${name}: ${words || "nothing"}`);
  for (const place of byId("classes").querySelectorAll("span")) {
    const inReach = answer.detections.filter((e) => e.class === place.dataset.of && e.score >= least());
    place.textContent = String(inReach.length);
  }
  byId("rows").replaceChildren(...list.map(row));
}

function row(each) {
  const line = document.createElement("tr");
  const cells = [each.class, `${Math.round(100 * each.score)} %`, each.bbox.map((v) => v.toFixed(0)).join(", ")];
  for (const text of cells) {
    const cell = document.createElement("td");
    cell.textContent = text;
    line.append(cell);
  }
  line.addEventListener("pointerenter", () => { marked = each; draw(); });
  line.addEventListener("pointerleave", () => { marked = null; draw(); });
  return line;
}

function listClasses() {
  const names = [...new Set(answer.detections.map((each) => each.class))];
  names.sort((a, b) => model.classes.indexOf(a) - model.classes.indexOf(b));
  byId("classes").replaceChildren(...names.map((text) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", value: text, checked: true });
    box.addEventListener("change", refresh);
    const patch = document.createElement("i");
    patch.style.background = colour(model.classes.indexOf(text));
    const count = document.createElement("span");
    count.dataset.of = text;
    label.append(box, patch, text, count);
    return label;
  }));
}

// --- asking ------------------------------------------------------------------------------------

async function open(file) {
  if (!file || !model) return;
  request?.abort();
  request = new AbortController();
  const mine = request;
  setState("working", `Looking at ${file.name} ...`);
  try {
    const found = await ask(file, mine.signal);
    // The browser turns a JPEG by its EXIF data as the server did; of other formats the server
    // sends the picture along.
    const bitmap = await createImageBitmap(found.picture ? fromBase64(found.picture) : file);
    if (mine.signal.aborted) return;
    if (bitmap.width !== found.width || bitmap.height !== found.height)
      throw new Error("This browser shows the picture in another orientation than it was looked at.");
    [answer, picture, name, marked] = [found, bitmap, file.name, null];
    for (const each of answer.detections) each.index = model.classes.indexOf(each.class);
    setState("done", "");
    listClasses();
    refresh();
  } catch (error) {
    if (mine.signal.aborted) return;
    setState(answer ? "done" : "failed", answer ? `${name} is still shown.` : "", error.message);
  }
}

async function ask(file, signal) {
  if (file.size > model.max_bytes)
    throw new Error(`The file is too large: ${megabytes(model.max_bytes)} at most.`);
  let response;
  try {
    response = await fetch("/predict", { method: "POST", body: file, signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

function fromBase64(text) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
}

function megabytes(bytes) {
  return `${Number((bytes / 2 ** 20).toPrecision(3))} MiB`;
}

// --- saving ------------------------------------------------------------------------------------

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name.replace(/\.[^.]*$/, "") + suffix;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePicture() {
  const canvas = document.createElement("canvas");
  // small pictures are enlarged, so that labels do not cover the objects
  const scale = Math.max(1, Math.ceil(640 / Math.min(picture.width, picture.height)));
  paint(canvas, picture, shown(), what(), scale);
  canvas.toBlob((blob) => save(blob, "_detections.png"), "image/png");
}

// COCO's format for annotations, with a score each.
function saveJson() {
  const image = { id: 1, file_name: name, width: answer.width, height: answer.height };
  const annotations = shown().map((each, place) => ({
    id: place + 1, image_id: 1, category_id: each.category_id, bbox: each.bbox, area: each.area,
    ...(each.segmentation ? { segmentation: each.segmentation } : {}), iscrowd: 0, score: each.score,
  }));
  const categories = model.classes.map((text, place) => ({ id: model.class_ids[place], name: text }));
  const info = { description: `vitdet, ${model.name}, score at least ${least()}` };
  const content = JSON.stringify({ info, images: [image], annotations, categories }, null, 1);
  save(new Blob([content], { type: "application/json" }), "_detections.json");
}

// --- controls ----------------------------------------------------------------------------------

byId("file").addEventListener("change", (event) => {
  open(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") open(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) open(event.clipboardData.files[0]);
});
byId("threshold").addEventListener("input", refresh);
for (const id of layers) byId(id).addEventListener("change", draw);
for (const [id, checked] of [["all", true], ["none", false]])
  byId(id).addEventListener("click", () => {
    for (const box of byId("classes").querySelectorAll("input")) box.checked = checked;
    refresh();
  });
byId("save-picture").addEventListener("click", savePicture);
byId("save-json").addEventListener("click", saveJson);
window.addEventListener("resize", draw);

setState("empty", "No picture yet.");
model = await (await fetch("/model")).json();
byId("about").textContent = `${model.name}, ${model.classes.length} classes, on ${model.device}`;
byId("limits").textContent =
  `JPEG, PNG, WebP or BMP, up to ${megabytes(model.max_bytes)} and ${model.max_pixels / 1e6} megapixels. ` +
  "It stays on the machine that serves this page.";
document.body.dataset.ready = "yes";
