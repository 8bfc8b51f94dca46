"use strict";
// Charts: the data beside this script, drawn by Bokeh, in the colours of the page where those are not the light ones.
const dark = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft] = ["--ink", "--soft"].map((name) => style.getPropertyValue(name).trim());
  const colours = {
    axis_label_text_color: ink, major_label_text_color: soft, axis_line_color: soft, major_tick_line_color: soft,
    minor_tick_line_color: soft, grid_line_color: dark.matches ? "#3a3f47" : "#e5e5e5", label_text_color: ink,
  };
  for (const bokeh of Bokeh.documents) {
    for (const model of bokeh.roots().flatMap((root) => [...root.references()])) {
      const known = Object.entries(colours).filter(([name]) => name in model.properties);
      if (known.length) model.setv(Object.fromEntries(known));
    }
  }
}

async function draw() {
  const items = JSON.parse(document.getElementById("charts").textContent);
  await Promise.all(items.map((item) => Bokeh.embed.embed_item(item)));
  if (dark.matches) paint();
  dark.addEventListener("change", paint);
  await new Promise(function wait(done) {
    if (Bokeh.documents.every((bokeh) => bokeh.is_idle)) done();
    else setTimeout(wait, 5, done);
  });
  document.documentElement.dataset.drawn = performance.now();
}

// Tokens: one tooltip for all of them; the arrow keys move within a completion.
const tip = document.getElementById("tip");
const percent = (logprob) =>
  logprob === null ? "?" : `${(100 * Math.exp(logprob)).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;
const nats = (value) => (value === null ? "?" : value.toFixed(2));
const likeliest = (tokens) => tokens.map(([text, logprob]) => `  ${JSON.stringify(text)} ${percent(logprob)}`).join("\n");

function show(token) {
  const data = JSON.parse(token.parentElement.nextElementSibling.textContent);
  const at = [...token.parentElement.children].indexOf(token);
  const [student, teacher] = [data.student_logprob[at], data.teacher_logprob[at]];
  const reward = student === null || teacher === null ? null : teacher - student;
  // Text, never markup: models wrote it.
  tip.textContent =
    `${JSON.stringify(data.text[at])}\nstudent ${percent(student)}, teacher ${percent(teacher)}\n` +
    `reward ${nats(reward)}, exact reverse KL here ${nats(data.reverse_kl[at])} nats\n` +
    `student's likeliest:\n${likeliest(data.student_top[at])}\nteacher's likeliest:\n${likeliest(data.teacher_top[at])}`;
  tip.hidden = false;
  const box = token.getBoundingClientRect();
  const left = Math.max(4, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 4));
  const below = box.bottom + tip.offsetHeight + 8 <= innerHeight;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 4 : Math.max(4, box.top - tip.offsetHeight - 4)) + scrollY}px`;
}

function move(token, by) {
  const target = by > 0 ? token.nextElementSibling : token.previousElementSibling;
  if (!target) return;
  token.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

const token = (event) => event.target.closest?.(".tokens > span");
addEventListener("pointerover", (event) => (token(event) ? show(token(event)) : (tip.hidden = true)));
addEventListener("focusin", (event) => token(event) && show(token(event)));
addEventListener("focusout", () => (tip.hidden = true));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
  if (!token(event) || !["ArrowRight", "ArrowLeft"].includes(event.key)) return;
  event.preventDefault();
  move(token(event), event.key === "ArrowRight" ? 1 : -1);
});

draw();
