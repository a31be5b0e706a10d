// Calls of the server, and the events of a stream.

export const failure = (message, more) => Object.assign(new Error(message), more);
const networkError = (message) => (error) => Promise.reject(error.name === "AbortError" ? error : failure(`${message}: ${error.message}`));

export async function call(method, path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const sent = fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  const response = await sent.catch(networkError("The server can't be reached"));
  if (response.ok) return response;
  const { message = `The server answered ${response.status}`, param } = (await response.json().catch(() => null))?.error ?? {};
  const wait = response.headers.get("Retry-After");
  throw failure(wait ? `${message} (try again in ${wait} s)` : message, { status: response.status, param });
}

/** The events of a stream, each one line of data. Read by hand, since EventSource can send no body. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch(networkError("The connection broke"));
    if (done) throw failure("The connection closed before the sample was done.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
