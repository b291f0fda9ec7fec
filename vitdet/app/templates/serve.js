// The page: an upload, and what is shown of the answer. Threshold, classes and layers are applied
// here, so that none of them asks the server again.

const byId = (id) => document.getElementById(id);
const controls = () => [...document.querySelectorAll("aside input, aside button")];
const classBoxes = () => [...byId("classes").querySelectorAll("input")];

let model = null;    // what /model says
let picture = null;  // ImageBitmap, upright
let name = "";       // of the file
let answer = null;   // what /predict says
let moved = false;   // the threshold, by hand: one for all classes
let request = null;  // AbortController of the upload under way

function setState(state, status, error = "") {
  document.body.dataset.state = state;
  byId("status").textContent = status;
  byId("error").textContent = error;
  byId("error").hidden = !error;
  for (const each of controls()) each.disabled = state !== "done";
}

function least() {
  return Number(byId("threshold").value) / 100;
}

function shown() {
  const classes = new Set(classBoxes().filter((box) => box.checked).map((box) => box.value));
  const enough = (each) => each.score >= (moved ? least() : model.thresholds[model.classes.indexOf(each.class)]);
  return answer.detections.filter((each) => enough(each) && classes.has(each.class));
}

// --- drawing -----------------------------------------------------------------------------------

// Steps of the golden section keep the hues of neighbouring classes far apart.
function colour(label, alpha = 1) {
  return `hsl(${(0.6180339887 * model.classes.indexOf(label) % 1) * 360} 88% 52% / ${alpha})`;
}

// Draws the picture, `scale` times as large, and the detections, the best on top.
function paint(canvas, scale) {
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const pen = canvas.getContext("2d");
  const side = Math.min(canvas.width, canvas.height);
  pen.imageSmoothingEnabled = scale < 3;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  for (const each of shown().reverse()) {
    pen.strokeStyle = colour(each.class);
    pen.fillStyle = colour(each.class, 0.42);
    pen.lineWidth = Math.max(2, side / 230);
    if (byId("masks").checked && each.outlines) {
      const path = new Path2D(); // lines inside others are holes
      for (const line of each.outlines) {
        for (let i = 0; i < line.length; i += 2) path.lineTo(scale * line[i], scale * line[i + 1]);
        path.closePath();
      }
      pen.fill(path, "evenodd");
      pen.stroke(path);
    }
    if (byId("boxes").checked) pen.strokeRect(...each.bbox.map((value) => value * scale));
  }
  if (byId("labels").checked) drawLabels(pen, scale, Math.max(12, side / 38));
}

function drawLabels(pen, scale, size) {
  const taken = []; // rectangles, so that the next ones go below
  pen.font = `600 ${size}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  for (const each of shown()) {
    const text = `${each.class} ${Math.round(100 * each.score)} %`;
    const width = pen.measureText(text).width + 0.7 * size, height = 1.4 * size;
    const x = Math.max(0, Math.min(each.bbox[0] * scale, pen.canvas.width - width));
    let y = Math.max(0, each.bbox[1] * scale - height);
    const covers = (o) => x < o.x + o.width && o.x < x + width && y < o.y + height && o.y < y + height;
    for (let moves = 0; moves < 5 && taken.some(covers); moves++) y += height;
    taken.push({ x, y, width });
    pen.fillStyle = "#10161dd9";
    pen.fillRect(x, y, width, height);
    pen.fillStyle = colour(each.class);
    pen.fillRect(x, y, 0.22 * size, height);
    pen.fillStyle = "#fff";
    pen.fillText(text, x + 0.45 * size, y + height / 2);
  }
}

function draw() {
  if (!answer) return;
  const canvas = byId("canvas"), dense = window.devicePixelRatio || 1;
  const height = Math.max(320, window.innerHeight - canvas.offsetTop - 20);
  const fit = Math.min(canvas.parentElement.clientWidth / picture.width, height / picture.height, 8);
  paint(canvas, fit * dense);
  canvas.style.width = `${canvas.width / dense}px`;
}

// --- showing -----------------------------------------------------------------------------------

function made(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

function refresh() {
  const mixed = !moved && new Set(model.thresholds).size > 1;
  byId("least").textContent = `${byId("threshold").value} %${mixed ? " (its own for each class)" : ""}`;
  if (!answer) return;
  const list = shown(), counts = new Map();
  for (const each of list) counts.set(each.class, (counts.get(each.class) || 0) + 1);
  const words = [...counts].map(([label, count]) => `${count} ${label}`).join(", ");
  const text = `${list.length} of ${answer.detections.length} detections shown`;
  byId("status").textContent = text + (words ? `: ${words}.` : ".");
  byId("canvas").setAttribute("aria-label", `${name}: ${words || "nothing"}`);
  const rows = list.map((each) => [each.class, `${Math.round(100 * each.score)} %`, each.bbox.map(Math.round).join(", ")]);
  byId("rows").replaceChildren(...rows.map((cells) => made("tr", ...cells.map((cell) => made("td", cell)))));
  draw();
}

function listClasses() {
  const names = model.classes.filter((label) => answer.detections.some((each) => each.class === label));
  byId("classes").replaceChildren(...names.map((label) => {
    const box = document.createElement("input"), patch = document.createElement("i");
    Object.assign(box, { type: "checkbox", value: label, checked: true, onchange: refresh });
    patch.style.background = colour(label);
    return made("label", box, patch, label);
  }));
}

// --- asking ------------------------------------------------------------------------------------

async function open(file) {
  if (!file || !model) return;
  request?.abort();
  const mine = request = new AbortController();
  setState("working", `Looking at ${file.name} ...`);
  try {
    const found = await ask(file, mine.signal);
    // Browsers differ about EXIF's orientations: then the server sends the upright picture along.
    const sent = atob(found.picture || "");
    const bytes = Uint8Array.from(sent, (letter) => letter.charCodeAt(0));
    const bitmap = await createImageBitmap(sent ? new Blob([bytes]) : file);
    if (mine.signal.aborted) return;
    [answer, picture, name] = [found, bitmap, file.name];
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
  const response = await fetch("predict", { method: "POST", body: file, signal }).catch(() => {
    throw new Error("The server does not answer. Is it still running?");
  });
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
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
  paint(canvas, Math.max(1, Math.ceil(640 / Math.min(picture.width, picture.height))));
  canvas.toBlob((blob) => save(blob, "_detections.png"), "image/png");
}

// COCO's format for annotations, with a score each.
function saveJson() {
  const image = { id: 1, file_name: name, width: answer.width, height: answer.height };
  const annotations = shown().map(({ class: _, outlines, ...each }, place) => ({ id: place + 1, image_id: 1, iscrowd: 0, ...each }));
  const categories = model.classes.map((label, place) => ({ id: model.class_ids[place], name: label }));
  const info = { description: `vitdet, ${model.name}, score at least ${moved ? least() : [...new Set(model.thresholds)].join(", ")}` };
  save(new Blob([JSON.stringify({ info, images: [image], annotations, categories }, null, 1)]), "_detections.json");
}

// --- controls ----------------------------------------------------------------------------------

byId("file").onchange = (event) => {
  open(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
};
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") open(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => open(event.clipboardData.files[0]));
byId("threshold").oninput = () => {
  moved = true;
  refresh();
};
for (const id of ["boxes", "masks", "labels"]) byId(id).onchange = draw;
for (const id of ["all", "none"])
  byId(id).onclick = () => {
    for (const box of classBoxes()) box.checked = id === "all";
    refresh();
  };
byId("save-picture").onclick = savePicture;
byId("save-json").onclick = saveJson;
window.onresize = draw;

setState("empty", "No picture yet.");
model = await (await fetch("model")).json();
byId("threshold").value = Math.round(100 * model.threshold);
refresh();
byId("about").textContent = `${model.name}, ${model.classes.length} classes, on ${model.device}`;
byId("limits").textContent =
  `JPEG, PNG, WebP or BMP, up to ${megabytes(model.max_bytes)} and ${model.max_pixels / 1e6} megapixels. ` +
  "It stays on the machine that serves this page.";
document.body.dataset.ready = "yes";
