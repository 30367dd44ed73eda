// What scrolls sideways can be reached and scrolled from the keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const one of document.querySelectorAll(".bd-article table, .bd-article pre")) {
    one.tabIndex = 0;
  }
});
