"use strict";
(() => {
  const data = JSON.parse(document.getElementById("pixels").textContent);
  const kinds = { uint8: [1, "getUint8"], uint16: [2, "getUint16"], int16: [2, "getInt16"], int32: [4, "getInt32"] };

  // Numbers of one pixel of a layer; null where nothing is known.
  const readers = {};
  for (const [name, layer] of Object.entries(data.layers)) {
    const bytes = Uint8Array.from(atob(layer.data), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const [width, get] = kinds[layer.type];
    readers[name] = (pixel) => {
      const values = [];
      for (let place = 0; place < layer.per; place++) {
        const number = view[get]((pixel * layer.per + place) * width, true);
        if (number === layer.missing) return null;
        values.push(number * layer.step);
      }
      return values;
    };
  }

  const words = (row, column) => {
    const pixel = row * data.columns + column;
    const read = (name) => (name in readers ? readers[name](pixel) : null);
    const place = `row ${row}, column ${column}`;
    const known = data.unit === "px" ? "" : `   (${(column * data.step[1]).toPrecision(4)}, ${(row * data.step[0]).toPrecision(4)} ${data.unit})`;
    const euler = read("euler");
    if (euler === null) return `${place}${known}\nnot indexed`;
    const lines = [place + known, data.phases[read("phase")[0]]];
    lines.push(`φ₁ ${euler[0].toFixed(1)}°  Φ ${euler[1].toFixed(1)}°  φ₂ ${euler[2].toFixed(1)}°`);
    const explained = read("explained_intensity");
    lines.push(`confidence ${read("confidence")[0].toFixed(2)}` + (explained ? `, explained ${explained[0].toFixed(2)}` : ""));
    const grain = read("grain");
    if ("grain" in readers) lines.push(grain ? `grain ${grain[0]}` : "no grain");
    const angles = [];
    for (const name of ["kam", "grod"]) {
      const angle = read(name);
      if (angle) angles.push(`${name.toUpperCase()} ${angle[0].toFixed(2)}°`);
    }
    if (angles.length) lines.push(angles.join(", "));
    const second = read("second");
    if (second) lines.push(`second crystal ${(100 * second[0]).toFixed(0)} %`);
    return lines.join("\n");
  };

  const tip = document.getElementById("tip");
  const maps = [...document.querySelectorAll(".map")];
  let held = false;

  const hide = () => {
    tip.hidden = true;
    for (const map of maps) map.querySelector("b").style.display = "none";
  };

  const show = (map, event) => {
    const box = map.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * data.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * data.rows);
    if (row < 0 || column < 0 || row >= data.rows || column >= data.columns) return;
    tip.textContent = words(row, column);
    tip.hidden = false;
    const right = event.clientX + 18 + tip.offsetWidth > window.innerWidth;
    const below = event.clientY + 18 + tip.offsetHeight > window.innerHeight;
    tip.style.left = `${right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 18}px`;
    tip.style.top = `${below ? event.clientY - 14 - tip.offsetHeight : event.clientY + 18}px`;
    for (const other of maps) {
      const mark = other.querySelector("b").style;
      mark.display = "block";
      mark.left = `${(100 * (column + 0.5)) / data.columns}%`;
      mark.top = `${(100 * (row + 0.5)) / data.rows}%`;
      mark.width = `${100 / data.columns}%`;
      mark.height = `${100 / data.rows}%`;
    }
  };

  for (const map of maps) {
    map.addEventListener("pointermove", (event) => { if (!held) show(map, event); });
    map.addEventListener("pointerleave", () => { if (!held) hide(); });
    map.addEventListener("click", (event) => { held = !held; show(map, event); });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { held = false; hide(); } });
  document.getElementById("all").addEventListener("change", (event) => document.body.classList.toggle("all", event.target.checked));
})();
