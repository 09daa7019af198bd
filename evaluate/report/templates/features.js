"use strict";
// Text of documents is put on the page as text nodes only; nothing here reads or writes HTML.
const thresher = (() => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const at = (id) => document.getElementById(id);
  const ROWS = 200;
  const pieces = new Map(), texts = new Map();
  let index = null, labels = {}, order = [], from = 0, to = 0, wanted = null;

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
  const name = (kind, number) => `${kind}-${String(number).padStart(3, "0")}.js`;

  // Favourites stay in this browser, those of each SAE apart; without storage they last as long as the page.
  const shelf = `thresher favourites ${page.about.fingerprint} ${page.about.folder}`;
  const favourites = new Set();
  try {
    for (const latent of JSON.parse(localStorage.getItem(shelf) ?? "[]")) favourites.add(latent);
  } catch { /* no storage here, or what is there is not ours */ }
  function favour(latent) {
    if (!favourites.delete(latent)) favourites.add(latent);
    try { localStorage.setItem(shelf, JSON.stringify([...favourites])); } catch { /* no storage here */ }
    if (at("favourites").getAttribute("aria-pressed") === "true") filter(); else mark();
    at("star").setAttribute("aria-pressed", String(favourites.has(latent)));
    at("star").textContent = favourites.has(latent) ? "★" : "☆";
  }

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
    const said = (i) => lower !== null && labels[i] !== undefined && labels[i].label.toLowerCase().includes(lower);
    return (i) => i === exact || said(i) || index.peaks[i].some((t) => hit[t]) || (index.raised !== null && index.raised[i].some((t) => hit[t]));
  }
  function filter() {
    const key = keys[at("sort").value], query = at("search").value, match = matches(query);
    const exact = Number(query.trim().replace(/^#/, "") || NaN);
    const favoured = at("favourites").getAttribute("aria-pressed") === "true";
    order = [...Array(page.width).keys()].filter((i) => match(i) && (!favoured || favourites.has(i)));
    order.sort((a, b) => (b === exact) - (a === exact) || key(a) - key(b) || a - b);
    list(0);
    at("list").scrollTop = 0;
    at("count").textContent = order.length === page.width ? `all ${whole(page.width)}` : `${whole(order.length)} of ${whole(page.width)}`;
  }
  function row(i) {
    const names = index.peaks[i].length ? spaced(index.peaks[i].map((t) => token(index.tokens[t]))) : [node("span", {class: "quiet"}, "silent")];
    const link = node("a", {href: `#${i}`}, node("b", {}, `#${i}`), node("span", {class: "peaks"}, ...names), node("span", {class: "figure"}, figures[at("sort").value](i)));
    if (labels[i]) link.append(node("span", {class: "label"}, labels[i].label));
    link.dataset.latent = i;
    return node("li", {}, link);
  }
  // A part of the list, for one of 100,000 latents would be slow: rows from place `first` on, and more on demand.
  function list(first) {
    from = to = first;
    at("list").replaceChildren();
    more();
    if (from > 0) {
      const button = node("button", {type: "button", id: "earlier"}, `show ${whole(Math.min(ROWS, from))} before`);
      button.addEventListener("click", () => list(Math.max(0, from - ROWS)));
      at("list").prepend(button);
    }
    mark();
  }
  function more() {
    at("more")?.remove();
    at("list").append(...order.slice(to, to + ROWS).map(row));
    to = Math.min(to + ROWS, order.length);
    if (to < order.length) {
      const button = node("button", {type: "button", id: "more"}, `show ${whole(Math.min(ROWS, order.length - to))} more`);
      button.addEventListener("click", () => { more(); mark(); });
      at("list").append(button);
    }
  }
  function mark() {
    for (const link of at("list").querySelectorAll("a")) {
      const latent = Number(link.dataset.latent);
      link.classList.toggle("favourite", favourites.has(latent));
      if (latent === wanted) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }
  }
  function reveal() {
    const place = order.indexOf(wanted);
    if (place >= 0 && (place < from || place >= to)) list(Math.max(0, place - ROWS / 2));
    mark();
    at("list").querySelector("a[aria-current]")?.scrollIntoView({block: "nearest"});
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
  function places(shares) {
    const W = 460, H = 46, step = W / shares.length, most = Math.max(...shares);
    const made = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "share of tokens it fires on, by place in the context"});
    shares.forEach((value, i) => {
      const title = svg("title", {}, `part ${i + 1} of ${shares.length}: ${share(value)}`);
      const height = most ? (H - 2) * value / most : 0;
      made.append(svg("rect", {x: i * step + 0.5, width: step - 1, y: H - 1 - height, height}, title));
    });
    made.append(svg("line", {x1: 0, x2: W, y1: H - 0.5, y2: H - 0.5}));
    return made;
  }
  // White space is shown by quiet signs. A whole context has the lines and spaces of the text; in a short one a run of
  // spaces is three dots at most, which leaves room for words.
  function readable(text, lines) {
    const seen = visible(text);
    if (lines) return seen.split(/([␍↵⇥¶]+)/).map((part, i) => i % 2 ? node("i", {}, part.replace(/↵/g, "↵\n").replace(/⇥/g, "⇥\t")) : part);
    return seen.split(/([␍↵⇥¶]+| {3,}|^ +$)/).map((part, i) => i % 2 ? node("i", {}, /^ /.test(part) ? "·".repeat(Math.min(part.length, 3)) : part) : part);
  }
  function shaded(tokens, values, peak, largest, lines, unread) {
    const text = node("div", {class: "text"});
    tokens.forEach((token, place) => {
      const value = values.get(place), span = node("span", {}, ...readable(token, lines));
      if (value) {
        span.style.backgroundColor = `rgba(var(--mark), calc(var(--most) * ${(0.12 + 0.88 * Math.min(1, value / largest)).toFixed(3)}))`;
        span.title = number(value);
        span.dataset.value = value;
      }
      if (place === peak) span.className = "peak"; else if (unread?.has(place)) span.className = "unread";
      text.append(span);
    });
    return text;
  }
  const paired = (list, shift) => {
    const values = new Map();
    for (let i = 0; i < list.length; i += 2) values.set(list[i] + shift, list[i + 1]);
    return values;
  };
  function context(example, piece, largest) {
    const near = paired(example.a, 0);
    const short = shaded(example.t.map((t) => piece.tokens[t]), near, example.p, largest, false);
    const value = node("div", {class: "value"}, number(near.get(example.p)));
    const from = node("div", {class: "from quiet small", title: piece.documents[example.d]}, `${piece.documents[example.d]}, context ${example.s[0]}, token ${example.s[1]}`);
    const button = node("button", {type: "button", class: "more", "aria-expanded": "false", title: "the whole context"}, "whole");
    const made = node("div", {class: "context"}, value, short, button, from);
    made.whole = async (open) => {
      made.classList.toggle("whole", open);
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "short" : "whole";
      let text = short;
      if (open) {
        const [sequence, position] = example.s, found = await textOf(sequence);
        const values = new Map([...paired(example.a, position - example.p), ...paired(example.o, 0)]);
        text = shaded(found.tokens, values, position, largest, true, found.unread);
      }
      if (made.classList.contains("whole") === open) made.querySelector(".text").replaceWith(text);
    };
    button.addEventListener("click", () => made.whole(!made.classList.contains("whole")));
    return made;
  }
  function textOf(sequence) {
    const number = Math.floor(sequence / page.a_text);
    if (!texts.has(number)) {
      let resolve;
      texts.set(number, {ready: new Promise((done) => { resolve = done; }), resolve});
      load("text", number);
    }
    return texts.get(number).ready.then((piece) => {
      const place = sequence - number * page.a_text;
      return {tokens: piece.contexts[place].map((t) => piece.tokens[t]), unread: new Set(piece.left_out[place])};
    });
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
  const linked = (other, ...names) => node("span", {}, node("a", {href: `#${other}`}, `#${other}`), " ", ...spaced(names));
  const peaksOf = (other) => index.peaks[other].slice(0, 3).map((t) => token(index.tokens[t]));
  function near(rows) {
    return pairs(rows.map(([other, cosine]) => [linked(other, ...peaksOf(other)), cosine.toFixed(2)]));
  }
  function otherRows(found, piece) {
    return pairs(found.x.map(([other, cosine, names]) => {
      const link = node("a", {href: `${page.other.path}/index.html#${other}`}, `#${other}`);
      return [node("span", {}, link, " ", ...spaced(names.slice(0, 3).map((t) => token(piece.tokens[t])))), cosine.toFixed(2)];
    }));
  }
  function titleOf(i) {
    const place = order.indexOf(i);
    const step = (to, text, key) => to === undefined ? node("span", {class: "quiet"}, text) : node("a", {href: `#${to}`, title: `key ${key}`}, text);
    const star = node("button", {type: "button", id: "star", class: "star", "aria-pressed": String(favourites.has(i)), title: "favourite (key f)"}, favourites.has(i) ? "★" : "☆");
    star.addEventListener("click", () => favour(i));
    const nav = node("nav", {"aria-label": "neighbours in the list"}, step(order[place - 1], "previous", "k"), step(place < 0 ? order[0] : order[place + 1], "next", "j"));
    if (page.other) {
      const beside = node("button", {type: "button", id: "split", "aria-pressed": String(document.body.classList.contains("split")), title: "key s"}, "side by side");
      beside.addEventListener("click", split);
      nav.prepend(beside);
    }
    return node("div", {class: "title"}, node("a", {class: "back", href: "#"}, "← all latents"), node("h1", {}, `Latent #${i}`), star, nav);
  }
  function latent(i, piece) {
    const found = piece.latents[i % page.a_piece], largest = index.max[i];
    const head = node("section", {class: "card across"}, titleOf(i));
    if (labels[i]) head.append(node("p", {class: "said"}, labels[i].label, " ", node("span", {class: "quiet small"}, labels[i].score ?? "")));
    head.append(node("dl", {class: "figures"}, figure("density", share(density(i))), figure("tokens", whole(index.fired[i])),
      figure("contexts", whole(index.contexts[i])), figure("max", number(index.max[i])), figure("mean above 0", number(index.mean[i])),
      figure("interest", number(index.interest[i]))));
    const expand = node("button", {type: "button", id: "expand", title: "key e"}, "all whole");
    const contexts = node("section", {class: "card fires"}, node("div", {class: "head"}, node("h2", {}, "What it fires on"), expand),
      ...(found.g.length ? found.g.map((g) => group(g, piece, largest)) : [node("p", {class: "quiet"}, "It fired on none of the tokens read.")]));
    expand.addEventListener("click", () => {
      const every = [...contexts.querySelectorAll(".context")], open = every.some((one) => !one.classList.contains("whole"));
      for (const one of every) one.whole(open);
      expand.textContent = open ? "all short" : "all whole";
    });
    at("latent").replaceChildren(head, contexts, node("div", {class: "beside"}, ...beside(i, found, piece)));
    at("latent").parentElement.scrollTop = 0;
    frame(found);
    document.title = `#${i} · ${page.about.variant} at ${page.about.site}`;
  }
  function beside(i, found, piece) {
    const parts = [];
    if (found.x?.length) parts.push(card(`Nearest in ${page.other.name}`, otherRows(found, piece)));
    if (found.h.length) parts.push(card("Activations above 0", histogram(found.h, found.w), node("p", {class: "quiet small"}, "tokens (log scale) by activation")));
    const rows = (list) => pairs(list.map(([t, value]) => [token(piece.tokens[t]), signed(value)]));
    const ends = (title, first, above, second, below) => card(title, node("div", {class: "ends"},
      node("div", {}, node("h3", {}, first), rows(above)), node("div", {}, node("h3", {}, second), rows(below))));
    if (found.rm) parts.push(ends("Input: token embeddings that the encoder reads", "Raise it", found.rm, "Lower it", found.rl));
    if (found.r) parts.push(ends(found.rm ? "Output: logits of the decoder row alone" : "Logits of the decoder row alone", "Raises", found.r, "Lowers", found.l));
    if (found.k.length) {
      parts.push(card("Tokens it fires on", pairs(found.k.map(([t, part, mean]) => [token(piece.tokens[t]), `${share(part)}, mean ${number(mean)}`])),
        node("p", {class: "quiet small"}, `of ${whole(Math.min(page.about.sample, index.fired[i]))} firings drawn at random`)));
      parts.push(card("Place in the context", places(found.b.map((n, part) => page.tokens_by_part[part] ? n / page.tokens_by_part[part] : 0)),
        node("p", {class: "quiet small"}, "share of the tokens it fires on, from the context's first to its last")));
    }
    if (found.c.length) parts.push(card("Fires together with", pairs(found.c.map(([other, part]) => [linked(other, ...peaksOf(other)), share(part)]))));
    if (found.n.length) parts.push(card("Nearest decoder rows", near(found.n)));
    return parts;
  }
  // The nearest latent of the other SAE, on its own pages, beside this one.
  function frame(found) {
    const main = at("latent").parentElement;
    main.querySelector("iframe")?.remove();
    if (!document.body.classList.contains("split") || !found.x?.length) return;
    main.append(node("iframe", {src: `${page.other.path}/index.html?embedded#${found.x[0][0]}`, title: `nearest latent in ${page.other.name}`}));
  }
  function split() {
    document.body.classList.toggle("split");
    show();
  }
  function say(text) {
    at("latent").replaceChildren(node("p", {class: "quiet across"}, text));
  }
  function load(kind, number) {
    const file = name(kind, number), script = node("script", {src: file});
    script.addEventListener("error", () => say(`${file} is missing: keep the folder of these pages whole, or make them again.`));
    document.head.append(script);
  }
  function show() {
    const hash = location.hash.slice(1);
    document.body.classList.toggle("one", hash !== "");
    wanted = /^\d+$/.test(hash) && Number(hash) < page.width ? Number(hash) : null;
    reveal();
    if (wanted === null) return say(hash ? `There is no latent #${hash}: they are numbered from 0 to ${page.width - 1}.` : "Choose a latent from the list.");
    const number = Math.floor(wanted / page.a_piece);
    if (pieces.has(number)) return latent(wanted, pieces.get(number));
    say("loading");
    load("part", number);
  }
  const go = (by) => {
    const place = order.indexOf(wanted), next = order[place < 0 ? 0 : place + by];
    if (next !== undefined) location.hash = `#${next}`;
  };
  function keysShown(open) {
    at("keys").hidden = !open;
    at("keys-button").setAttribute("aria-expanded", String(open));
  }
  const acts = {
    j: () => go(1), k: () => go(-1), "/": () => at("search").focus(), e: () => at("expand")?.click(),
    f: () => at("star")?.click(), s: () => at("split")?.click(), "?": () => keysShown(at("keys").hidden),
  };
  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "Escape") return keysShown(false);
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }
  return {
    index(data) {
      index = data;
      document.body.classList.toggle("embedded", location.search === "?embedded");
      at("search").addEventListener("input", filter);
      at("sort").addEventListener("change", filter);
      at("favourites").addEventListener("click", () => {
        at("favourites").setAttribute("aria-pressed", String(at("favourites").getAttribute("aria-pressed") !== "true"));
        filter();
      });
      at("keys-button").addEventListener("click", () => keysShown(at("keys").hidden));
      document.addEventListener("keydown", pressed);
      window.addEventListener("hashchange", show);
      const hash = location.hash.slice(1);
      filter();
      if (!hash && order.length && window.matchMedia("(min-width: 761px)").matches) history.replaceState(null, "", `#${order[0]}`);
      show();
    },
    labels(data) {
      labels = data;
      if (!Object.keys(labels).length) return;
      filter();
      show();
    },
    piece(number, data) {
      pieces.set(number, data);
      if (wanted !== null && Math.floor(wanted / page.a_piece) === number) latent(wanted, data);
    },
    text(number, data) { texts.get(number).resolve(data); },
  };
})();
