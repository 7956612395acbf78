// Blind votes on the report's pairs. Nothing is loaded or sent; answers stay in this browser until they are exported.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const storageKey = "spo_fast votes " + data.key;
const total = data.trials.length * data.questions.length;
let answers = []; // one of "left", "right", "tie" an answered question, in the order of the trials
let imported = []; // votes of other people's files

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(storageKey) || "[]");
    return Array.isArray(found) ? found.slice(0, total) : [];
  } catch {
    return []; // storage can be switched off; votes then last as long as the page
  }
}

function keep() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(answers));
  } catch {}
}

function picture(trial, side) {
  return element(`picture-${trial.row}-${trial.sides[side]}`).src;
}

function show() {
  const done = answers.length >= total;
  element("asking").hidden = done;
  element("answered").hidden = !done;
  element("progress").textContent = `${answers.length} of ${total}`;
  Object.assign(element("progress-bar"), { max: total, value: answers.length });
  if (done) {
    tabulate();
    return;
  }
  const trial = data.trials[Math.floor(answers.length / data.questions.length)];
  element("question").textContent = data.questions[answers.length % data.questions.length][1];
  element("prompt").textContent = trial.prompt;
  element("left").src = picture(trial, 0);
  element("right").src = picture(trial, 1);
}

function answer(choice) {
  if (answers.length >= total) return;
  answers.push(choice);
  keep();
  show();
}

function undo() {
  answers.pop();
  keep();
  show();
}

function voting(on) {
  document.body.classList.toggle("voting", on);
  element("vote").hidden = !on;
  if (on) show();
}

// A vote names what was compared, not where it stood: {prompt, image, a, b, question, choice: "a", "b" or "tie"}.
function votes() {
  return answers.map((choice, i) => {
    const trial = data.trials[Math.floor(i / data.questions.length)];
    const flipped = trial.sides[0] > trial.sides[1];
    const [a, b] = [...trial.sides].sort((x, y) => x - y).map((side) => data.names[side]);
    const side = choice === "tie" ? "tie" : (choice === "left") !== flipped ? "a" : "b";
    const question = data.questions[i % data.questions.length][0];
    return { prompt: trial.number, image: trial.image, a, b, question, choice: side };
  });
}

// Votes until a share as large as this one would leave one half by 1.96 standard errors of fair coins (a tie has no
// variance); fewer than 6 never do: even 5 : 0 is chance in 1 of 16.
function toSettle({ a, b, tie }) {
  const all = a + b + tie;
  const off = Math.abs((b + tie / 2) / all - 0.5);
  if (off === 0) return "even so far";
  const more = Math.max(6, Math.ceil((1.96 ** 2 * (a + b)) / all / 4 / off ** 2)) - all;
  return more > 0 ? `about ${more} more vote${more === 1 ? "" : "s"}` : "settled";
}

function tabulate() {
  const counts = new Map();
  for (const vote of [...votes(), ...imported]) {
    const row = [vote.question, vote.a, vote.b].join("\n");
    const count = counts.get(row) || { a: 0, b: 0, tie: 0 };
    count[vote.choice] += 1;
    counts.set(row, count);
  }
  const titles = Object.fromEntries(data.questions.map(([name, , title]) => [name, title]));
  const body = element("tally");
  body.replaceChildren();
  for (const [row, count] of counts) {
    const [question, a, b] = row.split("\n");
    const line = body.insertRow();
    const all = count.a + count.b + count.tie;
    for (const text of [titles[question] || question, `${b} against ${a}`, `${count.b} : ${count.a}`, `${count.tie}`,
      `${((100 * (count.b + count.tie / 2)) / all).toFixed(0)} %`, toSettle(count)]) {
      line.insertCell().textContent = text;
    }
  }
  element("tallied").hidden = counts.size === 0;
}

function save() {
  const file = { format: "spo_fast votes 1", key: data.key, seed: data.seed, votes: votes() };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
  link.download = "votes.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function load(files) {
  const notes = [];
  for (const file of files) {
    try {
      const found = JSON.parse(await file.text());
      if (found.key !== data.key) throw new Error("votes of another comparison");
      imported.push(...found.votes);
      notes.push(`${file.name}: ${found.votes.length} votes`);
    } catch (error) {
      notes.push(`${file.name} was not read (${error.message})`);
    }
  }
  element("imported").textContent = notes.join("; ");
  tabulate();
}

function arrange() {
  const wanted = element("filter").value.trim().toLowerCase();
  const metric = element("order").value;
  const all = [...document.querySelectorAll(".pair")];
  const key = (pair) => (metric === "" ? drawn.get(pair) : -JSON.parse(pair.dataset.gaps)[metric]);
  all.sort((x, y) => key(x) - key(y));
  element("pairs").append(...all);
  for (const pair of all) pair.hidden = !pair.querySelector("h3").textContent.toLowerCase().includes(wanted);
  element("matching").textContent = wanted ? `${all.filter((pair) => !pair.hidden).length} of ${all.length}` : "";
}
const drawn = new Map([...document.querySelectorAll(".pair")].map((pair, i) => [pair, i]));
element("filter").addEventListener("input", arrange);
element("order").addEventListener("change", arrange);

const KEYS = {
  ArrowLeft: () => answer("left"), 1: () => answer("left"),
  ArrowRight: () => answer("right"), 2: () => answer("right"),
  ArrowDown: () => answer("tie"), 0: () => answer("tie"),
  Backspace: undo, Escape: () => voting(false),
};
document.addEventListener("keydown", (event) => {
  if (element("vote").hidden || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});
const BUTTONS = {
  start: () => voting(true), stop: () => voting(false), undo, export: save,
  "choose-left": () => answer("left"), "choose-tie": () => answer("tie"), "choose-right": () => answer("right"),
};
for (const [id, act] of Object.entries(BUTTONS)) element(id).addEventListener("click", act);
element("votes-file").addEventListener("change", (event) => load(event.target.files));
answers = kept();
if (answers.length >= total) tabulate();
