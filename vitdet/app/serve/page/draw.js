// Draws detections over their picture. Everything is in pixels of the picture, upright.

// Steps of the golden section keep the hues of neighbouring classes far apart.
export function colour(index, alpha = 1) {
  const hue = (0.6180339887 * index % 1) * 360;
  return `hsl(${hue} 88% 52% / ${alpha})`;
}

// One path of a mask; lines inside others are holes ("evenodd").
function maskPath(outlines) {
  const path = new Path2D();
  for (const line of outlines) {
    path.moveTo(line[0], line[1]);
    for (let i = 2; i < line.length; i += 2) path.lineTo(line[i], line[i + 1]);
    path.closePath();
  }
  return path;
}

// Draws the picture and the detections, the best on top.
//   canvas     is given the size of the picture times `scale`
//   picture    an ImageBitmap
//   shown      detections as the server gives them, with `index` of their class
//   what       {boxes, masks, labels}: whether to draw each
//   marked     the detection to point out, or null
export function paint(canvas, picture, shown, what, scale, marked = null) {
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = scale < 3;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const width = Math.max(1.5, Math.min(canvas.width, canvas.height) / 320); // of lines
  for (const each of [...shown].reverse()) {
    const dim = marked !== null && marked !== each;
    pen.globalAlpha = dim ? 0.25 : 1;
    if (what.masks && each.outlines) {
      pen.save();
      pen.scale(scale, scale);
      const path = maskPath(each.outlines);
      pen.fillStyle = colour(each.index, 0.42);
      pen.fill(path, "evenodd");
      pen.strokeStyle = colour(each.index);
      pen.lineWidth = width / scale;
      pen.stroke(path);
      pen.restore();
    }
    if (what.boxes) {
      pen.strokeStyle = colour(each.index);
      pen.lineWidth = width * (marked === each ? 2.4 : 1.4);
      pen.strokeRect(...each.bbox.map((value) => value * scale));
    }
  }
  const taken = []; // rectangles of labels, so that the next ones go below
  if (what.labels) for (const each of shown) label(pen, canvas, each, scale, marked, taken);
  pen.globalAlpha = 1;
}

function label(pen, canvas, each, scale, marked, taken) {
  const size = Math.max(12, Math.min(canvas.width, canvas.height) / 38);
  const text = `${each.class} ${Math.round(100 * each.score)} %`;
  pen.globalAlpha = marked !== null && marked !== each ? 0.25 : 1;
  pen.font = `600 ${size}px system-ui, sans-serif`;
  const width = pen.measureText(text).width + 0.7 * size;
  const height = 1.4 * size;
  const x = Math.max(0, Math.min(each.bbox[0] * scale, canvas.width - width));
  const above = each.bbox[1] * scale - height;
  let y = Math.max(0, above);
  const covers = (other) =>
    x < other.x + other.width && other.x < x + width && y < other.y + height && other.y < y + height;
  for (let moves = 0; moves < 5 && taken.some(covers); moves++) y += height;
  taken.push({ x, y, width });
  pen.fillStyle = "#10161dd9";
  pen.fillRect(x, y, width, height);
  pen.fillStyle = colour(each.index);
  pen.fillRect(x, y, 0.22 * size, height);
  pen.fillStyle = "#fff";
  pen.textBaseline = "middle";
  pen.fillText(text, x + 0.45 * size, y + height / 2 + 0.04 * size);
}
