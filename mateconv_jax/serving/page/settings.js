// The settings dialog. What is empty is left out of requests: the server decides.

import { t } from "./texts.js";
import { element } from "./view.js";

/** Name in requests → [text, least, most, whether it is an integer]. */
export const SAMPLING = {
  temperature: ["temperature", 0, 2, false],
  top_p: ["topP", 0.01, 1, false],
  top_k: ["topK", 0, 100000, true],
  min_p: ["minP", 0, 1, false],
  repetition_penalty: ["repetitionPenalty", 0.1, 10, false],
  presence_penalty: ["presencePenalty", -2, 2, false],
  frequency_penalty: ["frequencyPenalty", -2, 2, false],
  max_tokens: ["maxTokens", 1, 1000000, true],
  seed: ["seed", 0, 4294967295, true],
};
const NAMES = { creative: "presetCreative", chat: "presetChat", factual: "presetFactual" };

/**
 * @param page {settings, presets(), conversation(), changed()}
 * @returns a function that fills the dialog in anew: after a change of language, conversation or server.
 */
export function setUpSettings(page) {
  const dialog = document.getElementById("settings");
  const preset = document.getElementById("preset");
  const system = document.getElementById("system");
  const fields = document.getElementById("sampling");
  const { settings } = page;

  function fill() {
    system.value = page.conversation().system;
    fields.replaceChildren(...Object.keys(SAMPLING).map(field));
    showPreset();
  }

  function field(name) {
    const [text, min, max, isInteger] = SAMPLING[name];
    const value = settings.sampling[name] ?? "";
    const input = element("input", { type: "number", min, max, step: isInteger ? 1 : "any", name, value });
    const problem = element("small", { className: "invalid" });
    input.oninput = () => {
      const isValid = input.validity.valid;
      input.setAttribute("aria-invalid", !isValid);
      problem.textContent = isValid ? "" : t("invalid", min, max);
      if (!isValid) return; // the last valid value stays
      if (input.value === "") delete settings.sampling[name];
      else settings.sampling[name] = Number(input.value);
      page.changed();
      showPreset();
    };
    return element("label", {}, element("span", { textContent: t(text) }), input, problem);
  }

  /** The preset whose values these are: nothing is remembered but the values. */
  function showPreset() {
    const presets = page.presets();
    const options = [["server", t("presetServer")], ...Object.keys(presets).map((name) => [name, NAMES[name] ? t(NAMES[name]) : name])];
    const used = Object.keys(settings.sampling).filter((name) => !["max_tokens", "seed"].includes(name));
    const isPreset = ([, values]) =>
      used.length === Object.keys(values).length && used.every((name) => values[name] === settings.sampling[name]);
    const found = used.length ? Object.entries(presets).find(isPreset)?.[0] : "server";
    if (!found) options.push(["own", t("presetOwn")]);
    preset.replaceChildren(...options.map(([value, textContent]) => element("option", { value, textContent })));
    preset.value = found ?? "own";
  }

  preset.onchange = () => {
    const { max_tokens, seed } = settings.sampling;
    settings.sampling = JSON.parse(JSON.stringify({ ...page.presets()[preset.value], max_tokens, seed }));
    page.changed();
    fill();
  };
  system.oninput = () => {
    settings.system = page.conversation().system = system.value.trim() ? system.value : "";
    page.changed();
  };
  document.getElementById("open-settings").onclick = () => {
    document.body.classList.remove("list-open");
    fill();
    dialog.showModal();
  };
  // A click beside the dialog closes it.
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  return fill;
}
