// What an application on node does with the server; argv[2] is its base URL. One line per check that passed.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say something." }];
const greedy = { model: "default", temperature: 0, max_tokens: 12 };
const brief = { model: "default", temperature: 0, max_output_tokens: 12 };
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const described = { name: "get_weather", description: "Tells the weather.", parameters, strict: true };
const tools = [{ type: "function", function: described }];

const checks = {
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.equal(ids.length, 1);
    assert.equal((await client.models.retrieve(ids[0])).id, ids[0]);
  },

  async chat() {
    const whole = await client.chat.completions.create({ messages, ...greedy });
    assert.equal(whole.choices[0].finish_reason, "length");
    assert.equal(whole.usage.completion_tokens, 12);
    const stream = await client.chat.completions.create({
      messages, stream: true, stream_options: { include_usage: true }, ...greedy,
    });
    let text = "", usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, 12);
  },

  async logprobs() {
    const reply = await client.chat.completions.create({ messages, logprobs: true, top_logprobs: 3, ...greedy });
    assert.equal(reply.choices[0].logprobs.content.length, 12);
    assert.equal(reply.choices[0].logprobs.content[0].top_logprobs.length, 3);
  },

  async tools() {
    const asked = { messages, tools, tool_choice: "required", parallel_tool_calls: false, ...greedy, max_tokens: 60 };
    const whole = await client.chat.completions.create(asked);
    const [call] = whole.choices[0].message.tool_calls;
    assert.equal(whole.choices[0].finish_reason, "tool_calls");
    assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
    const final = await client.chat.completions.stream(asked).finalChatCompletion();
    assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    const result = { role: "tool", tool_call_id: call.id, content: "22 degrees" };
    const history = [...messages, whole.choices[0].message, result];
    const after = await client.chat.completions.create({ messages: history, ...greedy });
    assert.ok(after.choices[0].message.content);
  },

  async structuredOutput() {
    const response_format = { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } };
    const reply = await client.chat.completions.parse({ messages, response_format, ...greedy, max_tokens: 60 });
    assert.ok(["Paris", "Rome"].includes(JSON.parse(reply.choices[0].message.content).city));
  },

  async completions() {
    const whole = await client.completions.create({ prompt: "Once", echo: true, logprobs: 1, ...greedy });
    assert.ok(whole.choices[0].text.startsWith("Once"));
    assert.equal(whole.choices[0].logprobs.token_logprobs[0], null);
    let text = "";
    for await (const chunk of await client.completions.create({ prompt: "Once", echo: true, stream: true, ...greedy }))
      text += chunk.choices[0].text;
    assert.equal(text, whole.choices[0].text);
  },

  async responses() {
    const first = await client.responses.create({ input: "One.", instructions: "Be brief.", ...brief });
    assert.ok(first.output_text);
    const second = await client.responses.create({ input: "Two.", previous_response_id: first.id, ...brief });
    assert.ok(second.usage.input_tokens > first.usage.input_tokens);
    assert.equal((await client.responses.retrieve(second.id)).output_text, second.output_text);
    const items = [];
    for await (const item of client.responses.inputItems.list(second.id, { order: "asc", limit: 2 })) items.push(item.id);
    assert.equal(items.length, 3);
    await client.responses.delete(first.id);
    await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  },

  async responseStream() {
    const text = { format: { type: "json_schema", name: "city", schema: parameters, strict: true } };
    const stream = client.responses.stream({ input: "?", text, ...brief, max_output_tokens: 60 });
    let delta = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") delta += event.delta;
    const final = await stream.finalResponse();
    assert.equal(delta, final.output_text);
    assert.equal(final.status, "completed");
  },

  async responseTools() {
    const flat = [{ type: "function", ...described }];
    const asked = { input: "Weather?", tools: flat, tool_choice: "required", parallel_tool_calls: false };
    const reply = await client.responses.create({ ...asked, ...brief, max_output_tokens: 60 });
    const [call] = reply.output;
    assert.equal(call.type, "function_call");
    const input = [{ type: "function_call_output", call_id: call.call_id, output: "22 degrees" }];
    const after = await client.responses.create({ input, previous_response_id: reply.id, ...brief });
    assert.ok(after.output_text);
  },

  async filesAndBatches() {
    const body = { messages, ...greedy };
    const line = JSON.stringify({ custom_id: "a", method: "POST", url: "/v1/chat/completions", body });
    const file = await client.files.create({ file: await toFile(Buffer.from(line + "\n"), "in.jsonl"), purpose: "batch" });
    let batch = await client.batches.create({
      input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
    });
    for (let i = 0; i < 300 && batch.status !== "completed"; i++) {
      assert.ok(["validating", "in_progress", "finalizing", "completed"].includes(batch.status), batch.status);
      await new Promise((resolve) => setTimeout(resolve, 100));
      batch = await client.batches.retrieve(batch.id);
    }
    const output = JSON.parse(await (await client.files.content(batch.output_file_id)).text());
    assert.equal(output.custom_id, "a");
    assert.equal(output.response.status_code, 200);
  },

  async errors() {
    const bad = client.chat.completions.create({ messages, ...greedy, temperature: 9 });
    await assert.rejects(bad, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
    const missing = client.chat.completions.create({ messages, ...greedy, model: "gpt-4" });
    await assert.rejects(missing, (error) => error.status === 404 && error.code === "model_not_found");
  },

  async leaving() {
    const stream = await client.chat.completions.create({ messages, ...greedy, max_tokens: 400, stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break; // closes the connection
    assert.ok(await client.chat.completions.create({ messages, ...greedy }));
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok ${name}`);
}
console.log(`passed ${Object.keys(checks).length}`);
