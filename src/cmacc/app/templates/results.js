// Players get their file when they come near the view: a hundred of them would take all connections to the server.
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      seen.unobserve(entry.target);
      entry.target.src = entry.target.dataset.src;
    }
  }
}, { rootMargin: "300px" });
const observe = () => element.querySelectorAll("video[data-src], audio[data-src]").forEach((player) => seen.observe(player));
observe();
watch("value", () => {
  observe();
  // On a phone the results stand below the fields; and a search from far down in a list would show its end.
  if (element.getBoundingClientRect().top < 0 || window.innerWidth < 700) element.scrollIntoView({ behavior: "smooth" });
});

// One sound at a time. These events do not bubble, so they are caught on the way down.
document.addEventListener("play", (event) => {
  document.querySelectorAll("video, audio").forEach((player) => { if (player !== event.target) player.pause(); });
}, true);

// A heat-map takes seconds to compute: only when it is opened. If there is none, the server says why.
element.addEventListener("toggle", (event) => {
  const image = event.target.querySelector("img[data-src]");
  if (!image || !event.target.open || image.src) return;
  const words = image.nextElementSibling;
  words.hidden = false;
  words.textContent = "One moment…";
  image.onload = () => { words.hidden = true; };
  image.onerror = async () => {
    image.hidden = true;
    words.textContent = await (await fetch(image.dataset.src)).text();
  };
  image.src = image.dataset.src;
}, true);

element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-id]");
  if (button) trigger("again", { id: button.dataset.id, start: Number(button.dataset.start), end: Number(button.dataset.end) });
});
