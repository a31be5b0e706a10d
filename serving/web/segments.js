// Segments as the API writes them: `{text, branches, reduce}` with settings, and paths such as branches[0].reduce.

/** A segment from what the API takes in its place. */
export const asSegment = (given) => (typeof given === "string" ? { text: given } : given);

/** What follows a segment, in order, each with its path. */
export function below({ branches = [], reduce }, path = "") {
  const places = branches.map((segment, index) => [`branches[${index}]`, segment]);
  if (reduce) places.push(["reduce", reduce]);
  return places.map(([step, segment]) => ({ path: path ? `${path}.${step}` : step, segment: asSegment(segment) }));
}

/** All segments after main in the order of their indices. */
export const walk = (fork, path) =>
  below(fork, path).flatMap((placed) => [placed, ...walk(placed.segment, placed.path)]);

/** The path of the segment that this one follows: "" for main. */
export const parentOf = (path) => path.split(".").slice(0, -1).join(".");

/** People count from 1: "Branch 1.2" for branches[0].branches[1], "Branch 1.reduce", "Reduce". */
export function nameOf(path) {
  const steps = path.split(".").map((step) => (step === "reduce" ? step : 1 + Number(step.match(/\d+/)[0])));
  return steps[0] === "reduce" ? `R${steps.join(".").slice(1)}` : `Branch ${steps.join(".")}`;
}
