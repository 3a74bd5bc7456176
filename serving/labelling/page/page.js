"use strict";
// Talks to the API beside it (api/...). Texts of prompts and responses come from models and files: they only ever
// become text nodes.

const CLIENT_VERSION = "page 1";
const IDLE_MS = 30_000; // whoever did nothing for so long is not working on it
const RETRY_MS = [300, 900, 2000]; // a request that nobody answered is sent again, with the same key
const REQUEST_MS = 90_000;
const LOST = ["lease_expired", "lease_ended", "no_lease", "already_voted", "unknown_task"]; // codes: the task is gone

const $ = (id) => document.getElementById(id);
const state = { token: "", session: null, task: null, busy: false, done: [], attempt: null };
const time = { activeMs: 0, sinceMs: 0, lastActMs: 0, visible: true };

class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Requests

async function request(method, path, body, keepalive = false) {
  const headers = { Authorization: `Bearer ${state.token}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method, headers, body: body && JSON.stringify(body), keepalive, cache: "no-store" };
  for (let attempt = 0; ; attempt++) {
    try {
      const answer = await fetch(path, { ...options, signal: AbortSignal.timeout(REQUEST_MS) });
      return await read(answer);
    } catch (error) {
      const gone = !(error instanceof Refused) || error.status === 503;
      if (!gone || attempt >= RETRY_MS.length || keepalive) throw error;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS[attempt]));
    }
  }
}

async function read(answer) {
  const content = await answer.json().catch(() => null);
  if (answer.ok && content !== null) return content;
  const error = content?.error ?? {};
  throw new Refused(answer.status, error.code ?? "", error.message ?? `The server answered ${answer.status}.`);
}

function newKey() {
  // not crypto.randomUUID, which plain http does not have
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// One thing at a time: what is pressed meanwhile is not taken for an answer to the next task. What failed because
// nobody answered can be tried again as it was.
async function work(doing) {
  if (state.busy) return;
  state.busy = true;
  showBusy();
  $("problem").hidden = true;
  try {
    await doing();
    state.attempt = null;
  } catch (error) {
    await failed(error, doing);
  } finally {
    state.busy = false;
    showBusy();
  }
}

async function failed(error, doing) {
  const refused = error instanceof Refused;
  if (refused && error.status === 401) {
    signOut();
    problem("This token is not known, or no longer. Sign in with the one that you were given, or ask for a new one.");
    return;
  }
  const again = !refused || error.status >= 500;
  const lost = refused && LOST.includes(error.code);
  const text = lost ? "That task was no longer yours, so this answer was not taken. Here is what is next." : `${error.message}.`;
  problem(refused ? text : "Nobody answered. Your answer is not lost: try again.", again && doing);
  if (lost) {
    await request("POST", "api/next").then(show, () => {}); // what went wrong first is said already
  }
}

function problem(text, again) {
  $("problem").hidden = false;
  $("problem-text").textContent = text;
  state.attempt = again || null;
  $("retry").hidden = !again;
}

function showBusy() {
  document.body.setAttribute("aria-busy", String(state.busy));
  for (const button of document.querySelectorAll("#actions button, #undo, #look-again, #sign-in button")) {
    button.disabled = state.busy;
  }
}

// Signing in and out

async function signIn(token) {
  state.token = token;
  await work(async () => {
    state.session = await request("GET", "api/session");
    sessionStorage.setItem("token", token);
    $("sign-in").hidden = true;
    $("tools").hidden = $("progress").hidden = false;
    $("guidelines-text").textContent = state.session.guidelines.text;
    $("guidelines-version").textContent = state.session.guidelines.version;
    buildAspects(state.session.aspects);
    show(await request("POST", "api/next"));
  });
}

function signOut() {
  release();
  sessionStorage.removeItem("token");
  Object.assign(state, { token: "", session: null, task: null, done: [], attempt: null });
  for (const id of ["task", "nothing", "tools", "progress", "last-line"]) $(id).hidden = true;
  $("sign-in").hidden = false;
  $("token").value = "";
  $("token").focus();
}

function release() {
  if (state.task === null || state.token === "") return;
  request("POST", `api/leases/${state.task.lease_id}/release`, undefined, true).catch(() => {}); // it ends by itself
}

// Showing a task

function show({ task, progress }) {
  state.task = task;
  showProgress(progress);
  $("task").hidden = task === null;
  $("nothing").hidden = task !== null;
  if (task === null) {
    $("nothing-title").focus();
    return;
  }
  const question = { pair: "Which response is better?", label: "Is this response good?" };
  $("question").textContent = question[task.kind] ?? `How good is this response, from 1 to ${task.scale}?`;
  showTexts(task);
  clearMore(task.kind);
  showActions(task);
  Object.assign(time, { activeMs: 0, sinceMs: performance.now(), lastActMs: performance.now() });
  window.scrollTo(0, 0);
  $("question").focus();
}

function showTexts(task) {
  showPrompt(task.prompt);
  $("responses").replaceChildren(...task.responses.map((response, index) => responseCard(response, index, task)));
}

function showProgress(progress) {
  const { voted, skipped, votes, required_votes: required } = progress;
  const skips = skipped ? `, ${skipped} skipped` : "";
  $("counts").textContent = `You: ${voted} answered${skips}. All: ${votes} of ${required}.`;
  $("bar").max = Math.max(required, 1);
  $("bar").value = Math.min(votes, required);
}

function showPrompt({ text, messages, offensive }) {
  const box = $("prompt");
  const turns = messages ?? [{ role: "", content: text }];
  box.replaceChildren(
    ...turns.map(({ role, content }) => {
      const turn = element("div", { className: "turn" });
      if (role) turn.append(element("span", { className: "who", textContent: role }));
      turn.append(String(content));
      return turn;
    }),
  );
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-labelledby", "prompt-title");
  veil(box.parentElement, box, offensive, "prompt");
}

function responseCard({ text, offensive }, index, task) {
  const name = task.kind === "pair" ? `Response ${index + 1}` : "Response";
  const card = element("article", { className: "card response" });
  const title = element("h3", { id: `response-title-${index}`, textContent: name });
  const box = element("div", { className: "text", textContent: text === "" ? "(empty)" : text, tabIndex: 0 });
  box.setAttribute("role", "region");
  box.setAttribute("aria-labelledby", title.id);
  card.append(title, box);
  veil(card, box, offensive, name.toLowerCase());
  return card;
}

// Blurred text is hidden from screen readers as well, until it is asked for.
function veil(card, box, offensive, name) {
  card.querySelector(".veil")?.remove();
  const wanted = $("blur").value;
  const veiled = wanted === "all" || (wanted === "offensive" && offensive);
  card.classList.toggle("veiled", veiled);
  box.toggleAttribute("inert", veiled);
  if (!veiled) return;
  const reason = offensive ? "Has words that may offend." : "Blurred, as you set it.";
  const line = element("p", { className: "veil", textContent: reason });
  const button = element("button", { type: "button", textContent: `Show ${name}` });
  button.addEventListener("click", () => {
    card.classList.remove("veiled");
    box.removeAttribute("inert");
    line.remove();
    box.focus();
  });
  line.append(button);
  box.before(line);
}

function showActions({ kind, scale }) {
  const answers = [];
  if (kind === "pair") {
    answers.push(["Response 1 is better", "1", { choice: "left" }, "wide main"]);
    answers.push(["Response 2 is better", "2", { choice: "right" }, "wide main"]);
    answers.push(["Tie", "t", { choice: "tie" }, ""]);
    answers.push(["Both bad", "b", { choice: "both_bad" }, ""]);
  } else if (kind === "label") {
    answers.push(["Good", "1", { value: 1 }, "wide main"]);
    answers.push(["Bad", "0", { value: 0 }, "wide main"]);
  } else {
    for (let value = 1; value <= scale; value++) answers.push([String(value), value < 10 ? String(value) : "", { value }, "main"]);
  }
  answers.push(["Skip", "s", { choice: "skip" }, ""]);
  $("actions").replaceChildren(
    ...answers.map(([text, key, said, className]) => {
      const button = element("button", { type: "button", className, textContent: text });
      // a rating's number is its key: say it once
      if (key && key !== text) button.append(element("kbd", { textContent: key, ariaHidden: "true" }));
      if (key) button.dataset.key = key;
      if (key) button.setAttribute("aria-keyshortcuts", key);
      button.addEventListener("click", () => vote(said));
      return button;
    }),
  );
  showBusy();
}

// What can be said beside the answer

function buildAspects(names) {
  const sides = [["", "not said"], ["left", "response 1"], ["right", "response 2"], ["tie", "same"]];
  $("aspects").replaceChildren(
    ...names.map((name) => {
      const group = element("fieldset", { className: "choices" });
      group.append(element("legend", { textContent: `More ${name}` }));
      for (const [value, text] of sides) {
        const label = element("label");
        const radio = element("input", { type: "radio", name: `aspect ${name}`, value });
        radio.dataset.aspect = name;
        label.append(radio, ` ${text}`);
        group.append(label);
      }
      return group;
    }),
  );
}

function clearMore(kind) {
  for (const radio of document.querySelectorAll("#more input[type=radio]")) radio.checked = radio.value === "";
  $("rationale").value = "";
  $("strength").hidden = $("aspects").hidden = kind !== "pair";
}

function saidBeside(said) {
  const rationale = $("rationale").value;
  if (said.choice === "skip" || state.task.kind !== "pair") return { rationale };
  const aspects = {};
  for (const radio of document.querySelectorAll("#aspects input:checked")) {
    if (radio.value) aspects[radio.dataset.aspect] = radio.value;
  }
  const strength = document.querySelector("#strength input:checked")?.value;
  const better = said.choice === "left" || said.choice === "right";
  return { rationale, aspects, strength: better && strength ? Number(strength) : null };
}

// Voting

async function vote(said) {
  const task = state.task;
  if (task === null || state.busy) return;
  countTime();
  const body = {
    task_id: task.task_id,
    lease_id: task.lease_id,
    idempotency_key: newKey(),
    active_s: Math.round(time.activeMs) / 1000,
    client_version: CLIENT_VERSION,
    guideline_version: state.session.guidelines.version,
    ...said,
    ...saidBeside(said),
  };
  let receipt = null;
  await work(async () => {
    receipt ??= await request("POST", "api/judgments", body);
    if (state.task === task) {
      state.done.push(receipt.judgment_id);
      state.task = null;
      told(task, said, receipt.weights_versions);
    }
    show(await request("POST", "api/next"));
  });
}

function told(task, said, versions) {
  const name = { left: "Response 1", right: "Response 2", tie: "Tie", both_bad: "Both bad", skip: "Skipped" };
  const what = said.choice ? name[said.choice] : task.kind === "label" ? ["Bad", "Good"][said.value] : `${said.value} of ${task.scale}`;
  const writer = (version) => (version === null ? "from a file" : `written by version ${version}`);
  const who = (versions ?? []).map((version, index) => (task.kind === "pair" ? `Response ${index + 1} was ` : "It was ") + writer(version));
  $("last").textContent = [`Saved: ${what}.`, ...(who.length ? [`${who.join(", ")}.`] : [])].join(" ");
  $("last-line").hidden = false;
  $("undo").hidden = false;
}

async function undo() {
  const judgment = state.done.at(-1);
  if (judgment === undefined || state.busy) return;
  const body = { idempotency_key: newKey() };
  await work(async () => {
    const back = await request("POST", `api/judgments/${judgment}/undo`, body).catch((error) => {
      if (error instanceof Refused && error.status < 500) forget(judgment); // it cannot be taken back any more
      throw error;
    });
    forget(judgment);
    $("last").textContent = "Taken back: answer it again. The sides may have changed.";
    show(back);
  });
}

function forget(judgment) {
  state.done = state.done.filter((each) => each !== judgment);
  $("undo").hidden = state.done.length === 0;
}

// Time that somebody spent on a task: not while the page is hidden, not while nothing happened for long

function countTime() {
  const now = performance.now();
  const until = Math.min(now, time.lastActMs + IDLE_MS);
  if (time.visible) time.activeMs += Math.max(0, until - time.sinceMs);
  time.sinceMs = now;
  time.visible = !document.hidden;
}

function acted() {
  countTime();
  time.lastActMs = performance.now();
}

async function renew() {
  const task = state.task;
  if (task === null || state.busy) return;
  const every = (state.session.lease_s * 1000) / 3;
  if (performance.now() - time.lastActMs > every) return; // nobody is here: let others have it in time
  try {
    await request("POST", `api/leases/${task.lease_id}/renew`);
  } catch (error) {
    if (state.task === task && !state.busy) await work(() => Promise.reject(error));
  }
}

function keepRenewing() {
  const lease_s = state.session?.lease_s ?? 60;
  setTimeout(async () => {
    await renew();
    keepRenewing();
  }, Math.max(1000, (lease_s * 1000) / 3));
}

// Keys

function pressed(event) {
  acted();
  const typing = event.target.closest?.("input, textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || typing || !$("use-keys").checked) return;
  if (document.querySelector("dialog[open]") || state.session === null) return;
  const key = event.key.toLowerCase();
  const button =
    key === "u" && !$("last-line").hidden && !$("undo").hidden ? $("undo")
    : key === "g" ? $("open-guidelines")
    : Array.from($("actions").children).find((each) => each.dataset.key === key);
  if (!button || (state.task === null && button.parentElement === $("actions"))) return;
  event.preventDefault();
  button.click();
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

// What is set here stays in this browser.
function kept(id, apply) {
  const control = $(id);
  const property = control.type === "checkbox" ? "checked" : "value";
  const saved = localStorage.getItem(id);
  if (saved !== null) control[property] = JSON.parse(saved);
  apply(control[property]);
  control.addEventListener("change", () => {
    localStorage.setItem(id, JSON.stringify(control[property]));
    apply(control[property]);
  });
}

function begin() {
  kept("use-keys", (on) => document.body.classList.toggle("no-keys", !on));
  kept("theme", (theme) => document.documentElement.style.setProperty("color-scheme", theme));
  kept("blur", () => state.task && showTexts(state.task));
  for (const [button, dialog] of [["open-guidelines", "guidelines"], ["open-settings", "settings"]]) {
    $(button).addEventListener("click", () => $(dialog).showModal());
  }
  $("sign-in").addEventListener("submit", (event) => {
    event.preventDefault();
    signIn($("token").value.trim());
  });
  $("sign-out").addEventListener("click", signOut);
  $("undo").addEventListener("click", undo);
  $("look-again").addEventListener("click", () => work(async () => show(await request("POST", "api/next"))));
  $("retry").addEventListener("click", () => state.attempt && work(state.attempt));
  document.addEventListener("keydown", pressed);
  document.addEventListener("visibilitychange", acted);
  for (const event of ["pointerdown", "pointermove", "wheel"]) document.addEventListener(event, acted, { passive: true });
  keepRenewing();

  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) history.replaceState(null, "", location.pathname); // not left in the history
  const token = given ?? sessionStorage.getItem("token");
  if (token) signIn(token);
  else signOut();
}

begin();
