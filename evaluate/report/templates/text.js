"use strict";
// The text is put on the page as text nodes only; nothing here reads or writes HTML.
(() => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const at = (id) => document.getElementById(id);
  const MOST = 6;  // tokens that a line of the table names
  const read = new Set(page.read);
  const latents = page.latents.map((one) => {
    const values = new Map();
    for (let i = 0; i < one.a.length; i += 2) values.set(one.a[i], one.a[i + 1]);
    return {...one, values, max: Math.max(...values.values())};
  });
  let token = null, latent = null;

  const node = (tag, props = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(props)) {
      if (name === "class") made.className = value; else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };
  const number = (value) => Number(value.toPrecision(3)).toString();
  const visible = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u2028\u2029]/g, "¶");
  const chip = (text) => node("span", {class: "token"}, visible(text).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)));
  const spaced = (list) => list.flatMap((item, i) => i ? [" ", item] : [item]);
  const textOf = (place) => page.tokens[page.ids[place]];

  // Shading: of the latent chosen its activation, else of each token how many latents fire there.
  const counts = new Map();
  for (const one of latents) for (const place of one.values.keys()) counts.set(place, (counts.get(place) ?? 0) + 1);
  const most = Math.max(1, ...counts.values());
  const spans = page.ids.map((_, place) => {
    const parts = visible(textOf(place)).split(/([␍↵⇥¶]+)/).map((part, i) => i % 2 ? node("i", {}, part.replace(/↵/g, "↵\n")) : part);
    const made = node("span", {role: "button", tabindex: "0", "aria-pressed": "false"}, ...parts);
    if (!read.has(place)) made.className = "unread";
    const choose = () => { token = token === place ? null : place; latent = null; show(); };
    made.addEventListener("click", choose);
    made.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
    return made;
  });
  at("text").append(...spans);

  function shade() {
    spans.forEach((span, place) => {
      const value = latent === null ? counts.get(place) : latent.values.get(place);
      const part = value === undefined ? 0 : value / (latent === null ? most : latent.max);
      const strength = latent === null ? 0.35 * part : 0.12 + 0.88 * part;
      span.style.backgroundColor = part ? `rgba(var(--mark), calc(var(--most) * ${strength.toFixed(3)}))` : "";
      span.title = value === undefined ? "" : latent === null ? `${value} latents` : number(value);
      span.setAttribute("aria-pressed", String(place === token));
      if (latent !== null && part) span.dataset.value = value; else delete span.dataset.value;
    });
    at("chosen").textContent = latent === null
      ? "Shaded by how many latents fire on a token. Choose a latent to shade by it, a token to see its latents."
      : `Shaded by latent #${latent.i}, at most ${number(latent.max)}.`;
    // A latent chosen here is the one that the next text is shaded by.
    if (at("asked") && latent !== null) at("asked").value = String(latent.i);
  }
  function show() {
    const key = {
      max: (one) => -(token === null ? one.max : one.values.get(token)), few: (one) => one.values.size, number: (one) => one.i,
    }[at("sort").value];
    const chosen = latents.filter((one) => token === null || one.values.has(token));
    chosen.sort((a, b) => key(a) - key(b) || a.i - b.i);
    at("latents").replaceChildren(...chosen.map(row));
    at("all").hidden = token === null;
    at("count").textContent = token === null ? `${chosen.length} fire on the text` : `${chosen.length} fire on this token`;
    shade();
  }
  function row(one) {
    const places = [...one.values.keys()].sort((a, b) => one.values.get(b) - one.values.get(a) || a - b);
    const names = places.slice(0, MOST).map((place) => chip(textOf(place)));
    if (places.length > MOST) names.push(node("span", {class: "quiet"}, `and ${places.length - MOST} more`));
    const raised = one.r.map((t) => chip(page.tokens[t]));
    const made = node("tr", {"aria-selected": String(one === latent)}, node("td", {}, node("button", {type: "button"}, `#${one.i}`)),
      node("td", {}, number(token === null ? one.max : one.values.get(token))), node("td", {}, String(places.length)),
      node("td", {class: "text"}, ...spaced(names)), node("td", {class: "text"}, ...spaced(raised)));
    made.addEventListener("click", () => {
      latent = latent === one ? null : one;
      for (const other of at("latents").rows) other.setAttribute("aria-selected", String(other === made && latent !== null));
      shade();
    });
    return made;
  }
  at("sort").addEventListener("change", show);
  at("all").addEventListener("click", () => { token = null; show(); });
  const asked = page.latent ?? null;
  latent = latents.find((one) => one.i === asked) ?? null;
  show();
  if (asked !== null && latent === null) at("chosen").textContent = `Latent #${asked} fires on none of these tokens. ${at("chosen").textContent}`;
})();
