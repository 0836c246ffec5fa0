// Draws every figure of the page.

const { results } = JSON.parse(document.getElementById("content").textContent);

document.querySelector(".figures")?.append(
  html("p", { id: "hint", class: "hint" }, "Wheel or + and \u2212 zoom, a drag selects, arrows move, a double-click or 0 shows all."),
);

for (const [name, draw] of Object.entries({ density: densityChart, line: lineChart, plane: planeChart })) {
  const figure = document.getElementById(name);
  if (figure) draw(figure, results);
}
