"use strict";
// The count of trained parameters: the expressions are those that the tests evaluate, see book/method_files.py.
const { min, max, ceil, floor } = Math;
const functions = { min, max, ceil, floor, len: (n) => n };

function evaluated(expression, values) {
  if (!expression) return 0;
  const names = Object.keys(functions).concat(Object.keys(values));
  return new Function(...names, `return ${expression};`)(...Object.values(functions), ...Object.values(values));
}

for (const form of document.querySelectorAll(".calculator")) {
  const update = () => {
    const values = {};
    let layers = 1;
    for (const input of form.querySelectorAll("input")) {
      const value = Number(input.value);
      if (input.name === "__layers") layers = value;
      else values[input.name === "in" ? "n_in" : input.name] = value;
    }
    const total = layers * evaluated(form.dataset.each, values) + evaluated(form.dataset.once, values);
    form.querySelector("output").textContent = Number.isFinite(total)
      ? total.toLocaleString("en-US", { maximumFractionDigits: 2 }) : "no number";
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}
