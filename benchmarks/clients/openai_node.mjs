// The openai package for node: models, chat, completions, responses, streams, errors.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [url, model] = process.argv.slice(2);
const packages = process.env.CLIENTS_NODE;
const { OpenAI, BadRequestError, NotFoundError } = createRequire(`${packages}/`)("openai");
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name a colour." }];
const chat = { model, messages, max_tokens: 8, temperature: 0 };

const names = (await client.models.list()).data.map(({ id }) => id);
assert(names.includes(model));
assert.equal((await client.models.retrieve(model)).id, model);

const answer = await client.chat.completions.create({ ...chat, n: 2, store: true });
const { message } = answer.choices[0];
assert.equal(answer.choices[1].message.content, message.content);
let text = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...chat,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, message.content);
assert.equal(usage.prompt_tokens, answer.usage.prompt_tokens);
const history = [...messages, message, { role: "user", content: "More." }];
assert.equal((await client.chat.completions.create({ ...chat, messages: history })).choices.length, 1);

const scored = await client.completions.create({
  model,
  prompt: "The sky is blue",
  max_tokens: 0,
  echo: true,
  logprobs: 1,
});
assert.equal(scored.choices[0].text, "The sky is blue");
assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);

const asked = { model, input: "Name a colour.", max_output_tokens: 16, temperature: 0 };
const response = await client.responses.create(asked);
assert(response.output_text);
let streamed = "";
for await (const event of await client.responses.create({ ...asked, stream: true })) {
  if (event.type === "response.output_text.delta") streamed += event.delta;
}
assert.equal(streamed, response.output_text);
assert.equal((await client.responses.stream(asked).finalResponse()).output_text, response.output_text);

await assert.rejects(client.chat.completions.create({ ...chat, model: "gpt-4" }), NotFoundError);
const long = [{ role: "user", content: "word ".repeat(10_000) }];
await assert.rejects(client.chat.completions.create({ ...chat, messages: long }), (error) => {
  assert(error instanceof BadRequestError);
  return error.code === "context_length_exceeded";
});
