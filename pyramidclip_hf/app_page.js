() => {
  // What Gradio's page lacks.

  // Its examples are buttons without words.
  const name = () => document.querySelectorAll("button.gallery-item:not([aria-label])").forEach(
    (button, number) => button.setAttribute("aria-label", `Example ${number + 1}`));
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
  // A file that is no picture has a sentence; the browser's own sign beside it says less.
  const hide = (hidden) => (event) => {
    if (event.target.matches("#picture img")) event.target.style.visibility = hidden ? "hidden" : "";
  };
  document.addEventListener("error", hide(true), true);
  document.addEventListener("load", hide(false), true);
  // Its tabs know no arrow keys.
  document.addEventListener("keydown", (event) => {
    const tab = event.target.closest("[role=tab]");
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!tab || !step) return;
    const tabs = [...tab.parentElement.querySelectorAll("[role=tab]")];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.click();
    next.focus();
    event.preventDefault();
  });
  // It pastes pictures by its button alone.
  document.addEventListener("paste", async (event) => {
    const picture = [...(event.clipboardData?.files ?? [])].find((file) => file.type.startsWith("image/"));
    if (!picture) return;
    event.preventDefault();
    for (const name of ["Remove Image", "Upload file"])
      document.querySelector(`#picture [aria-label='${name}']`)?.click();
    for (let tries = 0; tries < 50; tries++) {
      const input = document.querySelector("#picture input[type=file]");
      if (input && !document.querySelector("#picture img")) {
        const given = new DataTransfer();
        given.items.add(picture);
        input.files = given.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
        return;
      }
      await new Promise((done) => setTimeout(done, 100));
    }
  });
}
