// Draws all figures of the page.

const { results } = JSON.parse(document.getElementById("content").textContent);

document.querySelector(".figures")?.append(
  html("p", { id: "hint", class: "hint" }, "Zoom with the wheel or + and \u2212, select by dragging, move with the arrow keys, show all with a double-click or 0."),
);

for (const [name, draw] of Object.entries({ density: densityChart, line: lineChart, plane: planeChart })) {
  const figure = document.getElementById(name);
  if (figure) draw(figure, results);
}
