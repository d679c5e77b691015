"""The report page's style sheet and script, inlined so that the page is one file.

Colours are variables with a light and a dark set; paper is always light. No text is smaller than
14 pixels. The script only copies pictures that the page already holds into the before/after
slider, and opens what is folded before the page is printed; without it the slider stays hidden,
the same pictures stand side by side, and nothing else is lost.
"""

__all__ = ["CSS", "JS"]

CSS = """
:root {
  color-scheme: light dark;
  --page: #f5f5f2; --card: #ffffff; --ink: #1b1d22; --soft: #5b606b; --line: #dcdddf;
  --wash: #f0f1f3; --good: #11703c; --good-wash: #e2f3e8; --bad: #b3201a; --bad-wash: #fce8e6;
  --link: #2459b8;
  --series-0: #2459b8; --series-1: #bb4e06; --series-2: #7d36b5; --series-3: #0a7a6d;
  --series-4: #a61c5d; --series-5: #6b6b12;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #121316; --card: #1b1d21; --ink: #ecedf0; --soft: #a2a7b1; --line: #33363d;
    --wash: #24272c; --good: #6bd495; --good-wash: #173324; --bad: #ff8f86; --bad-wash: #43201e;
    --link: #8ab4ff;
    --series-0: #7fb0ff; --series-1: #ffa45c; --series-2: #cda0ff; --series-3: #58d0c0;
    --series-4: #ff8fc0; --series-5: #d4d06a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 clamp(16px, 3vw, 32px); }
header { padding-top: clamp(28px, 5vw, 56px); }
h1 { font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em;
  margin: 0 0 12px; text-wrap: balance; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 48px 0 6px; }
h3 { font-size: 1.05rem; margin: 0; }
p { margin: 0 0 12px; max-width: 66ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.small { font-size: 0.875rem; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 24px; margin: 18px 0 0; padding: 0;
  font-size: 0.9rem; }
.facts div { display: flex; gap: 8px; min-width: 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.875rem; overflow-wrap: anywhere; }
.after { margin-top: 12px; }

.cards { display: grid; gap: 16px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 336px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: clamp(16px, 2.4vw, 24px); min-width: 0; }
.cards.rows > .card { display: grid; grid-row: span 5; grid-template-rows: subgrid; row-gap: 0;
  grid-template-columns: minmax(0, 1fr); }
.card h3 { margin: 0 0 2px; overflow-wrap: anywhere; font-size: 1.2rem; letter-spacing: -0.01em; }
.card p { font-size: 0.92rem; margin: 10px 0 0; }
.card p.how { margin: 0; }
.cards.layered { align-items: start; }
.said { margin: 10px 0 0; font-size: 0.92rem; }
.said > div { padding: 9px 0; border-top: 1px solid var(--line); }
.said > div:first-child { border-top: 0; }
.said dt { font-weight: 600; }
.said dd { margin: 0; overflow-wrap: anywhere; max-width: 66ch; }
.bars { list-style: none; margin: 12px 0 0; padding: 0; font-size: 0.9rem; }
.bars li { display: grid; grid-template-columns: minmax(0, 1fr) auto 4.6em; gap: 2px 12px;
  align-items: baseline; padding: 5px 0; }
.bars span { color: var(--soft); }
.bars b { text-align: right; font-variant-numeric: tabular-nums; }
.bars i { grid-column: 1 / -1; display: block; height: 6px; border-radius: 3px; min-width: 2px;
  background: var(--link); }
.stats-box { container-type: inline-size; margin: 14px 0 4px; }
.stats { display: grid; gap: 6px; }
@container (min-width: 430px) { .stats { grid-template-columns: repeat(3, 1fr); } }
.stat { background: var(--wash); border-radius: 9px; padding: 8px 12px; min-width: 0; }
.stat b { display: block; font-size: 1.05rem; letter-spacing: -0.01em; }
.stat span { display: block; font-size: 0.875rem; color: var(--soft); line-height: 1.4; }
.stat.good { background: var(--good-wash); } .stat.bad { background: var(--bad-wash); }
.good > b, td.good, .stat.good b { color: var(--good); }
.bad > b, td.bad, .stat.bad b { color: var(--bad); }
td.good, td.bad { font-weight: 600; }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden;
  margin: 14px 0 4px; }
.bar i { display: block; height: 100%; background: var(--link); border-radius: 4px; }
p.loss { padding-left: 10px; border-left: 3px solid var(--bad); }
.warning { color: var(--bad); font-weight: 600; }

.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; margin-top: 12px; }
.scroll.tall { max-height: 460px; overflow-y: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 14px; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th[scope=row] { font-weight: 500; white-space: normal; min-width: 9.5em; }
th small, td small { display: block; color: var(--soft); font-weight: 400;
  font-size: 0.875rem; line-height: 1.35; }
thead th, thead td { border-bottom: 1px solid var(--line); white-space: normal; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.numbers tr > :first-child { position: sticky; left: 0; background: var(--card); }
.layers { font-size: 0.875rem; }
.layers th, .layers td { padding: 6px 12px; }
.layers thead th { position: sticky; top: 0; background: var(--card); z-index: 1;
  box-shadow: inset 0 -1px var(--line); border: 0; }
.layers td:nth-child(2), .layers th:nth-child(2) { text-align: left; }
.layers td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 13em; }
.layers .kept td { color: var(--soft); }

.stage-box { display: grid; gap: 20px; margin-top: 16px; align-items: start;
  grid-template-columns: minmax(0, min(440px, 52vw)) minmax(0, 1fr); }
.stage { position: relative; border-radius: 14px; overflow: hidden; background: var(--wash);
  border: 1px solid var(--line); --cut: 50%; }
.stage img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.stage .over { clip-path: inset(0 0 0 var(--cut)); }
.stage .edge { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / 45%);
  pointer-events: none; }
.stage .edge::after { content: "\\2039\\2009\\203a"; position: absolute; top: 50%; left: 50%;
  transform: translate(-50%, -50%); width: 38px; height: 38px; border-radius: 50%;
  background: #fff; color: #1b1d22; font: 600 20px/34px system-ui, sans-serif;
  text-align: center; box-shadow: 0 1px 5px rgb(0 0 0 / 45%); }
.stage input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.stage:focus-within { outline: 3px solid var(--link); outline-offset: 2px; }
.tag { position: absolute; bottom: 10px; padding: 2px 9px; border-radius: 7px;
  background: rgb(0 0 0 / 78%); color: #fff; font-size: 0.875rem; pointer-events: none;
  max-width: 46%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.tag.left { left: 10px; } .tag.right { right: 10px; }
.choices { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0 18px; }
.choices button { font: inherit; font-size: 0.9rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 9px; padding: 6px 14px; cursor: pointer;
  min-width: 44px; min-height: 44px; }
.choices button.thumb { padding: 3px; line-height: 0; border-width: 2px; }
.choices .thumb img { width: 52px; height: 52px; object-fit: cover; border-radius: 5px; }
.choices button[aria-pressed=true] { border-color: var(--link);
  box-shadow: inset 0 0 0 1px var(--link); }
button:focus-visible, summary:focus-visible { outline: 3px solid var(--link);
  outline-offset: 2px; }
.pixels img, img.pixels { image-rendering: pixelated; }
.zoom { max-width: 216px; }

.seeds { display: grid; gap: 16px; margin-top: 16px; }
.seed { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 14px; overflow-x: auto; min-width: 0; }
.seed h3 { font-size: 0.92rem; margin-bottom: 10px; overflow-wrap: anywhere; }
.row { display: grid; gap: 0 10px; grid-auto-flow: column; grid-template-rows: repeat(3, auto);
  grid-auto-columns: minmax(68px, 1fr); }
figure { margin: 0; min-width: 0; }
.row figure { display: grid; grid-row: span 3; grid-template-rows: subgrid; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px;
  background: var(--wash); }
figcaption { font-size: 0.875rem; line-height: 1.35; padding: 6px 0; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); display: block; }
.aside { font-size: 0.875rem; line-height: 1.35; color: var(--soft); align-self: center;
  text-align: right; }
.heat { display: flex; align-items: center; gap: 10px; font-size: 0.875rem; color: var(--soft);
  margin-top: 14px; flex-wrap: wrap; }
.heat img { width: 160px; height: 12px; border-radius: 6px; }

.chart { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 16px 20px 12px; margin-top: 12px; }
.plot { padding: 10px 14px 46px 52px; }
.plot svg { display: block; width: 100%; height: clamp(220px, 32vw, 320px); overflow: visible; }
.plot text { fill: var(--soft); font: 14px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
.plot .gridline { stroke: var(--line); }
.plot .axis { stroke: var(--soft); }
.plot polyline { fill: none; stroke-width: 2.2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; stroke-linecap: round; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; font-size: 0.88rem; }
.legend span { display: inline-flex; align-items: center; gap: 8px; }
.legend svg { flex: none; }

details { margin-top: 12px; }
summary { cursor: pointer; padding: 11px 0; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; }
.reasons { margin: 10px 0 0; padding-left: 1.2em; font-size: 0.92rem; }
.reasons li { margin-bottom: 8px; overflow-wrap: anywhere; }
.glossary { display: grid; gap: 4px 28px; margin: 12px 0 0; font-size: 0.93rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.glossary dt { font-weight: 600; }
.glossary dd { margin: 0 0 10px; color: var(--soft); }
footer { padding-top: 40px; padding-bottom: 48px; color: var(--soft); font-size: 0.875rem; }

@media (max-width: 700px) {
  .stage-box { grid-template-columns: 1fr; }
  .plot { padding-left: 44px; padding-right: 6px; }
  th, td { padding: 8px; }
  .numbers { font-size: 0.875rem; }
  td small { white-space: normal; }
  th[scope=row] { min-width: 7.4em; }
}
@media print {
  body { background: #fff; font-size: 11pt; }
  .needs-script { display: none; }
  .card, .seed, .chart, .scroll { break-inside: avoid; }
  .layered .card, .scroll.tall { break-inside: auto; }
  .scroll, .scroll.tall { max-height: none; overflow: visible; }
  h2, h3 { break-after: avoid; }
  .bar i, .bars i, .heat img, .stat { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""

JS = """
addEventListener("beforeprint", () =>
  document.querySelectorAll("details").forEach(part => { part.open = true; }));
(() => {
  const box = document.querySelector(".needs-script");
  const seeds = [...document.querySelectorAll(".seed")];
  if (!box || !seeds.length) return;
  const stage = box.querySelector(".stage");
  const [under, over] = stage.querySelectorAll("img");
  const slider = stage.querySelector("input");
  const caption = box.querySelector("[data-caption]");
  const error = box.querySelector(".zoom img");
  const state = { seed: 0, variant: 0 };
  const of = seed => seeds[seed].querySelectorAll("img.shot");
  const names = [...of(0)].slice(1).map(img => img.dataset.name);

  const buttons = (holder, count, fill, key) => {
    const made = Array.from({ length: count }, (_, i) => {
      const button = document.createElement("button");
      button.type = "button";
      fill(button, i);
      button.addEventListener("click", () => { state[key] = i; show(); });
      holder.append(button);
      return button;
    });
    return () => made.forEach((b, i) => b.setAttribute("aria-pressed", i === state[key]));
  };
  const marks = [
    buttons(box.querySelector("[data-variants]"), names.length,
      (button, i) => { button.textContent = names[i]; }, "variant"),
    buttons(box.querySelector("[data-seeds]"), seeds.length, (button, i) => {
      const img = new Image();
      img.src = of(i)[0].src;
      img.alt = seeds[i].dataset.name;
      button.className = "thumb";
      button.title = seeds[i].dataset.name;
      button.append(img);
    }, "seed"),
  ];

  const cut = () => {
    stage.style.setProperty("--cut", slider.value + "%");
    slider.setAttribute("aria-valuetext",
      slider.value + " % float, " + (100 - slider.value) + " % " + names[state.variant]);
  };
  const show = () => {
    const pictures = of(state.seed), right = pictures[state.variant + 1];
    under.src = pictures[0].src; under.alt = pictures[0].alt;
    over.src = right.src; over.alt = right.alt;
    stage.querySelector(".right").textContent = names[state.variant];
    const map = seeds[state.seed].querySelectorAll("img.map")[state.variant];
    error.src = map.src; error.alt = map.alt;
    caption.textContent = seeds[state.seed].dataset.name + " \\u00b7 " + right.dataset.score;
    marks.forEach(mark => mark());
    cut();
  };
  slider.addEventListener("input", cut);
  box.hidden = false;
  show();
})();
"""
