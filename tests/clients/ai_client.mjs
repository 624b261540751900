// Vercel's AI SDK against a running server: node ai_client.mjs BASE_URL. tests/openai.rs runs it, after `scripts/setup node-clients`.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";

const require = createRequire(new URL("../../.tools/node-clients/", import.meta.url));
const { APICallError, generateObject, generateText, stepCountIs, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = createOpenAICompatible({
  name: "local", baseURL: `${process.argv[2]}/v1`, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const asked = { model: provider("any"), maxRetries: 0, temperature: 0, maxOutputTokens: 100 };

const city = z.string().max(12);
const number = z.number().int().min(0).max(999);
const weather = z.object({ city, unit: z.enum(["celsius", "fahrenheit"]) });
const numbers = z.object({ a: number, b: number });

/** Two tools that note their calls, and how to go on: a call first, then what the model wants. */
function loop(called) {
  return {
    tools: {
      get_weather: tool({
        description: "The weather in a city.", inputSchema: weather,
        execute: (input) => { called.push(weather.parse(input)); return `Sunny in ${input.city}, 21 degrees.`; },
      }),
      add: tool({
        description: "The sum of two numbers.", inputSchema: numbers,
        execute: (input) => { called.push(numbers.parse(input)); return input.a + input.b; },
      }),
    },
    toolChoice: "required",
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    stopWhen: stepCountIs(2),
  };
}

/** The first step was a call whose result the second one has read and answered in text. */
function check(steps, text, called) {
  assert.ok(called.length > 0);
  assert.equal(steps.length, 2);
  assert.equal(steps[0].finishReason, "tool-calls");
  assert.deepEqual(steps[0].toolCalls.map((call) => call.input), called);
  assert.equal(steps[0].toolResults.length, called.length);
  assert.equal(steps[1].toolCalls.length, 0);
  assert.ok(text && ["stop", "length"].includes(steps[1].finishReason));
  for (const { usage } of steps) assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0, JSON.stringify(usage));
}

test("a tool is called and an answer follows, whole and streamed", async () => {
  const prompt = "How is the weather in Paris?";
  const called = [], streamed = [];
  const whole = await generateText({ ...asked, ...loop(called), prompt });
  check(whole.steps, whole.text, called);

  const stream = streamText({ ...asked, ...loop(streamed), prompt, onError: ({ error }) => { throw error; } });
  let text = "", starts = 0, deltas = "";
  for await (const part of stream.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "tool-input-start") starts += 1;
    if (part.type === "tool-input-delta") deltas += part.delta;
  }
  check(await stream.steps, text, streamed);
  assert.deepEqual([streamed, text, starts], [called, whole.text, called.length]);
  if (starts === 1) assert.deepEqual(JSON.parse(deltas), called[0]);
});

test("a stream is the same text", async () => {
  const prompt = "Name three colours.";
  const whole = await generateText({ ...asked, maxOutputTokens: 16, prompt });
  const stream = streamText({ ...asked, maxOutputTokens: 16, prompt });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.deepEqual([await stream.finishReason, (await stream.usage).outputTokens], [whole.finishReason, whole.usage.outputTokens]);
});

test("an object follows its schema", async () => {
  const schema = z.object({ sky: z.enum(["clear", "cloudy"]), degrees: z.number().int().min(-40).max(50), windy: z.boolean() });
  const { object, finishReason } = await generateObject({ ...asked, schema, prompt: "How is the weather? Answer in JSON." });
  schema.parse(object);
  assert.equal(finishReason, "stop");
});

test("a bad field is named", async () => {
  await assert.rejects(generateText({ ...asked, temperature: 3, prompt: "Hello." }), (error) => {
    assert.ok(APICallError.isInstance(error) && error.statusCode === 400 && error.message.includes("temperature"), String(error));
    return true;
  });
});
