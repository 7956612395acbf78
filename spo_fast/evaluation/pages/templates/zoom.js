// Sliders over two pictures, and pictures opened at their own size: arrows go on to the next, Escape or a click closes.
const zoomable = () => [...document.querySelectorAll("button.zoom")].filter((b) => b.offsetParent !== null);
const dialog = document.getElementById("zoom");
let opened = null;
function zoom(button) {
  opened = button;
  const image = button.querySelector("img");
  dialog.querySelector("img").src = image.src;
  dialog.querySelector("p").textContent = image.alt;
  if (!dialog.open) dialog.showModal();
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.zoom");
  if (button) zoom(button);
  else if (dialog.open && dialog.contains(event.target)) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const all = zoomable();
  event.preventDefault();
  zoom(all[(all.indexOf(opened) + step + all.length) % all.length]);
});
dialog.addEventListener("close", () => opened.focus());
for (const slider of document.querySelectorAll(".slider input")) {
  slider.addEventListener("input", () => slider.parentElement.style.setProperty("--at", `${slider.value}%`));
}
