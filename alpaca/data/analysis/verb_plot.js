// Makes the ring of verbs interactive. Only textContent and attributes are set: what a data set holds stays text.
(() => {
  const source = document.getElementById("verb-data");
  if (!source) return;
  const data = JSON.parse(source.textContent), said = document.getElementById("said");
  const ring = document.getElementById("ring"), alone = document.getElementById("alone");
  const hub = document.getElementById("hub"), C = 320;
  const share = n => (100 * n / data.total).toFixed(1) + " % of the orders";
  const make = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const at = (r, a) => (C + r * Math.sin(a)).toFixed(2) + " " + (C - r * Math.cos(a)).toFixed(2);
  const wedge = (r, R, a, b) => {
    b = Math.min(b, a + 2 * Math.PI - 1e-4);
    const big = b - a > Math.PI ? 1 : 0;
    return `M${at(R, a)}A${R} ${R} 0 ${big} 1 ${at(R, b)}L${at(r, b)}A${r} ${r} 0 ${big} 0 ${at(r, a)}Z`;
  };
  const tell = node => {
    if (!node.dataset || !node.dataset.said) return;
    said.textContent = node.dataset.said;
  };
  const open = place => {
    const verb = data.verbs[place], hue = 360 * place / data.verbs.length;
    const parts = verb.objects.concat(verb.rest ? [[null, verb.rest]] : []);
    let start = 0;
    alone.replaceChildren();
    parts.forEach(([object, count], row) => {
      const end = start + 2 * Math.PI * count / verb.count, middle = (start + end) / 2;
      const name = object === null ? "other objects or none" : object;
      const fill = object === null ? `hsl(${hue} 25% 88%)` : `hsl(${hue} 70% ${68 + (row % 3) * 6}%)`;
      const path = make("path", {d: wedge(100, 312, start, end), fill, tabindex: 0});
      path.dataset.said = `${verb.verb}: ${name}: ${count} (${share(count)})`;
      path.dataset.back = "1";
      path.append(make("title", {}, path.dataset.said));
      alone.append(path);
      if (end - start > 0.055) {
        let turn = middle * 180 / Math.PI - 90, flip = turn > 90;
        const where = `rotate(${turn.toFixed(2)} ${C} ${C}) translate(${C + 206} ${C})` + (flip ? " rotate(180)" : "");
        alone.append(make("text", {transform: where, "text-anchor": "middle", "dominant-baseline": "central"},
          name.length > 22 ? name.slice(0, 21) + "…" : name));
      }
      start = end;
    });
    const back = make("circle", {cx: C, cy: C, r: 98, fill: "transparent", style: "cursor: pointer"});
    back.dataset.back = "1";
    alone.append(back);
    hub.textContent = verb.verb + " ↩";
    ring.style.display = "none";
    said.textContent = `${verb.verb}: ${verb.count} (${share(verb.count)}); tap to go back`;
  };
  const close = () => { alone.replaceChildren(); ring.style.display = ""; hub.textContent = ""; said.textContent = ""; };
  const choose = node => {
    if (!node.dataset) return;
    if (node.dataset.back) close();
    else if (node.dataset.verb) open(Number(node.dataset.verb));
  };
  const figure = document.getElementById("verbs");
  said.textContent = "Hover or tap a piece; tap a verb to open it.";
  figure.addEventListener("pointerover", event => tell(event.target));
  figure.addEventListener("focusin", event => tell(event.target));
  figure.addEventListener("click", event => choose(event.target));
  figure.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event.target); }
    if (event.key === "Escape") close();
  });
})();
