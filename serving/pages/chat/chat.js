"use strict";
// Talks to the API that serves this page. What the policy writes only ever becomes text nodes.

const $ = (id) => document.getElementById(id);
const state = { columns: [], asking: null, loading: null };

class Failed extends Error {}

// Requests

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, body, signal) {
  const sent = body && { method: "POST", body: JSON.stringify(body) };
  const type = body && { "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(path, { ...sent, headers: { ...headers(), ...type }, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failed("Nobody answered: is the server still running?");
  }
  if (answer.ok) return answer;
  const error = (await answer.json().catch(() => null))?.error;
  const message = error?.message ?? `The server answered ${answer.status}.`;
  const wait = answer.headers.get("Retry-After");
  const key = answer.status === 401 && !$("key").value ? " Enter your API key above." : "";
  throw new Failed(message + (wait ? ` Try again in ${wait} s.` : "") + key);
}

// The JSON objects of server-sent events, until [DONE]. Characters and lines may be cut anywhere.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Failed("The answer broke off: the connection was closed.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function newKey() {
  // not crypto.randomUUID, which plain http does not have
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Models

async function loadModels() {
  try {
    const models = (await (await call("v1/models")).json()).data.map((model) => model.id);
    for (const [index, select] of [$("model-0"), $("model-1")].entries()) {
      const chosen = models.includes(select.value) ? select.value : models[Math.min(index, models.length - 1)];
      select.replaceChildren(...models.map((id) => element("option", { value: id, textContent: id })));
      select.value = chosen;
    }
    problem("");
  } catch (error) {
    problem(error.message);
  }
  nameColumns();
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = text === "";
}

// Columns: one conversation with each model

function buildColumns() {
  const count = $("compare").checked ? 2 : 1;
  $("other").hidden = count === 1;
  while (state.columns.length > count) state.columns.pop().section.remove();
  while (state.columns.length < count) {
    const index = state.columns.length;
    const section = element("section", { className: "column" });
    const title = element("h2", { id: `column-title-${index}` });
    const talk = element("ol", { className: "talk", tabIndex: 0 });
    section.setAttribute("aria-labelledby", title.id);
    talk.setAttribute("aria-labelledby", title.id);
    section.append(title, talk);
    $("columns").append(section);
    state.columns.push({ section, title, talk, messages: [], select: $(`model-${index}`) });
  }
  nameColumns();
}

function nameColumns() {
  for (const { title, select } of state.columns) title.textContent = select.value || "no model yet";
}

function startAgain() {
  state.asking?.abort();
  for (const column of state.columns.splice(0)) column.section.remove();
  buildColumns();
  $("message").focus();
}

function turn(column, who, text, className = "") {
  const item = element("li", { className: `turn ${className}` });
  const shown = element("p", { className: "text", textContent: text });
  item.append(element("p", { className: "who", textContent: who }), shown);
  column.talk.append(item);
  item.scrollIntoView({ block: "end" });
  return { item, shown };
}

// Asking

async function ask() {
  const text = $("message").value.trim();
  if (text === "" || state.asking !== null) return;
  const asking = new AbortController();
  state.asking = asking;
  showAsking(true);
  await state.loading;
  if ($("model-0").value === "") await loadModels();
  if ($("model-0").value === "") { // why is shown, and what was written stays
    state.asking = null;
    showAsking(false);
    return;
  }
  $("message").value = "";
  problem("");
  $("status").textContent = "Waiting for an answer.";
  const ends = await Promise.all(state.columns.map((column) => answerTo(column, text, asking.signal)));
  $("status").textContent = ends.join(" ");
  if (state.asking === asking) state.asking = null;
  showAsking(state.asking !== null);
  $("message").focus();
}

function showAsking(on) {
  $("send").disabled = on;
  $("stop").hidden = !on;
  for (const control of [$("model-0"), $("model-1"), $("compare")]) control.disabled = on;
}

// Streams one answer into a column; an answer that failed is not part of the conversation afterwards.
async function answerTo(column, text, signal) {
  const model = column.select.value;
  const messages = [...column.messages, { role: "user", content: text }];
  const question = turn(column, "You", text, "mine");
  const { item, shown } = turn(column, model, "");
  item.setAttribute("aria-busy", "true");
  const answer = { id: "", versions: new Set(), text: "", finish: null };
  let ended = "";
  try {
    const limits = { max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value) };
    await stream({ model, messages, ...limits, stream: true }, signal, answer, shown, column.talk);
    column.messages = [...messages, { role: "assistant", content: answer.text }];
  } catch (error) {
    ended = error.name === "AbortError" ? "Stopped." : error.message;
    if (error.name !== "AbortError") item.classList.add("failed");
    question.item.classList.add("failed");
  }
  item.removeAttribute("aria-busy");
  about(item, answer, ended);
  return ended || `${model} answered.`;
}

async function stream(body, signal, answer, shown, talk) {
  const response = await call("v1/chat/completions", body, signal);
  const version = response.headers.get("X-Weights-Version");
  if (version !== null) answer.versions.add(Number(version));
  for await (const event of events(response)) {
    if (event.error) throw new Failed(event.error.message);
    answer.id ||= event.id;
    for (const wrote of event.weights_versions ?? [event.weights_version ?? []].flat()) answer.versions.add(wrote);
    const choice = event.choices?.[0];
    answer.finish = choice?.finish_reason ?? answer.finish;
    const more = choice?.delta?.content;
    if (!more) continue;
    const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
    answer.text += more;
    shown.append(more);
    if (atEnd) talk.scrollTop = talk.scrollHeight;
  }
  if (answer.id === "") throw new Failed("The answer was empty.");
}

// Which weights wrote it, how it ended, and thumbs
function about(item, answer, ended) {
  const line = element("div", { className: "about" });
  const versions = [...answer.versions].sort((one, other) => one - other);
  const said = [];
  if (versions.length > 0) said.push(`weights version ${versions.join(" to ")}`);
  if (answer.finish === "length") said.push("cut at the token limit");
  if (ended) said.push(ended);
  line.append(element("span", { className: "version", textContent: said.join(" · ") }));
  if (answer.id && !ended) line.append(...thumbs(answer.id));
  item.append(line);
  item.scrollIntoView({ block: "end" });
}

function thumbs(answerId) {
  const outcome = element("span", { className: "outcome" });
  outcome.setAttribute("role", "status");
  const keys = { up: newKey(), down: newKey() }; // of what is sent again the same one
  const buttons = [["up", "Good"], ["down", "Bad"]].map(([thumb, text]) => {
    const button = element("button", { type: "button", className: `thumb ${thumb}`, textContent: text });
    button.setAttribute("aria-label", `${text} answer`);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", async () => {
      for (const each of buttons) each.disabled = true;
      outcome.textContent = "";
      try {
        await call("v1/feedback", { id: answerId, kind: "thumbs", value: thumb, idempotency_key: keys[thumb] });
        button.setAttribute("aria-pressed", "true");
        outcome.textContent = "Thank you.";
      } catch (error) {
        outcome.textContent = error.message;
        for (const each of buttons) each.disabled = false;
      }
    });
    return button;
  });
  return [...buttons, outcome];
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

function begin() {
  buildColumns();
  state.loading = loadModels();
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("key").addEventListener("change", loadModels);
  $("compare").addEventListener("change", startAgain);
  for (const select of [$("model-0"), $("model-1")]) select.addEventListener("change", startAgain);
  $("again").addEventListener("click", startAgain);
  $("stop").addEventListener("click", () => state.asking?.abort());
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
}

begin();
