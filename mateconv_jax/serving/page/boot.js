// Before the first paint: the language and the theme chosen last, so that nothing flashes.
(() => {
  let settings = {};
  try {
    settings = JSON.parse(localStorage.getItem("mateconv.settings")) ?? {};
  } catch {
    // No storage, or not ours: the defaults.
  }
  document.documentElement.lang = settings.language === "en" ? "en" : "zh-CN";
  if (settings.theme === "dark" || settings.theme === "light") document.documentElement.dataset.theme = settings.theme;
})();
