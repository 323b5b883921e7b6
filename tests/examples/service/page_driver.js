// Runs the page's script without a browser: `node page_driver.js SCRIPT SERVICE RECORDING` prints one JSON line a step.
// The elements and the loudspeaker are stand-ins; requests, streams and forms are node's own.
const fs = require("fs");

const [script, service, recording] = process.argv.slice(2);
const elements = {};

function element(id) {
  return (elements[id] ??= {
    value: "", textContent: "", files: [], options: [], listeners: {}, classList: { toggle() {} },
    addEventListener(kind, listener) { this.listeners[kind] = listener; },
    replaceChildren(...options) { this.options = options; this.value = options[0]?.value ?? ""; },
    async play() {},
  });
}

let played = 0;
globalThis.document = { getElementById: element };
globalThis.Option = class { constructor(text, value) { Object.assign(this, { text, value }); } };
globalThis.AudioContext = class {
  currentTime = 0;
  async resume() {}
  close() {}
  createBuffer(_channels, count, rate) {
    const samples = new Float32Array(count);
    return { duration: count / rate, getChannelData: () => samples };
  }
  createBufferSource() {
    return {
      connect() {},
      start() { played += this.buffer.duration; setTimeout(() => this.onended?.(), 5); },
    };
  }
};
URL.createObjectURL = () => "blob:";
URL.revokeObjectURL = () => {};
const { fetch } = globalThis;
globalThis.fetch = (address, options) => fetch(service + address, options);

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const values = (id) => element(id).options.map((option) => option.value);
const submit = (id) => element(id).listeners.submit({ preventDefault() {} });
const print = (step, content) => console.log(JSON.stringify({ step, status: element("status").textContent, ...content }));

(async () => {
  element("text").value = "one WAIT:0.1 two";
  element("stream").checked = true;
  (0, eval)(fs.readFileSync(script, "utf8"));
  while (!["Ready.", "Speaking."].includes(element("status").textContent)) await pause(10);
  print("start", { models: values("model"), voices: values("voice"), precisions: values("precision") });

  await submit("form");
  print("stream", { played, first: element("first").textContent, seconds: element("seconds").textContent });

  element("stream").checked = false;
  await submit("form");
  print("whole", { seconds: element("seconds").textContent, hidden: element("player").hidden });

  element("text").value = "";
  await submit("form");
  print("refused");

  element("text").value = "one WAIT:30 two";
  const speaking = submit("form");
  await pause(50);
  element("stop").listeners.click();
  await speaking;
  print("stopped", { disabled: element("stop").disabled });

  element("name").value = "Zoë";
  element("sample").files = [new Blob([fs.readFileSync(recording)])];
  await submit("upload");
  print("uploaded", { voice: element("voice").value, voices: values("voice").length });
  await element("delete").listeners.click();
  print("deleted", { voices: values("voice") });

  element("model").value = "plain";
  await element("model").listeners.change();
  print("changed", { voices: values("voice"), receipt: element("receipt").textContent });
})();
