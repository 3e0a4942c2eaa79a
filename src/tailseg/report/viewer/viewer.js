"use strict";
(() => {
  const $ = (name) => document.getElementById("tsv-" + name);
  const page = JSON.parse($("data").textContent);
  const WHOLE = [0, 0, 0, 1]; // of the slices: mm to move them by, and their scale
  const VIEWS = { axial: 0, coronal: 1, sagittal: 2, multiplanar: 3, render: 4 };
  // labels of the disagreement; classes end below them
  const MISSED = 251, EXTRA = 252, SWAPPED = 253;
  const ERRORS = [
    [MISSED, "#2f9bff", "missed: in the reference alone"],
    [EXTRA, "#ff9500", "too much: in the prediction alone"],
    [SWAPPED, "#f050d0", "mixed up: another class in the reference"],
  ];
  const everyClass = page.classes.map((_, index) => index + 1);

  const visible = new Set(everyClass);
  let found = 0; // the class that is shown alone, 0: none
  let nv = null;
  let scan = null; // {facts, shape, prediction, reference, field}: the one case in memory
  let wanted = 0; // counts requests, so that a case that was left before its turn is not opened
  let queue = Promise.resolve();

  const chosen = (name) => document.querySelector(`input[name="tsv-${name}"]:checked`).value;
  const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const swatch = (colour) => {
    const made = element("span", { className: "tsv-swatch" });
    made.style.backgroundColor = colour;
    return made;
  };

  function giveUp(sentence) {
    $("trouble").textContent = sentence;
    $("trouble").hidden = false;
    for (const name of ["controls", "body", "keys"]) $(name).hidden = true;
  }

  async function inflate(id) {
    const text = atob($(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  }

  async function loadNiivue() {
    const source = new Blob([await inflate("niivue")], { type: "text/javascript" });
    const url = URL.createObjectURL(source);
    await new Promise((resolve, reject) => {
      document.head.append(element("script", { src: url, onload: resolve, onerror: reject }));
    });
    URL.revokeObjectURL(url);
    return globalThis.niivue;
  }

  function colourTable() {
    const colours = [...page.colours.map((colour, index) => [index + 1, colour]), ...ERRORS];
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0] };
    for (const [label, colour] of colours) {
      const [red, green, blue] = channels(colour);
      table.I.push(label);
      table.R.push(red);
      table.G.push(green);
      table.B.push(blue);
      table.A.push(255);
    }
    return table;
  }

  async function start() {
    const { Niivue } = await loadNiivue();
    const made = new Niivue({
      sliceType: VIEWS[chosen("view")],
      logLevel: "error",
      dragAndDropEnabled: false,
      isRadiologicalConvention: true, // seen from the feet, as scans are read
      show3Dcrosshair: true,
      crosshairColor: [1, 1, 1, 1],
      crosshairWidthUnit: "mm",
      crosshairGap: 14, // half widths
      clipPlaneColor: [0, 0, 0, 0],
      fontColor: [0.85, 0.85, 0.85, 1],
      multiplanarForceRender: true,
      tileMargin: 2,
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
    });
    await made.attachToCanvas($("canvas"));
    nv = made;
    nv.drawRimOpacity = 1; // an organ of a few voxels is nearly all rim
    nv.setDrawColormap(colourTable());
    nv.setClipPlane([-1, 0, 0]); // cuts the whole scan away in 3D, where it would hide the organs; they are not cut
    nv.onLocationChange = (place) => describe(place.vox);
    $("canvas").addEventListener("webglcontextlost", () => giveUp("The graphics card took the 3D view away. Reload the page."));
  }

  /** One after the other, the viewer first; whoever only passed by in the list is left out. */
  function inTurn(task) {
    const request = ++wanted;
    $("loading").textContent = "Opening …";
    queue = queue.then(() => (request === wanted || task === start) && task()).catch(onTrouble);
  }

  async function openCase() {
    if (!nv) return; // it did not start, and has said so
    const number = $("case").value;
    const facts = page.cases[number];
    const volumes = {};
    for (const name of ["image", ...Object.keys(facts.voxels)]) volumes[name] = await inflate(`${number}-${name}`);
    scan = null;
    while (nv.volumes.length) nv.removeVolume(nv.volumes[0]);
    await nv.loadFromArrayBuffer(volumes.image, "image.nii");
    const labels = (buffer) => buffer && new Uint8Array(buffer, new DataView(buffer).getFloat32(108, true));
    scan = {
      facts,
      shape: nv.volumes[0].dimsRAS.slice(1, 4),
      prediction: labels(volumes.prediction),
      reference: labels(volumes.reference),
    };
    scan.field = Math.max(...scan.shape.map((size, axis) => size * facts.shown[axis])); // mm
    nv.opts.crosshairWidth = scan.field / 350;
    nv.createEmptyDrawing();
    for (const value of ["reference", "disagreement"]) {
      const choice = document.querySelector(`input[name="tsv-show"][value="${value}"]`);
      choice.disabled = !scan.reference;
      if (choice.checked && !scan.reference) document.querySelector('input[name="tsv-show"][value="prediction"]').checked = true;
    }
    listClasses();
    $("loading").textContent = "";
    nv.drawOpacity = $("opacity").value / 100;
    paint();
    if (!goTo(found || rarest(), Boolean(found))) describe(currentVoxel());
  }

  // ---- what is painted over the scan

  function paint() {
    if (!scan) return;
    const show = chosen("show");
    const shown = new Uint8Array(256);
    for (const label of visible) shown[label] = 1;
    const { prediction, reference } = scan;
    const out = nv.drawBitmap;
    if (show === "nothing") out.fill(0);
    else if (show === "disagreement") {
      for (let at = 0; at < out.length; at++) {
        const given = prediction[at], right = reference[at];
        if (given === right || right === page.unknown) out[at] = 0;
        else if (shown[right] && shown[given]) out[at] = SWAPPED;
        else out[at] = shown[right] ? MISSED : shown[given] ? EXTRA : 0;
      }
    } else {
      const labels = scan[show];
      for (let at = 0; at < out.length; at++) out[at] = shown[labels[at]] ? labels[at] : 0;
    }
    nv.refreshDrawing(true);
    $("key").hidden = show !== "disagreement";
    $("agree").hidden = out.some(Boolean);
  }

  // ---- finding a class

  /** Of a class in a label map: the voxel nearest to its middle, its box, or null where it has none. */
  function place(labels, label) {
    const [sizeX, sizeY] = scan.shape;
    const voxels = [];
    const middle = [0, 0, 0], low = [Infinity, Infinity, Infinity], high = [-1, -1, -1];
    for (let at = labels.indexOf(label); at >= 0; at = labels.indexOf(label, at + 1)) {
      const voxel = [at % sizeX, Math.floor(at / sizeX) % sizeY, Math.floor(at / (sizeX * sizeY))];
      voxels.push(voxel);
      for (let axis = 0; axis < 3; axis++) {
        middle[axis] += voxel[axis];
        low[axis] = Math.min(low[axis], voxel[axis]);
        high[axis] = Math.max(high[axis], voxel[axis]);
      }
    }
    if (!voxels.length) return null;
    let best = null, least = Infinity;
    for (const voxel of voxels) {
      const away = voxel.reduce((sum, value, axis) => {
        return sum + ((value - middle[axis] / voxels.length) * scan.facts.shown[axis]) ** 2;
      }, 0);
      if (away < least) [best, least] = [voxel, away];
    }
    const extent = Math.max(...high.map((value, axis) => (value - low[axis] + 1) * scan.facts.shown[axis]));
    return { voxel: best, extent };
  }

  const rarest = () => {
    const { prediction, reference } = scan.facts.voxels;
    const present = everyClass.filter((label) => (reference || prediction)[label]);
    return present.reduce((least, label) => {
      return (reference || prediction)[label] < (reference || prediction)[least] ? label : least;
    }, present[0]);
  };

  /** Crosshair to the class in what is shown, else in the other label map. zoom: enlarge small ones. */
  function goTo(label, zoom = true) {
    if (!label) return false;
    const first = chosen("show") === "prediction" ? "prediction" : "reference";
    const maps = [scan[first], scan.prediction, scan.reference].filter(Boolean);
    const at = maps.map((labels) => place(labels, label)).find(Boolean);
    if (!at) return false;
    nv.scene.crosshairPos = nv.vox2frac(at.voxel);
    if (zoom) {
      const scale = Math.min(4, Math.max(1, scan.field / (5 * at.extent)));
      const mm = nv.frac2mm(nv.scene.crosshairPos);
      nv.scene.pan2Dxyzmm = [...[0, 1, 2].map((axis) => (1 - scale) * mm[axis]), scale];
    }
    nv.drawScene();
    describe(at.voxel);
    return true;
  }

  function find(label) {
    found = found === label ? 0 : label;
    visible.clear();
    for (const one of found ? [found] : everyClass) visible.add(one);
    syncClasses();
    if (!scan) return;
    if (!found) nv.scene.pan2Dxyzmm = WHOLE;
    paint();
    if (found) goTo(found);
  }

  // ---- words

  const currentVoxel = () => Array.from(nv.frac2vox(nv.scene.crosshairPos), Math.round);
  const nameOf = (label) => (label === page.unknown ? "not annotated" : label ? page.classes[label - 1] : "background");

  function describe(voxel) {
    if (!scan) return;
    const [x, y, z] = Array.from(voxel, Math.round);
    const at = x + scan.shape[0] * (y + scan.shape[1] * z);
    const parts = ["Crosshair – prediction: " + nameOf(scan.prediction[at])];
    if (scan.reference) parts.push("reference: " + nameOf(scan.reference[at]));
    let text = parts.join("; ") + ".";
    const { prediction, reference } = scan.facts.voxels;
    if (found && !prediction[found]) text += ` ${nameOf(found)} is not predicted anywhere in this scan.`;
    if (found && reference && !reference[found]) text += ` The reference has no ${nameOf(found)} in this scan.`;
    $("here").textContent = text;
  }

  function volume(voxels, mm3) {
    if (voxels === 0) return "none";
    if (voxels < 100) return voxels === 1 ? "1 voxel" : `${voxels} voxels`;
    const ml = (voxels * mm3) / 1000;
    return `${ml < 10 ? ml.toFixed(1) : Math.round(ml)} ml`;
  }

  function listClasses() {
    const { voxels, mm3 } = scan.facts;
    $("measures").textContent = voxels.reference ? "predicted · reference" : "predicted";
    for (const label of everyClass) {
      const parts = [voxels.prediction, voxels.reference].filter(Boolean).map((counts) => volume(counts[label], mm3));
      $(`volume-${label}`).textContent = parts.join(" · ");
    }
  }

  function makeClasses() {
    for (const label of everyClass) {
      const box = element("input", { type: "checkbox", checked: true, id: `tsv-class-${label}` });
      box.addEventListener("change", () => {
        found = 0;
        if (box.checked) visible.add(label);
        else visible.delete(label);
        syncClasses();
        paint();
      });
      const name = element("span", { textContent: page.classes[label - 1] });
      const size = element("small", { id: `tsv-volume-${label}` });
      const button = element("button", { type: "button", textContent: "Find", id: `tsv-find-${label}` });
      button.setAttribute("aria-label", `Find ${page.classes[label - 1]}`);
      button.addEventListener("click", () => find(label));
      const row = element("li", {}, element("label", {}, box, swatch(page.colours[label - 1]), name, size), button);
      $("classes").append(row);
    }
    for (const [, colour, words] of ERRORS) $("key").append(element("li", {}, swatch(colour), words));
    $("key").append(element("li", { id: "tsv-agree", textContent: "Of what is ticked, every voxel agrees." }));
    syncClasses();
  }

  function syncClasses() {
    for (const label of everyClass) {
      $(`class-${label}`).checked = visible.has(label);
      $(`find-${label}`).setAttribute("aria-pressed", String(found === label));
    }
  }

  function showAll(labels) {
    found = 0;
    visible.clear();
    for (const label of labels) visible.add(label);
    syncClasses();
    if (!scan) return;
    nv.scene.pan2Dxyzmm = WHOLE;
    paint();
  }

  const STEPS = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };

  function onKey(event) {
    const step = STEPS[event.key];
    if (!step || !scan || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (chosen("view") === "render") {
      nv.setRenderAzimuthElevation(nv.scene.renderAzimuth + 5 * step[0], nv.scene.renderElevation + 5 * (step[1] + step[2]));
    } else {
      nv.moveCrosshairInVox(...step);
      describe(currentVoxel());
    }
  }

  function onTrouble(error) {
    giveUp(`The scans in 3D could not be shown (${error && error.message ? error.message : "the viewer did not start"}). ` +
      "Everything else on this page works without them.");
  }

  if (!globalThis.DecompressionStream || !document.createElement("canvas").getContext("webgl2")) {
    giveUp("The scans in 3D need WebGL 2, which this browser does not offer. Open the page in a current Firefox, Chrome, Edge or " +
      "Safari, with hardware acceleration turned on. Everything else on this page works without it.");
    return;
  }
  makeClasses();
  $("case").addEventListener("change", () => nv && inTurn(openCase));
  $("show").addEventListener("change", () => {
    paint();
    if (found && scan) goTo(found);
  });
  $("view").addEventListener("change", () => nv && nv.setSliceType(VIEWS[chosen("view")]));
  $("opacity").addEventListener("input", () => nv && nv.setDrawOpacity($("opacity").value / 100));
  $("all").addEventListener("click", () => showAll(everyClass));
  $("none").addEventListener("click", () => showAll([]));
  $("canvas").addEventListener("keydown", onKey);
  $("canvas").parentElement.addEventListener("wheel", (event) => {
    if (document.activeElement !== $("canvas")) event.stopPropagation(); // the wheel goes on scrolling the page
  }, { capture: true });
  // nothing is unpacked for a reader who never scrolls here
  const watcher = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watcher.disconnect();
    inTurn(start);
    inTurn(openCase);
  });
  watcher.observe($("body"));
})();
