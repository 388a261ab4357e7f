
"use strict";
const videos = [...document.querySelectorAll("video")];
const pairs = [...document.querySelectorAll(".pair")].map((figure) => [...figure.querySelectorAll("video")]);
const button = document.getElementById("play-all");

function start(group) {
  for (const video of group) video.currentTime = 0;
  // A browser may refuse to play; the poster stays and nothing else depends on it.
  return Promise.allSettled(group.map((video) => video.play()));
}

function stop(group) {
  for (const video of group) video.pause();
}

function show() {
  if (!button) return;
  const playing = videos.some((video) => !video.paused);
  button.textContent = playing ? "Pause all" : "Play all";
  button.setAttribute("aria-pressed", String(playing));
}

button?.addEventListener("click", () => {
  if (videos.some((video) => !video.paused)) stop(videos);
  else start(videos);
});

for (const pair of pairs) {
  const toggle = () => (pair.some((video) => !video.paused) ? stop(pair) : start(pair));
  const [leader, follower] = pair;
  for (const video of pair) {
    video.addEventListener("click", toggle);
    video.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      toggle();
    });
    video.addEventListener("play", show);
    video.addEventListener("pause", show);
  }
  // Two looping videos drift apart by a frame now and then; around the loop's end the difference means nothing.
  leader.addEventListener("timeupdate", () => {
    const apart = Math.abs(leader.currentTime - follower.currentTime);
    if (apart > 0.1 && apart < leader.duration / 2) follower.currentTime = leader.currentTime;
  });
}

// Folded parts must be on paper too.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
