// Draws the figures of lines of a page.

const { figures } = JSON.parse(document.getElementById("content").textContent);

document.querySelector(".figures")?.append(
  html("p", { id: "hint", class: "hint" }, "Zoom with the wheel or + and \u2212, select by dragging, move with the arrow keys, show all with a double-click or 0."),
);

for (const [name, drawing] of Object.entries(figures)) {
  const figure = document.getElementById(name);
  if (figure) linesChart(figure, drawing);
}
