"use strict";

// The API's PCM: signed 16 bits, little-endian, mono.
const RATE = 24000;
const LONGEST = 4096;
const byId = (id) => document.getElementById(id);
const models = new Map();
let running = null; // the AbortController of the request that is being spoken
let context = null;

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

async function answer(address, options) {
  const response = await fetch(address, options);
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new Error(found?.error?.message ?? `the service answered ${response.status}`);
  }
  return response;
}

function fill(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
  if (values.some(([value]) => value === before)) select.value = before;
}

async function showModel() {
  const model = models.get(byId("model").value);
  fill(byId("precision"), model.precisions.map((precision) => [precision, precision]));
  await showVoices();
  await showReceipt();
}

async function showVoices() {
  const model = models.get(byId("model").value);
  const own = model.voices.map((voice) => [voice, voice]);
  let uploaded = [];
  if (model.takes_references) {
    const { data } = await (await answer("/v1/audio/voices")).json();
    uploaded = data.filter((voice) => !voice.model).map((voice) => [voice.id, `${voice.name} (uploaded)`]);
  }
  fill(byId("voice"), [...own, ...uploaded]);
  byId("delete").disabled = !byId("voice").value.startsWith("voice_");
}

async function showReceipt() {
  const model = models.get(byId("model").value);
  const precision = byId("precision").value;
  const address = `/v1/models/${encodeURIComponent(model.id)}/receipt?precision=${precision}`;
  const has = model.receipts.includes(precision);
  byId("receipt-link").hidden = !has;
  byId("receipt-link").href = address;
  byId("receipt").textContent = has ? await (await answer(`${address}&form=text`)).text() : "This model was not tuned.";
}

function figures(first, seconds, total) {
  byId("first").textContent = first === null ? "–" : `${first.toFixed(2)} s`;
  byId("seconds").textContent = seconds === null ? "–" : `${seconds.toFixed(2)} s`;
  byId("factor").textContent = seconds ? (total / seconds).toFixed(2) : "–";
}

// Plays pieces of PCM one behind the other, and resolves when the last one has been heard.
async function play(response, begun, signal) {
  context = new AudioContext({ sampleRate: RATE });
  await context.resume();
  const reader = response.body.getReader();
  let odd = new Uint8Array(0);
  let at = 0;
  let samples = 0;
  let first = null;
  let last = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    first ??= (performance.now() - begun) / 1000;
    const bytes = new Uint8Array(odd.length + value.length);
    bytes.set(odd);
    bytes.set(value, odd.length);
    const count = bytes.length >> 1;
    odd = bytes.slice(2 * count);
    if (!count) continue;
    const view = new DataView(bytes.buffer);
    const sound = context.createBuffer(1, count, RATE);
    const channel = sound.getChannelData(0);
    for (let i = 0; i < count; i++) channel[i] = view.getInt16(2 * i, true) / 32768;
    last = context.createBufferSource();
    last.buffer = sound;
    last.connect(context.destination);
    at = Math.max(at, context.currentTime + 0.05);
    last.start(at);
    at += sound.duration;
    samples += count;
    figures(first, samples / RATE, (performance.now() - begun) / 1000);
    say("Speaking.");
  }
  if (last && !signal.aborted) {
    await new Promise((resolve) => {
      last.onended = resolve;
      signal.addEventListener("abort", resolve);
    });
  }
}

async function speak(event) {
  event.preventDefault();
  running?.abort();
  const mine = (running = new AbortController());
  const stream = byId("stream").checked;
  const wanted = {
    model: byId("model").value,
    voice: byId("voice").value,
    precision: byId("precision").value,
    input: byId("text").value,
    response_format: stream ? "pcm" : "wav",
  };
  if (stream) wanted.stream_format = "audio";
  byId("stop").disabled = false;
  byId("player").hidden = true;
  figures(null, null, 0);
  say("Waiting for the first sound.");
  const begun = performance.now();
  try {
    const response = await answer("/v1/audio/speech", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(wanted),
      signal: mine.signal,
    });
    if (stream) {
      await play(response, begun, mine.signal);
    } else {
      const sound = await response.blob();
      const total = (performance.now() - begun) / 1000;
      figures(total, Number(response.headers.get("X-Speech-Seconds")), total);
      const player = byId("player");
      URL.revokeObjectURL(player.src);
      player.src = URL.createObjectURL(sound);
      player.hidden = false;
      await player.play().catch(() => {}); // a browser may want a further key press; the controls are there
    }
    say("Done.");
  } catch (error) {
    say(mine.signal.aborted ? "Stopped." : error.message, !mine.signal.aborted);
  } finally {
    if (running === mine) {
      running = null;
      byId("stop").disabled = true;
      context?.close();
      context = null;
    }
  }
}

async function upload(event) {
  event.preventDefault();
  const form = new FormData();
  form.append("name", byId("name").value);
  form.append("audio_sample", byId("sample").files[0]);
  try {
    const voice = await (await answer("/v1/audio/voices", { method: "POST", body: form })).json();
    await showVoices();
    if (models.get(byId("model").value).takes_references) {
      byId("voice").value = voice.id;
      byId("delete").disabled = false;
      say(`The voice ${voice.name} is kept.`);
    } else {
      say(`The voice ${voice.name} is kept. The chosen model speaks with its own voices only.`);
    }
  } catch (error) {
    say(error.message, true);
  }
}

async function remove() {
  try {
    await answer(`/v1/audio/voices/${byId("voice").value}`, { method: "DELETE" });
    await showVoices();
    say("The voice is deleted.");
  } catch (error) {
    say(error.message, true);
  }
}

function showLength() {
  byId("length").textContent = `${byId("text").value.length} of ${LONGEST} characters`;
}

async function start() {
  while (!(await fetch("/ready")).ok) {
    say("The model is being loaded, tuned and warmed up.");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  const { data } = await (await answer("/v1/models")).json();
  for (const model of data) models.set(model.id, model);
  fill(byId("model"), data.map((model) => [model.id, model.id]));
  await showModel();
  byId("speak").disabled = false;
  say("Ready.");
}

byId("form").addEventListener("submit", speak);
byId("upload").addEventListener("submit", upload);
byId("delete").addEventListener("click", remove);
byId("stop").addEventListener("click", () => running?.abort());
byId("model").addEventListener("change", showModel);
byId("precision").addEventListener("change", showReceipt);
byId("voice").addEventListener("change", () => (byId("delete").disabled = !byId("voice").value.startsWith("voice_")));
byId("text").addEventListener("input", showLength);
showLength();
start().catch((error) => say(error.message, true));
