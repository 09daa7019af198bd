"use strict";
// Text of documents is put on the page as text nodes only; nothing here reads or writes HTML.
const thresher = (() => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const at = (id) => document.getElementById(id);
  const ROWS = 200;
  const pieces = new Map();
  let index = null, order = [], shown = 0, wanted = null;

  const node = (tag, props = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(props)) {
      if (name === "class") made.className = value; else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };
  const svg = (tag, props, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(props)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const number = (value) => value === 0 ? "0" : Number(value.toPrecision(3)).toString();
  const share = (value) => value === 0 ? "0" : value < 0.0001 ? value.toExponential(1) : `${Number((100 * value).toPrecision(2))}%`;
  const whole = (value) => value.toLocaleString("en");
  const density = (latent) => index.fired[latent] / page.tokens;
  // What cannot be seen is shown by a sign of its own.
  const visible = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u2028\u2029]/g, "¶");
  // A chip shows the spaces it begins or ends with as dots.
  const dotted = (text) => visible(text).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
  const token = (text) => node("span", {class: "token"}, dotted(text));
  const spaced = (list) => list.flatMap((item, i) => i ? [" ", item] : [item]);

  // The list.
  const keys = {
    interest: (i) => -index.interest[i], density: (i) => -index.fired[i], max: (i) => -index.max[i], number: (i) => i,
  };
  const figures = {
    interest: (i) => number(index.interest[i]), density: (i) => share(density(i)), max: (i) => number(index.max[i]),
    number: (i) => share(density(i)),
  };
  function matches(query) {
    const plain = query.trim().replace(/^#/, "");
    if (!plain) return () => true;
    const exact = /^\d+$/.test(plain) ? Number(plain) : null;
    const lower = query.startsWith("#") ? null : query.trim().toLowerCase();
    const hit = index.tokens.map((text) => lower !== null && text.toLowerCase().includes(lower));
    return (i) => i === exact || index.peaks[i].some((t) => hit[t]) || (index.raised !== null && index.raised[i].some((t) => hit[t]));
  }
  function filter() {
    const key = keys[at("sort").value], query = at("search").value, match = matches(query);
    const exact = Number(query.trim().replace(/^#/, "") || NaN);
    order = [...Array(page.width).keys()].filter(match);
    order.sort((a, b) => (b === exact) - (a === exact) || key(a) - key(b) || a - b);
    at("list").replaceChildren();
    shown = 0;
    more();
    at("list").scrollTop = 0;
    at("count").textContent = order.length === page.width ? `all ${whole(page.width)}` : `${whole(order.length)} of ${whole(page.width)}`;
  }
  function row(i) {
    const names = index.peaks[i].length ? spaced(index.peaks[i].map((t) => token(index.tokens[t]))) : [node("span", {class: "quiet"}, "silent")];
    const link = node("a", {href: `#${i}`}, node("b", {}, `#${i}`), node("span", {class: "peaks"}, ...names), node("span", {class: "figure"}, figures[at("sort").value](i)));
    if (i === wanted) link.setAttribute("aria-current", "true");
    return node("li", {}, link);
  }
  function more() {
    at("more")?.remove();
    at("list").append(...order.slice(shown, shown + ROWS).map(row));
    shown = Math.min(shown + ROWS, order.length);
    if (shown < order.length) {
      const button = node("button", {type: "button", id: "more"}, `show ${whole(Math.min(ROWS, order.length - shown))} more`);
      button.addEventListener("click", more);
      at("list").append(button);
    }
  }

  // One latent.
  function histogram(counts, width) {
    const W = 460, H = 150, left = 34, bottom = 18, top = 8, tallest = Math.log10(1 + Math.max(...counts));
    const step = (W - left) / counts.length, y = (n) => top + (H - top - bottom) * (1 - Math.log10(1 + n) / tallest);
    const made = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "histogram of the activations above 0"});
    for (let n = 1; Math.log10(1 + n) <= tallest; n *= 10) {
      made.append(svg("line", {x1: left, x2: W, y1: y(n), y2: y(n)}), svg("text", {x: left - 5, y: y(n) + 4, "text-anchor": "end"}, whole(n)));
    }
    counts.forEach((n, i) => {
      const title = svg("title", {}, `${number(i * width)} to ${number((i + 1) * width)}: ${whole(n)}`);
      if (n) made.append(svg("rect", {x: left + i * step + 0.5, width: Math.max(step - 1, 0.5), y: y(n), height: H - bottom - y(n)}, title));
    });
    made.append(svg("line", {x1: left, x2: W, y1: H - bottom, y2: H - bottom}));
    for (const part of [0, 0.5, 1]) {
      const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
      made.append(svg("text", {x: left + part * (W - left), y: H - 4, "text-anchor": anchor}, number(part * counts.length * width)));
    }
    return made;
  }
  function context(example, piece, largest) {
    const text = node("div", {class: "text"});
    const values = new Map();
    for (let i = 0; i < example.a.length; i += 2) values.set(example.a[i], example.a[i + 1]);
    example.t.forEach((t, place) => {
      const value = values.get(place), span = node("span", {}, visible(piece.tokens[t]));
      if (value) {
        span.style.backgroundColor = `rgba(var(--mark), calc(var(--most) * ${(0.12 + 0.88 * Math.min(1, value / largest)).toFixed(3)}))`;
        span.title = number(value);
        span.dataset.value = value;
      }
      if (place === example.p) span.className = "peak";
      text.append(span);
    });
    const value = node("div", {class: "value"}, number(values.get(example.p)));
    const from = node("div", {class: "from quiet small", title: piece.documents[example.d]}, `${piece.documents[example.d]}, context ${example.s[0]}, token ${example.s[1]}`);
    return node("div", {class: "context"}, value, text, from);
  }
  function group(found, piece, largest) {
    const title = found.q === undefined ? "Top contexts" : `Around the ${number(100 * found.q)}th percentile (${number(found.v)})`;
    return node("section", {class: "group"}, node("h3", {}, title), ...found.c.map((example) => context(example, piece, largest)));
  }
  const pairs = (rows) => node("ul", {class: "pairs"}, ...rows.map(([name, value]) => node("li", {}, name, node("span", {class: "value"}, value))));
  const signed = (value) => (value > 0 ? "+" : "−") + number(Math.abs(value));
  function card(title, ...children) {
    return node("section", {class: "card"}, node("h2", {}, title), ...children);
  }
  function figure(name, value) {
    return node("div", {}, node("dt", {}, name), node("dd", {}, value));
  }
  function near(rows) {
    return pairs(rows.map(([other, cosine]) => {
      const names = spaced(index.peaks[other].slice(0, 3).map((t) => token(index.tokens[t])));
      return [node("span", {}, node("a", {href: `#${other}`}, `#${other}`), " ", ...names), cosine.toFixed(2)];
    }));
  }
  function latent(i, piece) {
    const found = piece.latents[i % page.a_piece], largest = index.max[i];
    const step = (to, text) => to < 0 || to >= page.width ? node("span", {class: "quiet"}, text) : node("a", {href: `#${to}`}, text);
    const head = node("section", {class: "card across"},
      node("div", {class: "title"}, node("a", {class: "back", href: "#"}, "← all latents"), node("h1", {}, `Latent #${i}`),
        node("nav", {"aria-label": "neighbours by number"}, step(i - 1, "previous"), step(i + 1, "next"))),
      node("dl", {class: "figures"}, figure("density", share(density(i))), figure("tokens", whole(index.fired[i])),
        figure("contexts", whole(index.contexts[i])), figure("max", number(index.max[i])), figure("mean above 0", number(index.mean[i])),
        figure("interest", number(index.interest[i]))));
    const parts = [head];
    if (found.h.length) parts.push(card("Activations above 0", histogram(found.h, found.w), node("p", {class: "quiet small"}, "tokens (log scale) by activation")));
    const rows = (list) => pairs(list.map(([t, value]) => [token(piece.tokens[t]), signed(value)]));
    if (found.n.length) parts.push(card("Nearest decoder rows", near(found.n)));
    if (found.r) {
      const both = node("div", {class: "ends"}, node("div", {}, node("h3", {}, "Raises"), rows(found.r)), node("div", {}, node("h3", {}, "Lowers"), rows(found.l)));
      const made = card("Logits of the decoder row alone", both);
      made.classList.add("across");
      parts.push(made);
    }
    const examples = found.g.length ? found.g.map((g) => group(g, piece, largest)) : [node("p", {class: "quiet"}, "It fired on none of the tokens read.")];
    const contexts = card("What it fires on", ...examples);
    contexts.classList.add("across");
    parts.push(contexts);
    at("latent").replaceChildren(...parts);
    at("latent").parentElement.scrollTop = 0;
    document.title = `#${i} · ${page.about.variant} at ${page.about.site}`;
  }
  function say(text) {
    at("latent").replaceChildren(node("p", {class: "quiet across"}, text));
  }
  function load(number) {
    const name = `part-${String(number).padStart(3, "0")}.js`, script = node("script", {src: name});
    script.addEventListener("error", () => say(`${name} is missing: keep the folder of these pages whole, or make them again.`));
    document.head.append(script);
  }
  function show() {
    const hash = location.hash.slice(1);
    document.body.classList.toggle("one", hash !== "");
    wanted = /^\d+$/.test(hash) && Number(hash) < page.width ? Number(hash) : null;
    for (const link of at("list").querySelectorAll("a")) {
      if (link.getAttribute("href") === `#${wanted}`) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }
    if (wanted === null) return say(hash ? `There is no latent #${hash}: they are numbered from 0 to ${page.width - 1}.` : "Choose a latent from the list.");
    const number = Math.floor(wanted / page.a_piece);
    if (pieces.has(number)) return latent(wanted, pieces.get(number));
    say("loading");
    load(number);
  }
  return {
    index(data) {
      index = data;
      at("search").addEventListener("input", filter);
      at("sort").addEventListener("change", filter);
      window.addEventListener("hashchange", show);
      const hash = location.hash.slice(1);
      filter();
      if (!hash && order.length && window.matchMedia("(min-width: 761px)").matches) history.replaceState(null, "", `#${order[0]}`);
      show();
    },
    piece(number, data) {
      pieces.set(number, data);
      if (wanted !== null && Math.floor(wanted / page.a_piece) === number) latent(wanted, data);
    },
  };
})();
